"""How many processors there are for threads that hash or read."""

from __future__ import annotations

import os

__all__ = ["ENOUGH", "processors"]

ENOUGH = 4
"""Processors of which some are free for threads that read or hash. With fewer, such a thread takes
the time from its caller, from what computes beside it, or from torch's threads, which spin for a
while after each product."""


def processors() -> int:
    """Return how many processors this process may use.

    >>> processors() >= 1
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
