"""``lora-tree rebase``: give children their earlier effective weights, below a changed parent.

``mv --keep-effective`` moves one node in this way; ``set --keep-effective`` changes a parent and
keeps its children's effective weights in one step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...adapter import Adapter
from ...algebra import rebase_all
from ...folder import load
from ..arguments import AsJson, Folder, file_name, parse_weight_option
from ..editing import DryRun, MaxError, Rank, Work

__all__ = ["rebase_children"]


def rebase_children(
    folder: Folder,
    path: Annotated[str, typer.Option("--all", help="The node that has changed.")],
    was: Annotated[
        Path | None,
        typer.Option(help="The folder of the adapter that it had before.", parser=file_name),
    ] = None,
    was_weight: Annotated[
        str | None, typer.Option(help="The weight that it had before.", metavar="WEIGHT")
    ] = None,
    rank: Rank = None,
    max_error: MaxError = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Give all children of a changed node the effective weights that they had before."""
    work = Work(load(folder), folder, dry_run=dry_run)
    # No node has the former adapter any more, so it is read from its folder, not from the tree.
    old = None if was is None else Adapter.load(was)
    own = parse_weight_option(None if was_weight is None else [was_weight], "--was-weight")
    edited = rebase_all(work.tree, path, was=old, was_weight=own, rank=rank, max_error=max_error)
    work.finish(edited, as_json=as_json)
