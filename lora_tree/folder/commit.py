"""How several files change as one: staged, decided by one record, then put in place.

    .lora_tree/lock              held by the one writer
    .lora_tree/stage-<id>/0 …    new files, whole and synced
    .lora_tree/commit.json       the decision: which staged file goes where, and which files go away

Until the record has its name nothing has happened; from then on everything has. Readers that find a record look through
it: a staged file stands for its place, a deleted one is not there. The next writer carries out what a killed one left,
and sweeps up stages that were never decided on. When all is done none of these files remain.

Law: a record is data that anybody may have written. It can name only the files that one save writes (adapters in nodes'
folders, one YAML and its lock), at places in the folder itself, never through a link. And it tells what lay at each
place when it was decided. Whoever carries it out compares that first, so a record that came with somebody's download,
or with a folder that was changed since, replaces and deletes nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError

from ..errors import FolderError, FormatError, LoraTreeError, PathError, SpecError, listing
from ..formats import strict_json
from ..formats.limits import LOCK_BYTES
from ..formats.peft import CONFIG, WEIGHTS
from ..spec import StrictModel, check_format, check_path, explain
from ..system import claims, locks
from ..system.reading import is_folder
from . import disk
from .disk import Glimpse, Stamp

__all__ = [
    "HIDDEN",
    "Pending",
    "Staged",
    "Transaction",
    "leftovers",
    "pending",
    "progress",
    "writing",
]

HIDDEN = ".lora_tree"
RECORD = "commit.json"
VERSION: Literal[2] = 2
WAIT_S = 10.0
_STAGE = re.compile(r"stage-[0-9a-f]{32}\Z")
_STAGED = re.compile(r"(?:[0-9]+|record)\Z")
_TOP = re.compile(r"[^./\0][^/\0]{0,200}\.(yaml|yml|lock)\Z")

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, lt=2**63)]


class _Was(StrictModel):
    """Size and time of the file that lay at a place when the record was made.

    The time is in nanoseconds, so that it can't be guessed.
    """

    size: Size
    mtime_ns: int


class _Move(StrictModel):
    to: str
    size: Size
    sha256: Digest
    was: _Was | None


class _Delete(StrictModel):
    at: str
    was: _Was | None


class _Record(StrictModel):
    version: Literal[2] = VERSION
    stage: Annotated[str, StringConstraints(pattern="^stage-[0-9a-f]{32}$")]
    moves: list[_Move]
    deletes: list[_Delete]

    @property
    def places(self) -> list[str]:
        return [move.to for move in self.moves] + [gone.at for gone in self.deletes]


@dataclass(frozen=True)
class Staged:
    """A new file that waits for its place."""

    to: str
    path: str
    stamp: Stamp
    sha256: str


@dataclass(frozen=True)
class Pending:
    """A decision that is not wholly carried out: place → staged file, and places that are empty; all relative."""

    staged: dict[str, str] = field(default_factory=dict)
    deleted: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.staged or self.deleted)

    def resolve(self, folder: str, place: str) -> str | None:
        """Where the file at a place is now, or None where there is none (or the place leads through a link)."""
        waiting = self.staged.get(place)
        if waiting is not None and disk.exists(waiting):
            return waiting
        return None if place in self.deleted else os.path.join(folder, place)


def pending(folder: str | Path) -> Pending:
    """What a reader of ``folder`` has to look through; empty where nothing is left to be carried out.

    Raises:
        SpecError: the record is broken, or names what no save writes.
    """
    record = _record(folder)
    if record is None:
        return Pending()
    stage = os.path.join(folder, HIDDEN, record.stage)
    real = is_folder(stage, follow=False)
    staged = (
        {move.to: os.path.join(stage, str(i)) for i, move in enumerate(record.moves)}
        if real
        else {}
    )
    return Pending(staged, frozenset(gone.at for gone in record.deletes))


def progress(folder: str) -> tuple[Glimpse | None, ...]:
    """Glimpse at the record and the stages: a save changes these when it decides, carries a file over, and ends."""
    hidden = os.path.join(folder, HIDDEN)
    try:
        names = os.listdir(hidden)
    except OSError:
        return ()
    if RECORD not in names:  # what a save stages before it decides does not matter to readers
        return ()
    steps = [RECORD, *sorted(filter(_STAGE.match, names))]
    return tuple(disk.glimpse(os.path.join(hidden, name)) for name in steps)


def leftovers(folder: Path) -> list[str]:
    """What killed writers left: the next writer clears it away.

    Raises:
        FolderError: the hidden folder can't be read.
    """
    hidden = folder / HIDDEN
    with disk.named("look into it", hidden):
        names = os.listdir(hidden) if is_folder(hidden, follow=False) else []
    return sorted(f"{HIDDEN}/{name}" for name in names if name == RECORD or _STAGE.match(name))


@contextmanager
def writing(folder: Path) -> Iterator[Transaction]:
    """The one writer of ``folder``; what earlier writers left is carried out or swept up first.

    Raises:
        FolderError: another writer is at work, or the folder can't be written.
        SpecError: a commit record that can't be trusted.
    """
    with _exclusive(folder):
        record = _record(folder)
        if record is not None:
            _carry_out(folder, record)
        _sweep(folder)
        transaction = Transaction(folder)
        try:
            yield transaction
        except BaseException:  # Ctrl-C as well
            transaction.abandon()
            raise


class Transaction:
    """New files and deletions that happen together, or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.staged: list[Staged] = []
        self.deletes: set[str] = set()
        self.decided = False
        self._stage = f"stage-{uuid.uuid4().hex}"
        self._made: list[Path] = []

    def put(self, to: str, data: bytes) -> Staged:
        """Stage a file for the place ``to``, from bytes."""
        path = self._next()
        stamp = disk.write(path, data, mode=disk.mode_of(self.folder / to))
        return self._staged(to, path, stamp, hashlib.sha256(data).hexdigest())

    def copy(self, to: str, source: str | Path) -> Staged:
        """Stage a file for the place ``to``, from another file."""
        path = self._next()
        stamp, digest = disk.copy(source, path, mode=disk.mode_of(self.folder / to))
        return self._staged(to, path, stamp, digest)

    def delete(self, place: str) -> None:
        """Let the file at a place go away."""
        self.deletes.add(place)

    def commit(self) -> None:
        """Decide, and carry out.

        Raises:
            FolderError: where `decided` is False nothing has happened; else the folder opens as the new one already.
        """
        if not self.staged and not self.deletes:
            return
        record = self._as_record()
        hidden = self.folder / HIDDEN
        for move in record.moves:
            self._room_for(move.to)
        if self.staged:
            disk.sync(hidden / self._stage)
        disk.sync(hidden)
        data = (
            json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
        ).encode()
        draft = hidden / self._stage / "record"
        if not self.staged:
            disk.make_inside(hidden / self._stage)
        disk.write(draft, data)
        try:
            disk.rename(draft, hidden / RECORD)
            self.decided = True
        except BaseException:  # the disk knows, whatever came between
            self.decided = disk.exists(hidden / RECORD)
            raise
        try:
            disk.sync(hidden)
            _carry_out(self.folder, record, trusted=True)
            _sweep(self.folder)
        except LoraTreeError as error:
            raise FolderError(
                f"{error}: saved, but not everything is in its place yet",
                "the folder opens as the new tree; the next save, or lora-tree lock, carries out the rest",
            ) from error

    def abandon(self) -> None:
        """Take back everything that was not decided; nothing here may hide the error that led to it."""
        try:
            if disk.exists(self.folder / HIDDEN / RECORD):
                return  # the decision stands, and the next writer carries it out
        except LoraTreeError:
            return  # it may stand
        with suppress(LoraTreeError, OSError):
            _sweep(self.folder)
        for folder in reversed(self._made if not self.decided else ()):
            disk.drop(folder)

    def _next(self) -> str:
        if not self.staged:
            disk.make_inside(self.folder / HIDDEN / self._stage)
        return str(self.folder / HIDDEN / self._stage / str(len(self.staged)))

    def _staged(self, to: str, path: str, stamp: Stamp, digest: str) -> Staged:
        self.staged.append(Staged(to, path, stamp, digest))
        return self.staged[-1]

    def _as_record(self) -> _Record:
        moves = [
            _Move(
                to=file.to,
                size=file.stamp.size,
                sha256=file.sha256,
                was=_there(self.folder / file.to),
            )
            for file in self.staged
        ]
        places = sorted(self.deletes - {move.to for move in moves})
        deletes = [_Delete(at=place, was=_there(self.folder / place)) for place in places]
        record = _Record(stage=self._stage, moves=moves, deletes=deletes)
        _check(record, self.folder)
        for place in record.places:
            if is_folder(self.folder / place, follow=False):
                raise FolderError(
                    f"{self.folder / place}: a folder lies where a file belongs", "move it away"
                )
        return record

    def _room_for(self, place: str) -> None:
        """Make the folders on the way to a place, before the decision: afterwards nothing should be able to fail."""
        folder = self.folder
        for name in place.split("/")[:-1]:
            folder = folder / name
            if not os.path.lexists(folder):
                self._made.append(folder)  # before it is made: nothing may come between
            if disk.make_inside(folder):
                disk.sync(folder.parent)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise FolderError(f"{folder}: can't be written: no permission")


# ---------------------------------------------------------------------- the record
def _record(folder: str | Path) -> _Record | None:
    hidden = os.path.join(folder, HIDDEN)  # no Path: every load of an adapter comes by here
    file = os.path.join(hidden, RECORD)
    for path, kind in (
        (hidden, stat.S_ISDIR),
        (file, stat.S_ISREG),
    ):  # one look at each: a writer may be clearing up
        with disk.named("look at it", path):
            try:
                mode = os.lstat(path).st_mode
            except (FileNotFoundError, NotADirectoryError):
                return None  # the folder itself may be a file: its owner says so better
        if not kind(mode):
            raise SpecError(f"{path}: a link, or not what a save makes there", "remove it")
    try:
        data = strict_json.loads(disk.read(file, most=LOCK_BYTES, follow=False), file)
        check_format(data, file, VERSION)
        _no_earlier(data, file)
        record = _Record.model_validate(data)
    except ValidationError as error:
        raise SpecError(
            *(f"{file}: {text}" for _, text in explain(error, data, _Record)[:8])
        ) from error
    except FormatError as error:
        raise SpecError(error.what) from error
    except FolderError:
        if not os.path.lexists(file):
            return None  # carried out while we looked
        raise
    _check(record, Path(folder))
    return record


def _no_earlier(data: Mapping[str, Any], file: str) -> None:
    version = data.get("version")
    if type(version) is int and version < VERSION:
        raise SpecError(
            f"{file}: a save by an earlier lora_tree (format {version}) was cut off; this one reads {VERSION}",
            "let that version finish it: lora-tree lock; or forget that save: remove the file",
        )


def _check(record: _Record, folder: Path) -> None:
    """Every place is one that a save may write, at most once, and no link lies on the way to it."""
    file = folder / HIDDEN / RECORD
    places = record.places
    if len({place.casefold() for place in places}) != len(places):
        raise SpecError(f"{file}: names a file twice")
    clear: set[str] = set()
    for place in places:
        above, _, name = place.rpartition("/")
        if not _may_be_written(above, name):
            raise SpecError(
                f"{file}: {place[:200]!r} is no file that a save writes", "remove the record"
            )
        if above not in clear:
            _no_link(folder, above)
            clear.add(above)
    for gone in record.deletes:
        if "/" not in gone.at:
            raise SpecError(
                f"{file}: {gone.at[:200]!r} is no file that a save deletes", "remove the record"
            )
    top = sorted(place for place in places if _TOP.match(place))
    yamls = [name for name in top if not name.endswith(".lock")]
    # other.lock is of other.yaml, other.yml.lock of other.yml (see `Place`)
    own = {f"{name.removesuffix('.yaml')}.lock" for name in yamls} or set(top)
    locked = set(top) - set(yamls)
    if len(yamls) > 1 or len(locked) > 1 or not locked <= own:
        raise SpecError(
            f"{file}: {listing(top)}: of more than one tree, and a save writes one",
            "remove the record",
        )


def _may_be_written(above: str, name: str) -> bool:
    try:
        node = check_path(above)
    except PathError:
        return False
    return name in (CONFIG, WEIGHTS) or (not node and _TOP.match(name) is not None)


def _there(place: Path) -> _Was | None:
    """Return what lies at a place as a record tells it; a link is told as a link."""
    with disk.named("look at it", place):
        try:
            seen = os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            return None
    return _Was(size=seen.st_size, mtime_ns=seen.st_mtime_ns)


def _no_link(folder: Path, above: str) -> None:
    for name in above.split("/") if above else ():
        folder = folder / name
        if os.path.islink(folder):
            raise SpecError(f"{folder}: a link; a save writes into the tree's own folders only")


def _carry_out(folder: Path, record: _Record, *, trusted: bool = False) -> None:
    """Put everything in its place; what is there already is left, so it can be done again after a kill."""
    stage = folder / HIDDEN / record.stage
    if os.path.lexists(stage) and not is_folder(stage, follow=False):
        raise SpecError(f"{stage}: a link, or no folder; a save makes neither", "remove it")
    if not trusted:
        _verify(folder, record)
    touched = {folder / HIDDEN}
    for i, move in enumerate(record.moves):
        staged, place = stage / str(i), folder / move.to
        if disk.exists(staged):
            for part in [*place.relative_to(folder).parents][-2::-1]:
                disk.make_inside(folder / part)
            disk.rename(staged, place)
            touched.add(place.parent)
    emptied = set()
    for gone in record.deletes:
        disk.remove(folder / gone.at)
        emptied.add((folder / gone.at).parent)
    for parent in sorted(touched | emptied):
        if is_folder(parent):
            disk.sync(parent)
    disk.remove(folder / HIDDEN / RECORD)
    disk.sync(folder / HIDDEN)
    for parent in sorted(emptied, reverse=True):
        while parent != folder and disk.drop(parent):
            parent = parent.parent


def _verify(folder: Path, record: _Record) -> None:
    """Every staged file is what was decided on, and every place holds what it held then, or what was to come there."""
    stage = folder / HIDDEN / record.stage
    for i, move in enumerate(record.moves):
        waiting = disk.exists(stage / str(i))
        _whole(stage / str(i) if waiting else folder / move.to, move, folder)
        if waiting:
            _unchanged(folder, move.to, move.was)
    for gone in record.deletes:
        _unchanged(folder, gone.at, gone.was)


def _unchanged(folder: Path, place: str, was: _Was | None) -> None:
    now = _there(folder / place)
    if now is not None and now != was:
        raise FolderError(
            f"{folder / place}: not the file that a cut-off save was to replace or delete",
            f"move it away or put the old one back; or forget that save: remove {folder / HIDDEN}",
        )


def _whole(file: Path, move: _Move, folder: Path) -> None:
    seen = disk.stamp(file) if disk.exists(file) else None
    if seen is None or seen.size != move.size or disk.digest(file, follow=False) != move.sha256:
        raise FolderError(
            f"{file}: not the file that {HIDDEN}/{RECORD} speaks of: expected {move.size} bytes for {move.to}",
            f"a save was cut off and its files were changed since; restore them, or remove {folder / HIDDEN}",
        )


def _sweep(folder: Path) -> None:
    """Remove stages without a record, and in them what a save stages; nothing else is ours to remove."""
    hidden = folder / HIDDEN
    files: list[Path] = []
    with disk.named("sweep it up", hidden):
        stages = [hidden / name for name in os.listdir(hidden) if _STAGE.match(name)]
        for stage in (stage for stage in stages if is_folder(stage, follow=False)):
            names = [name for name in os.listdir(stage) if _STAGED.match(name)]
            files += [stage / name for name in names if not is_folder(stage / name, follow=False)]
    for file in files:
        disk.remove(file)
    for stage in stages:
        disk.drop(stage)


# ---------------------------------------------------------------------- one writer
@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    hidden = folder / HIDDEN
    held = _acquire(hidden, hidden / "lock", time.monotonic() + WAIT_S)
    try:
        yield
    finally:
        try:
            held.release(remove=True)
        finally:
            disk.drop(hidden)


def _acquire(hidden: Path, lock: Path, until: float) -> locks.Held:
    while True:
        disk.make_inside(hidden)
        try:
            held = locks.attempt(lock)
        except FolderError as error:
            # another writer may just have finished and cleared up
            if not isinstance(error.__cause__, FileNotFoundError):
                disk.drop(hidden)
                raise
            held = None
        if held is not None:
            return held
        if time.monotonic() > until:
            who = listing(claims.owners(lock), most=3)
            raise FolderError(
                f"{hidden.parent}: another process has been writing this folder for {WAIT_S:.0f} s"
                + (f": {who}" if who else ""),
                "wait until it is done, or end it; a lock that nobody holds does not block",
            )
        locks.pause()
