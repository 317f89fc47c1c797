"""The folder is the tree: opening, locking and checking a folder of nested PEFT adapters. `saving` writes one.

zoo/tree.yaml                        optional: base, defaults, weights, adapters that live elsewhere
zoo/tree.lock                        written by save and lock
zoo/fr/adapter_config.json           each folder with an adapter is a node
zoo/fr/legal/adapter_config.json     nesting is stacking
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapter import Adapter
from ..base_names import other_base
from ..errors import (
    FolderError,
    FormatError,
    LoraTreeError,
    LoraTreeWarning,
    StaleError,
    UnlockedError,
    listing,
)
from ..formats.recognise import recognise
from ..lowrank import LowRank
from ..storage import install
from ..tree import AdapterTree, Node
from .alone import finish_nodes, save_adapter
from .bounds import no_folder, tree_above
from .changes import Changes, NewFile
from .commit import writing
from .foreign import ForeignSource
from .lockfile import render_lock
from .one_file import save_one_file
from .opening import Opened, inspect, named_bases, unusable
from .pending import leftovers
from .problem import HARMLESS, Kind, Problem, raise_any
from .relock import Relocked, relocked
from .saving import save_tree
from .scan import find_files
from .seen import Seen, remember
from .source import FolderSource
from .trained import trained
from .training_steps import step_of
from .tree_place import place_of

__all__ = [
    "Problem",
    "SkippedWarning",
    "StaleWarning",
    "check",
    "load",
    "lock",
    "notes",
    "relock",
    "survey",
]


class StaleWarning(LoraTreeWarning):
    """Nodes were trained on a lineage, or a base, that has changed since; they load, but may not fit any more."""


class SkippedWarning(LoraTreeWarning):
    """Nodes were left out of a tree that was opened with ``skip_broken=True``, each with its reason."""


def load(
    path: str | os.PathLike[str],
    *,
    strict: bool = False,
    outside: bool = True,
    skip_broken: bool = False,
) -> AdapterTree:
    """Open a folder of nested PEFT adapters, or a tree.yaml, as a tree. No weights are read.

    Args:
        path: the folder, or a YAML file in it.
        strict: raise where a node is stale, instead of warning.
        outside: whether tree.yaml may name adapters that lie outside of the folder. Pass False for a tree that somebody
            else wrote: then nothing outside of its folder is read, whatever its tree.yaml and its links say.
        skip_broken: leave out the nodes that can't be used, and all below them, and warn of each with its reason. For
            this the headers of all adapters are read.

    Raises:
        NewerFormat: a newer version of this library wrote tree.yaml or tree.lock.
        SpecError: tree.yaml or tree.lock makes no sense; every mistake with its line and column.
        FolderError: there is no tree, or something lies where it can't.
        FormatError: an adapter is incomplete.
        UnlockedError: files are not what tree.lock says.
        StaleError: with ``strict``, a node's lineage has changed since it was trained.
    """
    place = place_of(path)
    opened = inspect(place, outside=outside)
    skipped: dict[str, str] = {}
    if skip_broken:
        raise_any([problem for problem in opened.problems if not problem.node])
        skipped = unusable(opened)
    else:
        raise_any(opened.problems, *_accept(opened), after=_go_on(opened))
    _there_is_a_tree(opened)
    if skipped:
        reasons = [line for text in skipped.values() for line in text.split("\n  ")]
        warnings.warn(SkippedWarning(f"left out: {listing(skipped)}", *reasons), stacklevel=2)
    stale = [text for node, text in opened.stale.items() if node not in skipped]
    if stale:
        todo = f"train them again, or accept them as they are: lora-tree lock --accept-stale {place.spelled}"
        if strict:
            raise StaleError(*stale, todo)
        warnings.warn(StaleWarning("stale: " + "; ".join(stale), todo), stacklevel=2)
    nodes = (_node(opened, node) for node in opened.entries if node not in skipped)
    defaults, cache = (opened.spec.defaults, opened.spec.cache) if opened.spec else (None, None)
    home = Path(place.yaml_file)
    tree = AdapterTree.from_nodes(
        nodes, base=opened.base_name, defaults=defaults, cache=cache, home=home
    )
    remember(tree, place, Seen.of(opened))
    return tree


def _go_on(opened: Opened) -> list[str]:
    """Say how to see all that is wrong, and how to open the tree without the nodes that can't be used."""
    wrong = [problem for problem in opened.problems if problem.kind not in HARMLESS]
    if any(not problem.node for problem in wrong):
        return []
    folder = opened.place.spelled
    kinds = {problem.kind for problem in wrong}
    more = [f"these and all other problems: lora-tree check {folder}"] if len(kinds) > 1 else []
    return [
        *more,
        f"to go on without them: lora_tree.load({folder!r}, skip_broken=True), or --skip-broken",
    ]


def _accept(opened: Opened) -> list[str]:
    """The offer to lock files as they are: made only where that could be right."""
    unlocked = [problem for problem in opened.problems if problem.kind == "unlocked"]
    broken = [problem.node for problem in unlocked if problem.broken]
    if len(broken) == len(unlocked):
        return []
    offer = (
        f"if the files are right, accept them as they are: lora-tree lock {opened.place.spelled}"
    )
    return [f"put the files of {listing(broken)} right first; {offer}" if broken else offer]


def survey(
    path: str | os.PathLike[str], *, outside: bool = True
) -> tuple[AdapterTree, list[Problem]]:
    """A tree as `load` opens it, with what is wrong with single nodes listed instead of raised.

    For a server, which goes on with the nodes that are whole. A node that is listed may fail when it is asked for, or
    not be in the tree at all.

    Args:
        path, outside: as for `load`.

    Raises:
        SpecError, FolderError: there is no tree, or what its folder means can't be said.
    """
    place = place_of(path)
    opened = inspect(place, outside=outside)
    raise_any([problem for problem in opened.problems if not problem.node])
    _there_is_a_tree(opened)
    problems = [problem for problem in opened.problems if problem.node]
    present: dict[str, Node] = {}
    for node in opened.entries:
        above = node.rpartition("/")[0]
        if above and above not in present:
            problems.append(
                Problem(node, "folder", f"{node}: lies below {above}, which can't be used")
            )
        else:
            present[node] = _node(opened, node)
    tree = AdapterTree.from_nodes(
        present.values(), base=opened.base_name, home=Path(place.yaml_file)
    )
    return tree, problems


def lock(path: str | os.PathLike[str], *, accept_stale: bool = False) -> None:
    """Accept the files of a tree as they are: write its tree.lock anew.

    Every file that the old lock does not vouch for is read whole first. What a node was trained on goes with its
    content: a folder that was moved on the disk is known again. A node whose content is new counts as trained on its
    lineage as it is now.

    Args:
        path: the folder, or a YAML file in it.
        accept_stale: so does every other node.

    Raises:
        SpecError, FolderError: as `load`, or the folder can't be written.
        FormatError: as `load`, or a file is broken: cut short, a Git LFS pointer, a header that does not fit.
    """
    relock(path, accept_stale=accept_stale)


def relock(path: str | os.PathLike[str], *, accept_stale: bool = False) -> Relocked:
    """Do what `lock` does, and say what the new lock accepts that the old one did not."""
    place = place_of(path)
    with writing(Path(place.folder)) as transaction:
        finish_nodes(place.folder)
        opened = inspect(place)
        raise_any(opened.problems, but=("stale", "unlocked", "leftover"))
        _there_is_a_tree(opened)
        result = relocked(opened, accept_stale=accept_stale)
        data = render_lock(result.lock)
        if data != opened.lock_bytes:
            transaction.apply(Changes((NewFile.of(place.lock, data),)))
    return result


def check(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> list[Problem]:
    """Everything that can be wrong with a folder or a tree.yaml; every adapter is read once.

    Args:
        path: the folder, or a YAML file in it.
        dtype: the base's. Factors times their scale must be finite in it, and fp16 ends at 65504.

    Raises:
        FolderError: there is no such folder or file.
    """
    place = place_of(path)
    try:
        opened = inspect(place)
    except LoraTreeError as error:
        return [Problem("", "folder", str(error))]
    problems = list(opened.problems)
    if any(problem.kind == "newer" for problem in problems):
        return problems  # advice about anything else would be a guess
    told = {problem.node for problem in problems if problem.kind in ("adapter", "unlocked")}
    for node, entry in opened.entries.items():
        if entry.files is not None and node not in told:
            try:
                source = _node(opened, node).source
                if source is not None:
                    problems += _numbers(node, source.load(), entry.weight, dtype)
            except LoraTreeError as error:
                kind: Kind = "unlocked" if isinstance(error, UnlockedError) else "adapter"
                problems.append(Problem(node, kind, f"{node}: {error}"))
    if opened.spec is None and opened.lock is None and not opened.entries and not problems:
        problems.append(
            Problem(
                "", "folder", f"{place.folder}: no tree.yaml, and no folder below with an adapter"
            )
        )
    for path in dict.fromkeys(["", *opened.scan.found]):
        folder = Path(place.folder, path)
        try:
            for name in leftovers(folder):
                text = f"{folder}/{name}: left by a save that was cut off; the next save, or lora-tree lock, clears it"
                problems.append(Problem(path, "leftover", text))
        except FolderError as error:
            problems.append(Problem(path, "folder", str(error)))
    return problems


def notes(path: str | os.PathLike[str]) -> list[str]:
    """Say what is no problem, and worth a line: steps of training runs that are passed over, and bases' names.

    Raises:
        FolderError: there is no such folder or file.
    """
    opened = inspect(place_of(path))
    return [*_part(opened), *_passed_over(opened), *_bases(opened)]


def _part(opened: Opened) -> list[str]:
    """Return a note if the folder is a part of a tree: only the nodes below it are shown."""
    folder = opened.place.folder
    part = tree_above(folder) if opened.spec is None and opened.lock is None else None
    if part is None:
        return []
    return [
        f"{folder}: {part[1]} of the tree {part[0]}; what lies above it there is not counted here"
    ]


def _passed_over(opened: Opened) -> list[str]:
    runs: dict[str, list[str]] = {}
    for step in opened.passed:
        runs.setdefault(step_of(step) or "", []).append(step)
    return [
        f"{run}: passed over {listing(steps)}: a step of its training run, not a node"
        for run, steps in runs.items()
    ]


def _bases(opened: Opened) -> list[str]:
    """Which adapters name another base than the tree; or, where the tree names none, that they do not agree."""
    by_name: dict[str, list[str]] = {}
    for node, name in named_bases(opened).items():
        by_name.setdefault(name, []).append(node)
    tree = opened.base_name
    if tree is not None:
        others = {name: nodes for name, nodes in by_name.items() if other_base(name, tree)}
        what = "the tree is over" if opened.spec is None else "the tree names"
        return [
            f"{listing(nodes)}: made for the base {name!r}, {what} {tree!r}"
            for name, nodes in others.items()
        ]
    if len(by_name) > 1 and opened.spec is None:
        told = "; ".join(f"{name!r} ({listing(nodes)})" for name, nodes in by_name.items())
        return [f"the adapters name different bases: {told}; name the tree's own in a tree.yaml"]
    return []


def _numbers(node: str, adapter: Adapter, weight: float, dtype: torch.dtype) -> list[Problem]:
    """Factors that would make a base's every output NaN, though they can be opened, added up and served."""
    problems = []
    broken = [name for name, value in adapter.modules.items() if not value.is_finite]
    if broken:
        text = f"{node}: {listing(broken)}: a factor holds NaN or an infinity, as a training that diverged leaves it"
        problems.append(Problem(node, "numbers", text))
    huge = [
        name
        for name, value in adapter.modules.items()
        if name not in broken and not _fits(value, weight, dtype)
    ]
    if huge:
        scale = max(abs(adapter.modules[name].scale) for name in huge)
        text = (
            f"{node}: {listing(huge)}: the scale ({scale:.3g}) and the node's weight ({weight:.3g}) times its factors "
            f"go over {torch.finfo(dtype).max:.5g}, the largest number of {str(dtype)[6:]}; "
            "look at lora_alpha and r in its adapter_config.json"
        )
        problems.append(Problem(node, "numbers", text))
    return problems


def _fits(value: LowRank, weight: float, dtype: torch.dtype) -> bool:
    """Whether a node's increment is finite in a base's dtype; the base's own numbers come on top."""
    return math.isfinite(value.scale * weight) and value.scaled(weight).fits(dtype)


def _there_is_a_tree(opened: Opened) -> None:
    if opened.spec is None and opened.lock is None and not opened.entries:
        raise FolderError(
            f"{opened.place.folder}: no tree: no tree.yaml, and no folder below with an adapter_config.json",
            "give the folder that holds the folders of the adapters",
        )


def _node(opened: Opened, path: str) -> Node:
    """A node as its folder has it, with a source that knows what the lock says."""
    entry, known = opened.entries[path], opened.lock.nodes.get(path) if opened.lock else None
    if entry.files is None:
        return Node(path, entry.weight, fresh=entry.fresh)
    on = trained(known, opened.lock) if known is not None and opened.lock is not None else None
    root = None if entry.named else opened.place.folder
    within = None if opened.outside else opened.place.folder
    source = FolderSource(
        entry.files.folder, root, entry.files.stamps, opened.contents.get(path), on, within
    )
    home = None if entry.named else entry.files.folder
    return Node(path, entry.weight, source=source, stale=opened.stale.get(path), home=home)


def _adapter_folder(folder: Path) -> str:
    """The folder of an adapter that a user named; an error where something else has the name."""
    where = os.path.abspath(folder)
    wrong = no_folder(where, os.fspath(folder))
    if wrong is not None:
        raise FormatError(*wrong)
    return where


@dataclass(frozen=True)
class _Edge:
    """What the values call for files; see `lora_tree.storage.Storage`."""

    def read_adapter(self, folder: Path) -> Adapter:
        found = recognise(Path(os.path.abspath(folder)))
        if found.file is not None:
            return ForeignSource(found).load()
        return FolderSource(_adapter_folder(folder)).load()

    def write_adapter(self, adapter: Adapter, folder: Path, form: str) -> None:
        if form == "peft":
            save_adapter(adapter, folder)
        else:
            save_one_file(adapter, folder, form)

    def source(self, folder: Path) -> FolderSource | ForeignSource:
        found = recognise(Path(os.path.abspath(folder)))
        if found.file is not None:
            return ForeignSource(found)
        where = _adapter_folder(folder)
        files = find_files(where)
        if files.flaw is not None:
            raise FormatError(files.flaw)
        return FolderSource(where, stamps=files.stamps)

    def save_tree(self, tree: AdapterTree, folder: Path, *, copy: bool) -> None:
        save_tree(tree, folder, copy=copy)


install(_Edge())
