"""Adapters in tiers, disk → host → device, under budgets; see docs/cache.md.

    files ──one read──▶ host: one packed buffer, page-locked for CUDA ──one copy──▶ device
                        └── on a CPU base these two are one tier ──┘

Laws. A tier never holds more bytes than its budget. An adapter in use is never evicted. The
numbers of an adapter do not depend on whether it was cached.

`Cache` answers requests, `Loader` brings one adapter into a tier, `Tier` counts bytes and evicts in
the order of a `Policy`, and a `Link` copies from host to device.
"""

from .cache import Cache, Hold
from .policy import Frequency, Lru, Policy
from .stats import CacheStats, TierStats

__all__ = ["Cache", "CacheStats", "Frequency", "Hold", "Lru", "Policy", "TierStats"]
