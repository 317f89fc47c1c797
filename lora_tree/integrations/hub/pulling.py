"""Pull: bring a tree from the model hub into a folder.

    ask      tree.yaml and tree.lock of the commit      which of its files are the tree's
    fetch    those, into huggingface_hub's cache        nothing in the folder is touched yet
    check    their hashes, against the tree.lock        what the owners broke is refused
    arrive   in the folder, whole or not at all

Law: a pull is refused where it would replace a file that the hub can't give back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...errors import FolderError, UnlockedError, listing
from ...folder import disk
from ...folder.problem import raise_any
from ...folder.reading.opening import inspect
from ...folder.reading.tree_place import TreePlace
from ...folder.transfer.hub_origin import HubOrigin, read_origin
from ...folder.transfer.incoming import Arrival, arrive, check_arrival, planned
from ...folder.transfer.tree_files import (
    PLACE,
    files_of_tree,
    locked_times,
    mismatched,
    missing_among,
    places_among,
)
from ...formats.peft import CONFIG
from ...spec import TreeSpec
from ...storage import as_path
from .client import MAIN, HubClient, HubFile, Snapshot
from .seen_commit import lock_in, seen_files, spec_in

__all__ = ["Pulled", "pull"]


@dataclass(frozen=True)
class Pulled:
    """The outcome of a pull, or of a dry run of one.

    Args:
        repository, revision, commit: where the tree came from.
        folder: where it is now.
        new, replaced, deleted: places in the folder.
        bytes: the size of the tree's files.
    """

    repository: str
    revision: str
    commit: str
    folder: str
    new: tuple[str, ...]
    replaced: tuple[str, ...]
    deleted: tuple[str, ...]
    bytes: int


def pull(
    repository: str,
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> Pulled:
    """Bring a tree from the model hub into a folder; only files of the tree come.

    The files are fetched into huggingface_hub's cache, checked there, and then copied. A pull into
    a folder that was pulled before brings it up to date.

    Args:
        repository: its id, ``org/zoo``.
        folder: made if it is missing. Files in it that are not the tree's stay as they are.
        revision: a branch, tag or commit; None: the default branch.
        dry_run: say what would happen. tree.yaml and tree.lock are fetched, and nothing is written
            into the folder. The other files are compared with the lock by their sizes alone.
        progress: let huggingface_hub draw its bars on stderr.

    Raises:
        HubError: the repository or revision is not there or gated, or the hub can't be asked.
        FolderError: the repository holds no tree; or a file that can't be brought back is in the
            way.
        UnlockedError, FormatError, SpecError: its files are not those of its lock, or broken.
    """
    client = HubClient(repository, what="pull", progress=progress)
    target = Path(os.path.abspath(as_path(folder)))
    tree_files = client.fetch(revision, [PLACE.yaml, PLACE.lock])
    files = _listed(client, tree_files.folder, tree_files.commit)
    spec = spec_in(tree_files.folder)
    if not client.is_online:
        _refuse_partial(client, tree_files, files, spec)
    names = places_among(files, spec)
    _refuse_no_tree(repository, files, names)
    origin = read_origin(target) if target.is_dir() else None
    known = partial(_is_on_the_hub, client, origin)
    endpoints = (repository, revision or MAIN, tree_files.commit, str(target))
    if dry_run:
        _check_lock(client, tree_files, files, names, spec)
        same = {place: files[place].holds for place in names}
        arrival = planned(target, same, known)
        check_arrival(target, arrival)
        return _pulled(endpoints, arrival, files, names)
    snapshot = client.fetch(tree_files.commit, names)
    opened = inspect(TreePlace(str(snapshot.folder)), outside=False)
    raise_any(
        opened.problems,
        _push_again(repository),
        # Adapters that nodes name on the hub are not part of a pull; opening the tree fetches them.
        but=("stale", "leftover", "hub"),
    )
    own_files = files_of_tree(opened)
    if own_files.outside:
        raise FolderError(
            f"{repository}: {listing(own_files.outside)}: its adapter lies in a hidden folder",
            "its owners have to move it",
        )
    places = own_files.files
    same = {place: partial(_same_bytes, at) for place, at in places.items()}
    arrival = arrive(
        target,
        {place: Path(os.path.realpath(at)) for place, at in places.items()},
        partial(planned, target, same, known),
        times=locked_times(opened),
        origin=HubOrigin(repository=repository, branch=revision or MAIN, commit=tree_files.commit),
    )
    return _pulled(endpoints, arrival, files, list(places))


def _pulled(
    endpoints: tuple[str, str, str, str],
    arrival: Arrival,
    files: Mapping[str, HubFile],
    places: Sequence[str],
) -> Pulled:
    size = sum(files[place].size for place in places if place in files)
    return Pulled(*endpoints, arrival.new, arrival.replaced, arrival.deleted, size)


def _push_again(repository: str) -> str:
    return (
        f"{repository} was pushed with files that differ from its {PLACE.lock}: its owners have to "
        "push it again"
    )


def _check_lock(
    client: HubClient,
    fetched: Snapshot,
    files: Mapping[str, HubFile],
    names: Sequence[str],
    spec: TreeSpec | None,
) -> None:
    """Refuse a tree whose files are not those of its lock, as it shows before they are fetched.

    Raises:
        SpecError: the tree.lock is broken.
        UnlockedError: they are not; names the nodes.
    """
    sizes = {name: file.size for name, file in files.items()}
    wrong = mismatched(sizes, names, spec, lock_in(fetched.folder))
    if wrong:
        raise UnlockedError(
            f"{client.repository}: {listing(wrong)}: files that are missing, hidden or outside, of "
            f"another size than {PLACE.lock} says, or not in it",
            _push_again(client.repository),
        )


def _listed(client: HubClient, folder: Path, commit: str) -> dict[str, HubFile]:
    """Return the files of a commit; without the hub those that the cache has of it."""
    if client.is_online:
        return client.files(commit)
    found: dict[str, HubFile] = {}
    for above, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(above, name)
            path = os.path.relpath(file, folder).replace(os.sep, "/")
            found[path] = HubFile(os.stat(file).st_size, "", disk.digest(file))
    return found


def _refuse_partial(
    client: HubClient, there: Snapshot, files: Mapping[str, HubFile], spec: TreeSpec | None
) -> None:
    """Refuse a tree of which the cache has only a part, as a dry run leaves it."""
    lock = lock_in(there.folder)
    if lock is None:
        return
    missing = missing_among(files, spec, lock)
    if missing:
        raise client.incomplete_error(there.commit, missing)


def _refuse_no_tree(repository: str, files: Mapping[str, HubFile], names: Sequence[str]) -> None:
    if PLACE.yaml in names or any(name.endswith(f"/{CONFIG}") for name in names):
        return
    if CONFIG in files:
        raise FolderError(
            f"{repository}: one adapter, not a tree of them",
            f"make it a node of a tree: lora-tree add FOLDER NODE hub:{repository}",
        )
    raise FolderError(
        f"{repository}: no tree: no {PLACE.yaml}, and no folder with an {CONFIG}",
        f"it holds {listing(sorted(files)) or 'nothing'}",
    )


def _is_on_the_hub(client: HubClient, origin: HubOrigin | None, place: str, file: Path) -> bool:
    """Tell whether the commit that a folder was pulled from, or pushed to, has this exact file."""
    known = seen_files(client, origin).get(place)
    return known is not None and known.holds(file)


def _same_bytes(one: str, other: Path) -> bool:
    if os.stat(one).st_size != os.stat(other).st_size:
        return False
    return disk.digest(one) == disk.digest(other)
