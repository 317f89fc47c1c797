"""The clean-up of the history: versions and records of runs beyond the bound, and spare files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...tree import AdapterTree
from ..adapters.scan import find_files
from ..history_log import history_place, render_history
from ..reading.loading import load
from ..reading.opening import Opened, inspect
from ..reading.tree_place import place_of
from ..transactions.archive import archived, contents_of_other_trees, place_in_archive
from ..transactions.changes import Changes, NewFile
from ..transactions.commit import Transaction, check_writing, writing
from .history_change import read_history
from .run_records import runs_folder
from .run_store import RUNS_KEPT, bytes_of_run, drop_runs, spare_runs

__all__ = ["Freed", "gc"]


@dataclass(frozen=True)
class Freed:
    """The contents that a clean-up removes, or would remove.

    Args:
        nodes: node → the number of its earlier versions that go.
        contents: content → the bytes of its files, for each content that goes.
        left_bytes: the bytes that the history still takes.
        runs: number of a run → the bytes of its record, for each run that goes.
        dry_run: nothing was removed.
    """

    nodes: Mapping[str, int] = field(default_factory=dict)
    contents: Mapping[str, int] = field(default_factory=dict)
    left_bytes: int = 0
    runs: Mapping[int, int] = field(default_factory=dict)
    dry_run: bool = False

    @property
    def nbytes(self) -> int:
        """The bytes that are free again."""
        return sum(self.contents.values()) + sum(self.runs.values())


def gc(
    path: str | os.PathLike[str],
    *,
    versions: int | None = None,
    runs: int | None = None,
    dry_run: bool = False,
) -> Freed:
    """Remove earlier versions and records of runs beyond the bound, and files that no log names.

    Args:
        path: the folder of the tree, or a YAML file in it.
        versions: earlier contents to leave of each node; None: as tree.yaml says.
        runs: records of runs to leave; None: the last 50. The last one, and one that is taking
            steps, always stay.
        dry_run: say what would go, and remove nothing.

    Raises:
        SpecError, FolderError: there is no tree, or its folder can't be read or written.

    >>> # gc("zoo/", versions=1, dry_run=True).nbytes
    """
    place = place_of(path)
    kept, most = runs_folder(place), RUNS_KEPT if runs is None else runs
    spare = {int(own.name): bytes_of_run(own) for own in spare_runs(kept, most=most)}
    if dry_run:
        check_writing(Path(place.folder))
        freed, changes = _spare(_looked(path), versions)
        Transaction(Path(place.folder)).check(changes)
        return replace(freed, runs=spare)
    with writing(Path(place.folder)) as transaction:
        freed, changes = _spare(_looked(path), versions)
        transaction.apply(changes)
    # A run may have begun or ended since the look above: only those that really went are reported.
    dropped = {int(own.name) for own in drop_runs(kept, most=most)}
    dropped_bytes = {number: nbytes for number, nbytes in spare.items() if number in dropped}
    return replace(freed, runs=dropped_bytes, dry_run=False)


def _looked(path: str | os.PathLike[str]) -> Opened:
    opened = inspect(place_of(path))
    if opened.is_empty:
        load(path)  # raises, and says what is missing
    return opened


def _spare(opened: Opened, most: int | None) -> tuple[Freed, Changes]:
    """Return the versions that gc drops, and the changes that drop them."""
    folder, place = opened.place.folder, history_place(opened.place.lock)
    spec = opened.spec.history if opened.spec is not None else AdapterTree().history
    old = read_history(opened)
    live = set(opened.contents.values())
    new = old.bounded(spec.most if most is None else most, opened.contents)
    new = new.within(spec.budget_bytes, live)[0]
    wanted = new.contents().keys() - live
    spare = archived(folder) - wanted
    if spare:
        spare -= contents_of_other_trees(Path(folder), place)
    nodes = {}
    for path, versions in old.nodes.items():
        count = len(versions) - len(new.nodes.get(path, ()))
        if count:
            nodes[path] = count
    sizes = {content: _bytes_of(folder, content) for content in sorted(archived(folder))}
    left_bytes = sum(size for content, size in sizes.items() if content not in spare)
    freed_bytes = {content: sizes[content] for content in sorted(spare)}
    files = () if new == old else (NewFile.of(place, render_history(new)),)
    return Freed(nodes, freed_bytes, left_bytes, dry_run=True), Changes(
        files, forgets=frozenset(spare)
    )


def _bytes_of(folder: str, content: str) -> int:
    files = find_files(place_in_archive(folder, content))
    return sum(stamp.size for stamp in files.stamps.values())
