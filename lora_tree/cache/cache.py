"""The adapters of an attached tree: in the memory where they are needed, within the budgets.

    hold(paths)      the adapters of a request, pinned until the hold is released
    read(path)       one adapter, for the tree itself
    prefetch(paths)  the same in the background; its errors are left to the call that needs the node

Without budgets, an adapter that is loaded from files goes to the tree, which keeps it. A device
with memory of its own gets a copy of every adapter it needs, also of those that lie in the tree.

Thread safety: any thread may call any method. One lock (a `threading.Condition` over a reentrant
lock) guards the tiers, the copies and the counts. It is never held while a file is read or a
transfer is started. The shelf has a lock of its own, which may be taken while this one is held,
and never the other way round.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..budget import Budgets
from ..engine.behaviour import Ahead
from ..engine.last_used import LastUsed
from ..engine.ledger import FREE_FIRST, Lender, ordinary
from ..errors import BudgetError
from ..storage import Source
from ..tree import AdapterTree, Node
from .background import Background
from .copies import TreeCopies, cache_key
from .link import Arrived, Link
from .loader import Loader
from .page_locked import PageLocked
from .policy import Frequency, Policy
from .shelf import PAGED, Shelf, trim
from .shortage import explain_shortage
from .stats import CacheStats
from .tier import Resident, Tier

__all__ = ["Cache", "Hold"]

# Side paths of batches come and go in small pieces, and an allocator keeps the
# freed pieces. After this many bytes it is asked to give them back: often enough
# for the budget, too seldom to cost time.
CHURN_BYTES = 4 << 20


class Cache:
    """The adapters of one tree for one base.

    Args:
        tree: the tree whose adapters are cached; under budgets it reads files through the cache.
        budgets: bytes for each kind of memory.
        policy: makes the eviction order of a tier; called once for each tier.
        link: the way to a device that has memory of its own; None: adapters are used in host
            memory.
    """

    def __init__(
        self,
        tree: AdapterTree,
        budgets: Budgets | None = None,
        *,
        policy: Callable[[], Policy] = Frequency,
        link: Link | None = None,
    ) -> None:
        self._tree = tree
        self._budgets = budgets or Budgets()
        self._policy = policy
        self._lock = threading.Condition()
        self._shelf = Shelf()
        memory = self._host_memory(link)
        tiers = self._new_tiers(link, memory)
        self._loader = Loader(self._lock, tiers, link, memory)
        self._copies = TreeCopies()
        self._background = Background()
        self._requests = self._served = self._prefetched = 0
        self._waited_s = 0.0
        self.bounded = self._budgets.bounded
        # A cache may be collected without `close`; its freed memory would stay
        # mapped. At exit the system takes it anyway.
        weakref.finalize(self, self._shelf.close).atexit = False

    # ------------------------------------------------------------------ asking for adapters
    def hold(self, paths: Iterable[str], ahead: Ahead | None = None) -> Hold:
        """Return the adapters of some nodes, from the root down, pinned until the hold is released.

        Args:
            paths: the nodes.
            ahead: called with the adapters while one of them is still being hashed; see `Ahead`.

        Raises:
            FolderError, FormatError: a node's files are gone, broken, or differ from the lock;
                names the node.
            BudgetError: they do not fit in beside what is in use already; says how much is needed.
            StateError: the model was detached meanwhile.
        """
        start = time.perf_counter()
        paths = list(paths)
        nodes = [self._tree[path] for path in paths]
        has_files = any(node.source is not None for node in nodes)
        unread = {n.path: n.source for n in nodes if n.loaded is None and n.source is not None}
        waited = False
        if not self.bounded and unread:
            waited = self._load_into_tree(unread, {node.path: node for node in nodes})
            # The tree has new node values for these now.
            nodes = [self._tree[path] for path in paths]
        adapters = {node.path: node.loaded for node in nodes if node.loaded is not None}
        needed = self._needed(nodes)
        keys = [cache_key(source) for source in needed.values()]
        tier = self._loader.top
        residents: dict[str, Resident | None] = {}
        if needed or self._loader.link is not None:
            waited = self._pin(tier, needed, adapters, ahead) or waited
        with self._lock:
            # `close` clears the tiers, pinned adapters too.
            self._loader.check_open()
            if needed:
                for path, source in needed.items():
                    residents[path] = tier.find(cache_key(source))
                tier.used(keys)
            if has_files:
                self._requests += 1
                self._served += not waited
            if waited:
                self._waited_s += time.perf_counter() - start
        link = self._loader.link
        for path, resident in residents.items():
            assert resident is not None, "a pinned adapter stays"
            adapters[path] = resident.arrived.adapter
            if link is not None:
                link.wait(resident.arrived)
        if self.bounded and tier.churn_bytes > CHURN_BYTES:
            tier.churn_bytes = 0
            trim()
        return Hold(partial(self._unpin, tier, keys), adapters)

    def read(self, path: str, source: Source) -> Adapter:
        """Return one node's adapter in host memory; the policy decides how long it stays cached.

        Raises:
            FolderError, FormatError: its files are gone, broken, or differ from the lock; names
                the node.
            BudgetError: it does not fit in beside what is in use.
        """
        try:
            return self._loader.load(0, path, source).arrived.adapter
        except BudgetError as error:
            raise error.advised(FREE_FIRST) from error

    def prefetch(self, paths: Iterable[str]) -> None:
        """Load some nodes in the background, in this order."""
        needed = self._needed([self._tree[path] for path in paths])
        self._background.add([partial(self._try, path, source) for path, source in needed.items()])

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until every prefetch is done or has failed; return False on a timeout."""
        return self._background.wait(timeout_s)

    # ------------------------------------------------------------------ for the model
    def follow(self, link: Link | None) -> None:
        """Send adapters to another device from now on, because the base was moved; empty the cache.

        Earlier holds keep their adapters. They unpin in the old tier, which lives as long as the
        last of them.
        """
        with self._lock:
            before, memory = self._loader.memory, self._host_memory(link)
            self._loader.follow(self._new_tiers(link, memory), link, memory)
            if isinstance(before, PageLocked):
                before.close()
            self._copies.clear()

    def origin(self, adapter: Adapter) -> Hashable:
        """Return a key for an adapter's numbers: see `Loader.origin`."""
        return self._loader.origin(adapter)

    @property
    def reclaims(self) -> bool:
        """True if no plan keeps an evicted adapter's memory: it is freed, or nothing is evicted."""
        return not self.bounded or self._loader.link is not None

    def spare(self, kept: LastUsed[Any]) -> None:
        """Allow the cache to drop the values of ``kept``, held weakly, when it needs room."""
        with self._lock:
            self._loader.top.spare(kept)

    def charge(self, owner: object, nbytes: int) -> None:
        """Make room for the side paths of ``owner``, and count them until ``owner`` is collected.

        Raises:
            BudgetError: everything that is held is in use.
        """
        if nbytes:
            with self._lock:
                self._loader.top.lay_out(owner, nbytes, churns=self._loader.link is None)

    def lend(self, owner: object, nbytes: int) -> Lender:
        """Charge the bytes, and return a function that allocates them, from freed memory first.

        Raises:
            BudgetError: everything that is held is in use.
        """
        if nbytes:
            with self._lock:
                churns = self._loader.link is None and nbytes < PAGED
                self._loader.tiers[-1].lay_out(owner, nbytes, churns=churns)
        return self._allocate_lent if self._loader.link is None else ordinary

    def stats(self) -> CacheStats:
        """Return what the cache holds now, and what it has done since the model was attached."""
        with self._lock:
            tiers = tuple(tier.stats() for tier in self._loader.tiers)
            return CacheStats(self._requests, self._served, self._waited_s, self._prefetched, tiers)

    def close(self) -> None:
        """Release everything; the tree must not ask for adapters here any more."""
        self._background.forget()
        with self._lock:
            # Set before the tiers are cleared: a load that is in progress must
            # not add its adapter afterwards.
            self._loader.closed = True
            for tier in self._loader.tiers:
                tier.clear()
        self._loader.memory.close()
        self._shelf.close()

    # ------------------------------------------------------------------ private
    def _host_memory(self, link: Link | None) -> Shelf | PageLocked:
        """Return the allocator of the host's adapters; the cache's end unmaps its freed memory."""
        if link is None:
            return self._shelf
        memory = PageLocked(link)
        weakref.finalize(self, memory.close).atexit = False
        return memory

    def _new_tiers(self, link: Link | None, memory: Shelf | PageLocked) -> list[Tier]:
        """Return empty tiers: host and device; on a CPU base one, with the smaller budget."""
        host_bytes, device_bytes = self._budgets.host_bytes, self._budgets.device_bytes
        if link is not None:
            return [
                Tier("host", host_bytes, self._policy(), self._lock, shelf=memory),
                Tier("device", device_bytes, self._policy(), self._lock),
            ]
        named = [(host_bytes, "host"), (device_bytes, "device")]
        given = [(nbytes, name) for nbytes, name in named if nbytes is not None]
        nbytes, name = min(given, default=(None, "host"))
        tier = Tier(
            "host",
            nbytes,
            self._policy(),
            self._lock,
            budget_name=f"{name}_budget",
            shelf=memory,
        )
        return [tier]

    def _pin(
        self,
        tier: Tier,
        needed: Mapping[str, Source],
        others: Mapping[str, Adapter],
        ahead: Ahead | None,
    ) -> bool:
        """Pin adapters in the last tier and load those that are missing; return whether any were.

        Args:
            tier: the last.
            needed: node → its source.
            others: the adapters of the request that are used where they lie.
            ahead: see `hold`.

        On an error none of them stays pinned; those that were loaded stay cached.
        """
        level = len(self._loader.tiers) - 1
        pinned: list[Hashable] = []
        missing: dict[str, Source] = {}
        with self._lock:
            # All that are cached are pinned before the first load: that one may
            # evict, and must not take these.
            self._copies.discard_collected(tier)
            for path, source in needed.items():
                key = cache_key(source)
                if tier.find(key) is None:
                    missing[path] = source
                else:
                    tier.pin(key)
                    pinned.append(key)
        try:
            for path, source in missing.items():
                show = None
                if ahead is not None:
                    show = partial(self._show, ahead, path, needed, others)
                self._loader.load(level, path, source, pinned=True, ahead=show)
                pinned.append(cache_key(source))
        except BaseException as error:
            with self._lock:
                # A policy evicts only adapters that it knows. It has to know these although the
                # request failed, or they would stay for ever.
                tier.used(pinned)
            self._unpin(tier, pinned)
            if isinstance(error, BudgetError):
                raise explain_shortage(error, needed, self._loader.tiers, self._lock) from error
            raise
        return bool(missing)

    def _show(
        self,
        ahead: Ahead,
        path: str,
        needed: Mapping[str, Source],
        others: Mapping[str, Adapter],
        arrived: Arrived,
    ) -> None:
        """Call ``ahead`` with a request's adapters, one of which is still being hashed.

        Args:
            ahead: the request's callback.
            path: the node of the new adapter.
            needed, others: as in `_pin`.
            arrived: the new adapter.
        """
        found = {path: arrived}
        with self._lock:
            for node, source in needed.items():
                resident = self._loader.top.find(cache_key(source))
                if resident is not None:
                    found[node] = resident.arrived
        adapters = dict(others)
        for node, there in found.items():
            adapters[node] = there.adapter
            if self._loader.link is not None:
                self._loader.link.wait(there)
        ahead(adapters, len(found) == len(needed))

    def _unpin(self, tier: Tier, keys: Sequence[Hashable]) -> None:
        with self._lock:
            for key in keys:
                tier.unpin(key)

    def _load_into_tree(self, unread: Mapping[str, Source], nodes: Mapping[str, Node]) -> bool:
        """Read some nodes and give them to the tree: all of them, or on an error none.

        Return whether any had to be read; a prefetch may have read them before.
        """
        host = self._loader.tiers[0]
        with self._lock:
            absent = any(host.find(cache_key(source)) is None for source in unread.values())
        pinned: list[Hashable] = []
        read: dict[str, Adapter] = {}
        try:
            for path, source in unread.items():
                read[path] = self._loader.load(0, path, source, pinned=True).arrived.adapter
                pinned.append(cache_key(source))
        except BaseException:
            with self._lock:
                host.used(pinned)  # so that the policy may evict them, as in `_pin`
            raise
        finally:
            self._unpin(host, pinned)
        for path in unread:
            node = nodes[path]
            self._tree.replace(node.with_loaded(read[path], rereadable=True), was=node)
        with self._lock:
            for source in unread.values():
                # The tree has it now. If another thread has it pinned, that
                # thread discards it here later.
                host.discard_unpinned(cache_key(source))
        return absent

    def _needed(self, nodes: Iterable[Node]) -> dict[str, Source]:
        """Return node → source, for the nodes whose adapter the last tier has to hold."""
        needed: dict[str, Source] = {}
        link = self._loader.link
        for node in nodes:
            source: Source | None
            if node.loaded is None:
                source = node.source
            elif link is None:
                continue  # it lies in host memory, and is used there
            else:
                with self._lock:
                    source = self._copies.source(node, link)
            if source is not None:
                needed[node.path] = source
        return needed

    def _allocate_lent(self, nbytes: int, device: torch.device) -> Tensor:
        return self._shelf.take(nbytes) if device.type == "cpu" else ordinary(nbytes, device)

    def _try(self, path: str, source: Source) -> None:
        """Prefetch one node.

        An error is dropped here: the call that needs the node meets it again.
        """
        level = len(self._loader.tiers) - 1
        with self._lock:
            if self._loader.closed or self._loader.top.find(cache_key(source)) is not None:
                return
        try:
            # Without waiting for room: a request that pins its adapters may be what fills the tier.
            self._loader.load(level, path, source, wait=False)
        except Exception:
            return
        with self._lock:
            self._prefetched += 1


class Hold:
    """Adapters that stay pinned until `release`.

    Args:
        unpin: takes back this hold's pins.
        adapters: node → adapter.
    """

    def __init__(self, unpin: Callable[[], None], adapters: Mapping[str, Adapter]) -> None:
        self._unpin: Callable[[], None] | None = unpin
        self.adapters = adapters

    def release(self) -> None:
        """Unpin the adapters; a second call is a no-op."""
        if self._unpin is not None:
            self._unpin()
        self._unpin, self.adapters = None, {}
