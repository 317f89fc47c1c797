"""``lora-tree squash``: add one node that equals a whole lineage, or a blend."""

from __future__ import annotations

from typing import Annotated

import typer

from ...algebra import squash
from ...folder import load
from ..arguments import AsJson, Folder
from ..editing import DryRun, MaxError, Rank, Work

__all__ = ["squash_lineage"]


def squash_lineage(
    folder: Folder,
    path: Annotated[str, typer.Argument(help="fr/legal, or a blend: fr/legal:0.5+fr/medical:0.5")],
    to: Annotated[str, typer.Option("--to", help="The new node.")],
    rank: Rank = None,
    max_error: MaxError = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Add one node whose effective weight is that of a whole lineage, exact or cut."""
    work = Work(load(folder), folder, dry_run=dry_run)
    edited = squash(work.tree, path, to=to, rank=rank, max_error=max_error)
    work.finish(edited, as_json=as_json)
