"""Families: choose the shared nodes of a tree over flat adapters, from a clustering of them.

    joins of average linkage                       families
    ┌──────── 0.91                                 shared 0: all leaves
    ├── 0.40 ┬ a                                   shared 1: a b c      below 0
    │   └ 0.38 ┬ b                                 (0.38 is no family: it is nearly its parent's)
    │          └ c
    └── 0.35 ┬ d                                   shared 2: d e        below 0
             └ e

A join becomes a shared node if its members are clearly nearer to each other than those of the
closest shared node above it (`NEARER`). Whether a shared node saves bytes is decided later: the fit
gives one that does not the rank 0, and `grow` leaves it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .clusters import Join

__all__ = ["Families", "families_of"]

NEARER = 0.85
"""A shared node's mean distance is at most this fraction of that of the shared node above it."""


@dataclass(frozen=True)
class Families:
    """The shape of a tree over n leaves, which stand in depth-first order.

    Args:
        order: the leaves' numbers in the clustering, in depth-first order.
        above: for each shared node, the shared node above it, or −1; nodes above come first.
        spans: for each shared node, its leaves as (first, last + 1) in depth-first order.
        homes: for each leaf, the deepest shared node above it.
    """

    order: tuple[int, ...]
    above: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    homes: tuple[int, ...]

    def lineage(self, shared: int) -> list[int]:
        """The shared nodes from the top one down to this one."""
        found: list[int] = []
        while shared >= 0:
            found.append(shared)
            shared = self.above[shared]
        return found[::-1]

    def direct_leaves(self, shared: int) -> list[int]:
        """The leaves directly below a shared node."""
        return [leaf for leaf, home in enumerate(self.homes) if home == shared]


def families_of(joins: Sequence[Join], count: int, depth: int) -> Families:
    """Choose the shared nodes.

    Args:
        joins: the n − 1 joins of n leaves, nearest first.
        count: n, at least 2.
        depth: the most shared nodes on a lineage, at least 1.

    >>> joins = [Join(1, 2, 0.38, 2), Join(0, 4, 0.4, 3), Join(3, 5, 0.9, 4)]
    >>> found = families_of(joins, 4, 2)
    >>> found.order, found.above, found.spans, found.homes
    ((0, 1, 2, 3), (-1, 0), ((0, 4), (0, 3)), (1, 1, 1, 0))
    """
    chosen = _chosen(joins, count, depth)
    order: list[int] = []
    above: list[int] = []
    spans: dict[int, tuple[int, int]] = {}
    homes: list[int] = []

    firsts = list(range(count))  # item → its leaf with the smallest number
    for join in joins:
        firsts.append(min(firsts[join.left], firsts[join.right]))
    # A stack instead of recursion: a chain of a thousand joins would exceed Python's limit.
    stack: list[tuple[str, int, int]] = [("open", count + len(joins) - 1, -1)]
    begun: list[int] = []
    while stack:
        step, item, home = stack.pop()
        if step == "close":
            spans[home] = (begun[home], len(order))
        elif item < count:
            order.append(item)
            homes.append(home)
        else:
            join = joins[item - count]
            if item in chosen:
                above.append(home)
                home = len(above) - 1
                begun.append(len(order))
                stack.append(("close", item, home))
            # The side with the smallest leaf comes first, which makes the order deterministic.
            sides = sorted((join.left, join.right), key=firsts.__getitem__)
            stack += [("open", side, home) for side in reversed(sides)]
    ordered = tuple(spans[shared] for shared in range(len(above)))
    return Families(tuple(order), tuple(above), ordered, tuple(homes))


def _chosen(joins: Sequence[Join], count: int, depth: int) -> set[int]:
    """The items of the joins that become shared nodes."""
    top = count + len(joins) - 1
    kept: dict[int, tuple[int, float]] = {}  # item → its level and its distance
    todo: list[tuple[int, int, float]] = [(top, 0, float("inf"))]
    while todo:
        item, level, distance = todo.pop()
        if item < count:
            continue
        join = joins[item - count]
        # The top join is always kept: many leaves with little in common may still share something.
        nearer = join.distance <= NEARER * distance
        if item == top or nearer:
            level, distance = level + 1, join.distance
            kept[item] = (level, distance)
        todo += [(join.left, level, distance), (join.right, level, distance)]
    # If there are too many levels, drop the deepest ones, which have the fewest leaves.
    return {item for item, (level, _) in kept.items() if level <= depth}
