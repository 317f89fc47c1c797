"""Pending: a decision that is not wholly carried out, as readers see it.

    staged file waits        the reader takes it for the file at its place
    file is to be deleted    the reader takes it for absent

So a reader sees the new tree from the moment the record has its name, however far the writer has
come, and even if it was killed.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from ...system.reading import is_folder
from .. import disk
from ..disk import Glimpse
from .record import HIDDEN, RECORD, STAGE, read_record

__all__ = ["Pending", "leftovers", "pending", "progress"]


@dataclass(frozen=True)
class Pending:
    """The moves and deletions of a decision that is not wholly carried out.

    Args:
        staged: place → the staged file that waits for it; places are relative.
        deleted: the places whose files are deleted.
    """

    staged: dict[str, str] = field(default_factory=dict)
    deleted: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.staged or self.deleted)

    def resolve(self, folder: str, place: str) -> str | None:
        """Return where the file of a place is now; None if the decision deletes it."""
        waiting = self.staged.get(place)
        if waiting is not None and disk.exists(waiting):
            return waiting
        # A staged file that is gone has been carried to its place meanwhile.
        return None if place in self.deleted else os.path.join(folder, place)


def pending(folder: str | Path) -> Pending:
    """Return the decision that a reader of ``folder`` has to see as done; empty if none is open.

    Raises:
        SpecError: the record is broken, or names a file that no save writes.
    """
    record = read_record(folder)
    if record is None:
        return Pending()
    stage = os.path.join(folder, HIDDEN, record.stage)
    staged: dict[str, str] = {}
    if is_folder(stage, follow=False):  # a link would lead the reader to other files
        for i, move in enumerate(record.moves):
            staged[move.to] = os.path.join(stage, str(i))
    return Pending(staged, frozenset(delete.at for delete in record.deletes))


def progress(folder: str) -> tuple[Glimpse | None, ...]:
    """Return glimpses of the record and the stages; empty if there is no record.

    A save changes these when it decides, when it moves a file, and when it ends.
    """
    hidden = os.path.join(folder, HIDDEN)
    try:
        # A link is refused where the record is read. Here it is not even followed to list what it
        # leads to.
        is_real = stat.S_ISDIR(os.lstat(hidden).st_mode)
        names = os.listdir(hidden) if is_real else []
    except OSError:
        return ()
    if RECORD not in names:  # readers ignore the files that a save stages before it decides
        return ()
    steps = [RECORD, *sorted(filter(STAGE.match, names))]
    return tuple(disk.glimpse(os.path.join(hidden, name)) for name in steps)


def leftovers(folder: Path) -> list[str]:
    """List the record and the stages that killed writers left, and the next writer removes.

    Raises:
        FolderError: the hidden folder can't be read.
    """
    hidden = folder / HIDDEN
    with disk.named("look into it", hidden):
        names = os.listdir(hidden) if is_folder(hidden, follow=False) else []
    return sorted(f"{HIDDEN}/{name}" for name in names if name == RECORD or STAGE.match(name))
