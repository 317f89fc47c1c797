"""A folder that appears whole or not at all, however large: built under a hidden name beside its place, then renamed.

.merged.<id>/     locked by who writes it; whoever comes later clears away what has no writer any more
config.json       and the index come last, so that a folder cut off half-way is no model to anybody
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import FolderError, LoraTreeError
from ..folder import disk
from ..folder.alone import make_all
from ..system import claims, locks
from ..system.durable import sync_file
from ..system.flags import NO_FOLLOW, PLAIN
from ..system.reading import Inside

__all__ = ["Stage", "staged"]

_STAGED = r"\.[0-9a-f]{32}\Z"


class Stage:
    """The folder while it is being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def create(self, name: str) -> Iterator[int]:
        """A new file to write to."""
        with self._file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
            yield file

    @contextmanager
    def reopen(self, name: str) -> Iterator[int]:
        """A file that `create` made, to write more of it."""
        with self._file(name, os.O_WRONLY) as file:
            yield file

    def sync(self, name: str) -> None:
        """Make a file's bytes last."""
        with disk.named("sync it", self.folder / name), self._file(name, os.O_RDONLY) as file:
            sync_file(file)

    def copy(self, source: Path, name: str, *, inside: Inside | None = None) -> None:
        """A small file, synced; the folders around it are made.

        Args:
            inside: where ``source`` may lie when it is opened.
        """
        above = Path(name).parent
        for part in [*reversed(above.parents), above]:
            if part != Path():
                disk.make(self.folder / part)
        disk.copy(source, self.folder / name, inside=inside)

    @contextmanager
    def _file(self, name: str, flags: int) -> Iterator[int]:
        with disk.named("open it", self.folder / name):
            file = os.open(self.folder / name, flags | PLAIN | NO_FOLLOW, 0o666)
        try:
            yield file
        finally:
            os.close(file)


@contextmanager
def staged(where: Path, *, needs_bytes: int) -> Iterator[Stage]:
    """A stage that becomes ``where`` when the block ends, and nothing where it does not.

    Raises:
        FolderError: ``where`` is there and not empty, or can't be written, or the disk is too small.
    """
    with disk.named("look into it", where):
        there = os.path.lexists(where) and (
            where.is_symlink() or not where.is_dir() or any(where.iterdir())
        )
    if there:
        raise FolderError(f"{where}: is there already", "name a new folder, or remove it first")
    with ExitStack() as undo:
        make_all(where.parent, undo)
        _sweep(where)
        with disk.named("ask for its disk's room", where.parent):
            free = shutil.disk_usage(where.parent).free
        if free < needs_bytes:
            raise FolderError(f"{where}: needs {needs_bytes:,} bytes, the disk has {free:,} left")
        folder = where.with_name(f".{where.name}.{uuid.uuid4().hex}")
        disk.make(folder)
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        with locks.holding(folder, make=False):
            yield Stage(folder)
            for inside, _, _ in os.walk(folder, topdown=False, onerror=disk.refuse):
                disk.sync(inside)
            disk.rename(folder, where)
        undo.pop_all()
        disk.sync(where.parent)


def _sweep(where: Path) -> None:
    """Clear away the stages of this place that nobody writes any more."""
    mine = re.compile(re.escape(f".{where.name}") + _STAGED)
    with disk.named("look into it", where.parent):
        stages = [name for name in os.listdir(where.parent) if mine.match(name)]
        claims.clear(where.parent, mine)
    for name in stages:
        with suppress(OSError, LoraTreeError):
            held = locks.attempt(where.with_name(name), make=False)
            if held is not None:
                try:
                    shutil.rmtree(where.with_name(name))
                finally:
                    held.release()
