"""``lora-tree mv``: move a node, and all nodes below it, to another path."""

from __future__ import annotations

from typing import Annotated

import typer

from ...algebra import Edited, rebase
from ...folder import load
from ..arguments import AsJson, Folder
from ..editing import DryRun, MaxError, Rank, Work, check_only_with_keep_effective

__all__ = ["move_node"]


def move_node(
    folder: Folder,
    path: Annotated[str, typer.Argument(help="The node.")],
    to: Annotated[str, typer.Argument(help="Its new path.")],
    keep_effective: Annotated[
        bool,
        typer.Option("--keep-effective", help="Change its increments so that its model stays."),
    ] = False,
    rank: Rank = None,
    max_error: MaxError = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Move or rename a node, its children with it; say what becomes stale."""
    check_only_with_keep_effective(keep_effective, rank, max_error)
    work = Work(load(folder), folder, dry_run=dry_run)
    if keep_effective:
        edited = rebase(work.tree, path, to=to, rank=rank, max_error=max_error)
    else:
        # The nodes below are listed before the move: after it their old paths are not in the tree.
        below = work.tree.paths(path)
        work.tree.move(path, to)
        edited = Edited(moved={old: to + old[len(path) :] for old in (path, *below)})
    work.finish(edited, as_json=as_json)
