"""``lora-tree rm``: remove nodes from the tree, and the files that a save wrote for them."""

from __future__ import annotations

from typing import Annotated

import typer

from ...algebra import Edited
from ...folder import load
from ..arguments import AsJson, Folder
from ..editing import DryRun, Work

__all__ = ["remove_nodes"]


def remove_nodes(
    folder: Folder,
    nodes: Annotated[list[str], typer.Argument(help="Paths or patterns like 'fr/*'.")],
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Remove all nodes below them, too.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove nodes. Files that a save wrote go with them; files that live elsewhere stay."""
    work = Work(load(folder), folder, dry_run=dry_run)
    # Reversed, because parents come before their children in the tree's order, and children have
    # to be removed first.
    for path in reversed(work.tree.matching(nodes)):
        work.tree.remove(path, recursive=recursive)
    # The removed nodes need not be listed here: `done` finds them by comparing the tree with its
    # earlier state.
    work.finish(Edited(), as_json=as_json)
