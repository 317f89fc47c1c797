"""Save a tree: lock the folder, look, decide, apply; then tell the tree where its nodes live."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ...budget import format_bytes
from ...errors import LoraTreeWarning, listing
from ...provenance import SaveNote
from ...tree import AdapterTree, Node
from ..adapters.source import FolderSource
from ..atomic_folders import make_all
from ..disk import Stamp
from ..problem import raise_any
from ..reading.last_seen import Seen, recall, remember, yaml_sha256
from ..reading.opening import Opened, inspect
from ..reading.tree_place import TreePlace, place_of
from ..transactions.changes import Changes, stamps_of
from ..transactions.commit import Transaction, check_writing, writing
from .decide import decide
from .single_adapter import finish_nodes

__all__ = ["HistoryWarning", "save_tree"]


class HistoryWarning(LoraTreeWarning):
    """Earlier versions of nodes were dropped: the history's budget has no room for them."""


def save_tree(
    tree: AdapterTree, folder: Path, *, copy: bool, note: SaveNote, dry_run: bool = False
) -> None:
    """Write a tree as a folder of nested PEFT adapters; see `AdapterTree.save`."""
    place = place_of(folder, make=True)
    if dry_run:
        check_writing(Path(place.folder))
        _, _, changes = _decided(tree, place, copy=copy, note=note)
        Transaction(Path(place.folder)).check(changes)
        return
    with ExitStack() as undo:
        make_all(Path(place.folder), undo)
        with writing(Path(place.folder)) as transaction:
            # A record that is left in a node's folder is carried out first. Readers look through
            # such a record, so after this save they would see its files instead of the new ones.
            finish_nodes(place.folder)
            # The folder is looked at under the writer's lock. Otherwise another save could change
            # it between this look and the changes that are decided from it.
            opened, seen, changes = _decided(tree, place, copy=copy, note=note)
            try:
                transaction.apply(changes)
            finally:
                # Once the save is decided the folder opens as the new tree, also if carrying it out
                # failed.
                if transaction.decided or changes.is_empty:
                    for node in _nodes(changes, transaction.written):
                        tree.replace(node)
                    tree.home = Path(place.yaml_file)
                    remember(tree, place, _seen(opened, seen, changes, transaction.written))
        undo.pop_all()
    if changes.nodes_over_budget:
        budget = format_bytes(tree.history.budget_bytes)
        warnings.warn(
            HistoryWarning(
                f"{listing(changes.nodes_over_budget)}: earlier versions were dropped, for "
                f"those of this tree may take {budget} together",
                f"to keep more: versions_budget in {place.yaml}",
            ),
            stacklevel=4,
        )


def _decided(
    tree: AdapterTree, place: TreePlace, *, copy: bool, note: SaveNote
) -> tuple[Opened, Seen, Changes]:
    """Look at a folder, and decide what a save changes there; nothing is written.

    Raises:
        LoraTreeError: the folder has problems, or as `decide`.
    """
    # A folder that is not there yet has nothing to look at.
    opened = inspect(place) if os.path.lexists(place.folder) else Opened(place)
    seen = recall(tree, place)
    raise_any(opened.problems, but=("stale", "unlocked", "leftover"))
    return opened, seen, decide(tree, opened, seen, copy=copy, note=note)


def _nodes(changes: Changes, written: Mapping[str, Stamp]) -> Iterator[Node]:
    """Yield the tree's nodes with the stamps of the files that were written."""
    for path, node in changes.nodes.items():
        if isinstance(node.source, FolderSource):
            stamps = stamps_of(path, changes.kept[path], written)
            node = replace(node, source=replace(node.source, stamps=stamps))
        yield node


def _seen(opened: Opened, before: Seen, changes: Changes, written: Mapping[str, Stamp]) -> Seen:
    """Return the folder, as this save leaves it, in the form of a `Seen`."""
    removed_folders = {place.rpartition("/")[0] for place in changes.deletes}
    files = {}
    for path, was in before.files.items():
        if path in opened.scan.found and path not in removed_folders:
            files[path] = was
    for path, kept in changes.kept.items():
        if not kept.named:
            files[path] = stamps_of(path, kept, written), kept.content
    yaml = yaml_sha256(opened.yaml_bytes)
    for file in changes.files:
        if file.place == opened.place.yaml:
            yaml = file.sha256
    return Seen(files, {**before.yaml, opened.place.yaml: yaml})
