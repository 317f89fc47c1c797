"""Make a run's checkpoint appear whole or not at all, and delete it.

    .unfinished/checkpoint-120             filled here by all ranks, synced, then renamed by one
    .unfinished/checkpoint-120.replaced    the checkpoint that it replaces, between the two renames

A run that is killed while it writes leaves only ``.unfinished``, which no program takes for a
checkpoint. The next save clears it. If the run was killed between the two renames, the checkpoint's
place is empty. Resuming and saving put the old one back first; reading reads it where it lies.

All ranks write into one folder, so its name is fixed, and there is no lock as in
`folder.atomic_folders`: a run's folder is written by one run.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..folder import disk
from ..folder.atomic_folders import REPLACED, publish, restore_replaced
from ..system.reading import is_folder, stat_of

__all__ = ["UNFINISHED", "locate_checkpoint", "put_back", "retire", "staged_checkpoint"]

UNFINISHED = ".unfinished"


@contextmanager
def staged_checkpoint(
    parent: Path, name: str, *, writes: bool, meet: Callable[[], None]
) -> Iterator[Path]:
    """Yield a folder in which to fill ``name``; when the block ends it is ``parent/name``.

    Args:
        parent: where it appears. A folder of that name that is there is replaced.
        name: of the folder.
        writes: this process clears up, and gives the name; exactly one of all processes does.
        meet: waits for the other processes.

    Raises:
        FolderError: the folder can't be written.
    """
    stage = parent / UNFINISHED
    if writes:
        # An old checkpoint that a killed run had put aside lies in the stage. It goes back before
        # the stage is removed, or it would be lost with it.
        put_back(parent)
        with disk.named("clear it", stage):
            shutil.rmtree(stage, ignore_errors=True)
            os.makedirs(stage)
    # No rank may write before the stage is there, and none may still write when it is renamed.
    meet()
    yield stage
    meet()
    if writes:
        publish(stage / name, parent / name, aside=stage / f"{name}{REPLACED}")
        with disk.named("clear it", stage):
            shutil.rmtree(stage)
    meet()


def put_back(parent: Path) -> None:
    """Put back a checkpoint that was to be replaced when its run was killed, if its place is empty.

    Args:
        parent: of the checkpoints; need not be there.

    Raises:
        FolderError: the folder can't be read or written.
    """
    restore_replaced(parent / UNFINISHED, parent)


def locate_checkpoint(checkpoint: Path) -> Path:
    """Return where to read a checkpoint: its place, or where a killed run had put it aside."""
    aside = checkpoint.parent / UNFINISHED / f"{checkpoint.name}{REPLACED}"
    return aside if stat_of(checkpoint, follow=False) is None and is_folder(aside) else checkpoint


def retire(checkpoint: Path) -> None:
    """Delete a checkpoint. What can't be deleted is left for the next save, which clears it."""
    stage = checkpoint.parent / UNFINISHED
    renamed = stage / f"{checkpoint.name}.{uuid.uuid4().hex}"
    with suppress(OSError):
        stage.mkdir(exist_ok=True)
        # Renamed first: a run that is killed meanwhile leaves no half-deleted checkpoint.
        os.rename(checkpoint, renamed)
        shutil.rmtree(renamed)
        os.rmdir(stage)
