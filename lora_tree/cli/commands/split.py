"""``lora-tree split``: move a part of a node into a new child."""

from __future__ import annotations

from typing import Annotated

import typer

from ...algebra import split
from ...folder import load
from ..arguments import AsJson, Folder
from ..editing import DryRun, Work

__all__ = ["split_node"]


def split_node(
    folder: Folder,
    path: Annotated[str, typer.Argument(help="The node.")],
    to: Annotated[str, typer.Option("--to", help="The new child, PATH/NAME.")],
    rank: Annotated[
        int | None,
        typer.Option(help="Keep the best part of this rank; the rest moves to the child."),
    ] = None,
    module: Annotated[
        list[str] | None,
        typer.Option(help="Move these modules: mlp, *.layers.3.*; repeat it."),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Move a part of a node into a new child, and its children below that; their models stay."""
    work = Work(load(folder), folder, dry_run=dry_run)
    edited = split(work.tree, path, to=to, rank=rank, modules=module or None)
    work.finish(edited, as_json=as_json)
