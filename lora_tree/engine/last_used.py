"""Keep the values made for the last keys used, so that using one again costs nothing.

    strong    the last `count` values, the oldest first to go; any thread may drop any of them
    weak      every value that is alive, because something uses it

Law: whether something is kept changes the cost of getting it, and nothing else. A value in use is
found again after a drop. Where memory is bounded, a `Ledger` counts the memory that such values
take (`ledger.py`).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["LastUsed"]

V = TypeVar("V")


class LastUsed(Generic[V]):
    """Key → value, for the last keys used.

    Args:
        count: how many values stay while nothing uses them.

    >>> class Made: pass
    >>> kept = LastUsed(1)
    >>> first = kept.get("a", Made)
    >>> _ = kept.get("b", Made)              # "b" stays; "a" is alive because we hold it
    >>> kept.get("a", Made) is first
    True
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._last: OrderedDict[Hashable, V] = OrderedDict()
        # Values that were dropped are in here too: a behaviour that runs holds its values, and must
        # find them again.
        self._alive: weakref.WeakValueDictionary[Hashable, V] = weakref.WeakValueDictionary()

    def get(self, key: Hashable, make: Callable[[], V], *, keep: bool = True) -> V:
        """Return the value of ``key``, made if there is none. With ``keep`` it stays when nothing
        uses it any more.
        """
        found = self._alive.get(key)
        if found is None:
            found = self._alive[key] = make()
        if keep:
            self._use(key, found)
        return found

    def again(self, key: Hashable) -> V | None:
        """Return the value of ``key`` if it is alive, and keep it as the one used last."""
        found = self._alive.get(key)
        if found is not None:
            self._use(key, found)
        return found

    def keep(self, key: Hashable, value: V) -> None:
        """Keep a value under a key that has none."""
        self._alive[key] = value
        self._use(key, value)

    def find(self, key: Hashable) -> V | None:
        """Return the value of ``key`` if it is alive."""
        return self._alive.get(key)

    def drop(self) -> bool:
        """Let go of the value used longest ago; False if none is kept. Any thread may call this."""
        # No check for an empty dictionary first: another thread may drop the last value after it.
        try:
            self._last.popitem(last=False)
        except KeyError:
            return False
        return True

    def forget(self) -> None:
        """Let go of all. Even a value in use is made again when its key is asked for next."""
        self._last.clear()
        self._alive.clear()

    def _use(self, key: Hashable, value: V) -> None:
        self._last.pop(key, None)
        self._last[key] = value
        # Another thread may have dropped values since the count was read: then there is nothing to
        # do.
        while len(self._last) > self._count and self.drop():
            pass
