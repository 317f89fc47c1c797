"""The rows that a command trains or measures on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import agreeing, listing, plural
from ..runs import Row, read_rows
from ..tree import AdapterTree
from .console import note

__all__ = ["open_rows"]


def open_rows(
    files: Iterable[Path],
    tree: AdapterTree,
    tokenizer: Any,
    *,
    max_length: int,
    slice_by: str | None = None,
) -> list[Row]:
    """Read the rows; say how many were cut, and which columns were not read.

    Raises:
        LoraTreeError: as `lora_tree.runs.read_rows`.
    """
    rows = read_rows(files, tree, tokenizer, max_length=max_length, slice_by=slice_by)
    cut = sum(row.cut for row in rows)
    if cut:
        was = agreeing(cut, "was", "were")
        note(f"{cut} of {plural(len(rows), 'row')} {was} longer than --max-length, and cut")
    # Rows may have columns of the user's own, so these are no error. They are reported, because
    # the user may have meant one of them to be learnt.
    extra: set[str] = set()
    for row in rows:
        extra.update(row.extra)
    if extra:
        note(f"columns that are not read: {listing(sorted(extra))}")
    return rows
