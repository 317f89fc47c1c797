"""Bytes that a tier sets aside for one adapter while it is being loaded."""

from __future__ import annotations

import threading

from ..errors import BudgetError
from .tier import Tier

__all__ = ["Reservation"]


class Reservation:
    """The bytes reserved for one adapter; corrected as more is known of its size, until `close`.

    Args:
        tier: where the adapter will be.
        lock: the cache's lock; taken by every method.
        wait: whether the first bytes may wait for other loads to finish.
    """

    def __init__(self, tier: Tier, lock: threading.Condition, wait: bool) -> None:
        self._tier, self._lock, self.wait = tier, lock, wait
        self._nbytes = 0
        self.open = True

    def resize(self, nbytes: int) -> None:
        """Reserve ``nbytes`` in place of what was reserved before.

        Raises:
            BudgetError: there is no room for the difference.
        """
        with self._lock:
            if nbytes <= self._nbytes:
                self._tier.cancel(self._nbytes - nbytes)
            elif self._nbytes == 0:
                self._tier.reserve(nbytes, wait=self.wait)
            else:
                # Two loads that each hold some bytes and wait for the other's would wait forever.
                self._tier.reserve(nbytes - self._nbytes, wait=False)
            self._nbytes = nbytes

    def try_resize(self, nbytes: int) -> bool:
        """Resize without waiting for other loads; return False if there is no room now."""
        wait, self.wait = self.wait, False
        try:
            self.resize(nbytes)
        except BudgetError:
            return False
        finally:
            self.wait = wait
        return True

    def extend(self, nbytes: int) -> None:
        """Reserve ``nbytes`` in addition; raises as `resize`."""
        self.resize(self._nbytes + nbytes)

    def close(self) -> None:
        """Give all bytes back; a second call is a no-op."""
        self._tier.cancel(self._nbytes)
        self._nbytes = 0
        self.open = False
