"""One kind of memory of a cache: its adapters, its budget, and the order in which it makes room.

    budget  ≥  adapters  +  reserved (being loaded)  +  laid out (side paths made of adapters)

A full tier makes room in this order: side paths laid out for earlier paths, which can be computed
again without a file; then idle adapters, in the policy's order. Pinned adapters are never
evicted.

Thread safety: every method is called with the cache's lock held, and that lock guards every
field. The one exception is `_refunds`: finalizers append to it in whichever thread collects the
owner.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..budget import format_bytes
from ..engine.last_used import LastUsed
from ..errors import BudgetError
from .link import Arrived
from .page_locked import PageLocked
from .policy import Policy
from .shelf import Shelf
from .stats import TierStats

__all__ = ["Resident", "Tier"]


@dataclass(frozen=True, eq=False)
class Resident:
    """An adapter in a tier, and the bytes that it keeps alive."""

    arrived: Arrived
    nbytes: int


class Tier:
    """One kind of memory.

    Args:
        name: ``host`` or ``device``.
        budget_bytes: the most it may hold; None: no bound.
        policy: chooses the next adapter to evict.
        lock: the cache's lock; a thread that waits for room waits on it.
        budget_name: the argument by which the caller set the budget, for errors.
        shelf: freed host memory that is kept for reuse, as far as the budget has room for it.
    """

    def __init__(
        self,
        name: str,
        budget_bytes: int | None,
        policy: Policy,
        lock: threading.Condition,
        *,
        budget_name: str | None = None,
        shelf: Shelf | PageLocked | None = None,
    ) -> None:
        self.name, self.budget_bytes, self.policy = name, budget_bytes, policy
        self.budget_name = budget_name or f"{name}_budget"
        self._lock = lock
        self._shelf = shelf
        self._residents: dict[Hashable, Resident] = {}
        self._pins: Counter[Hashable] = Counter()
        self._adapters = self._in_use = self._reserved = self._laid_out = 0  # bytes
        # (bytes, churns) of owners that were collected. A finalizer may run in
        # any thread, also while this thread holds the lock, so it must not take
        # the lock. A deque's append is atomic.
        self._refunds: deque[tuple[int, bool]] = deque()
        self._spare: list[weakref.ref[LastUsed[Any]]] = []
        # Bytes of side paths that went back to the allocator since the cache last trimmed it.
        self.churn_bytes = 0
        # Adapters pinned only while they are sent on to the next tier. Another thread may wait for
        # these to become idle, because it needs no action of the user.
        self.passing = 0
        self._left = False
        self.loads = self.loaded_bytes = self.evictions = self.evicted_bytes = self.failures = 0
        self.load_s = self.slowest_s = 0.0

    # ------------------------------------------------------------------ adapters
    def find(self, key: Hashable) -> Resident | None:
        """Return the adapter under a key, or None."""
        return self._residents.get(key)

    def add(self, key: Hashable, resident: Resident, seconds: float) -> None:
        """Admit an adapter that took ``seconds`` to load; its room was reserved before."""
        self._residents[key] = resident
        self._adapters += resident.nbytes
        self.loads += 1
        self.loaded_bytes += resident.nbytes
        self.load_s += seconds
        self.slowest_s = max(self.slowest_s, seconds)

    def discard(self, key: Hashable) -> None:
        """Remove an adapter that is not pinned; a no-op for an unknown key."""
        # The caller that pinned it still reads it, and calls `unpin` later.
        assert key not in self._pins, f"{key!r} is pinned"
        resident = self._residents.pop(key, None)
        if resident is None:
            return
        self._adapters -= resident.nbytes
        self.policy.gone(key)

    def discard_unpinned(self, key: Hashable) -> bool:
        """Discard an adapter unless it is pinned; return False if it is."""
        if key in self._pins:
            return False
        self.discard(key)
        return True

    def used(self, keys: Sequence[Hashable]) -> None:
        """Tell the policy that one request uses these adapters, from the root down."""
        self.policy.used(
            [(key, self._residents[key].nbytes) for key in keys if key in self._residents]
        )

    def pin(self, key: Hashable) -> None:
        """Keep an adapter from eviction until the matching `unpin`; pins are counted."""
        if key not in self._pins:
            self._in_use += self._residents[key].nbytes
        self._pins[key] += 1

    def unpin(self, key: Hashable) -> None:
        """Take back one `pin`; a no-op after `clear`."""
        if key not in self._pins:
            return
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]
            self._in_use -= self._residents[key].nbytes
            if self._left:
                self._vacate(key)
        # A thread may be waiting in `_make_room` for this adapter to become idle.
        self._lock.notify_all()

    def free_all(self) -> None:
        """Free every idle adapter's memory now, and that of a pinned one at its last `unpin`.

        Called when the base was moved to another device and no longer uses this tier.
        """
        self._left = True
        for key in list(self._residents):
            if key not in self._pins:
                self._vacate(key)

    def clear(self) -> None:
        """Remove every adapter, pinned or not: the cache is closed, and every pin is forgotten."""
        self._pins.clear()
        self._in_use = 0
        for key in list(self._residents):
            self.discard(key)

    # ------------------------------------------------------------------ room
    def reserve(self, nbytes: int, *, wait: bool) -> None:
        """Make room for an adapter that is about to be loaded.

        Args:
            wait: whether to wait for adapters that other threads are loading or sending on: these
                can be evicted afterwards. A thread that holds a reservation itself must not wait
                for others.

        Raises:
            BudgetError: everything that is held is in use.
        """
        self._make_room(nbytes, wait)
        self._reserved += nbytes

    def cancel(self, nbytes: int) -> None:
        """Give back reserved bytes, because the load failed or its adapter was added."""
        self._reserved -= nbytes
        self._lock.notify_all()

    def spare(self, kept: LastUsed[Any]) -> None:
        """Allow the tier to drop the values of ``kept``, held weakly, when it needs room."""
        self._spare.append(weakref.ref(kept))

    def lay_out(self, owner: object, nbytes: int, *, churns: bool) -> None:
        """Make room for the side paths of ``owner`` and count them until ``owner`` is collected.

        Args:
            churns: whether the memory comes in small pieces from the allocator, which keeps freed
                pieces.

        Raises:
            BudgetError: everything that is held is in use.
        """
        self._make_room(nbytes, wait=True)
        self._laid_out += nbytes
        if churns:
            # This memory does not come from the shelf, so the shelf has to leave room for it.
            self._trim_shelf()
        # The finalizer holds the deque and not the tier, so an owner keeps no tier alive.
        weakref.finalize(owner, self._refunds.append, (nbytes, churns)).atexit = False

    def busy_bytes(self, but: Sequence[Hashable] = ()) -> int:
        """Return the bytes that can't be evicted: side paths and pinned adapters except ``but``."""
        self._take_refunds()
        pinned_but = {key for key in but if key in self._pins}
        return (
            self._in_use - sum(self._residents[key].nbytes for key in pinned_but) + self._laid_out
        )

    def stats(self) -> TierStats:
        """Return the bytes held now, and the counts since the tier was made."""
        self._take_refunds()
        return TierStats(
            name=self.name,
            budget_bytes=self.budget_bytes,
            held_bytes=self._held_bytes,
            laid_out_bytes=self._laid_out,
            in_use_bytes=self._in_use,
            ready_bytes=0 if self._shelf is None else self._shelf.ready_bytes,
            nodes=len(self._residents),
            loads=self.loads,
            loaded_bytes=self.loaded_bytes,
            load_s=self.load_s,
            slowest_s=self.slowest_s,
            evictions=self.evictions,
            evicted_bytes=self.evicted_bytes,
            failures=self.failures,
        )

    # ------------------------------------------------------------------ private
    @property
    def _held_bytes(self) -> int:
        """The bytes that count against the budget, as of the last `_take_refunds`."""
        return self._adapters + self._reserved + self._laid_out

    def _take_refunds(self) -> None:
        """Subtract the side paths whose owners were collected since the last call."""
        while self._refunds:
            nbytes, churned = self._refunds.popleft()
            self._laid_out -= nbytes
            if churned:
                self.churn_bytes += nbytes

    def _make_room(self, nbytes: int, wait: bool) -> None:
        self._take_refunds()
        budget = self.budget_bytes
        if budget is None:
            return
        while self._held_bytes + nbytes > budget:
            stays = self._in_use + self._reserved
            # If it can't fit even with everything idle gone, nothing is evicted in vain.
            if stays + nbytes > budget or not (self._drop_spare() or self._evict()):
                others_may_finish = self._reserved > 0 or self.passing > 0
                if not (wait and nbytes <= budget and others_may_finish):
                    raise self._full_error(nbytes, stays + self._laid_out, budget)
                self._lock.wait()
            # Dropping side paths, and waiting, let finalizers run: count again before every
            # decision.
            self._take_refunds()
        self._trim_shelf()

    def _drop_spare(self) -> bool:
        """Drop the side paths kept for one path used before; return whether there were any."""
        for ref in self._spare:
            kept = ref()
            if kept is not None and kept.drop():
                return True
        return False

    def _evict(self) -> bool:
        """Evict the adapter that the policy names; return whether there was an idle one."""
        victim = self.policy.victim(lambda key: key in self._residents and key not in self._pins)
        if victim is None:
            return False
        self.evictions += 1
        self.evicted_bytes += self._residents[victim].nbytes
        self._vacate(victim)
        return True

    def _vacate(self, key: Hashable) -> None:
        """Discard an adapter that is not pinned, and free its memory if it is on a device.

        In host memory other threads may have it from `Cache.read`, without a pin. On a device only
        the holder of a pin reads it.
        """
        resident = self._residents[key]
        self.discard(key)
        resident.arrived.vacate()

    def _full_error(self, nbytes: int, stays: int, budget: int) -> BudgetError:
        enough = f"{self.budget_name}={stays + nbytes} (bytes)"
        return BudgetError(
            f"{format_bytes(nbytes)} more are needed, and {format_bytes(stays)} are in use; "
            f"{self.budget_name} is {format_bytes(budget)}",
            f"set {enough} or more",
        )

    def _trim_shelf(self) -> None:
        """Keep no more freed memory than the budget has room for; without one the shelf's own
        bound counts.
        """
        if self._shelf is None or self.budget_bytes is None:
            return
        self._take_refunds()
        self._shelf.trim_to(self.budget_bytes - self._held_bytes)
