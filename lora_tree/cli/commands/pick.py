"""``lora-tree pick``: copy a node's increments below another parent."""

from __future__ import annotations

from typing import Annotated

import typer

from ...algebra import pick
from ...folder import load
from ..arguments import AsJson, Folder
from ..editing import DryRun, Work

__all__ = ["pick_node"]


def pick_node(
    folder: Folder,
    path: Annotated[str, typer.Argument(help="The node whose increments are taken.")],
    to: Annotated[str, typer.Option("--to", help="The new node.")],
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Add a copy of a node elsewhere: the same increments, on other ancestors."""
    work = Work(load(folder), folder, dry_run=dry_run)
    work.finish(pick(work.tree, path, to=to), as_json=as_json)
