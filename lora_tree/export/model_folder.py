"""The folder of an exported model while it is written; it appears whole or not at all.

``config.json`` and the index are written last. So even the hidden folder that a killed export
leaves can't be mistaken for a model before all its weights are in it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FolderError
from ..folder import disk
from ..folder.atomic_folders import new_folder
from ..system.durable import sync_file
from ..system.flags import NO_FOLLOW, PLAIN
from ..system.reading import Inside

__all__ = ["ModelFolder", "new_model_folder"]


class ModelFolder:
    """The hidden folder of an export, and the operations by which it is filled.

    Args:
        folder: where it is now.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def create(self, name: str) -> Iterator[int]:
        """Yield the descriptor of a new file."""
        with self._file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
            yield file

    @contextmanager
    def reopen(self, name: str) -> Iterator[int]:
        """Yield the descriptor of a file that `create` made, to write more of it."""
        with self._file(name, os.O_WRONLY) as file:
            yield file

    def sync(self, name: str) -> None:
        """Flush a file to the disk.

        All files are synced once more at the end. To sync a large file as soon as it is complete
        lets the disk write it while the next one is computed.
        """
        with disk.named("sync it", self.folder / name), self._file(name, os.O_RDONLY) as file:
            sync_file(file)

    def copy(self, source: Path, name: str, *, inside: Inside | None = None) -> None:
        """Copy a small file, and make the folders around it.

        Args:
            source: the file.
            name: its name here; may have folders in it.
            inside: says where the real path of ``source`` may lie.
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
def new_model_folder(place: Path, *, needs_bytes: int) -> Iterator[ModelFolder]:
    """Yield a folder to write a model into; it becomes ``place`` when the block ends well.

    Args:
        place: where the model is to appear.
        needs_bytes: the space on the disk that it will take.

    Raises:
        FolderError: ``place`` is there and not empty, or can't be written, or the disk is too
            small.
    """
    with disk.named("look into it", place):
        taken = os.path.lexists(place) and not _is_empty_folder(place)
    if taken:
        raise FolderError(f"{place}: exists already", "name a new folder, or remove it first")
    with disk.named("find out the free space of its disk", place.parent):
        # The folders above the place may not exist yet: nothing is created before all checks.
        nearest = next(above for above in place.absolute().parents if above.exists())
        # Check the free space first: an export may run for hours, and would otherwise fail at its
        # end.
        free = shutil.disk_usage(nearest).free
    if free < needs_bytes:
        raise FolderError(f"{place}: needs {needs_bytes:,} bytes, the disk has {free:,} free")
    with new_folder(place) as folder:
        yield ModelFolder(folder)


def _is_empty_folder(place: Path) -> bool:
    # Not through a link: the rename would replace the link, not the folder that it leads to.
    return not place.is_symlink() and place.is_dir() and not any(place.iterdir())
