"""The rows that a command trains or measures on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import listing
from ..runs import Row, read_rows
from ..tree import AdapterTree
from .console import err

__all__ = ["open_rows"]


def open_rows(
    files: Iterable[Path], tree: AdapterTree, tokenizer: Any, *, max_length: int
) -> list[Row]:
    """See `lora_tree.runs.read_rows`; the user is told how many were cut, and which columns were not read."""
    rows = read_rows(files, tree, tokenizer, max_length=max_length)
    cut = sum(row.cut for row in rows)
    if cut:
        err().print(f"{cut} of {len(rows)} rows were longer than --max-length, and cut")
    extra = sorted({name for row in rows for name in row.extra})
    if extra:
        err().print(f"columns that are not read: {listing(extra)}")
    return rows
