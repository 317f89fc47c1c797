"""Load one adapter into a tier: from its files to the host, from the host to the device.

    load(device) ──not there──▶ load(host), pinned ──not there──▶ read the files
         ◀── send, then unpin the host's ──          ◀── pack into one buffer

While a thread hashes what was read, the buffer is page-locked, the adapter is sent on, and the
request prepares its plan (`EarlyUse`). If the hash is wrong all of it is dropped.

Laws. One thread loads an adapter, and the others that need it wait for that thread. No file is read
and nothing is sent while the lock is held. Room is reserved before the first byte is read. A load
that fails, or is interrupted, gives its room back and leaves no trace.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Hashable
from typing import TypeAlias

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import LoraTreeError, StateError
from ..storage import Source
from .copies import TreeSource, cache_key
from .link import Arrived, Link
from .pack import buffer_of, is_vacated, pack, packed_bytes
from .page_locked import PageLocked
from .reservation import Reservation
from .shelf import Shelf
from .tier import Resident, Tier

__all__ = ["EarlyUse", "Loader"]

EarlyUse: TypeAlias = Callable[[Arrived], object]
"""Called with an adapter that has arrived in a tier but whose hash is not known yet, to prepare for
it. It must not wait for room in a tier, because the load holds some itself."""


class Loader:
    """The tiers of a cache, and the way of an adapter into them.

    Args:
        lock: the cache's lock. It guards the tiers, `link`, `closed` and `_loading`.
        tiers: from the outside in.
        link: the way from the host to the device; None: the two are one tier.
        memory: allocates host memory.
    """

    def __init__(
        self,
        lock: threading.Condition,
        tiers: list[Tier],
        link: Link | None,
        memory: Shelf | PageLocked,
    ) -> None:
        self.lock = lock
        self.tiers, self.link = tiers, link
        self.closed = False
        self.memory = memory
        self._loading: set[tuple[int, Hashable]] = set()  # (level, key) of the loads in progress
        # An entry is written by the thread that made the adapter, before
        # another thread can see the adapter.
        self._origins: weakref.WeakKeyDictionary[Adapter, Hashable] = weakref.WeakKeyDictionary()
        # Adapters on the device, under the key of their tier. A plan may keep one after it was
        # evicted. When it is needed again it is given memory, and the plan is valid again.
        self._sent: weakref.WeakValueDictionary[Hashable, Adapter] = weakref.WeakValueDictionary()

    @property
    def top(self) -> Tier:
        """The last tier, whose adapters the base computes with."""
        return self.tiers[-1]

    def load(
        self,
        level: int,
        path: str,
        source: Source,
        *,
        pinned: bool = False,
        wait: bool = True,
        ahead: EarlyUse | None = None,
    ) -> Resident:
        """Return a node's adapter in a tier, loading it there if it is missing.

        Args:
            level: the index of the tier; 0 is the host.
            path: the node, for errors.
            pinned: whether to pin the adapter; otherwise only the policy notes the use.
            wait: whether to wait for room that other threads are about to free.
            ahead: called with the adapter before its hash is known, if it is read from files and
                there is time.

        Raises:
            FolderError, FormatError: the files are gone, broken, or differ from the lock.
            BudgetError: there is no room.
            StateError: the model was detached meanwhile.
        """
        try:
            return self._load(level, path, source, pinned, wait, ahead)
        except LoraTreeError as error:
            raise error.within(path) from error

    def check_open(self) -> None:
        """Raise if the model was detached; called with the lock held.

        Raises:
            StateError: it was.
        """
        if self.closed:
            raise StateError(
                "the model was detached while it was being loaded", "attach the tree again"
            )

    def origin(self, adapter: Adapter) -> Hashable:
        """Return a key for an adapter's numbers: its files' key if the lock has one, else a weak
        reference to the adapter.
        """
        return self._origins.get(adapter) or weakref.ref(adapter)

    def follow(self, tiers: list[Tier], link: Link | None, memory: Shelf | PageLocked) -> None:
        """Load into other tiers from now on, over another link; called with the lock held."""
        self.tiers[-1].free_all()
        self.tiers, self.link, self.memory = tiers, link, memory
        self._sent.clear()

    def _load(
        self,
        level: int,
        path: str,
        source: Source,
        pinned: bool,
        wait: bool,
        ahead: EarlyUse | None = None,
    ) -> Resident:
        tier, key = self.tiers[level], cache_key(source)
        start = time.perf_counter()
        reservation = Reservation(tier, self.lock, wait)
        claimed = False
        try:
            with self.lock:
                found = self._wait_for_other(tier, level, key)
                if found is not None:
                    _use(tier, key, pinned)
                    return found
                self.check_open()
                # Before the claim itself: an interrupt may come between the two lines, and
                # taking back a claim that was not made does no harm, while one that stays
                # would make other threads wait forever.
                claimed = True
                self._loading.add((level, key))
            if level == 0:
                arrived = self._read(source, reservation, ahead)
            elif isinstance(source, TreeSource):
                arrived = self._send_from_tree(source, reservation)
            else:
                arrived = self._send(level, path, source, reservation, ahead)
            buffer = arrived.buffer
            # To ask hundreds of tensors takes as long as to start the transfer.
            nbytes = packed_bytes(arrived.adapter) if buffer is None else buffer.numel()
            reservation.resize(nbytes)
            resident = Resident(arrived, nbytes)
            with self.lock:
                # In one step with `add`, so that no other thread sees these bytes counted twice, or
                # not at all.
                reservation.close()
                if pinned:
                    self.check_open()
                if not self.closed:
                    tier.add(key, resident, time.perf_counter() - start)
                    _use(tier, key, pinned)
            return resident
        finally:
            if claimed:
                with self.lock:
                    if reservation.open:
                        tier.failures += 1
                        reservation.close()
                    self._loading.discard((level, key))
                    # Wake the threads in `_wait_for_other`: they find the adapter, or load it
                    # themselves and meet the error in their own call.
                    self.lock.notify_all()

    def _wait_for_other(self, tier: Tier, level: int, key: Hashable) -> Resident | None:
        """Wait while another thread loads the adapter; return it, or None to load it here."""
        found = tier.find(key)
        while found is None and (level, key) in self._loading:
            self.lock.wait()
            found = tier.find(key)
        return found

    def _read(self, source: Source, reservation: Reservation, ahead: EarlyUse | None) -> Arrived:
        """Read files into one host buffer."""

        def first(nbytes: int) -> Tensor:
            # Not `extend`: a source that finds its files changed starts again,
            # and has freed its first buffer.
            reservation.resize(nbytes)
            return memory.take(nbytes)

        def second(nbytes: int) -> Tensor:
            # `pack` copies, so for a moment both buffers exist.
            reservation.extend(nbytes)
            return memory.take(nbytes)

        def unhashed(adapter: Adapter) -> None:
            buffer = buffer_of(adapter)
            if buffer is None:
                return  # it will be packed, and be another object then
            finish(adapter, buffer)
            if ahead is not None:
                ahead(Arrived(adapter))

        def finish(adapter: Adapter, buffer: Tensor) -> None:
            if isinstance(memory, PageLocked):
                memory.lock(buffer)
            if source.key is not None:
                self._origins[adapter] = source.key

        memory = self.memory
        # A prefetch thread or a caller's inference_mode must not mark the
        # factors: they may train later.
        with torch.inference_mode(False), torch.no_grad():
            adapter = pack(source.load(first, unhashed), second)
        buffer = buffer_of(adapter)
        assert buffer is not None, "it was packed"
        finish(adapter, buffer)
        return Arrived(adapter)

    def _send(
        self,
        level: int,
        path: str,
        source: Source,
        reservation: Reservation,
        ahead: EarlyUse | None,
    ) -> Arrived:
        """Send an adapter from the tier below, pinned there until the transfer has begun."""
        link = self.link
        assert link is not None
        below, key = self.tiers[level - 1], cache_key(source)
        # Host adapter → where it was sent before its hash was known. One at most.
        early: dict[Adapter, Arrived] = {}

        def drop_early() -> None:
            while early:
                early.popitem()[1].vacate()

        def unhashed(here: Arrived) -> None:
            drop_early()  # the files were read a second time
            if not reservation.try_resize(packed_bytes(here.adapter)):
                return
            arrived = early[here.adapter] = self._start_transfer(link, here.adapter, source)
            self._set_origin(arrived.adapter, here.adapter)
            if ahead is not None:
                ahead(arrived)

        try:
            # `_load` and not `load`: the caller names the node in the error.
            resident = self._load(
                level - 1, path, source, pinned=True, wait=reservation.wait, ahead=unhashed
            )
        except BaseException:
            drop_early()
            raise
        with self.lock:
            below.passing += 1
            below.used([key])
        try:
            reservation.resize(resident.nbytes)
            sent = early.pop(resident.arrived.adapter, None)
            arrived = sent or self._start_transfer(link, resident.arrived.adapter, source)
        finally:
            drop_early()
            with self.lock:
                below.passing -= 1
                below.unpin(key)
        self._set_origin(arrived.adapter, resident.arrived.adapter)
        return arrived

    def _set_origin(self, sent: Adapter, host: Adapter) -> None:
        """Give the adapter on the device the identity of the one in host memory."""
        origin = self._origins.get(host)
        if origin is not None:
            self._origins[sent] = origin

    def _send_from_tree(self, source: TreeSource, reservation: Reservation) -> Arrived:
        """Send an adapter from the tree.

        The host's tier gets no copy of it: it lies in host memory anyway.
        """
        link = self.link
        assert link is not None
        adapter = source.load()
        reservation.resize(packed_bytes(adapter))
        with torch.inference_mode(False), torch.no_grad():
            arrived = self._start_transfer(link, adapter, source)
        self._origins[arrived.adapter] = self.origin(source.adapter)
        return arrived

    def _start_transfer(self, link: Link, adapter: Adapter, source: Source) -> Arrived:
        """Start an adapter's transfer, into the adapter sent before if that was vacated."""
        key, again = cache_key(source), None
        # Without a key from the lock, its files may have another content by now.
        comes_back = source.key is not None or isinstance(source, TreeSource)
        if comes_back:
            again = self._sent.get(key)
            if again is not None and not is_vacated(again):
                again = None
        arrived = link.send(adapter, again)
        memory, buffer = self.memory, buffer_of(adapter)
        if isinstance(memory, PageLocked) and buffer is not None:
            memory.note_copy(buffer, arrived.event)
        if comes_back:
            self._sent[key] = arrived.adapter
        return arrived


def _use(tier: Tier, key: Hashable, pinned: bool) -> None:
    """Pin an adapter for a request; or tell the policy of the use, for a load outside of one."""
    if pinned:
        tier.pin(key)
    else:
        tier.used([key])
