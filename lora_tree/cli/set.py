"""``lora-tree set``: another weight or another adapter for a node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..algebra import Edited, rebase_all
from ..errors import SpecError
from ..folder import load
from .arguments import AsJson, Folder, WeightText, given_weight
from .editing import DryRun, MaxError, Rank, Work

__all__ = ["set_node"]


def set_node(
    folder: Folder,
    path: Annotated[str, typer.Argument(help="The node.")],
    weight: WeightText = None,
    adapter: Annotated[Path | None, typer.Option(help="The folder of its new adapter.")] = None,
    keep_effective: Annotated[
        bool,
        typer.Option("--keep-effective", help="Change its children so that their models stay."),
    ] = False,
    rank: Rank = None,
    max_error: MaxError = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Give a node another weight or another adapter; say what becomes stale."""
    if weight is None and adapter is None:
        raise SpecError("nothing to set", "give --weight or --adapter")
    if not keep_effective and (rank, max_error) != (None, None):
        raise SpecError("--rank and --max-error are for --keep-effective")
    own = given_weight(weight)
    work = Work(load(folder), folder, dry_run=dry_run)
    if keep_effective:
        edited = rebase_all(
            work.tree, path, adapter=adapter, weight=own, rank=rank, max_error=max_error
        )
    else:
        work.tree.update(path, adapter=adapter, weight=own)
        edited = Edited(changed=(path,))
    work.done(edited, as_json=as_json)
