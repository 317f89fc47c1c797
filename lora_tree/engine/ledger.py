"""Ledger: the engine's side of a memory budget.

The engine lays out tensors beside the weights. The cache bounds memory. This module is all that the
engine knows of the cache: it asks for room before it makes anything, and the bytes count until
their owner is collected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .last_used import LastUsed

__all__ = ["FREE_FIRST", "Ledger", "Lender", "Unbounded", "ordinary"]

FREE_FIRST = "or free what is in use first: model.deactivate()"
"""The advice of a `BudgetError` where another path may be active beside the one that needs room."""

Lender: TypeAlias = Callable[[int, torch.device], Tensor]
"""(bytes, device) → uninitialised memory there, (bytes,) uint8."""


def ordinary(nbytes: int, device: torch.device) -> Tensor:
    """Allocate with torch, outside of any budget."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


# A protocol, because imports point inward: the cache knows the engine, and not the other way round.
class Ledger(Protocol):
    """Bounds the memory that is taken beside the weights, as a cache with a budget does."""

    @property
    def reclaims(self) -> bool:
        """True: evicting an adapter frees its memory even while a kept plan refers to it."""

    def spare(self, kept: LastUsed[Any]) -> None:
        """Drop what ``kept`` keeps when room is needed. The ledger holds it weakly."""

    def charge(self, owner: object, nbytes: int) -> None:
        """Make room for ``nbytes`` that ``owner`` takes, and count them until it is collected.

        Raises:
            BudgetError: there is none, and nothing can be evicted.
        """

    def lend(self, owner: object, nbytes: int) -> Lender:
        """`charge` the bytes, and return a function that hands them out in portions.

        Raises:
            BudgetError: there is no room, and nothing can be evicted.
        """
        ...


# For models without a budget, so that no caller has to ask whether there is one.
class Unbounded:
    """A ledger without a bound; it counts nothing."""

    reclaims = True  # nothing is ever evicted

    def spare(self, kept: LastUsed[Any]) -> None:
        """Do nothing: room is never short."""

    def charge(self, owner: object, nbytes: int) -> None:
        """Do nothing: there is always room."""

    def lend(self, owner: object, nbytes: int) -> Lender:
        """Return `ordinary`."""
        return ordinary
