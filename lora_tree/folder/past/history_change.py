"""HistoryChange: the versions that a save adds to the history, decided before its first byte.

before   what the folder holds: content, weight and note of each node
after    what it will hold
differs  → the node has a new version: the old one goes into the log, and its files, if no node
           has that content any more, into the archive
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ...formats.limits import LOCK_BYTES
from ...provenance import Made, SaveNote, seen_from, utc_now
from ...tree import AdapterTree
from ...weights import Weight
from .. import disk
from ..adapters.examine import hashed
from ..history_log import (
    History,
    Version,
    ended,
    history_place,
    other_versions,
    parse_history,
    render_history,
)
from ..reading.opening import Opened
from ..reading.resolve import FolderNode
from ..trained import trained
from ..transactions.archive import archived, contents_of_other_trees
from ..transactions.changes import Archived, KeptAdapter, NewFile

__all__ = ["HistoryChange", "present_version", "read_history"]


def read_history(opened: Opened) -> History:
    """Return the history of a tree, as a pending save leaves it.

    Raises:
        SpecError: the log is broken.
        FolderError: it can't be read.
    """
    place = history_place(opened.place.lock)
    file = opened.decided.resolve(opened.place.folder, place)
    if file is None or not os.path.lexists(file):
        return History()
    return parse_history(disk.read_file(file, most=LOCK_BYTES, follow=False), file)


def present_version(opened: Opened, path: str, content: str) -> Version:
    """Return a node's present state as a version.

    Args:
        opened: the folder.
        path: a node with an adapter in files.
        content: the hash of these files.
    """
    entry, lock, on = opened.entries[path], opened.lock, None
    files = entry.files
    assert files is not None, "a node with a content has files"
    known = lock.nodes.get(path) if lock is not None else None
    # If the lock's entry is about other files, it says nothing about the origin of these.
    if lock is not None and known is not None and known.content == content:
        on = trained(known, lock)
    nbytes = sum(stamp.size for stamp in files.stamps.values())
    elsewhere = seen_from(opened.place.folder, files.folder) if entry.named else None
    return Version(content, entry.weight, nbytes, on, elsewhere=elsewhere, hub=entry.hub)


@dataclass(frozen=True)
class HistoryChange:
    """The change that a save makes to the history, from a tree and its folder before and after it.

    Args:
        tree: the tree that is saved.
        opened: the folder as it is now.
        kept: node → its adapter as the folder will hold it.
        note: the save's note about itself.
        when: the time of the save.
    """

    tree: AdapterTree
    opened: Opened
    kept: Mapping[str, KeptAdapter]
    note: SaveNote
    when: str = field(default_factory=utc_now)

    # ------------------------------------------------------------------ before and after
    @cached_property
    def before(self) -> dict[str, Version]:
        """Node → its version until now, of the nodes that have an adapter in files."""
        found = {}
        for path, entry in self.opened.entries.items():
            content = self._content_before(path, entry)
            if content is not None:
                found[path] = present_version(self.opened, path, content)
        return found

    def _content_before(self, path: str, entry: FolderNode) -> str | None:
        """Return the hash of a node's files as they are now; None if they are not whole."""
        if path in self.opened.contents or entry.files is None:
            return self.opened.contents.get(path)
        if entry.files.flaw is not None:
            return None
        own = self.kept.get(path)
        if own is not None and own.stamps is not None:
            here, there = os.path.realpath(entry.files.folder), os.path.realpath(own.folder)
            if here == there:
                return own.content  # they stay, and `decide` has hashed them already
        # No lock vouches for files that the save replaces, so they are read.
        return hashed(entry.files)

    def _now(self, path: str) -> tuple[str, Weight] | None:
        """Return content and weight of a node after the save; None if it has no adapter."""
        own = self.kept.get(path)
        return None if own is None else (own.content, self.tree[path].weight)

    @cached_property
    def moves(self) -> dict[str, str]:
        """Old path → new path of the nodes that were moved."""
        new_paths = {}
        for old, new in self.note.moved.items():
            if old in self.before and old not in self.kept and new in self.kept:
                new_paths[old] = new
        removed: dict[str, list[str]] = {}
        for old, was in self.before.items():
            if old not in self.kept and old not in new_paths:
                removed.setdefault(was.content, []).append(old)
        taken = set(new_paths.values())
        for path in sorted(self.kept):
            same = removed.get(self.kept[path].content)
            if same and path not in self.before and path not in taken:
                new_paths[same.pop(0)] = path
        return new_paths

    @cached_property
    def _origins(self) -> dict[str, str]:
        """New path → old path of the nodes that were moved."""
        return {new: old for old, new in self.moves.items()}

    def made(self, path: str) -> Made | None:
        """Return the origin of a node's content after the save."""
        origin = self._origins.get(path, path)
        was, now, own = self.before.get(origin), self._now(path), self.kept[path]
        known = None if own.trained is None else own.trained.made
        if was is not None and was.key == now:
            # An adapter that was given to the node again brings no lock entry: the old one counts.
            before = None if was.on is None else was.on.made
            return known or before
        # Files that lie in their place already, and no lock tells their origin.
        if was is None and own.stamps is not None and not own.named and own.trained is None:
            return None
        losses, training = self.note.losses.get(path), self.note.training.get(path)
        # Another weight, or a copy: the content is the one that was trained before.
        if training is None and known is not None:
            losses, training = known.losses, known.training
        return Made(self.when, self.note.by, losses, training)

    # ------------------------------------------------------------------ the history after it
    @cached_property
    def _old(self) -> History:
        return read_history(self.opened)

    @cached_property
    def _new(self) -> tuple[History, list[str]]:
        """The history after the save, and the nodes whose versions the budget has no room for."""
        nodes = dict(self._old.moved(self.moves).nodes)
        most = self.tree.history.most
        changed = False
        for old, was in self.before.items():
            path = self.moves.get(old, old)
            now = self._now(path)
            if was.key == now or not most:
                continue
            replaced = replace(was, until=self.when, ended_by=self.note.by)
            nodes[path] = ended(nodes.get(path, ()), replaced, now, most)
            changed = True
        for path, own in self.kept.items():
            if path in nodes:
                nodes[path] = other_versions(nodes[path], (own.content, self.tree[path].weight))
        history = History(nodes).without_empty()
        if not changed:
            return history, []
        return history.within(self.tree.history.budget_bytes, self._live)

    @cached_property
    def _live(self) -> set[str]:
        """The contents that nodes have after the save, in folders of their own."""
        return {own.content for own in self.kept.values() if not own.named}

    @property
    def nodes_over_budget(self) -> list[str]:
        """The nodes that lose a version because the budget has no room for it."""
        return self._new[1]

    def log(self) -> NewFile | None:
        """Return the log to write; None if it says the same already."""
        history = self._new[0]
        if history == self._old:
            return None
        return NewFile.of(history_place(self.opened.place.lock), render_history(history))

    def archives(self) -> tuple[Archived, ...]:
        """Return the contents that go into the archive: named by the log, and no node's any
        more.
        """
        wanted = self._new[0].contents().keys() - self._live
        if not wanted:
            return ()
        missing = wanted - archived(self.opened.place.folder)
        archived_contents = {}
        for path, was in self.before.items():
            files = self.opened.entries[path].files
            if was.content in missing and was.elsewhere is None and files is not None:
                places = {name: at for name, (at, _) in files.now.items()}
                archived_contents[was.content] = Archived(was.content, places)
        return tuple(archived_contents[content] for content in sorted(archived_contents))

    def forgets(self) -> frozenset[str]:
        """Return the contents that no log names any more, or that a node has again."""
        history, folder = self._new[0], self.opened.place.folder
        if history == self._old:
            return frozenset()
        wanted = history.contents().keys() - self._live
        spare = archived(folder) - wanted
        if spare:
            spare -= contents_of_other_trees(Path(folder), history_place(self.opened.place.lock))
        return frozenset(spare)
