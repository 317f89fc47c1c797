"""The archive: the files of contents that no node has any more, under the content's hash.

    .versions/<content>/adapter_config.json            a PEFT adapter like any other
    .versions/<content>/adapter_model.safetensors

A save that replaces a node's files gives them a second name here first, before it decides: a hard
link, which costs no bytes. The save then takes the first name away. So an archive may hold more
contents than the log names (left by a save that was cut off), and never fewer.

Law: a file of the archive shares its bytes with no file outside. A program that writes an adapter
in place, as some do, would write into the archive otherwise.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from ...errors import LoraTreeError, SpecError
from ...formats.limits import LOCK_BYTES
from ...formats.peft import FILES
from ...system.reading import is_folder
from .. import disk
from ..history_log import HISTORY, LOG_NAME, parse_history
from .changes import Archived

__all__ = [
    "archive",
    "archived",
    "contents_of_other_trees",
    "forget",
    "forget_unnamed",
    "place_in_archive",
]

_CONTENT = re.compile(r"[0-9a-f]{64}\Z")
_PART = ".part"


def place_in_archive(folder: str | Path, content: str) -> str:
    """Return the folder in which a tree's archive keeps a content."""
    return os.path.join(folder, HISTORY, content)


def archived(folder: str | Path) -> set[str]:
    """Return the contents in a tree's archive.

    Raises:
        SpecError: the archive is a link, or no folder.
        FolderError: it can't be read.
    """
    home = Path(folder) / HISTORY
    _refuse_link(home)
    with disk.named("look into it", home):
        names = os.listdir(home) if is_folder(home, follow=False) else []
    return {name for name in names if _CONTENT.match(name)}


def archive(folder: Path, leaving: Iterable[Archived]) -> None:
    """Put contents into the archive, durably.

    Args:
        folder: the tree's; its writer's lock is held.
        leaving: the contents, and where their files are now.

    Raises:
        SpecError: the archive is a link, or no folder.
        FolderError: the disk refuses.
    """
    home = folder / HISTORY
    _refuse_link(home)
    made = False
    for archived_content in leaving:
        made |= disk.make_inside(home)
        place = home / archived_content.content
        disk.make_inside(place)
        for name in FILES:
            if not disk.exists(place / name):
                _keep(archived_content.files[name], place / name)
        disk.sync(place)
    # The contents' names are durable once the archive is synced, its own name once the tree's
    # folder is.
    if os.path.lexists(home):
        disk.sync(home)
    if made:
        disk.sync(folder)


def _keep(source: str, place: Path) -> None:
    """Give a file its name in the archive: by a link if it has no other name, else as a copy."""
    with disk.named("look at it", source):
        seen = os.lstat(source)
    if stat.S_ISREG(seen.st_mode) and seen.st_nlink == 1 and disk.link(source, place):
        return
    # Under another name first: a copy that is cut off must not look like a whole file.
    part = place.with_name(place.name + _PART)
    disk.remove(part)
    disk.copy(source, part)
    disk.rename(part, place)


def forget(folder: Path, contents: Iterable[str]) -> None:
    """Remove contents from the archive, and the archive itself if nothing is left in it.

    Raises:
        FolderError: a file can't be removed.
    """
    home = folder / HISTORY
    if not is_folder(home, follow=False):
        return
    for content in contents:
        place = home / content
        if not _CONTENT.match(content) or not is_folder(place, follow=False):
            continue
        for name in FILES:
            disk.remove(place / name)
            disk.remove(place / (name + _PART))
        disk.drop(place)
    disk.drop(home)


def forget_unnamed(folder: Path) -> None:
    """Remove contents that no log names, left by a save that was cut off before it had decided.

    Raises:
        FolderError: a file can't be read or removed.
    """
    home = folder / HISTORY
    if not is_folder(home, follow=False):
        return
    named: set[str] = set()
    with disk.named("look into it", home):
        logs = [name for name in os.listdir(home) if LOG_NAME.match(name)]
    for name in logs:
        try:
            named |= _contents_of_log(home / name)
        except LoraTreeError:
            return  # a log that can't be read may name any of them
    forget(folder, archived(folder) - named)


def _contents_of_log(file: Path) -> set[str]:
    """Return the contents that a log names.

    Raises:
        SpecError, FolderError: it is broken, or can't be read.
    """
    raw = disk.read_file(file, most=LOCK_BYTES, follow=False)
    return set(parse_history(raw, str(file)).contents())


def _refuse_link(home: Path) -> None:
    if os.path.lexists(home) and not is_folder(home, follow=False):
        raise SpecError(f"{home}: a link, or no folder; a save makes neither", "move it away")


def contents_of_other_trees(folder: Path, own_log: str) -> set[str]:
    """Return the contents that the logs of other trees over this folder name.

    Args:
        folder: the trees' folder.
        own_log: the place of this tree's log.

    Raises:
        SpecError, FolderError: a log is broken, or can't be read.
    """
    home = folder / HISTORY
    named: set[str] = set()
    with disk.named("look into it", home):
        names = os.listdir(home) if is_folder(home, follow=False) else []
    for name in names:
        if LOG_NAME.match(name) and f"{HISTORY}/{name}" != own_log:
            named |= _contents_of_log(home / name)
    return named
