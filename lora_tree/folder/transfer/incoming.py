"""Incoming: a tree's files from elsewhere take their places in a folder, all of them or none.

    nothing there, or an empty folder   filled under a hidden name and renamed (`atomic_folders`)
    a folder                            one transaction, as a save's (`commit`)

Law: a file that would be replaced or deleted is one that its origin can give back, byte for byte.
Anything else in its way is refused before the first byte is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import FolderError, listing
from ...formats.peft import FILES
from .. import disk
from ..atomic_folders import new_folder
from ..reading.opening import inspect
from ..reading.tree_place import TreePlace
from ..saving.single_adapter import finish_nodes
from ..transactions.changes import Changes, NewFile
from ..transactions.commit import Transaction, check_writing, writing
from .hub_origin import HubOrigin, write_origin
from .tree_files import PLACE, files_of_tree

__all__ = ["Arrival", "arrive", "check_arrival", "planned"]


@dataclass(frozen=True)
class Arrival:
    """The changes to a folder: the places whose files are new, replaced, deleted or the same."""

    new: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    same: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.new or self.replaced or self.deleted)


def planned(
    folder: Path,
    places: Mapping[str, Callable[[Path], bool]],
    returnable: Callable[[str, Path], bool],
) -> Arrival:
    """Return the changes that a tree's files would make to a folder.

    Args:
        folder: it need not exist.
        places: place → a function that tells whether the file there needs no change.
        returnable: tells whether the origin can give back the file that is at a place now.

    Raises:
        FolderError: a file that can't be brought back is in the way; names all of them.
    """
    new, replaced, deleted, same, kept = [], [], [], [], []
    for place, is_same in places.items():
        at = folder / place
        if not os.path.lexists(at):
            new.append(place)
        elif disk.exists(at) and is_same(at):
            same.append(place)
        else:
            replaced.append(place)
            kept.append(place)
    for place in _own_places(folder):
        if place not in places:
            deleted.append(place)
            kept.append(place)
    blocked = []
    for place in kept:
        if not disk.exists(folder / place) or not returnable(place, folder / place):
            blocked.append(place)
    if blocked:
        raise FolderError(
            f"{folder}: {listing(blocked)}: would be replaced or deleted, and the hub does not "
            "have this content, so it could not be brought back",
            "pull into another folder; or push what is here first, to a branch of its own",
        )
    # A record of a save can't delete it: a folder without its tree.yaml may be another tree.
    if PLACE.yaml in deleted:
        raise FolderError(f"{folder}: the new tree has no {PLACE.yaml}", "move this one away first")
    return Arrival(tuple(new), tuple(replaced), tuple(deleted), tuple(same))


def arrive(
    folder: Path,
    files: Mapping[str, Path],
    plan: Callable[[], Arrival],
    *,
    times: Mapping[str, int],
    origin: HubOrigin,
) -> Arrival:
    """Put a tree's files into a folder as one change, and return the changes.

    Args:
        folder: made if it does not exist.
        files: place → the file to copy.
        plan: calls `planned`; itself called under the writer's lock if the folder has files.
        times: place → the time that the file gets, in nanoseconds. With the times in the tree's
            lock, the folder opens without hashing its files.
        origin: the commit on the hub, to be noted in the folder.

    Raises:
        FolderError: as `planned`, or the folder can't be written. Nothing in it has changed then.
    """
    if _is_free(folder):
        arrival = plan()
        with new_folder(folder) as stage:
            for place, file in files.items():
                for above in reversed((stage / place).parents[: place.count("/")]):
                    disk.make_inside(above)
                disk.copy(file, stage / place)
            _set_times(stage, times)
            write_origin(stage, origin)
        return arrival
    with writing(folder) as transaction:
        finish_nodes(str(folder))
        # Under the lock: no other writer can put a file in the way between this look and the moves.
        arrival = plan()
        _refuse_single([*arrival.new, *arrival.replaced], folder)
        new = []
        for place in (*arrival.new, *arrival.replaced):
            new.append(NewFile(place, disk.digest(files[place]), files[place]))
        transaction.apply(Changes(tuple(new), frozenset(arrival.deleted)))
        _set_times(folder, times)
        write_origin(folder, origin)
    return arrival


def check_arrival(folder: Path, arrival: Arrival) -> None:
    """Refuse what `arrive` would refuse of a folder; nothing is written.

    Raises:
        FolderError: as `arrive`.
    """
    is_free = _is_free(folder)
    check_writing(folder.parent if is_free else folder)
    if not is_free:
        places = (*arrival.new, *arrival.replaced)
        _refuse_single(places, folder)
        # Without their bytes: only the places are looked at.
        files = tuple(NewFile.of(place, b"") for place in places)
        Transaction(folder).check(Changes(files, frozenset(arrival.deleted)))


def _is_free(folder: Path) -> bool:
    if not os.path.lexists(folder):
        return True
    if not os.path.isdir(folder):
        raise FolderError(f"{folder}: a file lies where the tree's folder belongs", "move it away")
    with disk.named("look into it", folder):
        return not os.path.islink(folder) and not os.listdir(folder)


def _own_places(folder: Path) -> list[str]:
    """Return the places of the tree's files that are in a folder now."""
    if not os.path.isdir(folder):
        return []
    return list(files_of_tree(inspect(TreePlace(str(folder)))).files)


def _set_times(folder: Path, times: Mapping[str, int]) -> None:
    """Give files the times of the lock; their contents were compared with it."""
    for place, time_ns in times.items():
        # A time is for speed alone: where it can't be set, the files are hashed when opened.
        with suppress(OSError, OverflowError):
            os.utime(folder / place, ns=(time_ns, time_ns))


def _refuse_single(places: Iterable[str], folder: Path) -> None:
    """Refuse files that no save writes: the record of a transaction may not name them."""
    known = (PLACE.yaml, PLACE.lock)
    single = [p for p in places if p not in known and os.path.basename(p) not in FILES]
    if single:
        raise FolderError(
            f"{folder}: {listing(single)}: a file of another program's format comes with a new "
            "folder only",
            "pull into another folder",
        )
