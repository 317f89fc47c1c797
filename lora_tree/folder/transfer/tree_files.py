"""TreeFiles: the files that a tree consists of, whatever else its folder is used for.

    tree.yaml, tree.lock           under these names, also if the tree was opened by another YAML
    fr/adapter_config.json, …      the files of each node, as tree.yaml and the folders say
    everything else                a training run, a cache, notes, keys: no part of the tree

Law: a file does not belong to a tree because it lies in its folder. A push sends the files on this
list alone, so a file that no node uses can't leave the machine.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ...formats.peft import CONFIG, FILES
from ...formats.recognise import DIFFUSERS_WEIGHTS, MLX_WEIGHTS
from ...spec import TreeSpec
from ..adapters.scan import SINGLE
from ..bounds import is_in_folders
from ..hub_name import is_on_hub
from ..lockfile import TreeLock
from ..reading.opening import Opened
from ..reading.training_steps import step_of
from ..reading.tree_place import TreePlace
from ..yamlfile import walk

__all__ = [
    "PLACE",
    "TreeFiles",
    "files_of_tree",
    "locked_times",
    "mismatched",
    "missing_among",
    "places_among",
]

PLACE = TreePlace("")
_FOLDERS = (DIFFUSERS_WEIGHTS, MLX_WEIGHTS)


@dataclass(frozen=True)
class TreeFiles:
    """The files of a tree.

    Args:
        files: place in the tree's folder → where the file is now, which may be in a save's stage.
        outside: node → the folder of its adapter, for adapters that lie outside of the tree's, or
            in a hidden folder of it, where other programs keep their files.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)


def files_of_tree(opened: Opened) -> TreeFiles:
    """Return the files that a tree consists of."""
    place = opened.place
    files: dict[str, str] = {}
    if opened.yaml_bytes is not None:
        files[PLACE.yaml] = place.yaml_file
    if opened.lock_bytes is not None:
        files[PLACE.lock] = place.lock_file
    outside: dict[str, str] = {}
    root = os.path.normpath(place.folder)
    for path, entry in opened.entries.items():
        if entry.files is None or entry.hub is not None:
            continue  # tree.yaml names an adapter on the hub, so its files are not sent
        # By its name and not by where links lead: a snapshot in the hub's cache is all links.
        at = os.path.relpath(entry.files.around, root)
        if not is_in_folders(os.path.normpath(entry.files.around), (root,)) or is_hidden(at):
            outside[path] = entry.files.folder
            continue
        for name in entry.files.names:
            if name in entry.files.now:
                files[posixpath.normpath(f"{at}/{name}")] = entry.files.now[name][0]
    return TreeFiles(files, outside)


def locked_times(opened: Opened) -> dict[str, int]:
    """Return the times of the nodes' files that the lock records: place → nanoseconds."""
    found: dict[str, int] = {}
    for path, entry in opened.entries.items():
        if entry.files is None or path not in opened.contents or opened.lock is None:
            continue
        if entry.hub is not None:
            continue
        at = os.path.relpath(entry.files.around, opened.place.folder)
        for name, known in zip(entry.files.names, opened.lock.nodes[path].files, strict=True):
            found[posixpath.normpath(f"{at}/{name}")] = known.mtime_ns
    return found


def places_among(names: Iterable[str], spec: TreeSpec | None) -> list[str]:
    """Return which of a folder's names are files of its tree, before any file is fetched.

    Args:
        names: every file, relative to the folder.
        spec: what its tree.yaml says; None if there is none.

    >>> places_among(["a/adapter_config.json", "a/checkpoint-9/adapter_config.json", "key"], None)
    ['a/adapter_config.json']
    """
    listed = set(_homes(spec).values())
    places = []
    for name in sorted(names):
        above, _, last = name.rpartition("/")
        if name in (PLACE.yaml, PLACE.lock):
            places.append(name)
            continue
        # The steps of a training run are no nodes unless tree.yaml lists them.
        is_step = step_of(above) is not None and above not in listed
        is_named = name in listed or (above in listed and last in _FOLDERS)
        is_single = is_named and name.endswith(SINGLE)
        is_half = last in FILES and bool(above) and not is_step
        if (is_half or is_single) and not is_hidden(above):
            places.append(name)
    return places


def missing_among(names: Collection[str], spec: TreeSpec | None, lock: TreeLock) -> list[str]:
    """Return the nodes that a tree.lock records, and whose files are not all among these names.

    Args:
        names: every file, relative to the tree's folder.
        spec: what its tree.yaml says; None if there is none.
        lock: its tree.lock.
    """
    homes = _homes(spec)
    missing = []
    for path, node_lock in lock.nodes.items():
        if node_lock.hub is not None:
            continue  # its adapter is in another repository
        home = homes.get(path, path)
        if node_lock.file is None:
            is_there = all(f"{home}/{name}" in names for name in FILES)
        else:
            is_there = home in names or any(f"{home}/{name}" in names for name in _FOLDERS)
        if not is_there:
            missing.append(path)
    return missing


def mismatched(
    sizes: Mapping[str, int], places: Iterable[str], spec: TreeSpec | None, lock: TreeLock | None
) -> list[str]:
    """Return the nodes that a tree.yaml or tree.lock describes otherwise than the files show.

    Judged by names and sizes, before any file of a node is fetched. Which folders of a tree.yaml
    are no nodes is not known then, so an error may be missed, and none is invented.

    Args:
        sizes: every file, relative to the tree's folder → its bytes.
        places: the files of the tree among them.
        spec: what its tree.yaml says; None if there is none.
        lock: its tree.lock; None if there is none.
    """
    homes = _homes(spec)
    wrong: set[str] = set()
    for path, node, _ in walk(spec) if spec is not None else ():
        if node.adapter is None or is_on_hub(node.adapter):
            continue
        home = homes[path]
        ends = [home, *(f"{home}/{name}" for name in (CONFIG, *_FOLDERS))]
        if is_hidden(home) or not any(name in sizes for name in ends):
            wrong.add(path)
    if lock is None:
        return sorted(wrong)
    wrong.update(missing_among(sizes, spec, lock))
    known = {PLACE.yaml, PLACE.lock}
    for path, node_lock in lock.nodes.items():
        home = homes.get(path, path)
        names = [home, *(f"{home}/{name}" for name in _FOLDERS)]
        if node_lock.file is None:
            names = [f"{home}/{name}" for name in FILES]
        there = [name for name in names if name in sizes]
        known.update(there)
        locked_sizes = [one.size for one in node_lock.files]
        # A file that is missing was found above.
        if len(there) == len(locked_sizes) and [sizes[name] for name in there] != locked_sizes:
            wrong.add(path)
    # The nodes in tree.yaml are not judged here: there a folder may be no node's.
    listed = {*homes.keys(), *homes.values()}
    for place in places:
        above = place.rpartition("/")[0]
        if place not in known and above not in listed and place not in listed:
            wrong.add(above)
    return sorted(wrong)


def _homes(spec: TreeSpec | None) -> dict[str, str]:
    """Return node → the place of its adapter, of all nodes in tree.yaml."""
    homes: dict[str, str] = {}
    if spec is not None:
        for path, node, _ in walk(spec):
            homes[path] = path if node.adapter is None else posixpath.normpath(node.adapter)
    return homes


def is_hidden(path: str) -> bool:
    """Tell whether a folder, or one around it, has a name that begins with a dot."""
    return any(part.startswith(".") and part != "." for part in path.split("/"))
