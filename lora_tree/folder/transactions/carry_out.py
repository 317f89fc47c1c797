"""Carry out a record: move each staged file to its place, and delete what it deletes.

Every step can be repeated after a kill: a file that is in its place already stays there, and a file
that is gone already counts as deleted. A record that this process did not write itself is verified
first. Then each staged file must be what was decided on, and each place must still hold what it
held then.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...errors import FolderError, SpecError
from ...system.reading import is_folder
from .. import disk
from ..lockfile import FileLock
from .record import HIDDEN, RECORD, STAGE, Record, RecordedMove, stat_for_record

__all__ = ["carry_out", "sweep"]

_STAGED = re.compile(r"(?:[0-9]+|record)\Z")


def carry_out(folder: Path, record: Record, *, trusted: bool = False) -> None:
    """Move and delete the files that a record names, then remove the record.

    Args:
        folder: the folder that the record belongs to.
        record: the decision.
        trusted: this process made the record just now, so there is nothing to verify.

    Raises:
        SpecError: the stage is a link, or no folder.
        FolderError: a file differs from the record, or the disk refuses.
    """
    stage = folder / HIDDEN / record.stage
    # A record and a link of this name may come with a download. The moves would then take files
    # from wherever the link leads.
    if os.path.lexists(stage) and not is_folder(stage, follow=False):
        raise SpecError(f"{stage}: a link, or no folder; a save makes neither", "remove it")
    if not trusted:
        _verify(folder, record)
    touched = {folder / HIDDEN} | _move(folder, stage, record)
    emptied = set()
    for delete in record.deletes:
        disk.remove(folder / delete.at)
        emptied.add((folder / delete.at).parent)
    # The names must be durable before the record is removed: without it nothing would repeat the
    # moves after a power cut.
    for parent in sorted(touched | emptied):
        if is_folder(parent):
            disk.sync(parent)
    disk.remove(folder / HIDDEN / RECORD)
    disk.sync(folder / HIDDEN)
    # The empty folders go last, when the record is gone. A kill before this leaves an empty folder,
    # which is no node and does no harm.
    _drop_emptied(folder, emptied)


def _move(folder: Path, stage: Path, record: Record) -> set[Path]:
    """Rename each staged file to its place, and return the folders whose names have changed."""
    touched = set()
    for i, move in enumerate(record.moves):
        staged, place = stage / str(i), folder / move.to
        if not disk.exists(staged):
            continue  # an earlier attempt carried it to its place
        # The save made these folders before its decision. They are made again here, because another
        # program may have removed an empty one since.
        for part in [*place.relative_to(folder).parents][-2::-1]:
            disk.make_inside(folder / part)
        disk.rename(staged, place)
        touched.add(place.parent)
    return touched


def _drop_emptied(folder: Path, emptied: set[Path]) -> None:
    """Remove the folders in which nothing is left, and those above them, up to the tree's own."""
    for parent in sorted(emptied, reverse=True):  # a folder comes before the one around it
        while parent != folder and disk.drop(parent):
            parent = parent.parent


# ---------------------------------------------------------------------- another process's record
def _verify(folder: Path, record: Record) -> None:
    """Compare staged files with the record, and every place with what the record says of it."""
    stage = folder / HIDDEN / record.stage
    for i, move in enumerate(record.moves):
        if disk.exists(stage / str(i)):
            _refuse_another(stage / str(i), move, folder)
            _refuse_changed(folder, move.to, move.was)
        else:
            _refuse_another(folder / move.to, move, folder)
    for delete in record.deletes:
        _refuse_changed(folder, delete.at, delete.was)


def _refuse_changed(folder: Path, place: str, was: FileLock | None) -> None:
    now = stat_for_record(folder / place)
    # An absent file passes: an earlier attempt may have removed it, and nothing is lost by going
    # on.
    if now is not None and now != was:
        raise FolderError(
            f"{folder / place}: not the file that an interrupted save was to replace or delete",
            f"move it away or put the old one back; or give that save up: remove {folder / HIDDEN}",
        )


def _refuse_another(file: Path, move: RecordedMove, folder: Path) -> None:
    seen = disk.stamp(file) if disk.exists(file) else None
    same_size = seen is not None and seen.size == move.size
    if not same_size or disk.digest(file, follow=False) != move.sha256:
        raise FolderError(
            f"{file}: not the file that {HIDDEN}/{RECORD} describes: "
            f"expected {move.size} bytes for {move.to}",
            "a save was interrupted, and its files have changed since; restore them, "
            f"or remove {folder / HIDDEN}",
        )


# ---------------------------------------------------------------------- stages without a decision
def sweep(folder: Path) -> None:
    """Remove stages without a record, and in them only files that a save stages.

    Raises:
        FolderError: the hidden folder can't be read, or a file in it not be removed.
    """
    hidden = folder / HIDDEN
    files: list[Path] = []
    with disk.named("sweep it up", hidden):
        stages = [hidden / name for name in os.listdir(hidden) if STAGE.match(name)]
        for stage in stages:
            if not is_folder(stage, follow=False):
                continue
            for name in os.listdir(stage):
                if _STAGED.match(name) and not is_folder(stage / name, follow=False):
                    files.append(stage / name)
    for file in files:
        disk.remove(file)
    for stage in stages:
        disk.drop(stage)
