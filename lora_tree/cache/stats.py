"""What a cache has done so far, as a value."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CacheStats", "TierStats"]


@dataclass(frozen=True)
class TierStats:
    """One kind of memory.

    Args:
        name: ``host`` or ``device``; a base on the CPU has one tier, ``host``, for both.
        budget_bytes: the most that may be held; None: no bound.
        held_bytes: what is held now: adapters, what is being loaded, and what is laid out for side paths.
        laid_out_bytes: as much of it as is laid out for side paths.
        in_use_bytes: as much of it as belongs to nodes that are in use, which can't be evicted.
        ready_bytes: memory beside it that was let go of, for what comes next, where the budget has room for it.
        nodes: adapters held now.
        loads, loaded_bytes, load_s: adapters that came in, from files or from the host, their bytes, and the time taken
            in seconds, also in the background. Transfers to a device run on; of these it is the time to start them.
        slowest_s: the longest of these times.
        evictions, evicted_bytes: adapters let go of for others.
        failures: loads that came to nothing.
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
    """A cache, since the model was attached.

    Args:
        requests: lineages (of a path, a blend or a batch) that were asked for, and have nodes with files.
        served: those of them whose every node was there already.
        waited_s: seconds for which requests waited for what was not.
        prefetched: nodes that a prefetch brought in.
        tiers: from the outside in: the host, and the device where that has memory of its own.

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
        """The part of the requests whose whole lineage was served from the cache; 0.0 before the first."""
        return self.served / self.requests if self.requests else 0.0
