"""Share a folder of entries between processes that add, use and remove them.

    cache/1f0c…/                  an entry, named by its content; its mtime is the time of last use
    cache/.locks/budget           held by the one process that adds, removes or puts into use
    cache/.locks/make-0 … make-f  held while an entry is made whose name begins with that digit
    cache/.locks/<id>.held        one for each process: locked while it lives; lists what it uses

A process that is killed leaves its list behind, but its lock on the list ends, so the others know
that the list no longer counts. The number of files and of open files depends on the number of
processes, not on what clients ask for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import FolderError, LoraTreeError
from ...folder import disk
from ...system import claims, locks
from ...system.reading import is_file

__all__ = ["SharedFolder"]

_CONFIG = "adapter_config.json"
_MOST_BYTES = 1 << 24
_ENTRY = re.compile(r"([A-Za-z0-9._-]{1,80}-)?[0-9a-f]{32}\Z")  # version 1 put the path in front
_STAGED = re.compile(r"\..*\.[0-9a-f]{32}\Z")
_LIST = re.compile(r"[0-9a-f]{32}\.held\Z")
_EARLIER_LOCK = re.compile(r"[0-9a-f]{32}(\.make)?\Z")


class SharedFolder:
    """One process's view of the folder.

    Args:
        folder: made where it is missing; nothing else should live there.

    Raises:
        FolderError: it can't be made or locked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listed: dict[str, bool] = {}
        self._locks = folder / ".locks"
        disk.make(folder)
        disk.make(self._locks)
        self._list = self._locks / f"{uuid.uuid4().hex}.held"
        # Under the lock: another process would take a list that is not locked yet for one that a
        # killed process left.
        with self.alone():
            self.sweep()
            # Called because it removes the lists of ended processes: a server may restart often.
            self.in_use_elsewhere()
            held = locks.attempt(self._list)
            if held is None:
                raise FolderError(f"{self._list}: can't lock it")
            self._held = held

    def close(self) -> None:
        """Give up all uses of this process; the end of the process has the same effect."""
        self._held.release(remove=True)

    # ------------------------------------------------------------------ locks
    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock under which entries are added, removed and put into use."""
        with locks.holding(self._locks / "budget"):
            yield

    @contextmanager
    def making(self, name: str) -> Iterator[None]:
        """Hold the lock under which an entry of this name is made.

        Names with the same first digit share it, so a sixteenth of all other names wait, too.
        """
        with locks.holding(self._locks / f"make-{name[0]}"):
            yield

    # ------------------------------------------------------------------ uses; the caller is `alone`
    def write_list(self, in_use: dict[str, bool]) -> None:
        """Write the list of the entries that this process uses, each with a mark."""
        if in_use != self.listed:
            with disk.named("write it", self._list):
                self._list.write_text(json.dumps(in_use))
            self.listed = dict(in_use)

    def in_use_elsewhere(self) -> dict[str, bool]:
        """Return the entries that other processes use; a mark is True only if it is for all users.

        The lists of processes that ended are removed.
        """
        used: dict[str, bool] = {}
        for name in self._listdir(self._locks):
            file = self._locks / name
            if not _LIST.match(name) or file == self._list:
                continue
            # The system ends a lock with its process, however that ended.
            ended = locks.attempt(file)
            if ended is not None:
                ended.release(remove=True)
                continue
            for entry, mark in _read(file).items():
                used[entry] = used.get(entry, True) and mark
        return used

    def sweep(self) -> None:
        """Remove the files that killed processes and version 1 left."""
        for name in self._listdir(self.folder):
            if _STAGED.match(name):  # of a killed writer: a living one would hold the lock
                shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in self._listdir(self._locks):
            if _EARLIER_LOCK.match(name):
                disk.remove(self._locks / name)
        with disk.named("look into it", self._locks):
            claims.clear(self._locks, _LIST)

    def remove(self, name: str) -> bool:
        """Remove an entry, whole for every other process; False if it can't be removed."""
        # A rename is atomic; removing the files one by one is not. So the entry is renamed first.
        trash = self.folder / f".gone.{uuid.uuid4().hex}"
        try:
            os.rename(self.folder / name, trash)
        except OSError:
            return False
        shutil.rmtree(trash, ignore_errors=True)
        return True

    # ------------------------------------------------------------------ entries
    def has(self, name: str) -> bool:
        """Tell whether there is an entry of this name, whole."""
        return is_file(self.folder / name / _CONFIG)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each entry."""
        return {
            name: _size(self.folder / name)
            for name in self._listdir(self.folder)
            if _ENTRY.match(name)
        }

    def unused_s(self, name: str) -> float:
        """Return how many seconds ago an entry was last used by any process."""
        try:
            return time.time() - os.stat(self.folder / name).st_mtime
        except OSError:
            return 0.0

    def note_use(self, name: str, ago_s: float) -> None:
        """Record, for all processes, that an entry was used ``ago_s`` seconds ago."""
        if ago_s < self.unused_s(name) - 1:
            when = time.time() - ago_s
            with suppress(OSError):  # it may be gone
                os.utime(self.folder / name, (when, when))

    def _listdir(self, folder: Path) -> list[str]:
        with disk.named("look into it", folder):
            return sorted(os.listdir(folder))


def _read(file: Path) -> Mapping[str, bool]:
    """Return the entries that another process lists as used; all else in the file is ignored."""
    try:
        entries = json.loads(disk.read_file(file, most=_MOST_BYTES))
    except (LoraTreeError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {entry: mark for entry, mark in entries.items() if isinstance(mark, bool)}


def _size(entry: Path) -> int:
    with suppress(OSError):
        return sum(file.stat().st_size for file in entry.iterdir())
    return 0
