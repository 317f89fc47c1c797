"""Cache: the adapters of an attached tree, as many as the budgets allow, where they are needed.

    hold(paths)      the adapters of a request's lineages, in use until they are released
    read(path)       one adapter, for the tree itself
    prefetch(paths)  the same in the background; what fails there fails again, and aloud, where it is needed

A node is loaded by one thread at a time, and whoever else needs it waits for that one. Nothing is read while the lock
is held. Room is reserved before the first number is read; what fails gives it back, and is nowhere to be found.

Without budgets what is loaded from files is the tree's, for good. A device that has memory of its own gets a copy of
every adapter that it needs: of those that lie in the tree too, once, and as long as these live.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..budget import Budgets, format_bytes
from ..engine.last_used import LastUsed
from ..engine.ledger import Lender, ordinary
from ..errors import BudgetError, LoraTreeError, StateError, listing
from ..storage import Allocate, Source
from ..tree import AdapterTree, Node
from .background import Background
from .link import Arrived, Link
from .pack import held_bytes, pack, tensors
from .policy import Frequency, Policy
from .shelf import PAGED, Shelf, trim
from .stats import CacheStats
from .tier import Resident, Tier

__all__ = ["Cache", "Hold"]

CHURN_BYTES = (
    4 << 20
)  # what batches lay out comes and goes in small pieces, which an allocator keeps for itself


class Cache:
    """The adapters of one tree for one base.

    Args:
        tree: whose nodes; while there are budgets, what the tree reads comes from here too.
        budgets: bytes for each kind of memory.
        policy: makes the order in which a tier lets go of nodes; one for each tier.
        link: the way to a device that has memory of its own; None: the host's is where adapters are used.
    """

    def __init__(
        self,
        tree: AdapterTree,
        budgets: Budgets | None = None,
        *,
        policy: Callable[[], Policy] = Frequency,
        link: Link | None = None,
    ) -> None:
        budgets = budgets or Budgets()
        self._tree = tree
        self._lock = threading.Condition()
        self._budgets, self._policy = budgets, policy
        self._link = link
        self._shelf = Shelf()
        self._tiers = self._new_tiers()
        # The device copies of adapters that lie in the tree itself; None: those are used where they lie.
        self._own: weakref.WeakKeyDictionary[Adapter, _Own | None] = weakref.WeakKeyDictionary()
        self._gone: deque[Hashable] = deque()  # finalizers append, in whichever thread they run
        self._loading: set[tuple[int, Hashable]] = set()
        self._origins: weakref.WeakKeyDictionary[Adapter, Hashable] = weakref.WeakKeyDictionary()
        self._background = Background()
        self._closed = False
        self._requests = self._served = self._prefetched = 0
        self._waited_s = 0.0
        self.bounded = budgets.bounded
        weakref.finalize(self, self._shelf.close).atexit = False
        if self.bounded:
            tree.kept_by(self)

    # ------------------------------------------------------------------ asking for adapters
    def hold(self, paths: Iterable[str]) -> Hold:
        """The adapters of some nodes, from the root down, in use until the hold is released.

        Raises:
            FolderError, FormatError: a node's files are gone, broken, or not what the lock says; names the node.
            BudgetError: they do not fit in beside what is in use already; says how much is needed.
        """
        start = time.perf_counter()
        paths = list(paths)
        nodes = [self._tree[path] for path in paths]
        files = {node.path: node.source for node in nodes if node.source is not None}
        lacking = {n.path: n.source for n in nodes if n.loaded is None and n.source is not None}
        waited = False
        if not self.bounded and lacking:
            waited = self._into_tree(lacking)
            nodes = [self._tree[path] for path in paths]
        needed = self._needed(nodes)
        top = len(self._tiers) - 1
        pinned: list[Hashable] = []
        missing: list[str] = []
        tier = self._tiers[top]
        with self._lock:
            self._drop_gone()
            for path, source in needed.items():
                if tier.find(_key(source)) is None:
                    missing.append(path)
                else:
                    tier.pin(_key(source))
                    pinned.append(_key(source))
        try:
            for path in missing:
                self._get(top, path, needed[path], pinned=True)
                pinned.append(_key(needed[path]))
        except BaseException as error:
            with self._lock:
                tier.used(pinned)  # what came in is known to the policy, and may go
            self._release(pinned)
            if isinstance(error, BudgetError):
                raise self._too_small(needed, error) from error
            raise
        keys = [_key(source) for source in needed.values()]
        waited = waited or bool(missing)
        with self._lock:
            entries = {path: tier.find(_key(source)) for path, source in needed.items()}
            tier.used(keys)
            self._requests += bool(files)
            self._served += bool(files) and not waited
            self._waited_s += time.perf_counter() - start if waited else 0.0
        adapters = {node.path: node.loaded for node in nodes if node.loaded is not None}
        for path, entry in entries.items():
            assert entry is not None, "what is pinned stays"
            adapters[path] = entry.arrived.adapter
            if self._link is not None:
                self._link.wait(entry.arrived)
        if self.bounded and tier.churn_bytes > CHURN_BYTES:
            tier.churn_bytes = 0
            trim()
        return Hold(self, keys, adapters)

    def read(self, path: str, source: Source) -> Adapter:
        """One node's adapter in host memory; how long it stays cached is up to the policy.

        Raises:
            FolderError, FormatError: its files are gone, broken, or not what the lock says; names the node.
            BudgetError: it does not fit in beside what is in use.
        """
        return self._get(0, path, source).arrived.adapter

    def prefetch(self, paths: Iterable[str]) -> None:
        """Load some nodes in the background, in this order."""
        needed = self._needed([self._tree[path] for path in paths])
        self._background.add([partial(self._try, path, source) for path, source in needed.items()])

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until everything that was prefetched is there, or failed; False where that took too long."""
        return self._background.wait(timeout_s)

    # ------------------------------------------------------------------ for the model
    def follow(self, link: Link | None) -> None:
        """Send adapters another way from now on: the base was moved. What was held for it before is let go of."""
        with self._lock:
            self._link = link
            self._own.clear()
            self._tiers = self._new_tiers()

    def origin(self, adapter: Adapter) -> Hashable:
        """What an adapter is known by: the content of its files where the lock says it, or else itself."""
        return self._origins.get(adapter) or weakref.ref(adapter)

    def spare(self, kept: LastUsed[Any]) -> None:
        """What ``kept`` keeps may be dropped where room is needed; held weakly."""
        with self._lock:
            self._tiers[-1].spare(kept)

    def charge(self, owner: object, nbytes: int) -> None:
        """Make room for what ``owner`` lays out for side paths, and count it until ``owner`` is gone.

        Raises:
            BudgetError: there is none, and everything is in use.
        """
        if nbytes:
            with self._lock:
                self._tiers[-1].lay_out(owner, nbytes, churns=self._link is None)

    def lend(self, owner: object, nbytes: int) -> Lender:
        """`charge`, and what hands out that memory: what was let go of before, where it fits.

        Raises:
            BudgetError: there is no room, and everything is in use.
        """
        if nbytes:
            with self._lock:
                self._tiers[-1].lay_out(owner, nbytes, churns=self._link is None and nbytes < PAGED)
        return self._lent if self._link is None else ordinary

    def stats(self) -> CacheStats:
        """What the cache holds, and has done since the model was attached."""
        with self._lock:
            tiers = tuple(tier.stats() for tier in self._tiers)
            return CacheStats(self._requests, self._served, self._waited_s, self._prefetched, tiers)

    def close(self) -> None:
        """Let go of everything; what the tree reads is its own again."""
        self._background.forget()
        self._tree.keep(self)
        with self._lock:
            self._closed = True
            for tier in self._tiers:
                tier.clear()
        self._shelf.close()

    # ------------------------------------------------------------------ private
    def _new_tiers(self) -> list[Tier]:
        """Empty ones; where the host's memory is the device's, one for both, with the smaller budget."""
        budgets = self._budgets
        if self._link is not None:
            return [
                Tier("host", budgets.host_bytes, self._policy(), self._lock),
                Tier("device", budgets.device_bytes, self._policy(), self._lock),
            ]
        known = [("host", budgets.host_bytes), ("device", budgets.device_bytes)]
        given = [(nbytes, name) for name, nbytes in known if nbytes is not None]
        nbytes, name = min(given, default=(None, "host"))
        policy = self._policy()
        return [
            Tier(
                "host", nbytes, policy, self._lock, budget_name=f"{name}_budget", shelf=self._shelf
            )
        ]

    def _into_tree(self, lacking: Mapping[str, Source]) -> bool:
        """Give the tree what some nodes' files hold: all of it, or on an error none. True if any had to be read."""
        host = self._tiers[0]
        with self._lock:
            absent = any(host.find(_key(source)) is None for source in lacking.values())
        pinned: list[Hashable] = []
        read: dict[str, Adapter] = {}
        try:
            for path, source in lacking.items():
                read[path] = self._get(0, path, source, pinned=True).arrived.adapter
                pinned.append(_key(source))
        except BaseException:
            with self._lock:
                host.used(pinned)  # what came in is known to the policy, and may go
            raise
        finally:
            with self._lock:
                for key in pinned:
                    host.unpin(key)
        for path, source in lacking.items():
            self._tree.loaded(path, source, read[path])
        with self._lock:
            for source in lacking.values():
                host.let_go(
                    _key(source)
                )  # another thread that reads the same files lets go of it later
        return absent

    def _needed(self, nodes: Iterable[Node]) -> dict[str, Source]:
        """Where to get, for the last tier, what some nodes have and is not used where it lies."""
        needed: dict[str, Source] = {}
        for node in nodes:
            source = node.source if node.loaded is None else self._sent_from_tree(node)
            if source is not None:
                needed[node.path] = source
        return needed

    def _sent_from_tree(self, node: Node) -> _Own | None:
        """A loaded node's adapter as a source for the device; None where it is used as it is.

        Parameters are: they train where they are, and a copy would not follow what is written to them.
        """
        adapter, link = node.loaded, self._link
        if link is None or adapter is None:
            return None
        if adapter in self._own:
            return self._own[adapter]
        live = any(isinstance(t, torch.nn.Parameter) or t.requires_grad for t in tensors(adapter))
        if live or link.holds(adapter):
            self._own[adapter] = None
            return None
        own = _Own(adapter, None if node.source is None else node.source.key)
        self._own[adapter] = own
        # The copy goes when what it was made of is gone.
        weakref.finalize(adapter, self._gone.append, _key(own)).atexit = False
        return own

    def _drop_gone(self) -> None:
        """Let go of the copies whose adapters are gone, but of those in use only later."""
        for _ in range(len(self._gone)):
            key = self._gone.popleft()
            if not self._tiers[-1].let_go(key):
                self._gone.append(key)

    def _get(
        self, level: int, path: str, source: Source, *, pinned: bool = False, wait: bool = True
    ) -> Resident:
        """A node's entry in a tier, loaded where it is not there; ``wait`` for room that others are about to give."""
        tier, key, loading = self._tiers[level], _key(source), False
        start, room = time.perf_counter(), _Reservation(tier, self._lock, wait)
        try:
            with self._lock:
                while (found := tier.find(key)) is None and (level, key) in self._loading:
                    self._lock.wait()
                if found is not None:
                    if pinned:
                        tier.pin(key)
                    else:
                        tier.used([key])
                    return found
                if self._closed:
                    error = StateError(
                        "the model was detached while it was being loaded", "attach the tree again"
                    )
                    raise error.within(path) if level else error
                loading = True  # before it is: an interrupt may come between
                self._loading.add((level, key))
            arrived = (
                self._read(path, source, room)
                if level == 0
                else self._sent(level, path, source, room)
            )
            room.exactly(nbytes := held_bytes(arrived.adapter))
            entry = Resident(arrived, nbytes)
            with self._lock:
                room.close()
                if not self._closed:
                    tier.add(key, entry, time.perf_counter() - start)
                    if pinned:
                        tier.pin(key)
                    else:
                        tier.used([key])
            return entry
        except LoraTreeError as failed:
            raise (failed if level else failed.within(path)) from failed
        finally:
            if loading:
                with self._lock:
                    tier.failures += room.open
                    room.close()
                    self._loading.discard((level, key))
                    self._lock.notify_all()

    def _read(self, path: str, source: Source, room: _Reservation) -> Arrived:
        """From files to the host, in one buffer."""

        def again(nbytes: int) -> Tensor:  # a source that begins anew has let go of what it had
            room.exactly(nbytes)
            return self._allocate(nbytes)

        def more(nbytes: int) -> Tensor:
            room.also(nbytes)
            return self._allocate(nbytes)

        with torch.inference_mode(False), torch.no_grad():
            adapter = pack(source.load(again), more)
        if source.key is not None:
            self._origins[adapter] = source.key
        return Arrived(adapter)

    def _sent(self, level: int, path: str, source: Source, room: _Reservation) -> Arrived:
        """From the host to the device; it is in use there until the transfer has begun."""
        assert self._link is not None
        if isinstance(source, _Own):
            return self._sent_on(source, self._link, room)
        below, key = self._tiers[level - 1], _key(source)
        entry = self._get(level - 1, path, source, pinned=True, wait=room.wait)
        with self._lock:
            below.passing += 1
            below.used([key])
        try:
            room.exactly(entry.nbytes)
            arrived = self._link.send(entry.arrived.adapter)
        finally:
            with self._lock:
                below.passing -= 1
                below.unpin(key)
        if (origin := self._origins.get(entry.arrived.adapter)) is not None:
            self._origins[arrived.adapter] = origin
        return arrived

    def _sent_on(self, source: _Own, link: Link, room: _Reservation) -> Arrived:
        """From the tree to the device, without a place in the host's tier: it lies in the tree anyway."""
        adapter = source.load(link.allocate)
        room.exactly(held_bytes(adapter))
        with torch.inference_mode(False), torch.no_grad():
            arrived = link.send(adapter)
        self._origins[arrived.adapter] = self.origin(source.adapter)
        return arrived

    def _allocate(self, nbytes: int) -> Tensor:
        return self._link.allocate(nbytes) if self._link else self._shelf.take(nbytes)

    def _lent(self, nbytes: int, device: torch.device) -> Tensor:
        return self._shelf.take(nbytes) if device.type == "cpu" else ordinary(nbytes, device)

    def _try(self, path: str, source: Source) -> None:
        """Load a node that nobody waits for. What fails is left for the call that needs it."""
        top = len(self._tiers) - 1
        with self._lock:
            if self._closed or self._tiers[top].find(_key(source)) is not None:
                return
        try:
            self._get(top, path, source, wait=False)
        except Exception:
            return
        with self._lock:
            self._prefetched += 1

    def _release(self, keys: Sequence[Hashable]) -> None:
        tier = self._tiers[-1]
        with self._lock:
            for key in keys:
                tier.unpin(key)

    def _too_small(self, needed: Mapping[str, Source], error: BudgetError) -> BudgetError:
        """What a request takes, node by node, beside what is in use, against the budget that is too small for it."""
        try:
            outlines = {path: source.outline() for path, source in needed.items()}
        except (LoraTreeError, OSError):
            return error  # its size can't be known any more
        sizes = {
            path: sum(t.numel() * t.element_size() for t in tensors(of))
            for path, of in outlines.items()
        }
        keys = [_key(source) for source in needed.values()]
        passing = [nbytes for path, nbytes in sizes.items() if not isinstance(needed[path], _Own)]
        for tier in self._tiers:
            with self._lock:
                others = tier.busy_bytes(keys)
            passes = tier is not self._tiers[-1]  # one adapter after the other
            whole = max(passing, default=0) if passes else sum(sizes.values()) + others
            if tier.budget_bytes is None or whole <= tier.budget_bytes:
                continue
            parts = listing(f"{path} {format_bytes(nbytes)}" for path, nbytes in sizes.items())
            beside = f" beside {format_bytes(others)} that are in use" if others else ""
            return BudgetError(
                f"{next(reversed(sizes))}: {format_bytes(whole - others)} have to be in memory at once ({parts})"
                f"{beside}; {tier.budget_name} is {format_bytes(tier.budget_bytes)}",
                f"{tier.budget_name}={whole} (bytes, {format_bytes(whole)}) is the least that is enough",
                *(["or let go of something first: model.deactivate()"] if others else []),
            )
        return error


class Hold:
    """Some adapters, in use: they are not evicted until it is released."""

    def __init__(
        self, cache: Cache, keys: Sequence[Hashable], adapters: Mapping[str, Adapter]
    ) -> None:
        self._cache, self._keys = cache, keys
        self.adapters = adapters

    def release(self) -> None:
        """Not in use by this hold any more."""
        self._cache._release(self._keys)
        self._keys, self.adapters = [], {}


class _Own:
    """An adapter that lies in the tree itself, as a source for the device.

    Args:
        adapter: held weakly; the caller holds its copy.
        key: what its files are known by, if it was read from some; None: it is known by itself.
    """

    def __init__(self, adapter: Adapter, key: Hashable | None) -> None:
        self._adapter = weakref.ref(adapter)
        self.key = key

    @property
    def where(self) -> Path:
        return Path()

    @property
    def adapter(self) -> Adapter:
        """The adapter.

        Raises:
            StateError: the tree let go of it meanwhile.
        """
        adapter = self._adapter()
        if adapter is None:
            raise StateError(
                "the node was changed while it was sent to the device", "ask for it again"
            )
        return adapter

    def load(self, allocate: Allocate | None = None) -> Adapter:
        """The adapter in one buffer: its own, or a new one."""
        assert allocate is not None
        with torch.inference_mode(False), torch.no_grad():
            return pack(self.adapter, allocate)

    def outline(self) -> Adapter:
        return self.adapter


class _Reservation:
    """What is reserved in a tier for one adapter that is being loaded."""

    def __init__(self, tier: Tier, lock: threading.Condition, wait: bool) -> None:
        self._tier, self._lock, self.wait = tier, lock, wait
        self._nbytes = 0
        self.open = True

    def exactly(self, nbytes: int) -> None:
        """Reserve so much, instead of what was reserved before."""
        with self._lock:
            if nbytes <= self._nbytes:
                self._tier.cancel(self._nbytes - nbytes)
            elif self._nbytes == 0:
                self._tier.reserve(nbytes, wait=self.wait)
            else:
                self._tier.reserve(
                    nbytes - self._nbytes, wait=False
                )  # who holds some must not wait for others
            self._nbytes = nbytes

    def also(self, nbytes: int) -> None:
        """Reserve so much more."""
        self.exactly(self._nbytes + nbytes)

    def close(self) -> None:
        """Give back what is reserved, for good."""
        self._tier.cancel(self._nbytes)
        self._nbytes = 0
        self.open = False


def _key(source: Source) -> Hashable:
    """What an adapter in files is cached under."""
    known = source.key
    assert isinstance(source, Hashable)
    return source if known is None else known
