"""Eviction from a full cache: hits and loads of each policy on the same traffic, at equal bytes.

    flattened leaves   every path is one separate adapter, as large as its whole lineage
    nodes              a lineage is a hit if all its nodes are in memory; ancestors are shared
    offline            evict the node whose next use is farthest away (Belady): it knows the future

The policies are the library's own objects. Nothing is loaded, so the counts are exact and no clock
is involved.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Hashable, Sequence

from lora_tree.cache import Frequency, Lru, Policy

from .common import Result
from .sizes import FULL, Size

__all__ = ["run", "tree_of", "zipf"]

SKEWS = (0.7, 1.0, 1.3)
PART = 0.1  # of all nodes' bytes
FAN_OUT = 10
DEPTH = 4
SIZES = (8, 16, 16, 32)  # ranks, and so bytes, of nodes

Request = list[tuple[str, int]]
Make = Callable[[Sequence[Request]], Policy]


class LeavesFirst(Lru):
    """LRU that never evicts a node above a cached one; plain LRU on lineages does the same."""

    def victim(self, idle: Callable[[Hashable], bool]) -> Hashable | None:
        above = {str(key).rpartition("/")[0] for key in self._order}
        return super().victim(lambda key: idle(key) and key not in above)


class Offline:
    """Belady's rule: evict the node whose next use is farthest away."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._coming: dict[Hashable, list[float]] = {}
        for time, request in enumerate(requests):
            for key, _ in request:
                self._coming.setdefault(key, []).append(time)
        for times in self._coming.values():
            times.append(float("inf"))
            times.reverse()
        self._next: dict[Hashable, float] = {}
        self._heap: list[tuple[float, str]] = []

    def used(self, nodes: Sequence[tuple[Hashable, int]]) -> None:
        for key, _ in nodes:
            self._coming[key].pop()
            self._next[key] = self._coming[key][-1]
            heapq.heappush(self._heap, (-self._next[key], str(key)))

    def gone(self, key: Hashable) -> None:
        self._next.pop(key, None)

    def victim(self, idle: Callable[[Hashable], bool]) -> Hashable | None:
        busy, found = [], None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            if self._next.get(entry[1]) == -entry[0]:
                busy.append(entry)
                found = entry[1] if idle(entry[1]) else None
        for entry in busy:
            heapq.heappush(self._heap, entry)
        return found


POLICIES: dict[str, tuple[Make, bool]] = {
    "flattened leaves, LRU": (lambda requests: Lru(), True),
    "nodes, LRU": (lambda requests: Lru(), False),
    "nodes, LRU, leaves first": (lambda requests: LeavesFirst(), False),
    "nodes, frequency, forgotten when gone": (lambda requests: Frequency(remembered=0), False),
    "nodes, frequency": (lambda requests: Frequency(), False),
    "nodes, offline": (Offline, False),
}


def run(size: Size = FULL) -> list[Result]:
    """Return one table: for every skew, how much each policy served and loaded."""
    paths = tree_of(size.nodes * 10)
    draw = random.Random(0)
    ranks = {path: draw.choice(SIZES) for path in paths}
    total = sum(ranks.values())
    result = Result(
        f"{size.nodes * 50:,} requests for {len(paths):,} nodes of depth {DEPTH}; Zipf; whole "
        "lineages served from the "
        f"cache, and bytes loaded as a multiple of all nodes' bytes; room for {PART:.0%} of these"
    )
    for skew in SKEWS:
        asked = zipf(paths, skew, size.nodes * 50)
        found = {
            n: replay(make, flat, asked, ranks, total * PART)
            for n, (make, flat) in POLICIES.items()
        }
        where = f"skew {skew}"
        for name, (served, loaded) in found.items():
            result.facts[f"{where}: {name}: served"] = served
            result.facts[f"{where}: {name}: loaded"] = loaded / total
        lru, mine, best = (
            found[name] for name in ("nodes, LRU", "nodes, frequency", "nodes, offline")
        )
        if best[0] > lru[0]:
            gap = (mine[0] - lru[0]) / (best[0] - lru[0])
            result.aim(
                f"{where}: part of the gap in lineages served that is closed",
                gap,
                at_least=0.2,
                unit="",
            )
        if best[1] < lru[1]:
            gap = (lru[1] - mine[1]) / (lru[1] - best[1])
            result.aim(
                f"{where}: part of the gap in bytes loaded that is closed",
                gap,
                at_least=0.2,
                unit="",
            )
    return [result]


def replay(
    make: Make, flat: bool, asked: Sequence[str], sizes: dict[str, int], budget: float
) -> tuple[float, int]:
    """Return the part of the requests whose whole lineage was cached, and the bytes loaded."""
    requests = [_request(path, sizes, flat) for path in asked]
    policy, used, served, loaded = make(requests), 0, 0, 0
    known: dict[Hashable, int] = {}
    for request in requests:
        mine = {key for key, _ in request}
        missing = [(key, nbytes) for key, nbytes in request if key not in known]
        served += not missing
        for key, nbytes in missing:
            while used + nbytes > budget:
                victim = policy.victim(lambda other, mine=mine: other not in mine)  # type: ignore[misc]
                if victim is None:
                    break  # a lineage larger than the budget is used but not cached
                used -= known.pop(victim)
                policy.gone(victim)
            known[key] = nbytes
            used += nbytes
            loaded += nbytes
        policy.used(request)
    return served / len(requests), loaded


def _request(path: str, sizes: dict[str, int], flat: bool) -> Request:
    names = path.split("/")
    nodes = [(node, sizes[node]) for node in ("/".join(names[: i + 1]) for i in range(len(names)))]
    return [(path, sum(nbytes for _, nbytes in nodes))] if flat else nodes


def tree_of(nodes: int) -> list[str]:
    """Return the paths of a tree of ``nodes`` nodes, ten children each, depth-first."""
    found: list[str] = []

    def grow(path: str, depth: int) -> None:
        for i in range(FAN_OUT):
            if len(found) < nodes and depth < DEPTH:
                below = f"{path}/n{i}" if path else f"n{i}"
                found.append(below)
                grow(below, depth + 1)

    grow("", 0)
    return found


def zipf(paths: Sequence[str], skew: float, requests: int, *, seed: int = 1) -> list[str]:
    """Draw paths independently, the k-th most popular with weight 1 / k^skew, in random order."""
    draw = random.Random(seed)
    order = list(paths)
    draw.shuffle(order)
    return draw.choices(order, [1 / (k + 1) ** skew for k in range(len(order))], k=requests)
