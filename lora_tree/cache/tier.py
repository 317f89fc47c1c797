"""Tier: what one kind of memory holds for a cache, and who has to go when it is full.

    budget  ≥  adapters  +  reserved (being loaded)  +  laid out (what side paths made of adapters)

What has to make room goes in this order: what is laid out for paths used before; idle adapters, as the policy says.
What is in use is never asked. Every method is called with the cache's lock held.
"""

from __future__ import annotations

import sys
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
from .policy import Policy
from .shelf import Shelf
from .stats import TierStats

__all__ = ["Entry", "Tier"]


@dataclass(frozen=True, eq=False)
class Entry:
    """An adapter in a tier, and the bytes that it keeps alive."""

    arrived: Arrived
    nbytes: int


class Tier:
    """One kind of memory.

    Args:
        name: ``host`` or ``device``.
        budget_bytes: the most it may hold; None: no bound.
        policy: what goes first.
        lock: of the cache; whoever waits for room waits at it.
        budget_name: what its caller calls the budget.
        shelf: has the memory that was let go of, as much as there is room for.
    """

    def __init__(
        self,
        name: str,
        budget_bytes: int | None,
        policy: Policy,
        lock: threading.Condition,
        *,
        budget_name: str | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.name, self.budget_bytes, self.policy = name, budget_bytes, policy
        self.budget_name = budget_name or f"{name}_budget"
        self._lock = lock
        self._shelf = shelf
        self._entries: dict[Hashable, Entry] = {}
        self._pins: Counter[Hashable] = Counter()
        self._adapters = self._in_use = self._reserved = self._laid_out = 0
        self._refunds: deque[tuple[int, bool]] = (
            deque()
        )  # finalizers append, in whichever thread they run
        self._spare: list[weakref.ref[LastUsed[Any]]] = []
        self.churn_bytes = (
            0  # of what the allocator had for what is gone, since it was told to give memory back
        )
        self.passing = 0  # pins that last only while an adapter is sent on
        self.loads = self.loaded_bytes = self.evictions = self.evicted_bytes = self.failures = 0
        self.load_s = self.slowest_s = 0.0

    # ------------------------------------------------------------------ what is there
    def find(self, key: Hashable) -> Entry | None:
        return self._entries.get(key)

    def add(self, key: Hashable, entry: Entry, seconds: float) -> None:
        """An adapter came in, for which room was reserved."""
        self._entries[key] = entry
        self._adapters += entry.nbytes
        self.loads += 1
        self.loaded_bytes += entry.nbytes
        self.load_s += seconds
        self.slowest_s = max(self.slowest_s, seconds)

    def discard(self, key: Hashable) -> None:
        """It need not be here any more."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._adapters -= entry.nbytes
            self._in_use -= entry.nbytes if key in self._pins else 0
            self.policy.gone(key)

    def let_go(self, key: Hashable) -> bool:
        """`discard` it unless it is pinned; return whether it was discarded."""
        if key in self._pins:
            return False
        self.discard(key)
        return True

    def used(self, keys: Sequence[Hashable]) -> None:
        """A request uses these, from the root down."""
        self.policy.used([(key, self._entries[key].nbytes) for key in keys if key in self._entries])

    def pin(self, key: Hashable) -> None:
        """It is in use, once more."""
        self._in_use += 0 if key in self._pins else self._entries[key].nbytes
        self._pins[key] += 1

    def unpin(self, key: Hashable) -> None:
        """It is in use once less; fine where everything was cleared."""
        if key in self._pins:
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                self._in_use -= self._entries[key].nbytes
            self._lock.notify_all()

    def clear(self) -> None:
        """Everything goes, in use or not."""
        for key in list(self._entries):
            self.discard(key)
        self._pins.clear()

    # ------------------------------------------------------------------ room
    def reserve(self, nbytes: int, *, wait: bool) -> None:
        """Make room for what is about to be loaded.

        Args:
            wait: for what others are loading now, which can be evicted when it is there.

        Raises:
            BudgetError: there is none, and everything is in use.
        """
        self._make_room(nbytes, wait)
        self._reserved += nbytes

    def cancel(self, nbytes: int) -> None:
        """What was reserved is not needed, or has come in."""
        self._reserved -= nbytes
        self._lock.notify_all()

    def spare(self, kept: LastUsed[Any]) -> None:
        """What it keeps may go where room is needed."""
        self._spare.append(weakref.ref(kept))

    def lay_out(self, owner: object, nbytes: int, *, churns: bool) -> None:
        """Make room for what ``owner`` is about to lay out, and count it until that is gone.

        Args:
            churns: the memory is the allocator's, in small pieces, which it keeps for itself afterwards.

        Raises:
            BudgetError: there is none, and everything is in use.
        """
        self._make_room(nbytes, wait=True)
        self._laid_out += nbytes
        if churns:
            self._trim_shelf()
        weakref.finalize(owner, self._refunds.append, (nbytes, churns)).atexit = False

    @property
    def held_bytes(self) -> int:
        """Everything that counts."""
        while self._refunds:
            given_back, churned = self._refunds.popleft()
            self._laid_out -= given_back
            self.churn_bytes += given_back if churned else 0
        return self._adapters + self._reserved + self._laid_out

    @property
    def laid_out_bytes(self) -> int:
        return self._laid_out if self.held_bytes else 0

    @property
    def room_bytes(self) -> int:
        """What the budget leaves over."""
        return sys.maxsize if self.budget_bytes is None else self.budget_bytes - self.held_bytes

    def in_use_bytes(self, but: Sequence[Hashable] = ()) -> int:
        """Bytes of the adapters that are in use, without some of them."""
        return self._in_use - sum(
            self._entries[key].nbytes for key in set(but) if key in self._pins
        )

    def _make_room(self, nbytes: int, wait: bool) -> None:
        budget = self.budget_bytes
        while budget is not None and self.held_bytes + nbytes > budget:
            stays = self._in_use + self._reserved
            if stays + nbytes <= budget:  # else nothing is let go of in vain
                if any(kept is not None and kept.drop() for kept in (ref() for ref in self._spare)):
                    continue
                victim = self.policy.victim(
                    lambda key: key in self._entries and key not in self._pins
                )
                if victim is not None:
                    self.evictions += 1
                    self.evicted_bytes += self._entries[victim].nbytes
                    self.discard(victim)
                    continue
            if wait and nbytes <= budget and (self._reserved or self.passing):
                self._lock.wait()
            else:
                stays += self._laid_out
                raise BudgetError(
                    f"{format_bytes(nbytes)} more are needed, and {format_bytes(stays)} are in use; "
                    f"{self.budget_name} is {format_bytes(budget)}",
                    f"{self.budget_name}={stays + nbytes} (bytes) is enough for what is in use now and this",
                    "or let go of something first: model.deactivate()",
                )
        self._trim_shelf()

    def _trim_shelf(self) -> None:
        if self._shelf is not None:
            self._shelf.at_most(self.room_bytes)

    def stats(self) -> TierStats:
        """What is there now, and what happened so far."""
        return TierStats(
            name=self.name,
            budget_bytes=self.budget_bytes,
            held_bytes=self.held_bytes,
            laid_out_bytes=self._laid_out,
            in_use_bytes=self.in_use_bytes(),
            ready_bytes=self._shelf.ready_bytes if self._shelf is not None else 0,
            nodes=len(self._entries),
            loads=self.loads,
            loaded_bytes=self.loaded_bytes,
            load_s=self.load_s,
            slowest_s=self.slowest_s,
            evictions=self.evictions,
            evicted_bytes=self.evicted_bytes,
            failures=self.failures,
        )
