"""``lora-tree set``: give a node another weight or another adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...adapter import Adapter
from ...algebra import Edited, rebase_all
from ...errors import SpecError
from ...folder import load
from ...formats.block_weights import block_weights
from ...weights import as_weight
from ..arguments import AsJson, Folder, WeightText, file_name, parse_weight_option
from ..editing import DryRun, MaxError, Rank, Work, check_only_with_keep_effective

__all__ = ["set_node"]


def set_node(
    folder: Folder,
    path: Annotated[str, typer.Argument(help="The node.")],
    weight: WeightText = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            help="Its weight by blocks, as image tools say it: 12, 17, 20 or 26 numbers, 1,0,0,….",
            metavar="NUMBERS",
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="The folder of its new adapter.", parser=file_name)
    ] = None,
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
    if weight is None and adapter is None and blocks is None:
        raise SpecError("nothing to set", "give --weight, --blocks or --adapter")
    if weight is not None and blocks is not None:
        raise SpecError("--weight and --blocks both say the weight", "leave one of them out")
    check_only_with_keep_effective(keep_effective, rank, max_error)
    node_weight = parse_weight_option(weight)
    work = Work(load(folder), folder, dry_run=dry_run)
    if blocks is not None:
        # Weights by block need module names: those of the new adapter, or of the node's own.
        named = work.tree.outline(path) if adapter is None else Adapter.load(adapter)
        node_weight = as_weight(block_weights(_numbers(blocks), named or Adapter({})))
    if keep_effective:
        edited = rebase_all(
            work.tree, path, adapter=adapter, weight=node_weight, rank=rank, max_error=max_error
        )
    else:
        work.tree.update(path, adapter=adapter, weight=node_weight)
        edited = Edited(changed=(path,))
    work.finish(edited, as_json=as_json)


def _numbers(text: str) -> list[float]:
    """Read ``1,0,0.5``.

    Raises:
        SpecError: the text has another form.
    """
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise SpecError(f"--blocks {text[:80]!r}: expected numbers with commas: 1,0,0.5") from None
