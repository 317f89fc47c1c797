"""What was made for the last keys used, so that using one again costs nothing.

    strong    the last `count` values, the oldest first to go; any of them may be dropped at any time, by any thread
    weak      every value that is alive, because it is in use somewhere

Law: whether something is kept changes the cost of getting it, and nothing else. A value in use is found again,
whatever was dropped. Where memory is bounded, a `Ledger` counts the memory that such values take (`ledger.py`).
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
        count: how many values stay though nobody uses them.

    >>> class Made: pass
    >>> kept = LastUsed(1)
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
