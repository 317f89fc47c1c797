"""The folder of a run's checkpoints: which run goes on, and which makes room for the next.

    checkpoint-120/         of the run that goes on, or went last
    finished-1/             runs that finished before it, each with the checkpoints that it kept
      checkpoint-200/

Only an unfinished run is resumed. A finished one is set aside when another begins, so that a folder
has room for stage after stage. It stays there until the user deletes it, because its nodes may be
promoted from there.

A run is *finished* when all its steps are done, and *in the tree* when its caller said that the
tree was saved (``saved`` in its run.json).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FolderError, FormatError, LoraTreeError
from ..folder import disk
from ..formats import strict_json
from ..system.reading import is_folder, stat_of
from .checkpoint_place import put_back

__all__ = [
    "ABOUT",
    "LastCheckpoint",
    "checkpoints",
    "checkpoints_to_delete",
    "find_last_checkpoint",
    "read_measured_loss",
    "render_about",
    "set_aside",
]

ABOUT = "run.json"
_NAME = re.compile(r"checkpoint-([0-9]+)\Z")
_FINISHED = "finished-"


@dataclass(frozen=True)
class LastCheckpoint:
    """The last checkpoint in a run's folder.

    Args:
        folder: of the checkpoint.
        about: its run.json.
        step: how many steps are done.
    """

    folder: Path
    about: Mapping[str, Any]
    step: int

    @property
    def is_finished(self) -> bool:
        """True if all steps of its run are done."""
        settings = self.about.get("settings")
        return isinstance(settings, Mapping) and settings.get("steps") == self.step

    @property
    def is_saved(self) -> bool:
        """True if its nodes were saved in the tree."""
        return self.about.get("saved") is True


def find_last_checkpoint(folder: Path) -> LastCheckpoint | None:
    """Return the last checkpoint in a run's folder, or None.

    Raises:
        FolderError, FormatError: the folder or the checkpoint can't be read.
    """
    # A process that was killed while it replaced a checkpoint may have left it under another name.
    put_back(folder)
    found = checkpoints(folder)
    if not found:
        return None
    checkpoint = found[-1][1]
    file = checkpoint / ABOUT
    about = strict_json.loads(disk.read_file(file), str(file))
    step = about.get("step")
    # True is an int in Python, and JSON has it.
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise FormatError(f"{file}: step is {step!r}, expected how many steps are done")
    return LastCheckpoint(checkpoint, about, step)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the checkpoints in a run's folder, in order.

    Raises:
        FolderError: it is no folder, or can't be read.
    """
    if not is_folder(folder):
        # A name that is taken by a file would fail later, at the first checkpoint.
        if stat_of(folder) is not None:
            raise FolderError(f"{folder}: is no folder", "name a folder for the run's checkpoints")
        return []
    with disk.named("list it", folder):
        names = os.listdir(folder)
    found = []
    for name in names:
        match = _NAME.match(name)
        if match:
            found.append((int(match[1]), folder / name))
    # By number: as text, checkpoint-90 would come after checkpoint-100.
    return sorted(found)


def set_aside(before: LastCheckpoint) -> Path:
    """Move a finished run's checkpoints out of the next one's way; return where the last one is.

    Raises:
        FolderError: the folder can't be written.
    """
    parent = before.folder.parent
    number = 1
    # `make` says whether it made the folder, so two runs that end at once take two numbers.
    while not disk.make(parent / f"{_FINISHED}{number}"):
        number += 1
    aside = parent / f"{_FINISHED}{number}"
    # The last one is moved last: as long as it is there, the next start sees that a run has to make
    # room. Each is moved by one rename, which is atomic on one file system.
    for _, checkpoint in checkpoints(parent):
        if checkpoint != before.folder:
            disk.rename(checkpoint, aside / checkpoint.name)
    place = aside / before.folder.name
    disk.rename(before.folder, place)
    disk.sync(parent)
    return place


def read_measured_loss(checkpoint: Path) -> float | None:
    """Return a checkpoint's loss on the rows held back, from its run.json; None if unknown."""
    file = checkpoint / ABOUT
    try:
        measured = strict_json.loads(disk.read_file(file), str(file)).get("measured")
    except LoraTreeError:
        return None  # a loss only serves to compare checkpoints, so an unknown one is no error
    return measured if isinstance(measured, float) else None


def checkpoints_to_delete(found: Sequence[tuple[int, Path]], keep: int) -> list[Path]:
    """Return the checkpoints to delete, so that the best and the last ones stay.

    Args:
        found: (step, folder) of all of a run's, in order.
        keep: how many stay; the last one always does, the best one if there is room for two.
    """
    if len(found) <= keep:
        return []
    last = found[-1][1]
    measured = {folder: read_measured_loss(folder) for _, folder in found}
    known = {folder: loss for folder, loss in measured.items() if loss is not None}
    best = min(known, key=lambda folder: known[folder]) if known else last
    stay = {last} if keep == 1 else {last, best}
    for _, folder in reversed(found):
        if len(stay) >= keep:
            break
        stay.add(folder)
    return [folder for _, folder in found if folder not in stay]


def render_about(about: Mapping[str, Any]) -> bytes:
    """Return the bytes of a run.json."""
    # Sorted, so that a comparison of two files shows only what differs between the runs.
    return json.dumps(about, indent=2, sort_keys=True).encode()
