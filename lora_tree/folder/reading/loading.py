"""Load a folder as a tree, whole or without the nodes that can't be used.

zoo/tree.yaml                        optional: base, defaults, weights, adapters that live elsewhere
zoo/tree.lock                        written by save and lock
zoo/fr/adapter_config.json           each folder with an adapter is a node
zoo/fr/legal/adapter_config.json     nesting is stacking
"""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Collection
from pathlib import Path

from ...errors import LoraTreeWarning, StaleError, listing
from ...tree import AdapterTree, Node
from ..problem import HARMLESS, Problem, raise_any
from .last_seen import Seen, remember
from .nodes import node_of
from .opening import Opened, inspect, refuse_no_tree, unusable
from .tree_place import TreePlace, place_of

__all__ = ["SkippedWarning", "StaleWarning", "load", "survey"]


_MOST_LISTED = 20
"""The most nodes whose reason one warning gives."""


class StaleWarning(LoraTreeWarning):
    """Nodes were trained on a lineage, or a base, that has changed since.

    They load, but may not fit any more.
    """


class SkippedWarning(LoraTreeWarning):
    """Nodes were left out of a tree opened with ``skip_broken=True``, each with its reason."""


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
        strict: raise if a node is stale, instead of warning.
        outside: whether tree.yaml may name adapters that lie outside of the folder. Pass False for
            a tree whose author you do not trust: then nothing outside of its folder is read,
            also if its tree.yaml or a link leads there.
        skip_broken: leave out the nodes that can't be used, and all below them, and warn of each
            with its reason. For this the headers of all adapters are read.

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
        # A mistake in the tree's own files belongs to no single node, so to leave nodes out would
        # not help.
        raise_any([problem for problem in opened.problems if not problem.node])
        skipped = unusable(opened)
    else:
        raise_any(opened.problems, *_accept(opened), after=_go_on(opened))
    refuse_no_tree(opened)
    if skipped:
        reasons: list[str] = []
        for text in list(skipped.values())[:_MOST_LISTED]:
            reasons += text.split("\n  ")  # an error's advice stands on lines of its own
        reasons += _more(len(skipped), place)
        warnings.warn(SkippedWarning(f"left out: {listing(skipped)}", *reasons), stacklevel=2)
    stale = [text for node, text in opened.stale.items() if node not in skipped]
    if stale:
        todo = (
            "train them again, or accept them as they are: "
            f"lora-tree lock --accept-stale {shlex.quote(place.spelled)}"
        )
        if strict:
            raise StaleError(*stale, todo)
        lines = [*stale[:_MOST_LISTED], *_more(len(stale), place)]
        warnings.warn(StaleWarning(f"stale: {lines[0]}", *lines[1:], todo), stacklevel=2)
    tree = _tree(opened, skipped)
    # A later save compares the folder with what was seen here. So it can refuse to undo what
    # another process wrote in between.
    remember(tree, place, Seen.of(opened))
    return tree


def _more(count: int, place: TreePlace) -> list[str]:
    """Say how many more nodes there are than a warning names: it must not fill the screen."""
    more = count - _MOST_LISTED
    if more <= 0:
        return []
    return [f"and {more:,} more: lora-tree check {shlex.quote(place.spelled)} lists all of them"]


def _tree(opened: Opened, skipped: Collection[str]) -> AdapterTree:
    nodes = [node_of(opened, path) for path in opened.entries if path not in skipped]
    spec = opened.spec
    return AdapterTree.from_nodes(
        nodes,
        base=opened.base_name,
        defaults=spec.defaults if spec is not None else None,
        cache=spec.cache if spec is not None else None,
        history=spec.history if spec is not None else None,
        home=Path(opened.place.yaml_file),
    )


def _go_on(opened: Opened) -> list[str]:
    """Say how to see all problems, and how to open the tree without the broken nodes."""
    wrong = [problem for problem in opened.problems if problem.kind not in HARMLESS]
    if any(not problem.node for problem in wrong):
        return []
    folder = opened.place.spelled
    lines = []
    # The error shows the problems of one kind only.
    if len({problem.kind for problem in wrong}) > 1:
        lines.append(f"these and all other problems: lora-tree check {shlex.quote(folder)}")
    lines.append(
        f"to go on without them: lora_tree.load({folder!r}, skip_broken=True), or --skip-broken "
        "of eval, explore, export, generate, init and similar"
    )
    return lines


def _accept(opened: Opened) -> list[str]:
    """Offer to lock the present files, if that could be right for one of them."""
    unlocked = [problem for problem in opened.problems if problem.kind == "unlocked"]
    broken = [problem.node for problem in unlocked if problem.broken]
    if len(broken) == len(unlocked):
        return []
    folder = opened.place.spelled
    command = f"lora-tree lock {shlex.quote(folder)}"
    offer = f"if the files are right, accept them as they are: {command}"
    if broken:
        # `lock` refuses broken files, so the offer alone would lead into another error.
        return [f"put the files of {listing(broken)} right first; {offer}"]
    return [offer]


def survey(
    path: str | os.PathLike[str], *, outside: bool = True
) -> tuple[AdapterTree, list[Problem]]:
    """Open a tree as `load` does, with the problems of single nodes listed instead of raised.

    For a server, which goes on with the nodes that are whole. A node that is listed may fail when
    it is asked for, or not be in the tree at all.

    Args:
        path, outside: as for `load`.

    Raises:
        SpecError, FolderError: there is no tree, or a file of the tree itself is broken.
    """
    opened = inspect(place_of(path), outside=outside)
    raise_any([problem for problem in opened.problems if not problem.node])
    refuse_no_tree(opened)
    problems = [problem for problem in opened.problems if problem.node]
    present: dict[str, Node] = {}
    for node in opened.entries:  # parents first
        above = node.rpartition("/")[0]
        if above and above not in present:
            text = f"{node}: lies below {above}, which can't be used"
            problems.append(Problem(node, "folder", text))
        else:
            present[node] = node_of(opened, node)
    home = Path(opened.place.yaml_file)
    tree = AdapterTree.from_nodes(present.values(), base=opened.base_name, home=home)
    return tree, problems
