"""The number of processors for threads that hash or read."""

from __future__ import annotations

import os

__all__ = ["ENOUGH", "processors"]

ENOUGH = 4
"""The fewest processors with which threads that read or hash pay off. With fewer, such a thread
takes the time from its caller, from a computation beside it, or from torch's threads, which spin
for a while after each product."""


def processors() -> int:
    """Return how many processors this process may use.

    >>> processors() >= 1
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
