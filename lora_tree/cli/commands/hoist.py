"""``lora-tree hoist``: move the part that siblings share into their parent."""

from __future__ import annotations

from typing import Annotated

import typer

from ...algebra import hoist
from ...folder import load
from ..arguments import AsJson, Folder
from ..editing import DryRun, Work
from .merge import Density, Method, Seed, Space

__all__ = ["hoist_shared"]


def hoist_shared(
    folder: Folder,
    parent: Annotated[str, typer.Argument(help="The node above the siblings; '' for the root.")],
    siblings: Annotated[
        list[str] | None, typer.Argument(help="The children that share; all without any.")
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(help="Put the shared part into this new node, not into the parent."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the shared part; full without it.")
    ] = None,
    leaf_rank: Annotated[
        int | None, typer.Option(help="Rank of each sibling's remainder; exact without it.")
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="Share the result of this merge, not the mean.")
    ] = None,
    density: Density = 1.0,
    space: Space = Space.core,
    seed: Seed = 0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Move what siblings share into their parent; their models stay, or the error is printed."""
    work = Work(load(folder), folder, dry_run=dry_run)
    edited = hoist(
        work.tree,
        parent,
        siblings or None,
        into=into,
        rank=rank,
        leaf_rank=leaf_rank,
        method=None if method is None else method.value,
        density=density,
        space=space.value,
        seed=seed,
    )
    work.finish(edited, as_json=as_json)
