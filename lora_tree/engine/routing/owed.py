"""The debts of a batch's rows at one site, and some of the rows as one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from ...lowrank import LowRank, stacked
from ...sites import Site
from ..kernels import FactorTable
from ..ledger import Lender, ordinary
from ..rows.batch import Batch
from ..upload import uploaded
from .factor_tables import PlanTables
from .path_stacks import PathStacks

__all__ = ["Owed", "RowSubset"]

T = TypeVar("T")


class RowSubset:
    """Some rows of a batch in a given order: to take out of an input, and to add back.

    Args:
        rows: the rows in the order wanted; no row twice.
        batch: the whole batch.
        device: where it is computed.
    """

    def __init__(self, rows: Sequence[int], batch: Batch, device: torch.device) -> None:
        self.rows = tuple(rows)
        self.is_whole = self.rows == tuple(range(len(batch)))
        """True: these are all rows of the batch, in order."""
        self.slice: slice | None = None
        """Their slice, if they lie side by side and in order."""
        start, end = self.rows[0], self.rows[0] + len(rows)
        if self.rows == tuple(range(start, end)):
            self.slice = slice(start, end)
        # The batch has the index lists, so that sites with the same rows share one on the device.
        self.index = batch.index(self.rows, device)

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, x: Tensor) -> Tensor:
        """Return these rows of ``x``; a view if they lie side by side and need no gradient."""
        if self.is_whole:
            return x
        if self.slice is None or x.requires_grad:
            return x.index_select(0, self.index)
        return x[self.slice]

    def added(self, out: Tensor, delta: Tensor, *, spare: bool) -> Tensor:
        """Return ``out`` with ``delta`` added to these rows.

        One operation puts all rows back. Its backward returns a contiguous gradient, which grouped
        products need.

        Args:
            out: (all rows, …).
            delta: any view of (these rows, …).
            spare: ``out`` may be written over.
        """
        delta = delta.reshape(len(self.rows), *out.shape[1:]).to(out.dtype)
        if not spare:
            return out.index_add(0, self.index, delta)
        if self.is_whole:
            return out.add_(delta)
        return out.index_add_(0, self.index, delta)


@dataclass(frozen=True, eq=False)
class Owed:
    """The debts of a batch's rows at one site.

    Args:
        site: the site.
        values: the increment of every node that has one here, in the order of the sum.
        batch: the rows and how much of each node they owe.
        dtype: the narrowest dtype that side paths compute in.
        device: where the factors go.
        charge: is told how many bytes were laid out here, and raises if there is no room for them.
        lend: charges a number of bytes and returns memory for them.
        tables: the addresses of the plan's factors.
        trains: whether any factor trains; None: look at the factors.
    """

    site: Site
    values: Sequence[LowRank]
    batch: Batch
    dtype: torch.dtype
    device: torch.device
    charge: Callable[[int], None] = lambda nbytes: None
    tables: PlanTables = field(default_factory=lambda: PlanTables({}))
    trains: bool | None = None
    lend: Lender = ordinary

    @cached_property
    def path_stacks(self) -> PathStacks:
        """The frozen factors of every path side by side, laid out when first asked for."""
        return self.stacks([coefficients for _, coefficients in self.batch.by_kind])

    @cached_property
    def live(self) -> bool:
        """True: factors train, so nothing made of them can be kept."""
        if self.trains is not None:
            return self.trains
        tensors: list[Tensor] = []
        for value in self.values:
            tensors += value.tensors
        return any(tensor.requires_grad for tensor in tensors)

    def held(self, make: Callable[[], T]) -> Callable[[], T]:
        """Return a function that returns what ``make`` makes of the factors.

        If the factors are frozen, ``make`` runs once, now. If they train, it runs at every call.

        Raises:
            BudgetError: there is no room for it.
        """
        if self.live:
            return make  # an optimiser writes to the factors between two calls
        made = make()
        # Charged after it is made, because only then it is known how much of it is new memory: a
        # stack of one may be the factor itself.
        self.charge(_new_bytes(made, self.values))
        return lambda: made

    @property
    def biased(self) -> Sequence[int]:
        """The indices in `values` of those with a bias."""
        return self.tables.once(("biased", self.site.name, self.live), self._find_biased)

    def _find_biased(self) -> list[int]:
        return [i for i, value in enumerate(self.values) if value.bias is not None]

    @cached_property
    def table(self) -> FactorTable | None:
        """The addresses of the factors for kernels; None if the kernels don't cover them."""
        return self.tables.at(self.site.name, self.values, self.device, live=self.live)

    def table_now(self) -> FactorTable:
        """Return the addresses of the factors, where they are now."""
        table = self.table
        if self.live:
            table = self.tables.now(self.site.name, self.values, self.device)
        assert table is not None, "called only if `table` is not None"
        return table

    def rows(self, rows: Sequence[int]) -> RowSubset:
        """Return some of the rows."""
        return RowSubset(rows, self.batch, self.device)

    def numbers(self, of: Sequence[float] | Tensor) -> Tensor:
        """Return coefficients in the factors' dtype, on their device."""
        # Rounded once, from fp64, in host memory: the device gets a small table and no cast.
        numbers = torch.as_tensor(of, dtype=torch.float64, device="cpu").to(self.dtype)
        return uploaded(numbers, self.device)

    def stacking(self, coefficients: Sequence[float]) -> Callable[[], LowRank]:
        """Return a function that makes Σ coefficient · value as one value of scale 1."""
        terms = []
        for value, coefficient in zip(self.values, coefficients, strict=True):
            if coefficient:
                terms.append(value.scaled(coefficient))
        return partial(stacked, terms, dtype=self.dtype, device=self.device)

    def stacks(self, sums: Sequence[Sequence[float]]) -> PathStacks:
        """Return several sums' factors side by side; the coefficients are as for `stacking`.

        Raises:
            BudgetError: there is no room for it.
        """
        return PathStacks.of(self.values, sums, self.dtype, self.device, self.lend)

    def rank(self, coefficients: Sequence[float]) -> int:
        """Return the rank of Σ coefficient · value."""
        return sum(v.rank for v, c in zip(self.values, coefficients, strict=True) if c)


def _new_bytes(made: object, values: Sequence[LowRank]) -> int:
    """Return the bytes of tensors, or of a value's factors, that are not factors of ``values``."""
    # The common case first: a batch of many nodes comes here for each of them at every site.
    if any(made is value for value in values):
        return 0
    tensors = made.tensors if isinstance(made, LowRank) else made
    if not isinstance(tensors, tuple):
        return 0
    known: set[int] = set()
    for value in values:
        known.update(tensor.data_ptr() for tensor in value.tensors)
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.data_ptr() not in known:
            total += tensor.numel() * tensor.element_size()
    return total
