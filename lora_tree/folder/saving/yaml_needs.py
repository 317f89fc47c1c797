"""The tree.yaml that a tree needs: the settings that the folders alone do not tell.

A tree.yaml that says the same already stays as it is, comments included. A folder whose adapters
say everything needs none at all.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...formats.peft import FILES
from ...spec import TreeSpec
from ...tree import AdapterTree
from ...weights import plain_weight
from ..adapters.scan import Files, Scan
from ..disk import Stamp
from ..reading.bases import local_base
from ..reading.opening import Opened
from ..reading.resolve import resolve
from ..reading.training_steps import is_step
from ..transactions.changes import KeptAdapter

__all__ = ["YamlNeeds"]


@dataclass(frozen=True)
class YamlNeeds:
    """A tree, its adapters and their folder: enough to tell what its tree.yaml has to say.

    Args:
        tree: the tree that is saved.
        opened: the folder as it is now.
        kept: node → its adapter as the folder will hold it.
        leaving: the paths of adapters whose files are deleted.
    """

    tree: AdapterTree
    opened: Opened
    kept: Mapping[str, KeptAdapter]
    leaving: Collection[str]

    @property
    def changes_adapters(self) -> bool:
        """True if the save writes or removes an adapter in the folder."""
        return bool(self.leaving) or any(kept.stamps is None for kept in self.kept.values())

    # ------------------------------------------------------------------ is a new one needed?
    def is_up_to_date(self) -> bool:
        """Tell whether the present tree.yaml, or its absence, describes this tree already."""
        spec = self.opened.spec
        if spec is None and all(kept.named for kept in self.kept.values()):
            return False  # without an adapter in it, only a tree.yaml makes a folder a tree
        if spec is None and self.tree.base is not None and self.changes_adapters:
            return False  # the adapters may name another base then, or agree no more
        if _real_base(self.opened.base_name) != _real_base(self.tree.base):
            return False
        current = spec or TreeSpec(version=1)
        if (current.defaults, current.cache) != (self.tree.defaults, self.tree.cache):
            return False
        if current.history != self.tree.history:
            return False
        return self._has_same_nodes(spec)

    def _has_same_nodes(self, spec: TreeSpec | None) -> bool:
        """Resolve the folder as this save will leave it, and compare the nodes with the tree's."""
        pins = {path: kept.hub for path, kept in self.kept.items() if kept.hub is not None}
        resolved = resolve(spec, None, self._scan_after(), self.opened.place.folder, pins=pins)
        if resolved.problems or list(resolved.entries) != self.tree.paths():
            return False
        for path, entry in resolved.entries.items():
            node, kept = self.tree[path], self.kept.get(path)
            if entry.weight != node.weight:
                return False
            if entry.fresh != (None if kept else node.fresh):
                return False
            resolved_folder = os.path.realpath(entry.files.folder) if entry.files else None
            kept_folder = os.path.realpath(kept.folder) if kept else None
            if resolved_folder != kept_folder:
                return False
        return True

    def _scan_after(self) -> Scan:
        """Return what a scan of the folder will find after this save."""
        found = dict(self.opened.scan.found)
        for path in self.leaving:
            found.pop(path, None)
        for path, kept in self.kept.items():
            if not kept.named:
                found[path] = _files_of(kept)
        return Scan(found)

    # ------------------------------------------------------------------ the data
    def data(self) -> dict[str, Any]:
        """Return what a new tree.yaml says, in the order of its keys."""
        tree = self.tree
        data: dict[str, Any] = {"version": 1}
        base = self.spelled_base()
        if base is not None:
            data["base"] = base
        defaults = tree.defaults.model_dump(exclude_none=True)
        if defaults:
            data["defaults"] = defaults  # patterns keep their order: the first that matches counts
        cache = tree.cache.model_dump(exclude_none=True)
        if cache:
            data["cache"] = cache
        data.update(tree.history.model_dump(exclude_none=True))
        nodes = self._nodes()
        if nodes:
            data["tree"] = {path: nodes[path] for path in tree.children() if path in nodes}
        return data

    def spelled_base(self) -> str | None:
        """Return the base as tree.yaml spells it: a local folder relative to it."""
        if self.opened.spec is None and self.tree.base == self.opened.base_name:
            return self.opened.base_spelled
        local = local_base(self.tree.base, "")
        return os.path.relpath(local, self.opened.place.folder) if local else self.tree.base

    def _nodes(self) -> dict[str, dict[str, Any]]:
        """Return path → the node's entry, for nodes that need one."""
        nodes: dict[str, dict[str, Any]] = {}
        for path in reversed(self.tree.paths()):  # children first: their parent holds what they say
            below = {
                child.rpartition("/")[2]: nodes[child]
                for child in self.tree.children(path)
                if child in nodes
            }
            is_listed = bool(below) or self._must_be_listed(path)
            entry = dict(self._about(path, is_listed=is_listed))
            if below:
                entry["children"] = below
            if entry or is_listed:
                nodes[path] = entry
        return nodes

    def _about(self, path: str, *, is_listed: bool) -> Iterator[tuple[str, Any]]:
        """Yield what tree.yaml has to say of one node, apart from its children."""
        node, kept = self.tree[path], self.kept.get(path)
        is_group = kept is None and node.fresh is None
        if kept is not None and kept.named:
            local = os.path.relpath(kept.folder, self.opened.place.folder)
            yield "adapter", local if kept.hub is None else kept.hub.adapter
        elif is_group and (is_listed or node.weight != 1.0 or not self._is_group_by_itself(path)):
            yield "adapter", None
        if node.weight != 1.0:
            yield "weight", plain_weight(node.weight)
        if kept is None and node.fresh is not None:
            yield from node.fresh.model_dump(exclude_none=True).items()

    def _must_be_listed(self, path: str) -> bool:
        """Tell whether tree.yaml has to list a node even if there is nothing to say of it."""
        # A folder like checkpoint-500 is passed over unless tree.yaml lists it.
        return is_step(path) or (path not in self.kept and self.tree[path].fresh is not None)

    def _is_group_by_itself(self, path: str) -> bool:
        """Tell whether the folders alone make a node a group: no adapter there, but one below."""
        if path in self.opened.scan.found:
            return False
        below = self.tree.paths(path)
        return any(node in self.kept and not self.kept[node].named for node in below)


def _files_of(kept: KeptAdapter) -> Files:
    """Return the files of an adapter as they will lie in its folder."""
    # Only the disk will know the times of new files. `resolve` asks no more than whether both are
    # there.
    stamps = kept.stamps or dict.fromkeys(FILES, Stamp(0, 0))
    now = {name: (os.path.join(kept.folder, name), stamps[name]) for name in FILES}
    return Files(kept.folder, now)


def _real_base(name: str | None) -> str | None:
    local = local_base(name, "")
    return os.path.realpath(local) if local else name
