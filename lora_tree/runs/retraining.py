"""Retraining: plan, like a build tool, to train stale nodes again with their data and settings.

    fr          stale       ─→ first   fr                      legal.jsonl, 200 steps
    fr/legal    below it    ─→ then    fr/legal, fr/medical    one run trained both: one run again
    fr/medical  below it
    de          not stale       stays

Law: a node is trained only when all nodes above it that are to be trained again have been. So a
node whose data is gone also keeps all nodes below it from being trained.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoraTreeError, SpecError, listing, plural
from ..folder import disk
from ..folder.reading.nodes import is_untrained, made_of_node
from ..provenance import DataFile, TrainedWith
from ..system.reading import is_file
from ..tree import AdapterTree
from .forecast import why_not_fresh
from .settings import Settings

__all__ = ["RetrainJob", "Retraining", "plan_retraining"]


@dataclass(frozen=True)
class RetrainJob:
    """Nodes that one run trains again.

    Args:
        nodes: they were trained together, with the same data and settings.
        training: the data and settings of that training.
        settings: of the run, without those for other nodes.
        data: the files of rows, in order.
        changed: the files whose bytes have changed since.
        run: the folder of the run's checkpoints.
        held_out: the files of the rows that it is watched on, in order.
    """

    nodes: tuple[str, ...]
    training: TrainedWith
    settings: Settings
    data: tuple[Path, ...]
    changed: tuple[Path, ...]
    run: Path | None
    held_out: tuple[Path, ...] = ()

    def __str__(self) -> str:
        """One line: ``fr/legal, fr/medical: 200 steps on rows.jsonl``."""
        files = listing(os.fspath(file) for file in self.data)
        return f"{', '.join(self.nodes)}: {plural(self.settings.steps, 'step')} on {files}"


@dataclass(frozen=True)
class Retraining:
    """The jobs of a retraining, in order, and the nodes that can't be trained again.

    Args:
        jobs: each can be run when those before it are saved.
        left: node → why it can't be trained again.
    """

    jobs: tuple[RetrainJob, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        """All nodes that are to be trained, in the order of the jobs."""
        return [node for job in self.jobs for node in job.nodes]


def plan_retraining(
    tree: AdapterTree, nodes: Sequence[str] | None = None, *, fresh: bool = False
) -> Retraining:
    """Return the jobs that train nodes again with their data and settings, from the root down.

    The nodes below them become stale by that, so they are in the plan as well, except those that
    never trained.

    Args:
        tree: opened from a folder; it is not changed.
        nodes: paths or patterns; None: all stale nodes.
        fresh: begin from new factors; nodes that can't are left out, with the reason.

    Raises:
        PathError: a path or pattern matches no node.
        SpecError: the tree lives in no folder.
        FolderError: a file of rows can't be read.

    >>> # plan_retraining(lt.load("zoo/")).jobs
    """
    if tree.home is None:
        raise SpecError(
            "the tree was not opened from a folder, so how it was trained is unknown",
            "open a saved tree: lora_tree.load('zoo/')",
        )
    named = [path for path in tree.paths() if tree[path].stale]
    if nodes is not None:
        named = tree.matching(nodes)
    selected: set[str] = set()
    for path in named:
        if tree[path].has_adapter:
            selected.add(path)
        for below in tree.paths(path):
            # A node that never trained adds nothing, so no other lineage makes it stale.
            if tree[below].has_adapter and not is_untrained(tree[below]):
                selected.add(below)
    files = _DataFiles(tree.home.parent)
    left: dict[str, str] = {}
    able: dict[str, TrainedWith] = {}
    for path in tree.paths():  # parents first, so that a reason reaches all below
        if path not in selected:
            continue
        training = _training_of(tree, path)
        reason = _why_not(tree, path, training, left, files)
        if reason is None and fresh:
            reason = why_not_fresh(tree, path)
        if reason is None and training is not None:
            able[path] = training
        elif reason is not None:
            left[path] = reason
    jobs = []
    for group in _rounds(tree, able):
        jobs.append(_job(tree, group, able[group[0]], files))
    return Retraining(tuple(jobs), left)


def _training_of(tree: AdapterTree, path: str) -> TrainedWith | None:
    made = made_of_node(tree[path])
    return None if made is None else made.training


def _why_not(
    tree: AdapterTree,
    path: str,
    training: TrainedWith | None,
    left: Mapping[str, str],
    files: _DataFiles,
) -> str | None:
    """Say why a node can't be trained again; None if it can."""
    for above in tree.lineage(path)[:-1]:
        if above in left:
            return f"it stands on {above}, which can't be trained again"
    if training is None:
        return "no save recorded how it was trained"
    if path not in training.nodes:
        return f"it was trained as {listing(training.nodes)}, and the rows name that"
    missing = files.missing(training)
    if missing:
        return f"its rows are gone: {listing(missing)}"
    try:
        _settings(tree, [path], training)
    except LoraTreeError as error:
        return f"its settings are not those of this version: {error.what}"
    return None


def _rounds(tree: AdapterTree, able: Mapping[str, TrainedWith]) -> list[list[str]]:
    """Group nodes into runs, so that each run stands on what the runs before it have saved."""
    groups: list[list[str]] = []
    done: set[str] = set()
    while len(done) < len(able):
        ready: dict[str, str] = {}
        for path in tree.paths():
            if path not in able or path in done:
                continue
            digest = able[path].digest
            above = [node for node in tree.lineage(path)[:-1] if node in able and node not in done]
            # Ancestors may also train in the same run, if they did so the last time.
            if all(ready.get(node) == digest for node in above):
                ready[path] = digest
        together: dict[str, list[str]] = {}
        for path, digest in ready.items():
            together.setdefault(digest, []).append(path)
        groups.extend(together.values())
        done.update(ready)
    return groups


def _job(
    tree: AdapterTree, nodes: Sequence[str], training: TrainedWith, files: _DataFiles
) -> RetrainJob:
    run = None if training.run is None else files.place(training.run)
    return RetrainJob(
        tuple(nodes),
        training,
        _settings(tree, nodes, training),
        tuple(files.place(file.path) for file in training.data),
        tuple(files.changed(training)),
        run,
        tuple(files.place(file.path) for file in _held_out(training)),
    )


def _settings(tree: AdapterTree, nodes: Sequence[str], training: TrainedWith) -> Settings:
    """Return the settings of a run, without those for nodes that do not train now.

    Raises:
        SpecError: another version of this library wrote them.
    """
    plain: dict[str, Any] = dict(training.settings)
    for word, known in (("lr_of", set(nodes)), ("decay_of", set(nodes)), ("weights", {"", *tree})):
        given = plain.get(word)
        if isinstance(given, Mapping):
            plain[word] = {path: value for path, value in given.items() if path in known}
    return Settings.from_plain(plain)


def _held_out(training: TrainedWith) -> list[DataFile]:
    return [] if training.held_out is None else training.held_out.data


class _DataFiles:
    """The files of rows as they are now; each is hashed once."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._hashes: dict[Path, str] = {}

    def place(self, path: str) -> Path:
        """Return the place of a file, given its path relative to the tree's folder."""
        return Path(os.path.normpath(self._home / path))

    def missing(self, training: TrainedWith) -> list[str]:
        """Return the files that no longer exist."""
        files = [*training.data, *_held_out(training)]
        return [file.path for file in files if not is_file(self.place(file.path))]

    def changed(self, training: TrainedWith) -> list[Path]:
        """Return the files whose bytes have changed."""
        found = []
        for file in [*training.data, *_held_out(training)]:
            place = self.place(file.path)
            if place not in self._hashes:
                self._hashes[place] = disk.digest(place)
            if self._hashes[place] != file.sha256:
                found.append(place)
        return found
