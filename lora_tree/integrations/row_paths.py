"""The path of every row, from a data set to the batch, and what each path loses.

{"path": "fr/legal", "input_ids": …}  ─collate→  {"path": ["fr/legal", "de", …], "input_ids": (rows, tokens), …}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blend import Blend, spelled
from ..engine.upload import uploaded
from ..errors import SpecError, listing
from ..training.losses import ranks, row_losses
from ..tree import AdapterTree

__all__ = ["PathCollator", "PathTotals", "paths_of"]


class PathCollator:
    """A collator that keeps every row's path, and leaves the rest to another one.

    Args:
        inner: what collates everything else.
        column: where a row says its path.

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
        """The other collator's, where it has one: a trainer saves it."""
        return getattr(self.inner, "tokenizer", None)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        paths = [_path(row, self.column) for row in rows]
        rest = [{key: value for key, value in row.items() if key != self.column} for row in rows]
        return {**self.inner(rest), self.column: paths}


class PathTotals:
    """What every path loses over a whole evaluation, token by token and over all ranks.

    Args:
        tree: whose paths they are.
    """

    def __init__(self, tree: AdapterTree) -> None:
        self._order = ["", *tree.paths()]
        self._sums: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    def table(
        self, logits: Tensor, labels: Tensor, paths: Sequence[Blend], *, shift: bool
    ) -> Tensor:
        """(rows, 3), float64: which path, its loss summed over the row's tokens, how many those are.

        Raises:
            SpecError: a row has a blend, and several ranks evaluate, which have no common order of blends.
        """
        sums, tokens = row_losses(logits, labels, shift=shift)
        places = [self._place(spelled(path)) for path in paths]
        which = uploaded(torch.tensor(places, dtype=torch.float64, device="cpu"), sums.device)
        return torch.stack([which, sums.double(), tokens.double()], dim=1)

    def add(self, table: Tensor) -> None:
        """Count these rows in."""
        for which, loss, tokens in table.tolist():
            name = self._order[int(which)]
            self._sums[name] = self._sums.get(name, 0.0) + loss
            self._tokens[name] = self._tokens.get(name, 0) + int(tokens)

    def means(self) -> dict[str, float]:
        """Path → the mean over its tokens; paths of which nothing was learnt are left out."""
        return {name: self._sums[name] / tokens for name, tokens in self._tokens.items() if tokens}

    def _place(self, name: str) -> int:
        if name not in self._order:
            if ranks() > 1:
                raise SpecError(
                    f"{name}: over several ranks every row has one node's path, not a blend"
                )
            self._order.append(name)
        return self._order.index(name)


def paths_of(rows: Any, column: str, tree: AdapterTree) -> list[str]:
    """The path of every row of a data set, each checked to be in the tree.

    Args:
        rows: a ``datasets.Dataset``, or anything with rows that are mappings, in order.
        column: where a row says its path.
        tree: whose paths they are.

    Raises:
        SpecError, PathError: a row says none, or one that is not there; names the row.
    """
    columns = getattr(rows, "column_names", None)
    if isinstance(columns, list) and column in columns:
        paths = list(rows[column])
    else:
        paths = [_path(rows[i], column, i) for i in range(len(rows))]
    for path in dict.fromkeys(paths):
        tree.coefficients(path)
    return paths


def _path(row: Mapping[str, Any], column: str, number: int | None = None) -> Any:
    if column not in row:
        which = "a row" if number is None else f"row {number}"
        raise SpecError(
            f"{which} of the data has no {column!r}; it has {listing(map(str, row))}",
            f"give every row its node's path, or '' for the bare base: {{'{column}': 'fr/legal', …}}",
        )
    return row[column]
