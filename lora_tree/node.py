"""Node: one place in the tree, as a frozen value. A change puts another value in its place.

loaded    source    fresh      the node is
·         ·         ·          a group: no increments of its own
·         ·         a recipe   fresh: its adapter is made when the tree meets a base
·         files     ·          not read yet
adapter   ·         ·          in memory only
adapter   files     ·          in memory, and in files that held the same when it was read or saved
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .adapter import Adapter
from .errors import LoraTreeError
from .spec import LoraSpec
from .storage import Source
from .weights import Weight

__all__ = ["Node"]


# Nodes are compared by identity alone: the tree has to notice that a node was replaced while its
# files were read (`AdapterTree.replace`), even by a value with equal fields.
@dataclass(frozen=True, eq=False)
class Node:
    """A place in the tree below the root.

    Args:
        path: its name, ``fr/legal``.
        weight: factor on its increments, on every path through it: a number, or `ModuleWeights`.
        loaded: its adapter, if it is in memory.
        source: where its adapter lives, if it came from files.
        fresh: how its adapter is to be made when the tree is attached, if it has none yet.
        stale: why it no longer fits its lineage, if the lock says so.
        home: the folder that is this node's own place in a saved tree; a save may write there.
        rereadable: ``loaded`` was read from ``source``, so it can be dropped and read again.
    """

    path: str
    weight: Weight = 1.0
    loaded: Adapter | None = None
    source: Source | None = None
    fresh: LoraSpec | None = None
    stale: str | None = None
    home: str | None = None
    rereadable: bool = False

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def has_adapter(self) -> bool:
        """True if the node has an adapter of its own, in memory or in files."""
        return self.loaded is not None or self.source is not None

    def outline(self) -> Adapter | None:
        """Return its adapter; if it is not in memory, its shapes on the meta device.

        Raises:
            FormatError: its files are gone or broken; names the node.
        """
        if self.loaded is not None or self.source is None:
            return self.loaded
        try:
            return self.source.outline()
        except LoraTreeError as error:
            raise error.within(self.path) from error

    # ------------------------------------------------------------------ the same node, changed
    def holding(self, adapter: Adapter) -> Node:
        """Return the node with an adapter in memory only: no files, no recipe, not stale."""
        return replace(self, loaded=adapter, source=None, fresh=None, stale=None, rereadable=False)

    def read_from(self, source: Source) -> Node:
        """Return the node with an adapter in other files, which are read when first needed."""
        return replace(self, loaded=None, source=source, fresh=None, stale=None, rereadable=False)

    def with_loaded(self, adapter: Adapter, *, rereadable: bool = False) -> Node:
        """Return the node with ``adapter`` in memory, and with the files that it has.

        Args:
            adapter: the same numbers, or numbers that the files will get at the next save.
            rereadable: it was read from the node's files just now.
        """
        return replace(self, loaded=adapter, rereadable=rereadable)

    def unloaded(self) -> Node:
        """Return the node without its adapter in memory."""
        return replace(self, loaded=None, rereadable=False)
