"""The order in which a full tier evicts adapters: one small object, which a caller may replace.

A policy is told which adapters are used, and names a victim among the idle ones. It knows nodes,
not paths.
A request uses its whole lineage, so an ancestor is used at least as often, and as lately, as
anything below it. Both policies here therefore keep an ancestor at least as long as its
descendants, and need no rule about the tree.

    Lru          evicts the least recently used
    Frequency    evicts the least frequently used for its size, old uses counting less; the default,
                 because it measured better (docs/benchmarks.md)

Reference: greedy-dual-size-frequency, Cherkasova 1998, HPL-98-69R1; the counts of evicted nodes
are kept too.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

__all__ = ["Frequency", "Lru", "Policy"]


class Policy(Protocol):
    """The eviction order of one tier.

    The tier calls it with the cache's lock held, so it needs none.
    """

    def used(self, nodes: Sequence[tuple[Hashable, int]]) -> None:
        """Note that one request uses these (key, bytes), from the root down."""
        ...

    def gone(self, key: Hashable) -> None:
        """Note that a key left the tier."""
        ...

    def victim(self, idle: Callable[[Hashable], bool]) -> Hashable | None:
        """Return the key to evict next, of those used, not gone and ``idle``; None if none is.

        The key counts as gone only when the tier calls `gone`.
        """
        ...


class Lru:
    """Evicts the least recently used; of one request, the leaf before its ancestors.

    >>> policy = Lru()
    >>> policy.used([("fr", 8), ("fr/legal", 8)]); policy.used([("fr", 8), ("fr/medical", 8)])
    >>> policy.victim(lambda key: True), policy.victim(lambda key: key != "fr/legal")
    ('fr/legal', 'fr/medical')
    """

    def __init__(self) -> None:
        self._order: OrderedDict[Hashable, None] = OrderedDict()

    def used(self, nodes: Sequence[tuple[Hashable, int]]) -> None:
        # Reversed, so that the root is the most recent of its request.
        for key, _ in reversed(nodes):
            self._order[key] = None
            self._order.move_to_end(key)

    def gone(self, key: Hashable) -> None:
        self._order.pop(key, None)

    def victim(self, idle: Callable[[Hashable], bool]) -> Hashable | None:
        for key in self._order:
            if idle(key):
                return key
        return None


class Frequency:
    """Evicts the least frequently used for its size.

        worth = floor + uses / bytes        floor: the worth of the last victim

    The floor rises with every eviction, so a node that was popular once ages beside nodes that are
    used now.

    Args:
        remembered: the number of keys whose uses are counted, whether or not they are in the tier.

    >>> policy = Frequency()
    >>> for _ in range(3): policy.used([("fr", 8), ("fr/legal", 8)])
    >>> policy.used([("fr", 8), ("fr/medical", 8)])
    >>> policy.victim(lambda key: True)
    'fr/medical'
    """

    def __init__(self, remembered: int = 1 << 16) -> None:
        self._remembered = remembered
        self._uses: dict[Hashable, int] = {}
        self._worth: dict[Hashable, tuple[float, int]] = {}
        # (worth, order, key). An entry stays here when its key is used again or leaves; `victim`
        # skips it then, which is cheaper than to find it.
        self._heap: list[tuple[float, int, Hashable]] = []
        self._order = itertools.count()  # breaks ties, so that keys are never compared
        self._floor = 0.0

    def used(self, nodes: Sequence[tuple[Hashable, int]]) -> None:
        for key, nbytes in reversed(nodes):
            # Popped and set again: the dictionary's order is then the order of the last use.
            uses = self._uses.pop(key, 0) + 1
            self._uses[key] = uses
            worth = self._floor + uses / max(nbytes, 1)
            order = next(self._order)
            self._worth[key] = (worth, order)
            heapq.heappush(self._heap, (worth, order, key))
        while len(self._uses) > self._remembered:
            del self._uses[next(iter(self._uses))]
        # Rebuilt when most entries are outdated, so a push costs O(log n) on average.
        if len(self._heap) > 64 + 4 * len(self._worth):
            self._heap = [(*worth, key) for key, worth in self._worth.items()]
            heapq.heapify(self._heap)

    def gone(self, key: Hashable) -> None:
        self._worth.pop(key, None)

    def victim(self, idle: Callable[[Hashable], bool]) -> Hashable | None:
        popped: list[tuple[float, int, Hashable]] = []
        found = None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            worth, order, key = entry
            if self._worth.get(key) != (worth, order):
                continue  # it was used again, or is gone
            popped.append(entry)
            if idle(key):
                found = key
                self._floor = max(self._floor, worth)
        # The victim is pushed back too: the tier may decide not to evict it.
        for entry in popped:
            heapq.heappush(self._heap, entry)
        return found
