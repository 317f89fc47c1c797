"""Carry the path of every row from a data set into the batch.

{"path": "fr/legal", "input_ids": …}  ─collate→  {"path": ["fr/legal", "de", …], "input_ids": …}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import SpecError, listing
from ...tree import AdapterTree

__all__ = ["PathCollator", "paths_of"]


class PathCollator:
    """A collator that keeps every row's path, and leaves the rest to another one.

    Args:
        inner: collates everything else.
        column: the column that holds a row's path.

    >>> import torch
    >>> collate = PathCollator(lambda rows: {"x": torch.tensor([row["x"] for row in rows])}, "path")
    >>> collate([{"path": "fr", "x": 1}, {"path": "", "x": 2}])
    {'x': tensor([1, 2]), 'path': ['fr', '']}
    """

    def __init__(
        self, inner: Callable[[list[dict[str, Any]]], Mapping[str, Any]], column: str
    ) -> None:
        self.inner, self.column = inner, column

    @property
    def tokenizer(self) -> Any:
        """The inner collator's tokenizer, if it has one: a Trainer saves it from here."""
        return getattr(self.inner, "tokenizer", None)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        paths = [_path(row, self.column) for row in rows]
        # The inner collator makes tensors of all that it gets, and would refuse text.
        rest = [self._without_path(row) for row in rows]
        return {**self.inner(rest), self.column: paths}

    def _without_path(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key != self.column}


def paths_of(rows: Any, column: str, tree: AdapterTree) -> list[str]:
    """Return the path of every row of a data set, each checked to be in the tree.

    Args:
        rows: a ``datasets.Dataset``, or anything with rows that are mappings, in order.
        column: the column that holds a row's path.
        tree: of the paths.

    Raises:
        SpecError: a row has no path; the error names the row.
        PathError: the tree has no such path.
    """
    columns = getattr(rows, "column_names", None)
    if isinstance(columns, list) and column in columns:
        # One column of a Dataset is read at once; row by row it would decode all the others.
        paths = list(rows[column])
    else:
        paths = [_path(rows[i], column, i) for i in range(len(rows))]
    # Each path is looked up once. A data set has far more rows than the tree has paths.
    for path in dict.fromkeys(paths):
        tree.coefficients(path)
    return paths


def _path(row: Mapping[str, Any], column: str, number: int | None = None) -> Any:
    if column not in row:
        which = "a row" if number is None else f"row {number}"
        raise SpecError(
            f"{which} of the data has no {column!r}; it has {listing(map(str, row))}",
            "give every row its node's path, or '' for the bare base: "
            f"{{'{column}': 'fr/legal', …}}",
        )
    return row[column]
