"""Nodes of an opened folder: each gets a source that knows what the lock says about its files."""

from __future__ import annotations

from ...provenance import Made
from ...tree import Node
from ..adapters.source import FolderSource
from .opening import Opened

__all__ = ["is_untrained", "made_of_node", "node_of"]


def made_of_node(node: Node) -> Made | None:
    """Return the origin of a node's content, if its folder's lock has it."""
    source = node.source
    if not isinstance(source, FolderSource) or source.trained is None:
        return None
    return source.trained.made


def is_untrained(node: Node) -> bool:
    """Return whether a node was saved fresh and never trained: its increments are zero."""
    source = node.source
    if not isinstance(source, FolderSource) or source.trained is None:
        return False
    return source.trained.untrained


def node_of(opened: Opened, path: str) -> Node:
    """Return a node as its folder has it; no weights are read.

    Args:
        opened: the folder.
        path: the node.
    """
    entry, lock = opened.entries[path], opened.lock
    if entry.files is None:
        return Node(path, entry.weight, fresh=entry.fresh)
    folder = entry.files.folder
    known = lock.nodes.get(path) if lock is not None else None
    content = opened.contents.get(path)
    # None if the files are not those of the lock: then reads are not compared with it.
    source = FolderSource(
        folder,
        # A save of the tree may have decided on files of its own folders, never on those elsewhere.
        root=None if entry.named else opened.place.folder,
        stamps=entry.files.stamps,
        content=content,
        pieces=None if content is None or known is None else known.pieces,
        trained=opened.trained(path),
        within=None if opened.outside else opened.place.folder,
        hub=entry.hub,
    )
    # A save may write into a node's own folder, not into one that its user named.
    home = None if entry.named else folder
    return Node(path, entry.weight, source=source, stale=opened.stale.get(path), home=home)
