"""Changes: all that one save does to a folder, as a value made before the first byte is written.

    decide (reads, hashes, refuses)  →  Changes  →  Transaction.apply (writes)

Two things are not in it, because only the disk knows them: the times of the new files, and so the
bytes of tree.lock, which lists these times. `NewLock.complete` adds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from ...formats.peft import FILES
from ...tree import Node
from ..disk import Stamp
from ..lockfile import BaseLock, HubLock, TreeLock, render_lock
from ..trained import Trained, lineage_locks, node_lock, training_locks

__all__ = ["Archived", "Changes", "KeptAdapter", "NewFile", "NewLock", "Origin", "stamps_of"]

Origin: TypeAlias = bytes | Path | Callable[[], bytes]
"""The origin of a new file's bytes: the bytes, a file to copy, or a function that makes them again.

The function is for weights. They were made once, to be hashed and checked, and dropped: a save of a
large tree must not hold the bytes of all its files at once.
"""


@dataclass(frozen=True)
class NewFile:
    """A file that a save writes.

    Args:
        place: where it goes, relative to the folder.
        sha256: the hash of the bytes decided on; other bytes are refused when it is written.
        origin: where its bytes come from.
    """

    place: str
    sha256: str
    origin: Origin

    @classmethod
    def of(cls, place: str, data: bytes) -> NewFile:
        """Return the file of these bytes."""
        return cls(place, hashlib.sha256(data).hexdigest(), data)


@dataclass(frozen=True)
class KeptAdapter:
    """A node's adapter as the folder will hold it.

    Args:
        folder: where its two files will be.
        content: the hash of both.
        pieces: the hash by pieces of the weights (`pieces`), if it is known.
        stamps: size and time of its files; None if they are new, so that only the disk will know.
        trained: the lineage and base that it was trained on; None if those are the ones that the
            save writes.
        untrained: its increments are zero.
        named: its user named the folder, which lies elsewhere and stays as it is.
        written: a save wrote the files.
        hub: where it is on the model hub, if it is there.
    """

    folder: str
    content: str
    pieces: str | None
    stamps: Mapping[str, Stamp] | None
    trained: Trained | None
    untrained: bool = False
    named: bool = False
    written: bool = False
    hub: HubLock | None = None


@dataclass(frozen=True)
class NewLock:
    """The tree.lock that a save leaves, except the times of the files that it writes.

    Args:
        place: the name of the lock.
        base: what is known of the base.
        yaml: SHA-256 of tree.yaml, if a save wrote it.
        adapters: node → its adapter.
        trained: node → the lineage and base that it was trained on.
    """

    place: str
    base: BaseLock
    yaml: str | None
    adapters: Mapping[str, KeptAdapter]
    trained: Mapping[str, Trained]

    def complete(self, written: Mapping[str, Stamp]) -> TreeLock:
        """Return the lock, given the size and time of each new file by its place."""
        nodes = {
            path: node_lock(
                stamps_of(path, kept, written),
                kept.content,
                self.trained[path],
                self.base,
                pieces=kept.pieces,
                written=kept.written,
                hub=kept.hub,
            )
            for path, kept in self.adapters.items()
        }
        return TreeLock(
            base=self.base,
            yaml=self.yaml,
            nodes=nodes,
            lineages=lineage_locks(self.trained.values()),
            trainings=training_locks(self.trained.values()),
        )

    def to_bytes(self, written: Mapping[str, Stamp]) -> bytes:
        """Return the bytes of the lock; see `complete`."""
        return render_lock(self.complete(written))


def stamps_of(path: str, kept: KeptAdapter, written: Mapping[str, Stamp]) -> Mapping[str, Stamp]:
    """Return size and time of an adapter's two files, of new ones as they were written."""
    if kept.stamps is not None:
        return kept.stamps  # the files stay as they are
    return {name: written[f"{path}/{name}"] for name in FILES}


@dataclass(frozen=True)
class Archived:
    """A content that a save takes out of a node's folder, and keeps.

    Args:
        content: its hash.
        files: name → where the file is now.
    """

    content: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class Changes:
    """All that one save does.

    Args:
        files: the files to write, in this order; the lock comes after them.
        deletes: the places whose files are deleted.
        archives: the contents that leave the folder and are kept in its history.
        forgets: the contents that the history has no entry for any more.
        lock: the lock to write; None if it says the same already.
        kept: for the save of a tree: node → its adapter as the folder will hold it.
        nodes: for the save of a tree: its nodes as they will be opened again; only the stamps of
            new files are missing.
        nodes_over_budget: nodes that lose a version because the history's budget has no room for
            it.
    """

    files: tuple[NewFile, ...] = ()
    deletes: frozenset[str] = frozenset()
    archives: tuple[Archived, ...] = ()
    forgets: frozenset[str] = frozenset()
    lock: NewLock | None = None
    kept: Mapping[str, KeptAdapter] = field(default_factory=dict)
    nodes: Mapping[str, Node] = field(default_factory=dict)
    nodes_over_budget: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to do."""
        return not (self.files or self.deletes or self.forgets) and self.lock is None

    @property
    def writes(self) -> list[str]:
        """The places that get a new file, the lock's included."""
        # The lock comes last: its bytes are made of the stamps of the others.
        places = [file.place for file in self.files]
        return places if self.lock is None else [*places, self.lock.place]
