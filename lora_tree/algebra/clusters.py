"""Clusters: average linkage over a matrix of distances.

    d(I ∪ J, K) = (|I| d(I, K) + |J| d(J, K)) / (|I| + |J|)        Lance & Williams, 1967

The nearest-neighbour chain (Murtagh, 1983) finds the merges in n² steps: it walks from one cluster
to its nearest until two are each other's nearest. Average linkage is reducible, so those may be
joined at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..errors import SpecError

__all__ = ["Join", "average_linkage", "groups", "leaf_order"]

_ROUNDING = 1e-5
"""The most by which two distances of one pair may differ, in parts of the largest distance."""


@dataclass(frozen=True)
class Join:
    """A step that joins two clusters. Items are 0 … n − 1; join number i makes cluster n + i."""

    left: int
    right: int
    distance: float
    size: int


def average_linkage(distances: Tensor) -> list[Join]:
    """Return the n − 1 joins of n items, nearest first.

    Args:
        distances: (n, n), finite, and symmetric up to rounding. The diagonal is not read.

    Raises:
        SpecError: they are not such a matrix.

    >>> apart = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 6.0], [4.0, 6.0, 0.0]])
    >>> [(join.left, join.right, join.distance) for join in average_linkage(apart)]
    [(0, 1, 1.0), (2, 3, 5.0)]
    """
    apart = _checked(distances)
    count = len(apart)
    apart.fill_diagonal_(torch.inf)
    sizes = [1] * count
    alive = [True] * count
    walk: list[int] = []
    joins: list[tuple[float, int, int]] = []
    for _ in range(count - 1):
        if not walk:
            walk.append(alive.index(True))
        while True:
            here = walk[-1]
            row = apart[here]
            near = int(row.argmin())
            # If the cluster that we came from is as near as the nearest, choose it: otherwise the
            # walk could cycle.
            if len(walk) > 1 and float(row[walk[-2]]) <= float(row[near]):
                near = walk[-2]
                break
            # Every step is shorter than the last one, so the walk ends.
            walk.append(near)
        walk.pop()
        walk.pop()
        keep, absorbed = min(here, near), max(here, near)
        joins.append((float(apart[here, near]), keep, absorbed))
        size = sizes[keep] + sizes[absorbed]
        mixed = (apart[keep] * sizes[keep] + apart[absorbed] * sizes[absorbed]) / size
        # A mean of two is at least the smaller one, but may be rounded below it. Then a cluster
        # earlier on the walk would have another nearest one than the walk took.
        mixed = torch.maximum(mixed, torch.minimum(apart[keep], apart[absorbed]))
        mixed[keep] = torch.inf
        apart[keep], apart[:, keep] = mixed, mixed
        apart[absorbed], apart[:, absorbed] = torch.inf, torch.inf
        sizes[keep], alive[absorbed] = size, False
    return _numbered(joins, count)


def _checked(distances: Tensor) -> Tensor:
    """Return the distances in float64 and exactly symmetric, as a copy with zeros on the diagonal.

    Raises:
        SpecError: they are not square, finite and symmetric up to rounding.
    """
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise SpecError(f"distances: got {tuple(distances.shape)}, expected a square matrix")
    apart = distances.double().clone()
    apart.fill_diagonal_(0.0)
    if not bool(apart.isfinite().all()):
        raise SpecError("distances that are not finite have no clusters")
    if apart.numel() and bool(((apart - apart.mT).abs() > _ROUNDING * apart.abs().max()).any()):
        raise SpecError(
            "distances that are not symmetric have no clusters",
            "expected d[i, j] = d[j, i]; (d + d.T) / 2 takes the mean of the two",
        )
    return (apart + apart.mT) / 2


def groups(joins: list[Join], count: int, distance: float) -> list[list[int]]:
    """Return the clusters after all joins up to a distance, largest first.

    >>> apart = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 6.0], [4.0, 6.0, 0.0]])
    >>> groups(average_linkage(apart), 3, 2.0)
    [[0, 1], [2]]
    """
    members: dict[int, list[int]] = {i: [i] for i in range(count)}
    for i, join in enumerate(joins):
        if join.distance <= distance:
            members[count + i] = sorted(members.pop(join.left) + members.pop(join.right))
    return sorted(members.values(), key=lambda items: (-len(items), items))


def leaf_order(joins: list[Join], count: int) -> list[int]:
    """Return the items in an order in which every cluster's items are adjacent."""
    members: dict[int, list[int]] = {i: [i] for i in range(count)}
    for i, join in enumerate(joins):
        # The side with the smallest item comes first, which makes the order deterministic.
        first, second = sorted((members.pop(join.left), members.pop(join.right)))
        members[count + i] = first + second
    return list(chain.from_iterable(sorted(members.values())))


def _numbered(pairs: list[tuple[float, int, int]], count: int) -> list[Join]:
    """The joins sorted by distance, with the numbers of the clusters that they join."""
    joins: list[Join] = []
    cluster = list(range(count))  # item → the cluster that it is the first item of
    sizes = dict.fromkeys(range(count), 1)
    # The chain finds joins out of order. The sort is stable, so at equal distances a cluster still
    # comes after the ones that it is made of.
    for distance, keep, absorbed in sorted(pairs, key=lambda each: each[0]):
        one, other = sorted((_find_cluster(cluster, keep), _find_cluster(cluster, absorbed)))
        made = count + len(joins)
        cluster.append(made)
        cluster[one] = cluster[other] = made
        sizes[made] = sizes[one] + sizes[other]
        joins.append(Join(one, other, distance, sizes[made]))
    return joins


def _find_cluster(cluster: list[int], item: int) -> int:
    """Return the largest cluster so far that holds an item (union-find with path compression)."""
    way = [item]
    while cluster[way[-1]] != way[-1]:
        way.append(cluster[way[-1]])
    for each in way:
        cluster[each] = way[-1]
    return way[-1]
