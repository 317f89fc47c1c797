"""``lora-tree absorb``: add a flat adapter below the node that shares most with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ...adapter import Adapter
from ...algebra import absorb
from ...folder import load
from ..arguments import AsJson, Folder, file_name
from ..editing import DryRun, MaxError, Rank, Work
from .export import DTYPES, Dtype

__all__ = ["absorb_adapter"]

_MOST_SHOWN = 3  # of the compared nodes, the nearest first


def absorb_adapter(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="The new node's own name.")],
    adapter: Annotated[
        Path, typer.Argument(help="A flat adapter of the tree's base.", parser=file_name)
    ],
    under: Annotated[str, typer.Option(help="Consider only this node and those below it.")] = "",
    rank: Rank = None,
    max_error: MaxError = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Round the factors to this dtype.")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Add a flat adapter below the node that has most of it already; store only the rest."""
    work = Work(load(folder), folder, dry_run=dry_run)
    absorbed = absorb(
        work.tree,
        name,
        Adapter.load(adapter),
        under=under,
        rank=rank,
        max_error=max_error,
        dtype=DTYPES[dtype] if dtype else None,
    )
    nearest = list(absorbed.left.items())[:_MOST_SHOWN]
    notes = [f"below {path or 'the root'}, {part:.0%} of it remains" for path, part in nearest]
    edited = replace(absorbed.edited, notes=(*notes, *absorbed.edited.notes))
    work.finish(edited, as_json=as_json, parent=absorbed.parent, left=dict(absorbed.left))
