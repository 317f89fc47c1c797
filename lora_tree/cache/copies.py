"""Device copies of adapters that lie in the tree itself, without files behind them.

The tree owns these adapters: they were added in Python, or read without a budget. A device that
has memory of its own gets one copy of each, and the copy goes when its adapter does.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable
from pathlib import Path

from ..adapter import Adapter
from ..errors import StateError
from ..storage import Allocate, Source, Unhashed
from ..tree import Node
from .link import Link
from .tier import Tier

__all__ = ["TreeCopies", "TreeSource", "cache_key"]


class TreeSource:
    """An adapter that lies in the tree, as a source for the device.

    Args:
        adapter: held weakly, so that a copy does not keep a replaced adapter alive.
        key: the key of the files it was read from; None: this object is its own key.
    """

    def __init__(self, adapter: Adapter, key: Hashable | None) -> None:
        self._adapter = weakref.ref(adapter)
        self.key = key

    @property
    def where(self) -> Path:
        """An empty path: there is no folder behind it."""
        return Path()

    @property
    def adapter(self) -> Adapter:
        """The adapter.

        Raises:
            StateError: the tree dropped it meanwhile.
        """
        adapter = self._adapter()
        if adapter is None:
            raise StateError(
                "the node was changed while it was being copied to the device",
                "activate or route its path again",
            )
        return adapter

    def load(self, allocate: Allocate | None = None, unhashed: Unhashed | None = None) -> Adapter:
        """Return the adapter where it lies: it is packed on its way to the device."""
        return self.adapter

    def outline(self) -> Adapter:
        """Return the adapter, which has its shapes at hand."""
        return self.adapter


class TreeCopies:
    """The sources of the adapters that lie in the tree.

    The cache's lock guards all of it but `_collected`.
    """

    def __init__(self) -> None:
        # None: the adapter is used where it lies.
        self._sources: weakref.WeakKeyDictionary[Adapter, TreeSource | None] = (
            weakref.WeakKeyDictionary()
        )
        # Keys of copies whose adapter was collected. A finalizer may run in a thread that holds the
        # lock already, or in the middle of a change of the tier, so it only notes the key.
        self._collected: deque[Hashable] = deque()

    def source(self, node: Node, link: Link | None) -> TreeSource | None:
        """Return the source of a loaded node's copy; None if the adapter is used where it lies.

        Parameters are used where they lie: they train there, and a copy would not follow an
        optimiser's writes.
        """
        adapter = node.loaded
        if link is None or adapter is None:
            return None
        if adapter in self._sources:
            return self._sources[adapter]
        changes = adapter.is_trainable or adapter.trains
        if changes or link.holds(adapter):
            self._sources[adapter] = None
            return None
        source = TreeSource(adapter, None if node.source is None else node.source.key)
        self._sources[adapter] = source
        weakref.finalize(adapter, self._collected.append, cache_key(source)).atexit = False
        return source

    def discard_collected(self, tier: Tier) -> None:
        """Discard the copies of collected adapters; try those in use again at the next call."""
        for _ in range(len(self._collected)):
            key = self._collected.popleft()
            if not tier.discard_unpinned(key):
                self._collected.append(key)

    def clear(self) -> None:
        """Forget all sources, because the base was moved to another device."""
        self._sources.clear()


def cache_key(source: Source) -> Hashable:
    """Return an adapter's key in every tier: its content where that is known, else its source."""
    known = source.key
    assert isinstance(source, Hashable)
    return source if known is None else known
