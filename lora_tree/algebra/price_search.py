"""Search for the price of a byte at which a tree just meets its bound on bytes or on error.

    price     high ───── falls by √2 each time ───────▶ low
    bytes     none            rise                      all
    error     1               falls                     0

All modules of all nodes have the same price. `compress` chooses ranks by the same rule. If every
fit is optimal at its price, no other choice of ranks with as many bytes has a smaller error.
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
from .flat_adapters import FlatAdapters, FlatModule, smallest_module
from .shared_fit import SharedFit

__all__ = ["Goal", "PriceSearch", "PricedFit", "Progress", "goal_of", "relative_error"]

Progress = Callable[[int, int], None]

_ROUNDING = 1e-6
"""The smallest error to aim for: below it a fit differs from an exact one only by rounding."""

_CLOSE = 0.97  # fraction of the bound: a fit that uses this much of it ends the search
_AIM = 0.99  # fraction of the bound that the search aims at
_FALL = 2.0**0.5  # ratio of one price to the next; see `PriceSearch.search`
_LITTLE = 0.01  # a price that adds fewer ranks than this fraction added next to nothing
_MOST_FALLS = 120
_MOST_CUTS = 6  # how often the interval around the bound is divided
_PER_READ = 5  # prices per pass if every pass reads the files again
_ROUNDS_DOWN = 1  # rounds of fitting per price while the price falls
_ROUNDS_NEAR = 12  # the same near the bound


@dataclass(frozen=True)
class Goal:
    """The bound of the search: ``budget_bytes``, or ``max_error`` if that is None."""

    max_error: float
    budget_bytes: int | None

    @property
    def bound(self) -> float:
        """The value of the bound: bytes, or a relative error."""
        return self.max_error if self.budget_bytes is None else float(self.budget_bytes)

    def figure(self, tried: PricedFit) -> float:
        """Return the fit's bytes or its error, whichever is bounded."""
        return tried.error if self.budget_bytes is None else float(tried.nbytes)

    def is_met(self, tried: PricedFit) -> bool:
        """Return whether a fit is within the bound."""
        return self.figure(tried) <= self.bound

    def is_close(self, tried: PricedFit) -> bool:
        """Return whether a fit within the bound uses nearly all of it."""
        return self.figure(tried) >= _CLOSE * self.bound


@dataclass(frozen=True, eq=False)
class PricedFit:
    """The fits of all modules at one price.

    Args:
        price: of one byte, in units of the weighted squared error.
        nbytes: of all nodes.
        error: the relative error.
        fits: module → its fit, from which the fit at the next price starts.
    """

    price: float
    nbytes: int
    error: float
    fits: Mapping[str, SharedFit]

    @property
    def ranks(self) -> int:
        """The sum of all ranks of all nodes."""
        return sum(fit.shared_ranks + sum(fit.ranks) for fit in self.fits.values())


def goal_of(max_error: float | None, budget_bytes: int | str | None) -> Goal:
    if (max_error is None) == (budget_bytes is None):
        raise SpecError(
            "grow to max_error= (--max-error) or budget_bytes= (--budget), one of the two"
        )
    if max_error is not None:
        check_part(max_error, "max_error")
    budget = None if budget_bytes is None else parse_bytes(budget_bytes)
    return Goal(max(max_error or 0.0, _ROUNDING), budget)


def relative_error(weights: Tensor, squares: Tensor, energies: Tensor) -> float:
    """Return √ Σ w e² / Σ w ‖ΔW‖² over all leaves.

    Args:
        weights: (n,) how much each leaf counts.
        squares: (n,) their squared errors.
        energies: (n,) the squares of their norms.
    """
    whole = (weights * energies).sum().clamp(min=1e-300)
    return math.sqrt(float((weights * squares).sum() / whole))


class PriceSearch:
    """The search for the price at which the bound is just met."""

    def __init__(self, flat: FlatAdapters, goal: Goal, progress: Progress | None) -> None:
        self.flat, self.goal, self.progress = flat, goal, progress
        self.by_bytes = goal.budget_bytes is not None
        self.rounding = _ROUNDING
        if self.by_bytes:
            # The factors are rounded to their dtype afterwards, so a smaller error gains nothing.
            self.rounding = max(_ROUNDING, torch.finfo(flat.dtype).eps / 2)
        # If every pass reads the files again, it tries several prices.
        self.prices_per_pass = 1 if flat.are_kept else _PER_READ

    def search(self) -> PricedFit:
        """Return the best fit within the bound.

        The price starts so high that no rank pays, and falls in small steps. A direction that
        several leaves share therefore pays first, and goes to their shared node, before it pays for
        any one of them alone. If the first fit were at a low price, parts of single leaves would
        end up in shared nodes. While the price falls, one round of fitting per price is enough;
        near the bound the fits run until they converge.

        Raises:
            BudgetError, SpecError: no fit is within the bound.
        """
        high, low = self._bracket()
        within = None
        for tried in (high, low):
            if tried is not None and self.goal.is_met(tried):
                within = tried
        if within is None and not self.by_bytes:
            raise SpecError(
                f"max_error: no tree was found with an error of {self.goal.max_error:g}",
                "allow a larger error",
            )
        if within is None:
            raise BudgetError(
                f"no tree of these adapters takes {self.goal.budget_bytes:,} bytes",
                "give more bytes, or fewer adapters",
            )
        if high is None or low is None:
            return self._converge(within)
        return self._between(high, low, within)

    def _bracket(self) -> tuple[PricedFit | None, PricedFit | None]:
        """Return the last fit before the bound is crossed and the first one after it, or None."""
        high: PricedFit | None = None
        price, rounds = self._first_price(), _ROUNDS_DOWN
        for _ in range(_MOST_FALLS):
            prices = [price / _FALL**step for step in range(self.prices_per_pass)]
            for tried in self._try(prices, high, rounds):
                # Bytes rise while the price falls, and errors fall.
                if self.goal.is_met(tried) != self.by_bytes:
                    return high, tried
                # If a lower price added next to no ranks, the error left is from fits that have not
                # converged: the next prices get more rounds.
                dull = high is not None and tried.ranks < (1.0 + _LITTLE) * high.ranks
                high = tried
                if tried.error < self.rounding:
                    return high, None  # a lower price has nothing left to buy
            rounds = _ROUNDS_NEAR if dull else _ROUNDS_DOWN
            price = prices[-1] / _FALL
        return high, None

    def _between(self, high: PricedFit, low: PricedFit, within: PricedFit) -> PricedFit:
        """Return the best fit within the bound at a price between these two."""
        settled = False
        for _ in range(_MOST_CUTS):
            # With equal bytes at both ends, the prices between them give the same ranks.
            if (settled and self.goal.is_close(within)) or high.nbytes == low.nbytes:
                break
            # Each fit starts from the one at the higher price, so that the price only falls.
            for tried in self._try(self._prices_between(high, low), high, _ROUNDS_NEAR):
                if self.goal.is_met(tried):
                    within, settled = tried, True
                if self.goal.is_met(tried) != self.by_bytes:
                    low = tried
                    break
                high = tried
        return within if settled else self._converge(within)

    def _prices_between(self, high: PricedFit, low: PricedFit) -> list[float]:
        """Return the prices to try next, by linear interpolation in the logarithms.

        If a pass can try several prices, they divide the interval evenly instead.
        """
        fall = low.price / high.price
        if self.prices_per_pass > 1:
            parts = [(i + 1) / (self.prices_per_pass + 1) for i in range(self.prices_per_pass)]
            return [high.price * fall**part for part in parts]
        part = 0.5
        above, below, bound = self.goal.figure(high), self.goal.figure(low), self.goal.bound
        if above > 0.0 and below > 0.0 and above != below:
            part = math.log(_AIM * bound / above) / math.log(below / above)
        return [high.price * fall ** min(max(part, 0.05), 0.95)]

    def _converge(self, rough: PricedFit) -> PricedFit:
        """Return the converged fit at the same price; the rough one if that exceeds the bound."""
        tried = self._try([rough.price], rough, _ROUNDS_NEAR)[0]
        return tried if self.goal.is_met(tried) else rough

    def _first_price(self) -> float:
        """Return a price at which no rank of any module pays."""
        most = 0.0
        for module in self.flat.modules():
            gain = module.problem.largest_gain
            most = max(most, gain / self.flat.rank_bytes[module.name])
        return max(most, 1e-300)

    def _try(
        self, prices: Sequence[float], like: PricedFit | None, most_rounds: int
    ) -> list[PricedFit]:
        """Fit every module at falling prices; each fit starts from the one before."""
        flat = self.flat
        totals = [_Sum(flat) for _ in prices]
        for done, module in enumerate(flat.modules(), 1):
            start = None if like is None else like.fits[module.name]
            for total, price in zip(totals, prices, strict=True):
                per_rank = price * flat.rank_bytes[module.name]
                start = call_named(module.name, module.problem.fit, per_rank, start, most_rounds)
                total.add(module, start)
            if self.progress is not None:
                self.progress(done, len(flat))
        return [total.at(price) for total, price in zip(totals, prices, strict=True)]


class _Sum:
    """The totals of one price over the modules that were fitted so far."""

    def __init__(self, flat: FlatAdapters) -> None:
        self.flat = flat
        self.squares = torch.zeros(len(flat.weights), dtype=torch.float64)
        self.energies = torch.zeros_like(self.squares)
        self.nbytes = 0
        self.filled = [False] * len(flat.names)
        self.fits: dict[str, SharedFit] = {}

    def add(self, module: FlatModule, got: SharedFit) -> None:
        """Add a module's fit."""
        self.squares += got.squares
        self.energies += module.problem.stack.energies
        ranks = got.shared_ranks
        for i, (rank, value) in enumerate(zip(got.ranks, module.values, strict=True)):
            if value is not None and value.bias is not None:
                # A bias is always kept, and its module then has at least one rank, of zeros.
                self.nbytes += value.bias.numel() * self.flat.dtype.itemsize
                rank = max(rank, 1)
            self.filled[i] = self.filled[i] or rank > 0
            ranks += rank
        self.nbytes += ranks * self.flat.rank_bytes[module.name]
        self.fits[module.name] = got if self.flat.are_kept else got.without_leaves()

    def at(self, price: float) -> PricedFit:
        """Return the sum over all modules."""
        nbytes = self.nbytes
        for outline, filled in zip(self.flat.outlines, self.filled, strict=True):
            if not filled:
                # An empty leaf keeps one rank of zeros in its smallest module.
                value = outline.modules[smallest_module(outline)]
                nbytes += value.numel // value.rank * self.flat.dtype.itemsize
        error = relative_error(self.flat.weights, self.squares, self.energies)
        return PricedFit(price, nbytes, error, self.fits)
