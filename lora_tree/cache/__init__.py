"""Adapters in tiers, disk → host → device, under budgets; see docs/cache.md.

    files ──one read──▶ host: one packed buffer, pinned for CUDA ──one copy──▶ device
                        └── on a CPU base these two are one tier ──┘

Law: a budget bounds what is held, whatever is asked for; what is in use stays; and what an adapter is does not depend
on whether it was cached. `Cache` says who waits for whom, `Tier` what is held, `Policy` what goes first, `Link` how an
adapter gets from one memory to the other.
"""

from .cache import Cache, Hold
from .policy import Frequency, Lru, Policy
from .stats import CacheStats, TierStats

__all__ = ["Cache", "CacheStats", "Frequency", "Hold", "Lru", "Policy", "TierStats"]
