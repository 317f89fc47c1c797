"""Commit: several files change as one. They are checked, staged, decided, and put in place.

    .lora_tree/lock              held by the one writer (`writer`)
    .lora_tree/stage-<id>/0 …    new files, whole and synced
    .lora_tree/commit.json       the decision (`record`): which files move where, which are deleted
    .versions/<content>/         what the save replaces, put there before the decision (`archive`)

Until the record has its name nothing has happened; from then on everything has. Readers that find a
record look through it (`pending`). The next writer carries out what a killed one left
(`carry_out`), and sweeps up stages without a record. When all is done none of these files remain.

Law: what can be refused is refused before the first byte is staged.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import FolderError, LoraTreeError
from ...system.reading import is_folder
from .. import disk
from ..disk import Stamp
from .archive import archive, forget, forget_unnamed
from .carry_out import carry_out, sweep
from .changes import Changes, NewFile
from .pending import leftovers
from .record import (
    HIDDEN,
    RECORD,
    Record,
    RecordedDelete,
    RecordedMove,
    check_places,
    read_record,
    stat_for_record,
)
from .writer import only_writer

__all__ = ["Transaction", "check_writing", "writing"]


@contextmanager
def writing(folder: Path) -> Iterator[Transaction]:
    """Hold the writer's lock on ``folder``, finish cut-off saves in it, and yield a transaction.

    Raises:
        FolderError: another writer is at work, or the folder can't be written.
        SpecError: the commit record can't be trusted.
    """
    with only_writer(folder):
        # The order matters: `sweep` removes every stage. If it came first it would remove the files
        # that an earlier save has decided on and not yet moved.
        record = read_record(folder)
        was_cut_off = record is not None or bool(leftovers(folder))
        if record is not None:
            carry_out(folder, record)
        if was_cut_off:
            # Before `sweep`: a stage is the sign that there may be such contents. If this writer is
            # killed here, the next one still finds the sign.
            forget_unnamed(folder)
        sweep(folder)
        transaction = Transaction(folder)
        try:
            yield transaction
        except BaseException:  # Ctrl-C as well
            transaction.abandon()
            raise


def check_writing(folder: Path) -> None:
    """Refuse a folder in which `writing` would fail, as far as that shows without writing.

    Another writer is not kept out, and a disk that is full is not foreseen.

    Args:
        folder: it need not exist.

    Raises:
        FolderError: a file is in the way, or there is no permission.
    """
    nearest = missing = folder
    while not os.path.lexists(nearest):
        missing, nearest = nearest, nearest.parent
    if not is_folder(nearest):
        raise FolderError(f"{missing}: can't make the folder: {os.strerror(errno.ENOTDIR)}")
    hidden = folder / HIDDEN
    if os.path.lexists(hidden) and not is_folder(hidden, follow=False):
        text = f"{hidden}: a file or a link lies where a folder belongs"
        raise FolderError(text, "move it away")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise FolderError(f"{nearest}: can't be written: no permission")


class Transaction:
    """Changes that happen together, or not at all.

    Attributes:
        decided: the record has its name, so the folder opens as the new tree.
        written: place → size and time of each file as it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.decided = False
        self.written: dict[str, Stamp] = {}
        self._hidden = folder / HIDDEN
        self._stage = self._hidden / f"stage-{uuid.uuid4().hex}"
        self._moves: list[RecordedMove] = []
        self._made: list[Path] = []
        self._archives = False

    def apply(self, changes: Changes) -> None:
        """Check the places, stage the files, decide, and carry out.

        Raises:
            SpecError, FolderError: a place can't be written; nothing has been.
            FolderError: the disk refuses. If `decided` is False nothing has happened; otherwise the
                folder opens as the new tree already.
        """
        if changes.is_empty:
            return
        self.check(changes)
        # The folders come before the decision: after it nothing should be able to fail.
        for place in changes.writes:
            self._make_folders(place)
        disk.make_inside(self._stage)
        # Before the decision as well: from then on the log names these contents.
        self._archives = bool(changes.archives)
        archive(self.folder, changes.archives)
        for new in changes.files:
            self._write(new)
        if changes.lock is not None:
            data = changes.lock.to_bytes(self.written)
            self._write(NewFile.of(changes.lock.place, data))
        self._decide(self._record(changes.deletes), changes.forgets)

    def abandon(self) -> None:
        """Remove everything that was staged, unless it was decided."""
        # No error here may hide the one that led to it.
        try:
            if disk.exists(self._hidden / RECORD):
                return  # the decision stands, and the next writer carries it out
        except LoraTreeError:
            return  # the disk does not tell, so the decision may stand
        with suppress(LoraTreeError, OSError):
            if self._archives:
                forget_unnamed(self.folder)
            sweep(self.folder)
        if not self.decided:
            for folder in reversed(self._made):
                disk.drop(folder)

    # ------------------------------------------------------------------ checks before writing
    def check(self, changes: Changes) -> None:
        """Refuse places that can't be written, or that no save may write; nothing is written.

        Raises:
            SpecError, FolderError: there is one.
        """
        if changes.is_empty:
            return
        writes = list(changes.writes)
        check_places(self.folder, writes, sorted(changes.deletes))
        for place in [*writes, *changes.deletes]:
            if is_folder(self.folder / place, follow=False):
                text = f"{self.folder / place}: a folder lies where a file belongs"
                raise FolderError(text, "move it away")
        for above in sorted({place.rpartition("/")[0] for place in writes}):
            self._check_folders(above)

    def _check_folders(self, above: str) -> None:
        """Refuse a file that lies where a folder belongs, and a folder that can't be written."""
        folder = self.folder
        for name in above.split("/") if above else ():
            if not os.path.lexists(folder / name):
                break  # the folders from here on are made by this save
            folder = folder / name
            if not is_folder(folder, follow=False):
                text = f"{folder}: a file or a link lies where a folder belongs"
                raise FolderError(text, "move it away")
        # A dry run may be of a folder that is not there yet.
        if os.path.lexists(folder) and not os.access(folder, os.W_OK | os.X_OK):
            raise FolderError(f"{folder}: can't be written: no permission")

    # ------------------------------------------------------------------ staging
    def _make_folders(self, place: str) -> None:
        """Make the folders on the way to a place."""
        folder = self.folder
        for name in place.split("/")[:-1]:
            folder = folder / name
            if not os.path.lexists(folder):
                # It is noted before it is made, so that Ctrl-C in between leaves no folder behind.
                self._made.append(folder)
            if disk.make_inside(folder):
                disk.sync(folder.parent)

    def _write(self, new: NewFile) -> None:
        """Stage one file, and refuse bytes that are not those which were decided on."""
        path = self._stage / str(len(self._moves))
        mode = disk.mode_of(self.folder / new.place)
        if isinstance(new.origin, Path):
            stamp, sha256 = disk.copy(new.origin, path, mode=mode)
        else:
            data = new.origin if isinstance(new.origin, bytes) else new.origin()
            stamp, sha256 = disk.write(path, data, mode=mode), NewFile.of(new.place, data).sha256
        if sha256 != new.sha256:
            what = new.origin if isinstance(new.origin, Path) else self.folder / new.place
            raise FolderError(f"{what}: its bytes changed while they were saved", "save again")
        was = stat_for_record(self.folder / new.place)
        self._moves.append(RecordedMove(to=new.place, size=stamp.size, sha256=sha256, was=was))
        self.written[new.place] = stamp

    def _record(self, deletes: frozenset[str]) -> Record:
        recorded = [
            RecordedDelete(at=place, was=stat_for_record(self.folder / place))
            for place in sorted(deletes)
        ]
        return Record(stage=self._stage.name, moves=self._moves, deletes=recorded)

    # ------------------------------------------------------------------ deciding
    def _decide(self, record: Record, forgets: Iterable[str]) -> None:
        """Give the record its name, carry it out, and forget what the log no longer names."""
        # The names of the staged files have to last before the record does. Otherwise a power cut
        # could leave a decision whose files are gone.
        disk.sync(self._stage)
        disk.sync(self._hidden)
        draft = self._stage / "record"
        disk.write(draft, record.to_bytes())
        try:
            disk.rename(draft, self._hidden / RECORD)
            self.decided = True
        except BaseException:
            # Ctrl-C may have come just after the rename: only the disk knows.
            self.decided = disk.exists(self._hidden / RECORD)
            raise
        try:
            disk.sync(self._hidden)
            carry_out(self.folder, record, trusted=True)
            # Only now: until the new log is in its place, a reader of the old one may want them.
            forget(self.folder, forgets)
            sweep(self.folder)
        except LoraTreeError as error:
            raise FolderError(
                f"{error}: saved, but not everything is in its place yet",
                "the folder opens as the new tree; the next save, or lora-tree lock, "
                "carries out the rest",
            ) from error
