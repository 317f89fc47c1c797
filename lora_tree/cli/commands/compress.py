"""``lora-tree compress``: cut all nodes to a rank, an error or a number of bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from ...algebra import compress
from ...folder import load
from ..arguments import AsJson, Folder, Nodes
from ..editing import DryRun, Work
from .export import DTYPES, Dtype

__all__ = ["compress_nodes"]


def compress_nodes(
    folder: Folder,
    nodes: Nodes = None,
    rank: Annotated[int | None, typer.Option(help="The largest rank in a module.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="The largest relative error of all nodes together.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Most bytes of all factors together: 20MiB.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Round the factors to this dtype.")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Cut the nodes, with ranks chosen across all of them so that the error is least."""
    work = Work(load(folder), folder, dry_run=dry_run)
    compressed = compress(
        work.tree,
        nodes or None,
        rank=rank,
        max_error=max_error,
        budget_bytes=budget,
        dtype=DTYPES[dtype] if dtype else None,
    )
    size = f"{compressed.bytes_before:,} → {compressed.bytes_after:,} bytes"
    note = f"{size}, relative error {compressed.relative_error:.2g} over all nodes"
    edited = replace(compressed.edited, notes=(note, *compressed.edited.notes))
    figures: dict[str, Any] = compressed.as_dict()
    shown = ("bytes_before", "bytes_after", "ranks", "error", "relative_error")
    work.finish(edited, as_json=as_json, **{name: figures[name] for name in shown})
