"""The price of a byte at which a tree just keeps within its bytes, or its error.

    price     high ───── falls by half each time ─────▶ low
    bytes     none            rise                      all
    error     1               falls                     0

All modules of all nodes have one price. That is the rule by which `compress` chooses ranks, and no
other ranks of as many bytes have a smaller error, as far as each fit is the best one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import parse_bytes
from ..errors import BudgetError, SpecError
from ..given import check_part
from .deviation import call_named
from .families import Families
from .flat_adapters import FlatAdapters
from .shared_fit import Pair, SharedFit, Stack, fit

__all__ = ["Goal", "PriceSearch", "PricedFit", "fit_at", "goal_of"]

Progress = Callable[[int, int], None]

_ROUNDING = 1e-6
"""An error that is asked for below this one is met by a fit that is exact but for rounding."""

_CLOSE = 0.97  # of the bytes or the error that are asked for: the search ends there
_FALL = 2.0  # from one price to the next; see `PriceSearch.found`
_MOST_FALLS = 60
_MOST_HALVES = 5


@dataclass(frozen=True)
class Goal:
    """A bound: on the bytes, or on the error where there is none on the bytes."""

    max_error: float
    budget_bytes: int | None

    def met(self, tried: PricedFit) -> bool:
        """Whether a fit is within the bound."""
        if self.budget_bytes is not None:
            return tried.nbytes <= self.budget_bytes
        return tried.error <= self.max_error

    def close(self, tried: PricedFit) -> bool:
        """Whether a fit within the bound uses nearly all of it."""
        if self.budget_bytes is not None:
            return tried.nbytes >= _CLOSE * self.budget_bytes
        return tried.error >= _CLOSE * self.max_error


@dataclass(frozen=True, eq=False)
class PricedFit:
    """The outcome of one price.

    Args:
        price: for one byte, in units of the weighted squared error.
        nbytes: of all nodes.
        error: the relative error.
        ranks: the sum of all ranks, 0 where nothing is left.
        shared: module → the shared parts, with which another price begins.
    """

    price: float
    nbytes: int
    error: float
    ranks: int
    shared: Mapping[str, tuple[Pair, ...]]


def goal_of(max_error: float | None, budget_bytes: int | str | None) -> Goal:
    if (max_error is None) == (budget_bytes is None):
        raise SpecError(
            "grow to max_error= (--max-error) or budget_bytes= (--budget), one of the two"
        )
    if max_error is not None:
        check_part(max_error, "max_error")
    budget = None if budget_bytes is None else parse_bytes(budget_bytes)
    return Goal(max(max_error or 0.0, _ROUNDING), budget)


class PriceSearch:
    """The search for the price at which the bound is just met."""

    def __init__(
        self,
        flat: FlatAdapters,
        families: Families,
        weights: Tensor,
        goal: Goal,
        progress: Progress | None,
    ) -> None:
        self.flat, self.families, self.weights = flat, families, weights
        self.goal, self.progress = goal, progress

    def found(self) -> PricedFit:
        """The best fit within the bound.

        The price begins where nothing is worth it and falls. At no price does a leaf then find
        something worth it alone that was worth it for two leaves together at the price before:
        that has its shared node already. A first fit at a low price would put parts of single
        leaves into shared nodes.

        Raises:
            BudgetError: there is none within the bound.
        """
        by_bytes = self.goal.budget_bytes is not None
        high = self._try(self._first_price(), None)
        low: PricedFit | None = None
        for _ in range(_MOST_FALLS):
            # Bytes rise while the price falls, and errors fall.
            if self.goal.met(high) != by_bytes or self._is_done(high):
                break
            low = self._try(high.price / _FALL, high)
            if self.goal.met(low) != by_bytes:
                break
            high = low
        if low is None or low is high:
            within = high if self.goal.met(high) else None
        else:
            within = self._between(high, low)
        if within is None:
            raise BudgetError(
                f"no tree of these adapters takes {self.goal.budget_bytes:,} bytes",
                "give more bytes, or fewer adapters",
            )
        return within

    def _between(self, high: PricedFit, low: PricedFit) -> PricedFit:
        """The best fit at a price between one that is within the bound and one that is not."""
        within = high if self.goal.met(high) else low
        for _ in range(_MOST_HALVES):
            # Where both have the same ranks, prices between them have these too.
            if self.goal.close(within) or high.nbytes == low.nbytes:
                break
            # Begin with the fit at the higher price, so that the price only falls.
            tried = self._try(math.sqrt(high.price * low.price), high)
            if self.goal.met(tried):
                within = tried
            if self.goal.met(tried) == self.goal.met(high):
                high = tried
            else:
                low = tried
        return within

    def _is_done(self, tried: PricedFit) -> bool:
        """Whether a lower price has nothing left to buy."""
        return tried.error < _ROUNDING

    def _first_price(self) -> float:
        """A price above what any rank of any module is worth."""
        most = 0.0
        for module, _, stack in self.flat.modules():
            # All leaves together can have no larger singular value than their lengths allow.
            gains = (self.weights * stack.energies).sum()
            most = max(most, float(gains) / self.flat.rank_bytes[module])
        return max(most, 1e-300)

    def _try(self, price: float, like: PricedFit | None) -> PricedFit:
        squares = torch.zeros(len(self.weights), dtype=torch.float64)
        shared: dict[str, tuple[Pair, ...]] = {}
        nbytes = ranks = 0
        for done, (module, _, stack) in enumerate(self.flat.modules(), 1):
            start = None if like is None else like.shared[module]
            got = fit_at(self.flat, self.families, self.weights, module, stack, price, start)
            shared[module] = got.shared
            squares += got.squares
            ranks += got.ranks
            nbytes += got.ranks * self.flat.rank_bytes[module]
            if self.progress is not None:
                self.progress(done, len(self.flat))
        error = math.sqrt(float((self.weights * squares).mean()))
        return PricedFit(price, nbytes, error, ranks, shared)


def fit_at(
    flat: FlatAdapters,
    families: Families,
    weights: Tensor,
    module: str,
    stack: Stack,
    price: float,
    start: Sequence[Pair] | None,
) -> SharedFit:
    """Fit one module at a price for a byte."""
    per_rank = price * flat.rank_bytes[module]
    return call_named(
        module, lambda: fit(stack, families, weights, per_rank, name=module, start=start)
    )
