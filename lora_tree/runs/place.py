"""The folder of a run's checkpoints: which run is resumed, and which makes room for the next.

    checkpoint-120/         of the run that goes on, or went last
    finished-1/             runs that finished before it, each with its last checkpoint
      checkpoint-200/

Only an unfinished run is resumed. A finished one is set aside when another begins, so that a folder has room for stage
after stage; it stays until somebody deletes it, since its nodes may be promoted from there.

A run is *finished* when all its steps are done, and *in the tree* when its owner said that the tree was saved
(``saved`` in its run.json).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FolderError, FormatError, SpecError
from ..folder import disk
from ..formats import strict_json
from ..integrations.checkpoint import put_back
from ..system.reading import is_folder, stat_of

__all__ = [
    "ABOUT",
    "LastCheckpoint",
    "checkpoints",
    "differing",
    "last_of",
    "refuse_other",
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
        """All steps of its run are done."""
        settings = self.about.get("settings")
        return isinstance(settings, Mapping) and settings.get("steps") == self.step

    @property
    def is_saved(self) -> bool:
        """Its nodes were saved in the tree."""
        return self.about.get("saved") is True


def last_of(folder: Path) -> LastCheckpoint | None:
    """Return the last checkpoint in a run's folder, or None.

    Raises:
        FolderError, FormatError: the folder or the checkpoint can't be read.
    """
    put_back(folder)
    found = checkpoints(folder)
    if not found:
        return None
    file = found[-1][1] / ABOUT
    about = strict_json.loads(disk.read(file), str(file))
    step = about.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise FormatError(f"{file}: step is {step!r}, expected how many steps are done")
    return LastCheckpoint(found[-1][1], about, step)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints in a run's folder, in order.

    Raises:
        FolderError: it is no folder, or can't be read.
    """
    if not is_folder(folder):
        if stat_of(folder) is not None:
            raise FolderError(f"{folder}: is no folder", "name a folder for the run's checkpoints")
        return []
    with disk.named("list it", folder):
        names = [
            (match, folder / name) for name in os.listdir(folder) if (match := _NAME.match(name))
        ]
    return sorted((int(match[1]), path) for match, path in names)


def set_aside(before: LastCheckpoint) -> Path:
    """Move a finished run's checkpoint out of the next one's way, and return where it is now.

    Raises:
        FolderError: the folder can't be written.
    """
    parent = before.folder.parent
    number = 1
    while not disk.make(parent / f"{_FINISHED}{number}"):
        number += 1
    place = parent / f"{_FINISHED}{number}" / before.folder.name
    disk.rename(before.folder, place)
    disk.sync(parent)
    return place


def render_about(about: Mapping[str, Any]) -> bytes:
    """The bytes of a run.json."""
    return json.dumps(about, indent=2, sort_keys=True).encode()


def refuse_other(before: LastCheckpoint, mine: Mapping[str, Any]) -> None:
    """Refuse to begin a run where another one is unfinished.

    Raises:
        SpecError: says in what the two differ.
    """
    what = differing(before.about, mine)
    if what is not None:
        raise SpecError(
            f"{before.folder}: of a run with other {what}: {_told(before.about.get(what), mine[what])}",
            "it is unfinished: go on with what it was, name another folder for this run, or delete that checkpoint",
        )


def differing(about: Mapping[str, Any], mine: Mapping[str, Any]) -> str | None:
    """The first word under which a run.json says something else than ``mine``; None: it is the same run."""
    return next((what for what, value in mine.items() if about.get(what) != value), None)


def _told(theirs: Any, mine: Any) -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = sorted(k for k in {*theirs, *mine} if theirs.get(k) != mine.get(k))
        return "; ".join(f"{k} was {theirs.get(k)!r} and is {mine.get(k)!r}" for k in keys)
    return f"was {theirs!r} and is {mine!r}"
