"""A folder appears whole or not at all: it is filled under a hidden name, synced, and renamed.

    .zoo.<id>/                 filled here; its writer holds a lock on it
    zoo                        has its name only when every byte in it lasts
    .zoo.<id>/zoo.replaced     a folder that is replaced, between the two renames

A writer that is killed leaves the hidden folder. The next writer of the same place sees that no
process holds it. It puts a folder that was to be replaced back, if its place is empty, and clears
the rest away.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from shutil import rmtree

from ..errors import LoraTreeError
from ..system import claims, locks
from ..system.durable import sync_file
from ..system.reading import is_folder, stat_of
from . import disk

__all__ = ["REPLACED", "make_all", "new_folder", "new_folders", "publish", "restore_replaced"]

REPLACED = ".replaced"
_STAGE = r"\.[0-9a-f]{32}\Z"


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """Yield a hidden folder, which becomes ``place`` when the block ends without an error.

    Args:
        place: nothing lies there, or an empty folder; the folders around it are made.

    Raises:
        FolderError: the folder can't be made, synced or renamed.
    """
    with ExitStack() as undo:
        make_all(place.parent, undo)
        with _stage(place) as stage:
            yield stage
            publish(stage, place)
        undo.pop_all()


@contextmanager
def new_folders(places: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield a hidden folder for each place; when the block ends each replaces what lies there.

    The hidden folders lie side by side under their own names, so a relative path from one to
    another stays right.

    Args:
        places: siblings.

    Raises:
        FolderError: a folder can't be made, synced or renamed.
    """
    with ExitStack() as undo:
        make_all(places[0].parent, undo)
        with _stage(places[0]) as stage:
            folders = [stage / place.name for place in places]
            for folder in folders:
                disk.make(folder)
            yield folders
            for folder, place in zip(folders, places, strict=True):
                publish(folder, place, aside=stage / f"{place.name}{REPLACED}")
        undo.pop_all()


def publish(new: Path, place: Path, *, aside: Path | None = None) -> None:
    """Sync a filled folder, then rename it to its place.

    Args:
        new: the folder, on the same file system as ``place``.
        place: where it is to appear.
        aside: where a folder that lies at ``place`` is put meanwhile; None if none lies there.

    Raises:
        FolderError: a file can't be synced, or a folder not be renamed.
    """
    _sync_all(new)
    old = aside if stat_of(place) is not None else None
    if old is not None:
        disk.rename(place, old)
    disk.rename(new, place)
    if old is not None:
        # Under the name ``aside`` it would be put back after a kill. So it loses that name before
        # its removal begins: from then on it is not whole.
        disk.rename(old, new)
    disk.sync(place.parent)


def restore_replaced(stage: Path, parent: Path) -> None:
    """Put back folders that were to be replaced when their writer was killed.

    Args:
        stage: the hidden folder in which they were put aside; need not be there.
        parent: the folder of their places. A place that is taken again is left alone.

    Raises:
        FolderError: a folder can't be read or renamed.
    """
    with disk.named("look into it", stage):
        names = os.listdir(stage) if is_folder(stage) else []
    for name in names:
        place = parent / name.removesuffix(REPLACED)
        if name.endswith(REPLACED) and stat_of(place, follow=False) is None:
            disk.rename(stage / name, place)


def make_all(folder: Path, undo: ExitStack) -> None:
    """Make a folder and those above it; ``undo`` removes those that were made and are empty."""
    missing = [above for above in (folder, *folder.parents) if not os.path.lexists(above)]
    for above in reversed(missing):
        if disk.make(above):
            undo.callback(disk.drop, above)
            disk.sync(above.parent)


# ---------------------------------------------------------------------- hidden folders
@contextmanager
def _stage(place: Path) -> Iterator[Path]:
    """Yield a hidden folder beside a place, locked; remove what is left of it at the end."""
    _clear_abandoned(place)
    stage = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    disk.make(stage)
    try:
        # The lock tells later writers of this place that its writer lives. It is on the folder
        # itself, so it still holds under the folder's new name.
        with locks.holding(stage, make=False):
            yield stage
    finally:
        with suppress(OSError):
            rmtree(stage, ignore_errors=True)


def _clear_abandoned(place: Path) -> None:
    """Clear away the hidden folders of this place whose writers are gone.

    Raises:
        FolderError: the folder around can't be read.
    """
    own_stage = re.compile(re.escape(f".{place.name}") + _STAGE)
    with disk.named("look into it", place.parent):
        stages = [name for name in os.listdir(place.parent) if own_stage.match(name)]
        claims.clear(place.parent, own_stage)
    for name in stages:
        # One that can't be locked or removed is in no writer's way. The next writer tries again.
        with suppress(OSError, LoraTreeError):
            held = locks.attempt(place.with_name(name), make=False)
            if held is None:
                continue
            try:
                restore_replaced(place.with_name(name), place.parent)
                rmtree(place.with_name(name))
            finally:
                held.release()


def _sync_all(folder: Path) -> None:
    """Make every byte and name below a folder durable."""
    # Files come before the folders that name them: a name must not last longer than its bytes.
    for root, _, files in os.walk(folder, topdown=False, onerror=disk.refuse):
        for file in files:
            path = os.path.join(root, file)
            with disk.named("sync it", path):
                # Windows syncs only files that are open for writing.
                handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
                try:
                    sync_file(handle)
                finally:
                    os.close(handle)
        disk.sync(root)
