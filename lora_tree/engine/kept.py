"""What was made for the last keys used, so that using one again costs nothing.

    strong    the last `count` values, the oldest first to go; any of them may be dropped at any time, by any thread
    weak      every value that is alive, because it is in use somewhere

Law: whether something is kept changes what it costs to get it, and nothing else. A value in use is found again whatever
was dropped. Where memory is bounded, a `Ledger` knows how much of it such values take, from before they are made until
they are gone.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

__all__ = ["Kept", "Ledger", "Lender", "Unbounded", "ordinary"]

V = TypeVar("V")


Lender: TypeAlias = Callable[[int, torch.device], Tensor]
"""(bytes, device) → memory there: (bytes,) uint8, whatever is in it."""


def ordinary(nbytes: int, device: torch.device) -> Tensor:
    """Memory as torch has it."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


class Ledger(Protocol):
    """Whoever bounds the memory that is taken beside the weights: a cache with a budget."""

    def spare(self, kept: Kept[Any]) -> None:
        """From now on, what ``kept`` keeps may be dropped where room is needed; held weakly."""

    def charge(self, owner: object, nbytes: int) -> None:
        """Make room for ``nbytes`` that ``owner`` takes, and count them until it is gone.

        Raises:
            BudgetError: there is none, and nothing that could be let go of.
        """

    def lend(self, owner: object, nbytes: int) -> Lender:
        """`charge`, and what hands out that memory, in portions.

        Raises:
            BudgetError: there is no room, and nothing that could be let go of.
        """
        ...


class Unbounded:
    """No bound, and nothing counted."""

    def spare(self, kept: Kept[Any]) -> None:
        """Nothing has to be dropped."""

    def charge(self, owner: object, nbytes: int) -> None:
        """There is room."""

    def lend(self, owner: object, nbytes: int) -> Lender:
        """Ordinary memory."""
        return ordinary


class Kept(Generic[V]):
    """Key → value, for the last keys used.

    Args:
        count: how many values stay though nobody uses them.

    >>> class Made: pass
    >>> kept = Kept(1)
    >>> first = kept.get("a", Made)
    >>> _ = kept.get("b", Made)                         # the last one stays, "a" is alive because we hold it
    >>> kept.get("a", Made) is first
    True
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._last: OrderedDict[Hashable, V] = OrderedDict()
        self._alive: weakref.WeakValueDictionary[Hashable, V] = weakref.WeakValueDictionary()

    def get(self, key: Hashable, make: Callable[[], V], *, keep: bool = True) -> V:
        """The value of ``key``, made where there is none; ``keep``: it stays when it is not in use any more."""
        found = self.find(key)
        if found is None:
            found = self._alive[key] = make()
        if not keep:
            return found
        self._last.pop(key, None)
        self._last[key] = found
        while len(self._last) > self._count and self.drop():
            pass
        return found

    def find(self, key: Hashable) -> V | None:
        """The value of ``key`` where it is alive."""
        return self._alive.get(key)

    def drop(self) -> bool:
        """Let go of the value used longest ago; False where none is kept. Any thread may ask."""
        try:
            self._last.popitem(last=False)
        except KeyError:
            return False
        return True

    def forget(self) -> None:
        """Let go of all; what is in use is made anew when it is asked for next."""
        self._last.clear()
        self._alive.clear()
