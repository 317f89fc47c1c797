"""A tree on its base, and rows to measure on, for the commands that measure."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..model import TreeModel, attach
from ..runs import Row
from ..tree import AdapterTree
from .open_base import open_model, open_tokenizer
from .open_rows import open_rows

__all__ = ["open_measured"]


def open_measured(
    tree: AdapterTree,
    folder: Path,
    data: Iterable[Path],
    base: str | None,
    *,
    what: str,
    max_length: int,
    trust_remote_code: bool,
) -> tuple[TreeModel, list[Row]]:
    """Read the rows, then open the base, which takes minutes, and attach the tree to it.

    Args:
        tree, folder, base, what, trust_remote_code: as for `open_tokenizer`.
        data: files of rows.
        max_length: tokens to keep of a row.

    Raises:
        LoraTreeError: as `open_tokenizer`, `open_rows`, `open_model` and `attach`.
    """
    name, tokenizer = open_tokenizer(
        tree, folder, base, what=what, trust_remote_code=trust_remote_code
    )
    rows = open_rows(data, tree, tokenizer, max_length=max_length)
    model = attach(tree, open_model(name, trust_remote_code=trust_remote_code))
    return model, rows
