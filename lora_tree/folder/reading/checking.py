"""Check: everything that can be wrong with a folder, and notes about it that are no problems."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import torch

from ...adapter import Adapter
from ...base_names import other_base
from ...errors import FolderError, LoraTreeError, SpecError, UnlockedError, listing
from ...formats.recognise import recognise
from ...lowrank import LowRank
from ...nonfinite import broken_tensors, listed_broken
from ...weights import Weight, check_matched, weight_at
from ..bounds import tree_above
from ..hub_name import moved_to, parse_hub_name
from ..problem import Kind, Problem
from ..transactions.pending import leftovers
from .nodes import node_of
from .opening import Opened, inspect, named_bases
from .training_steps import step_of
from .tree_place import place_of

__all__ = ["check", "moved_branches", "notes"]

# Notes read headers of files that may have nothing to do with the tree, so their number is bounded.
_MOST_HEADERS = 100


def check(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> list[Problem]:
    """List everything that can be wrong with a folder or a tree.yaml; every adapter is read once.

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
    problems += _adapters(opened, dtype)
    if opened.is_empty:
        text = f"{place.folder}: no tree.yaml, and no folder below with an adapter"
        problems.append(Problem("", "folder", text))
    problems += _leftovers(opened)
    return problems


def _adapters(opened: Opened, dtype: torch.dtype) -> Iterator[Problem]:
    """Read every adapter that has no problem yet, and judge its numbers."""
    # An adapter with such a problem is not read again: the read would only fail for the same
    # reason, and the problem would be listed twice.
    reported = {
        problem.node for problem in opened.problems if problem.kind in ("adapter", "unlocked")
    }
    for path, entry in opened.entries.items():
        source = node_of(opened, path).source
        if source is None or path in reported:
            continue
        try:
            # One adapter in memory at a time: a folder may hold more than memory does.
            yield from _numbers(path, source.load(), entry.weight, dtype)
        except LoraTreeError as error:
            kind: Kind = "unlocked" if isinstance(error, UnlockedError) else "adapter"
            yield Problem(path, kind, f"{path}: {error}")


def _numbers(node: str, adapter: Adapter, weight: Weight, dtype: torch.dtype) -> Iterator[Problem]:
    """Find patterns that match nothing, and factors that would make every output of a base NaN,
    though they load and add up.
    """
    try:
        check_matched([(node, weight, adapter.module_names)])
    except SpecError as error:
        yield Problem(node, "adapter", str(error))
    broken = broken_tensors(adapter)
    broken_names = {name for name, _ in broken}
    huge = []
    for name, value in adapter.modules.items():
        if name not in broken_names and not _fits(value, weight_at(weight, name), dtype):
            huge.append(name)
    for name, override in adapter.overrides.items():
        if name not in broken_names and not bool(override.values.to(dtype).isfinite().all()):
            yield Problem(
                node,
                "numbers",
                f"{node}: {name}: its override goes over {torch.finfo(dtype).max:.5g}, the largest "
                f"number of {str(dtype)[6:]}",
            )
    if broken:
        yield Problem(
            node,
            "numbers",
            f"{node}: {listed_broken(broken)}: a factor holds NaN or an infinity, "
            "as a training that diverged leaves it",
        )
    if huge:
        scale = max(abs(adapter.modules[name].scale) for name in huge)
        yield Problem(
            node,
            "numbers",
            f"{node}: {listing(huge)}: the scale ({scale:.3g}) and the node's weight "
            f"({weight:.3g}) times its factors go over {torch.finfo(dtype).max:.5g}, the largest "
            f"number of {str(dtype)[6:]}; look at lora_alpha and r in its adapter_config.json",
        )


def _fits(value: LowRank, weight: float, dtype: torch.dtype) -> bool:
    """Tell whether a node's increment is finite in a base's dtype."""
    # The base's own numbers come on top. They are not known here.
    return math.isfinite(value.scale * weight) and value.scaled(weight).fits(dtype)


def _leftovers(opened: Opened) -> Iterator[Problem]:
    """Find the remains of saves that were cut off, in the tree's own folder and in its nodes'."""
    # The scan lists the top folder too if an adapter lies in it. A dict drops the second mention,
    # so that its remains are listed once.
    for path in dict.fromkeys(["", *opened.scan.found]):
        folder = Path(opened.place.folder, path)
        try:
            for name in leftovers(folder):
                text = (
                    f"{folder}/{name}: left by a save that was cut off; "
                    "the next save, or lora-tree lock, clears it"
                )
                yield Problem(path, "leftover", text)
        except FolderError as error:
            yield Problem(path, "folder", str(error))


# ---------------------------------------------------------------------- no problems
def notes(path: str | os.PathLike[str]) -> list[str]:
    """Return notes about adapters that are passed over, and about bases that disagree.

    Steps of training runs are passed over, and adapters of other programs that nothing names.

    Raises:
        FolderError: there is no such folder or file.
    """
    opened = inspect(place_of(path))
    return [
        *_part_of_a_tree(opened),
        *_passed_over_notes(opened),
        *_not_added(opened),
        *_bases(opened),
    ]


def moved_branches(path: str | os.PathLike[str]) -> list[str]:
    """Return a note for each adapter on the hub whose branch has moved on since it was locked.

    This asks the hub; if it does not answer, there are no notes.

    Raises:
        FolderError: there is no such folder or file.
    """
    notes = []
    for node, entry in inspect(place_of(path)).entries.items():
        name = None if entry.hub is None else parse_hub_name(entry.hub.adapter)
        if name is None or entry.hub is None:
            continue
        head = moved_to(name, entry.hub.commit)
        if head is not None:
            notes.append(
                f"{node}: {name} has moved on to {head[:12]}…; the commit in use is "
                f"{entry.hub.commit[:12]}…: lora-tree lock takes the new one"
            )
    return notes


def _part_of_a_tree(opened: Opened) -> list[str]:
    """Return a note if the folder is a part of a tree: only the nodes below it are shown."""
    folder = opened.place.folder
    if opened.spec is not None or opened.lock is not None:
        return []
    part = tree_above(folder)
    if part is None:
        return []
    tree, node = part
    return [f"{folder}: the node {node} of the tree {tree}; its ancestors there don't count here"]


def _passed_over_notes(opened: Opened) -> list[str]:
    """Return a note for each run whose steps are passed over."""
    runs: dict[str, list[str]] = {}
    for step in opened.passed:
        runs.setdefault(step_of(step) or "", []).append(step)
    return [
        f"{run}: passed over {listing(steps)}: a step of its training run, not a node"
        for run, steps in runs.items()
    ]


def _not_added(opened: Opened) -> list[str]:
    """Return a note about adapters in single files that are no nodes, since nothing names them."""
    if not opened.scan.single:
        return []  # in nearly every tree: no link of ten thousand nodes has to be followed
    folder = opened.place.folder
    used: set[str] = set()
    for entry in opened.entries.values():
        if entry.files is not None:
            used.update(os.path.realpath(at) for at, _ in entry.files.now.values())
    unused: list[str] = []
    for path in sorted(opened.scan.single)[:_MOST_HEADERS]:
        at = Path(folder, path)
        if os.path.realpath(at) in used or any(path.startswith(f"{p}/") for p in opened.passed):
            continue
        try:
            recognise(at)
        except LoraTreeError:
            continue  # a model's weights, or anything else that is no adapter
        unused.append(path)
    if not unused:
        return []
    tree = opened.place.spelled
    first = os.path.join(tree, unused[0])
    return [
        f"passed over {listing(unused)}: only PEFT folders are nodes by themselves; to add one: "
        f"lora-tree add {shlex.quote(tree)} NAME {shlex.quote(first)}"
    ]


def _bases(opened: Opened) -> list[str]:
    """Tell which adapters name another base than the tree; or that they disagree."""
    by_name: dict[str, list[str]] = {}
    for node, name in named_bases(opened).items():
        by_name.setdefault(name, []).append(node)
    tree = opened.base_name
    if tree is not None:
        what = "the tree is over" if opened.spec is None else "the tree names"
        return [
            f"{listing(nodes)}: made for the base {name!r}, {what} {tree!r}"
            for name, nodes in by_name.items()
            if other_base(name, tree)
        ]
    if len(by_name) > 1 and opened.spec is None:
        names_text = "; ".join(f"{name!r} ({listing(nodes)})" for name, nodes in by_name.items())
        return [
            f"the adapters name different bases: {names_text}; name the tree's own in a tree.yaml"
        ]
    return []
