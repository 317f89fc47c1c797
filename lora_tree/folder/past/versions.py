"""The verbs of the history: list it, read an earlier version, bring one back.

    fr/legal@2         the second version of fr/legal, as `history` numbers them from 1
    fr/legal@3f9c21    the one whose content begins with these digits, six at least

A number is right as long as no save comes in between; the digits of a content always are.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ...errors import FolderError, PathError, TreeError, agreeing, listing, suggest_path
from ...node_names import check_path
from ...provenance import SaveNote
from ...tree import AdapterTree
from ..adapters.scan import find_files
from ..adapters.source import FolderSource
from ..history_log import Version
from ..reading.loading import StaleWarning, load
from ..reading.opening import Opened, inspect
from ..reading.training_steps import paths_above
from ..reading.tree_place import place_of
from ..transactions.archive import place_in_archive
from .history_change import present_version, read_history

__all__ = [
    "Restored",
    "history",
    "load_versions",
    "restore",
    "version_beside",
    "versions_beside",
]

_AT = re.compile(r"(?P<path>[^@]*)@(?P<version>[0-9a-f]+)\Z")
_IN_BLEND = re.compile(r"(?P<path>[^@:+]+)@(?P<version>[0-9a-f]+)")
_DIGITS = 6


def history(path: str | os.PathLike[str]) -> dict[str, list[Version]]:
    """Return every node's versions, the oldest first; the last one is the present one.

    For a node that was removed, all versions are earlier ones. A node that is in memory alone, or
    whose files no lock has, has no present one.

    Args:
        path: the folder of a tree, or a YAML file in it.

    Raises:
        SpecError, FolderError: there is no tree, or its files can't be read.

    >>> # for number, version in enumerate(history("zoo/")["fr/legal"], 1): print(number, version)
    """
    opened = inspect(place_of(path))
    if opened.is_empty:
        load(path)  # raises, and says what is missing
    return _all_versions(opened)


def _all_versions(opened: Opened) -> dict[str, list[Version]]:
    found = {path: list(versions) for path, versions in read_history(opened).nodes.items()}
    for path, content in opened.contents.items():
        found.setdefault(path, []).append(present_version(opened, path, content))
    return {path: found[path] for path in sorted(found, key=lambda path: path.split("/"))}


# ---------------------------------------------------------------------- one version
@dataclass(frozen=True)
class _Named:
    """A version that a user named, and the node that it is of."""

    path: str
    number: int
    version: Version


def _find(opened: Opened, name: str) -> _Named:
    """Return the version that a name like ``fr/legal@2`` means.

    Raises:
        PathError: there is no such node or version.
    """
    match = _AT.match(name)
    if match is None:
        raise PathError(f"{name!r} names no version", "write fr/legal@2; see lora-tree log")
    path, wanted = match["path"], match["version"]
    check_path(path)
    versions = _all_versions(opened)
    if path not in versions:
        raise PathError(f"no versions of {path!r} are kept{suggest_path(path, versions)}")
    own_versions = versions[path]
    if len(wanted) < _DIGITS and wanted.isdecimal():
        if not 1 <= int(wanted) <= len(own_versions):
            raise PathError(f"{path} has versions 1 to {len(own_versions)}, got {wanted}")
        return _Named(path, int(wanted), own_versions[int(wanted) - 1])
    hits = [n for n, version in enumerate(own_versions, 1) if version.content.startswith(wanted)]
    # Several hits are one content with different weights; the last one is meant.
    if not hits or len(wanted) < _DIGITS:
        raise PathError(
            f"{path} has no version {wanted}",
            f"a number from 1 to {len(own_versions)}, or at least {_DIGITS} digits of a content",
        )
    return _Named(path, hits[-1], own_versions[hits[-1] - 1])


def _source(opened: Opened, named: _Named) -> FolderSource:
    """Return where the files of a version are: in the archive, at a node, or elsewhere.

    Raises:
        FolderError: they are gone.
    """
    root, version = opened.place.folder, named.version
    places: list[str] = []
    # Folders of nodes come first. If a node has the content, a copy in the archive is left over
    # from a save that was cut off, and the restore's own save removes it before it copies files.
    for path, content in opened.contents.items():
        files = opened.entries[path].files
        if content == version.content and files is not None:
            places.append(files.folder)
    places.append(place_in_archive(root, version.content))
    inside: str | None = root
    if version.elsewhere is not None:
        # The tree never kept these files: the user named their folder, and it is named again.
        places, inside = [os.path.normpath(os.path.join(root, version.elsewhere))], None
    for place in places:
        files = find_files(place, inside)
        if files.flaw is None:
            within = None if opened.outside else root
            return FolderSource(
                place,
                inside,
                files.stamps,
                version.content,
                version.on,
                within,
                hub=version.hub,
            )
    raise FolderError(
        f"{named.path}@{named.number}: the files of content {version.content[:12]}… are gone "
        f"from {places[-1]}",
        "another version may still be there: lora-tree log",
    )


def _put(
    tree: AdapterTree,
    opened: Opened,
    named: _Named,
    advice: Callable[[list[str]], str],
    *,
    at: str | None = None,
) -> None:
    """Give a node of a tree its earlier content and weight; bring it back if it was removed.

    Args:
        tree: changed in memory.
        opened: the folder of the tree.
        named: the version.
        advice: nodes above it that were removed → the words that say what to do about them.
        at: the node that gets it; None: the version's own.

    Raises:
        PathError: a node above it was removed.
    """
    source, path = _source(opened, named), at or named.path
    if path not in tree:
        missing = [above for above in paths_above(path) if above not in tree]
        versions = _all_versions(opened)
        removed = [above for above in missing if above in versions]
        if removed:
            raise PathError(
                f"{named.path}: {listing(removed)}, above it in that version, "
                f"{agreeing(len(removed), 'is', 'are')} not in the tree",
                advice(removed),
            )
        for above in missing:
            tree.add(above, group=True)  # a group has no content, so nothing else is known of it
        tree.add(path, group=True)
    tree.update(path, weight=named.version.weight)  # asks attached models, too
    tree.replace(tree[path].read_from(source))


def load_versions(
    path: str | os.PathLike[str], *texts: str, skip_broken: bool = False
) -> tuple[AdapterTree, tuple[str, ...]]:
    """Open a tree with some nodes at earlier versions, for reading only.

    Args:
        path: the folder of the tree, or a YAML file in it.
        texts: paths or blends, in which a path may be a version: ``fr/legal@1:0.5+de``.
        skip_broken: as for `load`.

    Returns:
        the tree, and the same texts without the versions. It is not to be saved.

    Raises:
        PathError: there is no such node or version, the texts name two of one node, or a node above
            a removed one was removed as well and no text names a version of that.
        FolderError: as `load`, or the files of a version are gone.

    >>> # tree, (path,) = load_versions("zoo/", "fr/legal@1"); tree.flatten(path)
    """
    tree = load(path, skip_broken=skip_broken)
    requested: dict[str, str] = {}
    for text in texts:
        for match in _IN_BLEND.finditer(text):
            node, version = match["path"], match["version"]
            if requested.setdefault(node, version) != version:
                raise PathError(f"{node}: two versions at once: {requested[node]} and {version}")
    if requested:
        opened = inspect(place_of(path))
        for node in sorted(requested, key=lambda node: node.count("/")):
            named = _find(opened, f"{node}@{requested[node]}")
            _put(tree, opened, named, partial(_advice_to_read, opened, named))
    return tree, tuple(_IN_BLEND.sub(lambda match: match["path"], text) for text in texts)


def _advice_to_read(opened: Opened, named: _Named, removed: list[str]) -> str:
    """Say how to read a version whose ancestors were removed, too."""
    versions = _all_versions(opened)
    names = [f"{above}@{len(versions[above])}" for above in removed]
    options = " ".join(f"--on {name}" for name in names)
    texts = ", ".join(f'"{name}"' for name in (f"{named.path}@{named.number}", *names))
    return f"read it on a version of each: add {options}, or load_versions(…, {texts})"


def version_beside(tree: AdapterTree, path: str | os.PathLike[str], name: str) -> str:
    """Add one version of a node to a tree as its sibling, on the nodes that are above it now.

    Args:
        tree: changed in memory, and not to be saved.
        path: the folder of the tree, or a YAML file in it.
        name: the version: ``fr/legal@2``.

    Returns:
        the path in the tree; that of the node itself if it was not in the tree.

    Raises:
        PathError: there is no such node or version, or a node above it was removed.
        FolderError: the files of the version are gone.

    >>> # tree = load("zoo/"); tree.flatten(version_beside(tree, "zoo/", "fr/legal@1"))
    """
    opened = inspect(place_of(path))
    return _add_sibling(tree, opened, _find(opened, name))


def _add_sibling(tree: AdapterTree, opened: Opened, named: _Named) -> str:
    sibling = named.path
    if sibling in tree:
        sibling = f"{sibling}.{named.number}"
    while sibling in tree:
        sibling += "-"
    _put(tree, opened, named, partial(_advice_to_read, opened, named), at=sibling)
    return sibling


def versions_beside(tree: AdapterTree, path: str | os.PathLike[str], node: str) -> dict[str, str]:
    """Add a node's earlier versions to a tree as its siblings, so that one batch can hold them all.

    Args:
        tree: as `load` opened it; changed in memory, and not to be saved.
        path: the folder of the tree, or a YAML file in it.
        node: the node.

    Returns:
        ``fr/legal@1`` and so on → the path in the tree, the oldest first; the node is the last.

    Raises:
        PathError: no versions of the node are kept.
        FolderError: the files of a version are gone.

    >>> # tree = load("zoo/"); versions_beside(tree, "zoo/", "fr/legal")
    """
    opened = inspect(place_of(path))
    names: dict[str, str] = {}
    for number, version in enumerate(_all_versions(opened).get(node, ()), 1):
        name = f"{node}@{number}"
        if version.is_present:
            names[name] = node
            continue
        names[name] = _add_sibling(tree, opened, _Named(node, number, version))
    if len(names) < 2:
        raise PathError(
            f"{node}: no earlier version is kept", f"see: lora-tree log {shlex.quote(str(path))}"
        )
    return names


# ---------------------------------------------------------------------- bring back
@dataclass(frozen=True)
class Restored:
    """A node that has an earlier version again.

    Args:
        path: the node.
        number: the number that the version had.
        version: the version.
        stale: why the node is stale with it; None if it is not.
        was_removed: the node had been removed.
    """

    path: str
    number: int
    version: Version
    stale: str | None = None
    was_removed: bool = False


def restore(
    path: str | os.PathLike[str], *names: str, note: SaveNote | str | None = None
) -> list[Restored]:
    """Give nodes an earlier content and weight again, in one save; a restore can undo it, too.

    The nodes' present contents become earlier versions. A node that was removed comes back with its
    last version, or with the one that is named.

    Args:
        path: the folder of the tree, or a YAML file in it.
        names: versions like ``fr/legal@2``; paths or patterns of nodes that were removed.
        note: the save's note about itself.

    Raises:
        PathError: there is no such node or version, or the node above is missing.
        FolderError: the files of a version are gone, or the folder can't be written.
        SpecError, UnlockedError: as `load`.

    >>> # restore("zoo/", "fr/legal@2")
    """
    with warnings.catch_warnings():
        # A node may be stale only because of the content that is undone here. `Restored.stale` says
        # what is stale afterwards.
        warnings.simplefilter("ignore", StaleWarning)
        tree = load(path)
    opened = inspect(place_of(path))
    restored_from: list[_Named] = []
    for name in names:
        restored_from += [_find(opened, name)] if "@" in name else _removed(opened, tree, name)
    twice = [
        named.path
        for named in restored_from
        if sum(n.path == named.path for n in restored_from) > 1
    ]
    if twice:
        raise PathError(f"{listing(sorted(set(twice)))}: named twice")
    if not restored_from:
        raise PathError("no version is named", "write fr/legal@2; see lora-tree log")
    back = [named.path for named in restored_from if named.path not in tree]
    # A node's parent has to be there first.
    for named in sorted(restored_from, key=lambda named: named.path.count("/")):
        _put(tree, opened, named, partial(_advice_to_restore, named))
    if note is None:
        note = SaveNote(by=f"restore({', '.join(names)})")
    tree.save(opened.place.spelled, note=note)
    restored = []
    for named in restored_from:
        stale = tree[named.path].stale
        is_back = named.path in back
        restored.append(Restored(named.path, named.number, named.version, stale, is_back))
    return restored


def _advice_to_restore(named: _Named, removed: list[str]) -> str:
    return f"bring back those as well: lora-tree restore … {' '.join(removed)} {named.path}"


def _removed(opened: Opened, tree: AdapterTree, pattern: str) -> list[_Named]:
    """Return the last versions of the removed nodes that a path or a pattern names."""
    versions = _all_versions(opened)
    removed = [path for path in versions if path not in tree]
    hits = [pattern] if pattern in removed else fnmatch.filter(removed, pattern)
    if not hits and pattern in tree:
        raise TreeError(
            f"{pattern} is in the tree, so say which version of it to bring back",
            f"like {pattern}@1; lora-tree log {shlex.quote(opened.place.spelled)} "
            f"{shlex.quote(pattern)} lists them",
        )
    if not hits:
        raise PathError(
            f"{pattern!r} matches no node that was removed{suggest_path(pattern, removed)}"
        )
    return [_Named(path, len(versions[path]), versions[path][-1]) for path in hits]
