"""The commit record: the decision of one save, as data that anybody may have written.

    .lora_tree/commit.json       which staged file goes to which place, and which are deleted

Law: a record can name only the files that one save writes (adapters in nodes' folders, one YAML
file, its lock, the log of the history), at places in the folder itself, never through a link. It
also records the file that lay at each place when it was made, and a process that carries it out
compares that first. So a record that came with a download, or with a folder that was changed since,
replaces and deletes nothing else.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import StringConstraints, ValidationError

from ...errors import FolderError, FormatError, PathError, SpecError, listing
from ...formats import strict_json
from ...formats.limits import LOCK_BYTES
from ...formats.peft import CONFIG, WEIGHTS
from ...node_names import check_path
from ...spec import StrictModel, check_format
from ...spec_errors import describe_invalid
from .. import disk
from ..history_log import HISTORY, LOG_NAME
from ..lockfile import Count, Digest, FileLock

__all__ = [
    "HIDDEN",
    "RECORD",
    "STAGE",
    "Record",
    "RecordedDelete",
    "RecordedMove",
    "check_places",
    "read_record",
    "stat_for_record",
]

HIDDEN = ".lora_tree"
RECORD = "commit.json"
VERSION: Literal[2] = 2
STAGE = re.compile(r"stage-[0-9a-f]{32}\Z")
_TOP = re.compile(r"[^./\0][^/\0]{0,200}\.(yaml|yml|lock)\Z")


class RecordedMove(StrictModel):
    """A staged file, the place it goes to, and the file that lay there when the record was made.

    The time in ``was`` is in nanoseconds, so a stranger can't guess it.
    """

    to: str
    size: Count
    sha256: Digest
    was: FileLock | None


class RecordedDelete(StrictModel):
    """A place whose file is deleted, and the file that lay there when the record was made."""

    at: str
    was: FileLock | None


class Record(StrictModel):
    """The whole decision: the staged file number i is ``moves[i]``."""

    version: Literal[2] = VERSION
    stage: Annotated[str, StringConstraints(pattern="^stage-[0-9a-f]{32}$")]
    moves: list[RecordedMove]
    deletes: list[RecordedDelete]

    def to_bytes(self) -> bytes:
        """Return the bytes of a commit.json."""
        data = self.model_dump(mode="json")
        return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def read_record(folder: str | Path) -> Record | None:
    """Read the record of a save that is not wholly carried out; None if there is none.

    Raises:
        NewerFormat: a newer version of this library wrote it.
        SpecError: the record is broken, or names a file that no save writes.
        FolderError: it can't be read.
    """
    hidden = os.path.join(folder, HIDDEN)  # no Path: every load of an adapter comes by here
    file = os.path.join(hidden, RECORD)
    for path, is_kind in ((hidden, stat.S_ISDIR), (file, stat.S_ISREG)):
        with disk.named("look at it", path):
            # One lstat each, and never "does it exist?" first: a writer may be clearing up.
            try:
                mode = os.lstat(path).st_mode
            except (FileNotFoundError, NotADirectoryError):
                return None  # the folder itself may be a file, which its owner reports better
        if not is_kind(mode):
            raise SpecError(f"{path}: a link, or not a file that a save writes", "remove it")
    try:
        data = strict_json.loads(disk.read_file(file, most=LOCK_BYTES, follow=False), file)
        check_format(data, file, VERSION)
        _refuse_earlier(data, file)
        record = Record.model_validate(data)
    except ValidationError as error:
        mistakes = describe_invalid(error, data, Record)[:8]
        raise SpecError(*(f"{file}: {text}" for _, text in mistakes)) from error
    except FormatError as error:
        raise SpecError(error.what) from error
    except FolderError:
        if not os.path.lexists(file):
            return None  # the writer carried it out between the lstat and the read
        raise
    moved_to = [move.to for move in record.moves]
    deleted = [delete.at for delete in record.deletes]
    check_places(Path(folder), moved_to, deleted)
    return record


def _refuse_earlier(data: Mapping[str, Any], file: str) -> None:
    version = data.get("version")
    # `isinstance` would take True for the version 1, because a bool is an int in Python.
    if type(version) is int and version < VERSION:
        raise SpecError(
            f"{file}: a save by an earlier lora_tree (format {version}) was cut off; "
            f"this one reads {VERSION}",
            "let that version finish it: lora-tree lock; or forget that save: remove the file",
        )


# ---------------------------------------------------------------------- places
def check_places(folder: Path, writes: Iterable[str], deletes: Iterable[str]) -> None:
    """Refuse places that no save writes or deletes, or that lie behind a link.

    Args:
        folder: the folder that the save writes.
        writes, deletes: places in it, relative.

    Raises:
        SpecError: names the place.
    """
    file = folder / HIDDEN / RECORD
    # The places are gone through twice, and an iterator would be empty the second time.
    deletes = list(deletes)
    places = [*writes, *deletes]
    # Many disks take two names that differ only by case for one file. There the second move would
    # replace what the first one put in place.
    if len({place.casefold() for place in places}) != len(places):
        raise SpecError(f"{file}: names a file twice")
    clear: set[str] = set()
    for place in places:
        above, _, name = place.rpartition("/")
        if not _is_written_by_a_save(above, name):
            text = f"{file}: {place[:200]!r} is no file that a save writes"
            raise SpecError(text, "remove the record")
        if above not in clear:  # two files of a node share the way, and each step is an lstat
            _refuse_links(folder, above)
            clear.add(above)
    # A save replaces tree.yaml, tree.lock and the log of the history, and deletes none of them. So
    # a record that deletes a file there was not made by a save.
    for place in deletes:
        if "/" not in place or place.startswith(f"{HISTORY}/"):
            text = f"{file}: {place[:200]!r} is no file that a save deletes"
            raise SpecError(text, "remove the record")
    _refuse_two_trees(file, places)


def _refuse_two_trees(file: Path, places: Iterable[str]) -> None:
    """Refuse the YAML files, or the locks, of more than one tree."""
    top = sorted(place for place in places if _TOP.match(place))
    yamls = [name for name in top if not name.endswith(".lock")]
    locks = set(top) - set(yamls)
    # other.lock belongs to other.yaml, other.yml.lock to other.yml (see `TreePlace`).
    # Without a YAML file any one lock will do.
    fitting = {f"{name.removesuffix('.yaml')}.lock" for name in yamls} or locks
    if len(yamls) > 1 or len(locks) > 1 or not locks <= fitting:
        raise SpecError(
            f"{file}: {listing(top)}: of more than one tree, and a save writes one",
            "remove the record",
        )


def _is_written_by_a_save(above: str, name: str) -> bool:
    if above == HISTORY:
        return LOG_NAME.match(name) is not None
    try:
        node = check_path(above)
    except PathError:
        return False
    return name in (CONFIG, WEIGHTS) or (not node and _TOP.match(name) is not None)


def _refuse_links(folder: Path, above: str) -> None:
    for name in above.split("/") if above else ():
        folder = folder / name
        if os.path.islink(folder):
            raise SpecError(f"{folder}: a link; a save writes into the tree's own folders only")


def stat_for_record(place: Path) -> FileLock | None:
    """Return size and time of the file at a place, for a record; a link is not followed.

    Raises:
        FolderError: the system does not tell.
    """
    with disk.named("look at it", place):
        try:
            seen = os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            return None
    return FileLock(size=seen.st_size, mtime_ns=seen.st_mtime_ns)
