"""Outgoing: a tree's files as others get them, with a name of the base that is valid everywhere.

    /models/llama-8b, ../base      a folder of this machine: replaced, or refused
    org/llama-8b                   a hub id: stays

The name of a base stands in tree.yaml, in tree.lock, and in every adapter's config. If a config
changes, so does its node's content, and with it every lineage below. So a new lock is made, which
says the same of each node as before: trained on its present lineage, or stale.

Law: nothing in the tree's own folder changes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ruamel.yaml import YAML

from ...base_names import hub_id
from ...errors import FolderError, SpecError, listing
from ...formats import strict_json
from ...formats.limits import CONFIG_BYTES
from ...formats.peft import CONFIG, WEIGHTS
from .. import disk
from ..adapters.hashing import by_pieces, weights_digest
from ..lockfile import BaseLock, FileLock, TreeLock, content, lineage, render_lock
from ..reading.bases import local_base
from ..reading.last_seen import yaml_sha256
from ..reading.opening import Opened, named_bases
from ..saving.relocked import relocked
from .tree_files import PLACE, files_of_tree

__all__ = ["Outgoing", "outgoing", "portable_base"]

Outbound: TypeAlias = bytes | Path


@dataclass(frozen=True)
class Outgoing:
    """A tree's files as others get them.

    Args:
        files: place → the bytes, or the file that holds them.
        base: the portable name of the base; None if the tree names none.
        renamed: the places of the files that had another name of the base.
    """

    files: Mapping[str, Outbound]
    base: str | None = None
    renamed: tuple[str, ...] = field(default=())


def outgoing(opened: Opened, *, base_name: str | None = None) -> Outgoing:
    """Return a tree's files as others get them.

    Args:
        opened: the folder, without problems.
        base_name: the portable name of the base, if the tree names a folder.

    Raises:
        FolderError: an adapter lies outside of the folder.
        SpecError: the base is a folder of this machine, and no portable name was given.
    """
    own = files_of_tree(opened)
    if own.outside:
        node, folder = next(iter(own.outside.items()))
        raise FolderError(
            f"{listing(own.outside)}: outside of the tree's folder or hidden in it, like {folder}, "
            "so the push would leave it out",
            f"bring it in: lt.load({opened.place.spelled!r}) and save(copy=True); or push it to a "
            f"repository of its own and name that in tree.yaml: {node}: {{adapter: hub:org/name}}",
        )
    lock = opened.lock or relocked(opened, accept_stale=False).lock
    names = _BaseNames.of(opened, base_name)
    files: dict[str, Outbound] = {}
    for place, at in own.files.items():
        files[place] = Path(at)
    renamed: list[str] = []
    contents: dict[str, str] = {}
    pieces: dict[str, str | None] = {}
    nodes = dict(lock.nodes)
    for path, named in named_bases(opened).items():
        entry = opened.entries[path]
        if named not in names.replaced or entry.files is None or path not in nodes:
            continue
        place = f"{os.path.relpath(entry.files.folder, opened.place.folder)}/{CONFIG}"
        data = _renamed_config(entry.files.now[CONFIG][0], names.base)
        files[place] = data
        renamed.append(place)
        weights, of_pieces = weights_digest(entry.files.now[WEIGHTS][0])
        digests = {CONFIG: hashlib.sha256(data).hexdigest(), WEIGHTS: weights}
        contents[nodes[path].content] = content(*digests.values())
        pieces[nodes[path].content] = by_pieces(digests, of_pieces)
        known = nodes[path].files[0]
        size = FileLock(size=len(data), mtime_ns=known.mtime_ns)
        nodes[path] = nodes[path].model_copy(update={"config": size})
    yaml = opened.yaml_bytes
    if yaml is not None:
        files[PLACE.yaml] = yaml
    if yaml is not None and opened.spec is not None and opened.spec.base in names.replaced:
        yaml = _renamed_yaml(yaml, names.base)
        files[PLACE.yaml] = yaml
        renamed.append(PLACE.yaml)
    if opened.yaml_bytes is not None and lock.yaml == yaml_sha256(opened.yaml_bytes):
        lock = lock.model_copy(update={"yaml": yaml_sha256(yaml)})
    lock = lock.model_copy(update={"nodes": nodes})
    lock = _moved(lock, contents, pieces, names)
    files[PLACE.lock] = render_lock(lock)
    return Outgoing(files, names.base, tuple(sorted(renamed)))


def portable_base(name: str | None, folder: str) -> str | None:
    """Return the portable name of a base; None if its name means a folder of this machine.

    Args:
        name: as a tree or an adapter has it.
        folder: the tree's, from which a relative name starts.

    >>> portable_base("org/model", "/zoo"), portable_base("../models/base", "/zoo")
    ('org/model', None)
    """
    repository = hub_id(name)
    # A snapshot in the hub's cache is a folder too, but its path tells the repository.
    is_snapshot = repository is not None and repository != name
    if is_snapshot or (local_base(name, folder) is None and local_base(name, "") is None):
        return repository
    return None


@dataclass(frozen=True)
class _BaseNames:
    """The portable name of a base, and the names that it replaces."""

    base: str | None
    replaced: frozenset[str] = frozenset()

    @classmethod
    def of(cls, opened: Opened, base_name: str | None) -> _BaseNames:
        """Collect every name of the base that a tree holds.

        Raises:
            SpecError: one is a folder of this machine, and nothing says its portable name.
        """
        folder, spelled = opened.place.folder, opened.base_spelled
        by_config = set(named_bases(opened).values())
        names = by_config | ({spelled} if spelled is not None else set())
        if base_name is not None and portable_base(base_name, folder) != base_name:
            raise SpecError(
                f"base name {base_name!r}: a folder of this machine, or no hub id",
                "give the hub id of the base: --base-name org/model",
            )
        base = base_name or portable_base(spelled, folder)
        local = {name for name in names if portable_base(name, folder) != name}
        if local and base is None:
            raise SpecError(
                f"{opened.place.spelled}: the base is {listing(sorted(local), most=3)}, a folder "
                "of this machine, which others can't open",
                "give its id on the hub: --base-name org/model",
            )
        if base_name is not None and spelled is not None and spelled != base_name:
            local.add(spelled)
        return cls(base, frozenset(local))


# ---------------------------------------------------------------------- the files that hold a name
def _renamed_config(file: str, base: str | None) -> bytes:
    """Return an adapter's config with another name of its base, as PEFT writes it."""
    config: dict[str, Any] = dict(strict_json.loads(disk.read_file(file, most=CONFIG_BYTES), file))
    config["base_model_name_or_path"] = base
    return (json.dumps(config, indent=2) + "\n").encode()


def _renamed_yaml(data: bytes, base: str | None) -> bytes:
    """Return a tree.yaml with another name of its base, every other byte as it was."""
    text = data.decode("utf-8-sig")
    top = YAML(typ="safe", pure=True).compose(io.StringIO(text))
    for key, value in top.value:
        if key.value == "base":
            begin, end = value.start_mark.index, value.end_mark.index
            return (text[:begin] + json.dumps(base) + text[end:]).encode()
    raise SpecError("tree.yaml: no key 'base' at its top")


# ---------------------------------------------------------------------- the lock
def _moved(
    lock: TreeLock,
    contents: Mapping[str, str],
    pieces: Mapping[str, str | None],
    names: _BaseNames,
) -> TreeLock:
    """Return a lock that says the same of nodes with their new contents and base names.

    Args:
        lock: as the folder has it.
        contents: the content of a node → its new one.
        pieces: the content of a node → its new hash by pieces.
        names: those of the base.
    """
    known: dict[str, str] = {}
    lineages = {}

    def moved(digest: str) -> str:
        """Return a lineage with the new contents in it; one that the lock does not list stays."""
        if digest in known or digest not in lock.lineages:
            return known.get(digest, digest)
        step = lock.lineages[digest]
        above, own = moved(step.above), contents.get(step.content, step.content)
        known[digest] = lineage(above, own, step.own_weight)
        lineages[known[digest]] = step.model_copy(update={"above": above, "content": own})
        return known[digest]

    nodes = {}
    for path, node in lock.nodes.items():
        new = {
            "content": contents.get(node.content, node.content),
            "pieces": pieces.get(node.content, node.pieces),
            "trained_on": moved(node.trained_on),
            "base": None if node.base is None else _renamed_base(node.base, names),
        }
        nodes[path] = node.model_copy(update=new)
    for digest in lock.lineages:
        moved(digest)
    base = _renamed_base(lock.base, names)
    return lock.model_copy(update={"base": base, "nodes": nodes, "lineages": lineages})


def _renamed_base(base: BaseLock, names: _BaseNames) -> BaseLock:
    if base.name not in names.replaced:
        return base
    return base.model_copy(update={"name": names.base})
