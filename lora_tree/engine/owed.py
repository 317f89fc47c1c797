"""What the rows of a batch owe at one site, and the ways to get at some of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from ..lowrank import LowRank, stacked
from ..sites import Site
from .batch import Batch
from .cost import Cost
from .upload import uploaded

__all__ = ["Owed", "RowSubset"]

T = TypeVar("T")


class RowSubset:
    """Some rows of a batch in an order of their own: taken out of an input, and what comes of them added back.

    Args:
        rows: which, in the order wanted; no row twice.
        batch: the whole batch.
        device: where it is computed.
    """

    def __init__(self, rows: Sequence[int], batch: Batch, device: torch.device) -> None:
        self.rows = tuple(rows)
        self.whole = self.rows == tuple(range(len(batch)))
        start = self.rows[0]
        self.slice = (
            slice(start, start + len(rows))
            if self.rows == tuple(range(start, start + len(rows)))
            else None
        )
        self.index = batch.index(self.rows, device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def gathered(self) -> bool:
        """They do not lie side by side."""
        return self.slice is None

    def of(self, x: Tensor) -> Tensor:
        """The rows of ``x``: a view where they lie side by side, unless autograd would have to unpick it."""
        if self.whole:
            return x
        return (
            x.index_select(0, self.index)
            if self.slice is None or x.requires_grad
            else x[self.slice]
        )

    def added(self, out: Tensor, delta: Tensor, *, spare: bool) -> Tensor:
        """``out`` with ``delta``, any view of (rows, …), added in their places; written over where it is ``spare``.

        One operation puts all rows back, and its backward hands on a gradient that lies in memory as it seems, which
        grouped products want.
        """
        delta = delta.reshape(len(self.rows), *out.shape[1:]).to(out.dtype)
        if self.whole and spare:
            return out.add_(delta)
        return (
            out.index_add_(0, self.index, delta) if spare else out.index_add(0, self.index, delta)
        )


@dataclass(frozen=True, eq=False)
class Owed:
    """What the rows of a batch owe at one site.

    Args:
        site: where.
        values: the increment of every node that has one here, in the order of the sum.
        batch: what the rows owe to these nodes.
        dtype: what side paths compute in, at least.
        device: where the factors go.
        charge: is told how many bytes were laid out here, and raises where there is no room for them.
    """

    site: Site
    values: Sequence[LowRank]
    batch: Batch
    dtype: torch.dtype
    device: torch.device
    charge: Callable[[int], None] = lambda nbytes: None

    @cached_property
    def live(self) -> bool:
        """Factors train, so nothing made of them can be kept."""
        return any(t.requires_grad for value in self.values for t in value.tensors)

    def held(self, make: Callable[[], T]) -> Callable[[], T]:
        """What is made of the factors: once, or anew at every call where they train.

        Raises:
            BudgetError: there is no room for it.
        """
        if self.live:
            return make
        made = make()
        self.charge(_new_bytes(made, self.values))
        return lambda: made

    def rows(self, rows: Sequence[int]) -> RowSubset:
        """Some of the rows."""
        return RowSubset(rows, self.batch, self.device)

    def numbers(self, of: Sequence[float] | Tensor) -> Tensor:
        """Coefficients, where and as what the factors are."""
        numbers = torch.as_tensor(of, dtype=torch.float64, device="cpu").to(self.dtype)
        return uploaded(numbers, self.device)

    def stacked(self, coefficients: Sequence[float]) -> LowRank:
        """Σ coefficient · value as one value of scale 1."""
        terms = [v.scaled(c) for v, c in zip(self.values, coefficients, strict=True) if c]
        return stacked(terms, dtype=self.dtype, device=self.device)

    def rank(self, coefficients: Sequence[float]) -> int:
        """The rank of that sum."""
        return sum(v.rank for v, c in zip(self.values, coefficients, strict=True) if c)

    def cost(self, rows: Sequence[int], rank: int, tokens: int, *, copies: int = 1) -> Cost:
        """What a product of some rank costs for some rows; ``copies``: how many different factors are read."""
        shape = self.values[0].shape
        gathered = tuple(rows) != tuple(range(rows[0], rows[0] + len(rows)))
        return Cost.product(
            shape, rank, len(rows) * tokens, self.dtype, gathered=gathered, copies=copies
        )


def _new_bytes(made: object, values: Sequence[LowRank]) -> int:
    """Bytes of tensors, or of a value's factors, that are not the factors of ``values`` themselves."""
    tensors = made.tensors if isinstance(made, LowRank) else made
    known = {t.data_ptr() for value in values for t in value.tensors}
    new = [t for t in tensors if isinstance(t, Tensor)] if isinstance(tensors, tuple) else []
    return sum(t.numel() * t.element_size() for t in new if t.data_ptr() not in known)
