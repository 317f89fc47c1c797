"""The state and the counts of a cache, as a value."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CacheStats", "TierStats"]


@dataclass(frozen=True)
class TierStats:
    """The bytes and counts of one tier; times are in seconds.

    Args:
        name: ``host`` or ``device``; a base on the CPU has one tier, ``host``, for both.
        budget_bytes: the most that may be held; None: no bound.
        held_bytes: held now: adapters, loads in progress, and side paths.
        laid_out_bytes: the part of it that side paths take.
        in_use_bytes: the part of it that belongs to pinned nodes, which can't be evicted.
        ready_bytes: freed memory beside it, kept for reuse where the budget has room for it.
        nodes: adapters held now.
        loads, loaded_bytes, load_s: adapters that came in, from files or from the host, their
            bytes, and the time taken, prefetches included. A transfer to a device is asynchronous,
            so only its start is timed.
        slowest_s: the longest of these times.
        evictions, evicted_bytes: adapters evicted to make room.
        failures: loads that ended in an error.
    """

    name: str
    budget_bytes: int | None
    held_bytes: int = 0
    laid_out_bytes: int = 0
    in_use_bytes: int = 0
    ready_bytes: int = 0
    nodes: int = 0
    loads: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    slowest_s: float = 0.0
    evictions: int = 0
    evicted_bytes: int = 0
    failures: int = 0


@dataclass(frozen=True)
class CacheStats:
    """The counts of a cache since the model was attached.

    Args:
        requests: requests (for a path, a blend or a batch) whose lineages have nodes with files.
        served: the requests of which every node was cached.
        waited_s: seconds for which requests waited for loads.
        prefetched: nodes that a prefetch loaded.
        tiers: from the outside in: the host, and the device if it has memory of its own.

    >>> CacheStats(requests=4, served=3).hit_rate
    0.75
    """

    requests: int = 0
    served: int = 0
    waited_s: float = 0.0
    prefetched: int = 0
    tiers: tuple[TierStats, ...] = ()

    @property
    def hit_rate(self) -> float:
        """The fraction of requests whose every node was cached; 0.0 before the first request."""
        return self.served / self.requests if self.requests else 0.0
