"""``lora-tree grow``: make a tree of flat adapters, by moving what they share into new parents."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from ...algebra import grow
from ...folder import load
from ..arguments import AsJson, Folder, Nodes
from ..editing import DryRun, Work
from ..progress import Bar
from .export import DTYPES, Dtype

__all__ = ["grow_tree"]


def grow_tree(
    folder: Folder,
    nodes: Nodes = None,
    max_error: Annotated[
        float | None, typer.Option(help="The largest relative error of all adapters together.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Most bytes of the factors of all new nodes: 20MiB.")
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="The most shared nodes above a leaf.")] = 3,
    dtype: Annotated[Dtype | None, typer.Option(help="Round the factors to this dtype.")] = None,
    by_norm: Annotated[
        bool, typer.Option("--by-norm", help="Weigh each adapter by its norm squared.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Find what flat adapters share, and put it into nodes above them; say each one's error."""
    work = Work(load(folder), folder, dry_run=dry_run)
    columns = (TextColumn("fitting"), BarColumn(), MofNCompleteColumn(), TextColumn("modules"))
    with Bar(*columns) as bar:
        task = bar.add_task("", total=None)
        grown = grow(
            work.tree,
            nodes or None,
            max_error=max_error,
            budget_bytes=budget,
            depth=depth,
            dtype=DTYPES[dtype] if dtype else None,
            by_norm=by_norm,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    size = f"{grown.bytes_before:,} → {grown.bytes_after:,} bytes"
    note = f"{size}, relative error {grown.relative_error:.2g} over all adapters"
    edited = replace(grown.edited, notes=(note, *grown.edited.notes))
    figures: dict[str, Any] = grown.as_dict()
    shown = ("bytes_before", "bytes_after", "relative_error")
    work.finish(edited, as_json=as_json, **{name: figures[name] for name in shown})
