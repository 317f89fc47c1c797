"""Lock a folder's present files: write the tree.lock that accepts them."""

from __future__ import annotations

import os
from pathlib import Path

from ..lockfile import render_lock
from ..problem import raise_any
from ..reading.opening import inspect, refuse_no_tree
from ..reading.tree_place import place_of
from ..transactions.changes import Changes, NewFile
from ..transactions.commit import writing
from .relocked import Relocked, relocked
from .single_adapter import finish_nodes

__all__ = ["lock", "relock"]


def lock(path: str | os.PathLike[str], *, accept_stale: bool = False) -> None:
    """Accept the present files of a tree: write a new tree.lock.

    Every file that the old lock does not vouch for is read whole first. The record of what a node
    was trained on follows its content, so a folder that was moved on the disk keeps it. A node with
    new content counts as trained on its present lineage.

    Args:
        path: the folder, or a YAML file in it.
        accept_stale: count every other node as trained on its present lineage, too.

    Raises:
        SpecError, FolderError: as `load`, or the folder can't be written.
        FormatError: as `load`, or a file is broken: cut short, a Git LFS pointer, a header that
            does not fit.
    """
    relock(path, accept_stale=accept_stale)


def relock(path: str | os.PathLike[str], *, accept_stale: bool = False) -> Relocked:
    """Lock as `lock` does, and return the files that only the new lock accepts."""
    place = place_of(path)
    with writing(Path(place.folder)) as transaction:
        # A lock clears what cut-off saves left, in the nodes' folders as well: `check` says so. It
        # does that before `inspect`, which then finds every file at its own place.
        finish_nodes(place.folder)
        opened = inspect(place, repin=True)
        raise_any(opened.problems, but=("stale", "unlocked", "leftover"))
        refuse_no_tree(opened)
        result = relocked(opened, accept_stale=accept_stale)
        data = render_lock(result.lock)
        if data != opened.lock_bytes:
            transaction.apply(Changes((NewFile.of(place.lock, data),)))
    return result
