"""Share a folder of entries between processes that add, use and take away.

    cache/1f0c…/                  an entry, named by its content; its time says when it was last
    used cache/.locks/budget           held by the one process that adds, takes away or puts into
    use cache/.locks/make-0 … make-f  held while an entry whose name begins like that is made
    cache/.locks/<id>.held        one for each process: locked while it lives; lists what it uses

A process that is killed leaves its list behind and the lock on it ends, so the others see that its
list counts no more. The number of files and of open files depends on the number of processes, not
on what is asked for.
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

from ..errors import FolderError, LoraTreeError
from ..folder import disk
from ..system import claims, locks
from ..system.reading import is_file

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
        self.told: dict[str, bool] = {}
        self._locks = folder / ".locks"
        disk.make(folder)
        disk.make(self._locks)
        self._list = self._locks / f"{uuid.uuid4().hex}.held"
        # Alone: another process would take a list that is not locked yet for one left over.
        with self.alone():
            self.sweep()
            # For the lists that it removes: a server may be started over and over.
            self.in_use_elsewhere()
            held = locks.attempt(self._list)
            if held is None:
                raise FolderError(f"{self._list}: can't lock it")
            self._held = held

    def close(self) -> None:
        """Use nothing any more; the end of the process does as well."""
        self._held.release(remove=True)

    # ------------------------------------------------------------------ locks
    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other thread or process add, take away or put into use."""
        with locks.holding(self._locks / "budget"):
            yield

    @contextmanager
    def making(self, name: str) -> Iterator[None]:
        """Let no other thread or process make an entry of this name.

        Names that begin alike share a lock file: a sixteenth of all others wait, too.
        """
        with locks.holding(self._locks / f"make-{name[0]}"):
            yield

    # ------------------------------------------------------------------ uses; the caller is `alone`
    def tell(self, in_use: dict[str, bool]) -> None:
        """Write down which entries this process uses, each with a mark for the others to see."""
        if in_use != self.told:
            with disk.named("write it", self._list):
                self._list.write_text(json.dumps(in_use))
            self.told = dict(in_use)

    def in_use_elsewhere(self) -> dict[str, bool]:
        """Return the entries that other processes use, with their marks; False counts more.

        The lists of processes that ended are removed.
        """
        found: dict[str, bool] = {}
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
                found[entry] = found.get(entry, True) and mark
        return found

    def sweep(self) -> None:
        """Clear away what killed processes and version 1 left."""
        for name in self._listdir(self.folder):
            if _STAGED.match(name):  # a writer that was killed: the only living one is `alone`
                shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in self._listdir(self._locks):
            if _EARLIER_LOCK.match(name):
                disk.remove(self._locks / name)
        with disk.named("look into it", self._locks):
            claims.clear(self._locks, _LIST)

    def remove(self, name: str) -> bool:
        """Remove an entry, its name first, so that no process finds half of it."""
        # A rename is atomic; removing the files one by one is not.
        gone = self.folder / f".gone.{uuid.uuid4().hex}"
        try:
            os.rename(self.folder / name, gone)
        except OSError:
            return False
        shutil.rmtree(gone, ignore_errors=True)
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
        """Have all processes see that an entry was used so many seconds ago."""
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
        said = json.loads(disk.read_file(file, most=_MOST_BYTES))
    except (LoraTreeError, ValueError, RecursionError):
        return {}
    if not isinstance(said, dict):
        return {}
    return {entry: mark for entry, mark in said.items() if isinstance(mark, bool)}


def _size(entry: Path) -> int:
    with suppress(OSError):
        return sum(file.stat().st_size for file in entry.iterdir())
    return 0
