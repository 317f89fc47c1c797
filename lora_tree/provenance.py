"""Provenance: the origin of a node's content, as values that a lock and a history keep.

    tree.save("zoo/", note=SaveNote(by="tune.py", training={"fr": TrainedWith(...)}))

A save writes the note of each node that it changes into tree.lock. If a later save replaces the
node, the note goes into the history with the content that it is about.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from .errors import FolderError
from .spec import StrictModel

__all__ = [
    "DataFile",
    "Made",
    "SaveNote",
    "TrainedWith",
    "WatchedWith",
    "data_files",
    "seen_from",
    "utc_now",
]

_BLOCK = 1 << 18

Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class DataFile(StrictModel):
    """A file of rows that nodes were trained on.

    Args:
        path: where it was, relative to the tree's folder: a project that is moved as a whole keeps
            it.
        sha256: the hash of its bytes.
    """

    path: str
    sha256: Sha256


class WatchedWith(StrictModel):
    """The evaluations of a training on rows that it did not learn; see `lora_tree.runs.HeldOut`.

    Args:
        data: the files of these rows, in order; empty: rows that the run held back from its own.
        every: steps between two evaluations.
        patience: evaluations without improvement after which a node stops; None: no node does.
    """

    data: list[DataFile] = Field(default_factory=list)
    every: int = Field(ge=1)
    patience: int | None = Field(default=None, ge=1)


class TrainedWith(StrictModel):
    """The rows, settings and run of a training: enough to train in the same way again.

    Args:
        nodes: the nodes that were trained together.
        data: the files that the rows came from, in order.
        settings: the run's, as JSON has them; see `lora_tree.runs.Settings.plain`.
        max_length: tokens that were kept of a row.
        run: the folder of the run's checkpoints, relative to the tree's folder.
        held_out: the evaluations of it; None: there were none.
    """

    nodes: list[str]
    data: list[DataFile]
    settings: dict[str, Any] = Field(default_factory=dict)
    max_length: int | None = None
    run: str | None = None
    held_out: WatchedWith | None = None

    @property
    def digest(self) -> str:
        """A hash of all fields: tree.lock keeps one entry under it for all nodes of a training."""
        fields = self.model_dump(mode="json")
        # A training without `held_out` keeps the hash that it had before this field existed.
        if fields["held_out"] is None:
            del fields["held_out"]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Made:
    """When and by which command a node got its content.

    Args:
        when: the time of the save, UTC, like ``2026-11-26T19:17:26Z``.
        by: the command, or what the program called itself.
        losses: before and after, in nats per token, if it was trained.
        training: what its content was trained with, if that is known.
    """

    when: str
    by: str
    losses: tuple[float, float] | None = None
    training: TrainedWith | None = None


@dataclass(frozen=True)
class SaveNote:
    """A note of a save about itself, for tree.lock and the history.

    Args:
        by: the command, or what the program calls itself.
        training: node → what it was trained with.
        losses: node → its loss before and after.
        moved: old path → new path of nodes that were moved and changed at once; the history of a
            node that was only moved follows its content by itself.
    """

    by: str = "tree.save()"
    training: Mapping[str, TrainedWith] = field(default_factory=dict)
    losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    moved: Mapping[str, str] = field(default_factory=dict)


def utc_now() -> str:
    """Return the time as locks and logs note it, like ``2026-11-26T19:17:26Z``."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def data_files(
    files: Iterable[str | os.PathLike[str]], folder: str | os.PathLike[str]
) -> list[DataFile]:
    """Hash files of rows, for `TrainedWith.data`.

    Args:
        files: the files.
        folder: the tree's; the paths returned are relative to it.

    Raises:
        FolderError: a file can't be read.
    """
    hashed_files = []
    for file in files:
        hashed = hashlib.sha256()
        try:
            with open(file, "rb") as stream:
                while block := stream.read(_BLOCK):
                    hashed.update(block)
        except OSError as error:
            raise FolderError(f"{file}: can't be read: {error.strerror}") from error
        hashed_files.append(DataFile(path=seen_from(folder, file), sha256=hashed.hexdigest()))
    return hashed_files


def seen_from(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> str:
    """Return a path relative to a folder, with "/"; an absolute one if there is no such path."""
    try:
        # Links are resolved first: if the folder is a link, a ".." leads to another place.
        found = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    except ValueError:  # two drives of Windows
        found = os.path.realpath(path)
    return found.replace(os.sep, "/")
