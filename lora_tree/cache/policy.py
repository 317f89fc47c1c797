"""What leaves a full tier first: one small object, that a caller may replace.

A policy sees what is used, and names a victim among what is not in use now. It sees nodes, never paths: a request uses
its whole lineage, so an ancestor is used at least as often, and as lately, as anything below it, and both orders here
keep it at least as long. That is all that the tree has to add.

    Lru          what was used longest ago
    Frequency    what was used least often for its size, old uses counting less and less; the default, since it was
                 measured to be better (docs/benchmarks.md)

Reference: greedy-dual-size-frequency, Cherkasova 1998, HPL-98-69R1, with the counts of what left kept beside it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

__all__ = ["Frequency", "Lru", "Policy"]


class Policy(Protocol):
    """The order in which a tier lets go of nodes. One object for a tier, never called by two threads at once."""

    def used(self, nodes: Sequence[tuple[Hashable, int]]) -> None:
        """A request uses these (key, bytes), from the root down; all of them are in the tier now."""
        ...

    def gone(self, key: Hashable) -> None:
        """It left the tier."""
        ...

    def victim(self, idle: Callable[[Hashable], bool]) -> Hashable | None:
        """What should leave next, of what was used and is not gone, and is ``idle``; None where nothing is."""
        ...


class Lru:
    """What was used longest ago; of one request, the leaf before its ancestors.

    >>> policy = Lru()
    >>> policy.used([("fr", 8), ("fr/legal", 8)]); policy.used([("fr", 8), ("fr/medical", 8)])
    >>> policy.victim(lambda key: True), policy.victim(lambda key: key != "fr/legal")
    ('fr/legal', 'fr/medical')
    """

    def __init__(self) -> None:
        self._order: OrderedDict[Hashable, None] = OrderedDict()

    def used(self, nodes: Sequence[tuple[Hashable, int]]) -> None:
        for key, _ in reversed(nodes):
            self._order[key] = None
            self._order.move_to_end(key)

    def gone(self, key: Hashable) -> None:
        self._order.pop(key, None)

    def victim(self, idle: Callable[[Hashable], bool]) -> Hashable | None:
        return next((key for key in self._order if idle(key)), None)


class Frequency:
    """What was used least often for its size.

        worth = floor + uses / bytes        floor: the worth of the last victim, so that old favourites age

    Args:
        remembered: of how many keys the uses are known, though they are not in the tier.

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
        self._heap: list[tuple[float, int, Hashable]] = []
        self._order = itertools.count()
        self._floor = 0.0

    def used(self, nodes: Sequence[tuple[Hashable, int]]) -> None:
        for key, nbytes in reversed(nodes):
            uses = self._uses.pop(key, 0) + 1
            self._uses[key] = uses
            self._worth[key] = worth = (self._floor + uses / max(nbytes, 1), next(self._order))
            heapq.heappush(self._heap, (*worth, key))
        while len(self._uses) > self._remembered:
            del self._uses[next(iter(self._uses))]
        if len(self._heap) > 64 + 4 * len(self._worth):
            self._heap = [(*worth, key) for key, worth in self._worth.items()]
            heapq.heapify(self._heap)

    def gone(self, key: Hashable) -> None:
        self._worth.pop(key, None)

    def victim(self, idle: Callable[[Hashable], bool]) -> Hashable | None:
        busy, found = [], None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            worth, order, key = entry
            if self._worth.get(key) != (worth, order):
                continue  # used since, or gone
            busy.append(entry)
            if idle(key):
                found, self._floor = key, max(self._floor, worth)
        for entry in busy:  # the victim too: it counts as gone only when the tier says so
            heapq.heappush(self._heap, entry)
        return found
