"""The nodes of a folder, one line each, and the reasons of those that can't be used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

from ..errors import LoraTreeError, PathError, listing, suggest_path
from ..folder import Problem
from ..folder.problem import HARMLESS
from ..node_names import is_pattern
from ..tree import AdapterTree
from ..weights import Weight, plain_weight
from .stale_words import short_stale_text

__all__ = ["NodeLine", "lines_below", "lines_of", "matching_lines", "remark_text"]

WORDS = {"adapter": "", "fresh": "fresh: made when attached", "group": "group", "broken": ""}


@dataclass(frozen=True)
class NodeLine:
    """One node. ``ranks`` are the distinct ones of its modules, sorted; ``overrides`` the tensors
    of the base that it replaces.
    """

    path: str
    kind: Literal["adapter", "fresh", "group", "broken"]
    weight: Weight
    modules: int
    ranks: list[int]
    parameters: int
    bytes: int
    stale: str | None
    overrides: tuple[str, ...] = ()

    @property
    def weight_words(self) -> str:
        """The weight, short enough for a cell of a table."""
        return f"{self.weight:g}" if isinstance(self.weight, float) else "by module"

    def as_dict(self) -> dict[str, object]:
        """Return the line as plain data, for JSON."""
        return {**vars(self), "weight": plain_weight(self.weight)}


def lines_of(
    tree: AdapterTree, problems: list[Problem]
) -> tuple[list[NodeLine], dict[str, Problem]]:
    """Return a line for each node, broken ones included, and the problem of each broken one.

    Only headers are read.

    Args:
        tree: the nodes that could be opened.
        problems: of the other places, as `lora_tree.folder.survey` found them.
    """
    broken: dict[str, Problem] = {}
    for problem in problems:
        if problem.kind not in HARMLESS:
            broken.setdefault(problem.node, problem)  # the first one is the cause of the others
    lines: list[NodeLine] = []
    for path in tree.paths():
        if path in broken:
            continue
        try:
            lines.append(_line(tree, path))
        except LoraTreeError as error:
            # Its files were damaged after the folder was opened.
            broken[path] = Problem(path, "adapter", str(error))
    for path in broken:
        weight: Weight = tree[path].weight if path in tree else 1.0
        lines.append(NodeLine(path, "broken", weight, 0, [], 0, 0, None))
    # By names and not by text: "fr-x" must not come between "fr" and "fr/legal".
    lines.sort(key=lambda line: line.path.split("/"))
    return lines, broken


def _line(tree: AdapterTree, path: str) -> NodeLine:
    node, adapter = tree[path], tree.outline(path)
    if adapter is None:
        kind: Literal["fresh", "group"] = "fresh" if node.fresh is not None else "group"
        return NodeLine(path, kind, node.weight, 0, [], 0, 0, node.stale)
    return NodeLine(
        path,
        "adapter",
        node.weight,
        len(adapter),
        sorted(set(adapter.ranks.values())),
        adapter.numel,
        adapter.nbytes,
        node.stale,
        tuple(adapter.overrides),
    )


def lines_below(lines: Iterable[NodeLine], path: str) -> list[NodeLine]:
    """Return the lines of a node and of everything below it.

    Raises:
        PathError: there is no such node, broken or not.
    """
    lines = list(lines)
    # With a slash after both, so that "fr" does not claim "fr-x".
    found = [line for line in lines if f"{line.path}/".startswith(f"{path}/")]
    if not found:
        near = suggest_path(path, [line.path for line in lines])
        raise PathError(f"no node {path!r} in the tree{near}", "lora-tree show FOLDER lists them")
    return found


def matching_lines(lines: Iterable[NodeLine], pattern: str) -> list[NodeLine]:
    """Return the lines whose path matches a pattern like ``fr/*``, or contains a word.

    Raises:
        PathError: no path does.
    """
    lines = list(lines)
    if is_pattern(pattern):
        # The star of fnmatch crosses slashes, so fr/* shows every node below fr, at any depth, as
        # the patterns of the other commands do.
        found = [line for line in lines if fnmatch(line.path, pattern)]
    else:
        found = [line for line in lines if pattern in line.path]
    if not found:
        near = suggest_path(pattern, [line.path for line in lines])
        raise PathError(
            f"no path matches --filter {pattern!r}{near}",
            "a pattern is like 'fr/*' or '*/legal'; a word is found anywhere in a path",
        )
    return found


def remark_text(line: NodeLine, problem: Problem | None) -> str:
    """Return the remark beside a node's numbers: why it is broken or stale, or its kind."""
    if problem is not None:
        # On one line, so that grep finds the node and its reason together.
        reason = _without_place(problem).replace("\n", " ")
        return f"{problem.kind}: {reason}"
    if line.stale:
        return f"stale: {short_stale_text(line.path, line.stale)}"
    if line.overrides:
        return f"replaces {listing(line.overrides, most=2)}"
    return WORDS[line.kind]


def _without_place(problem: Problem) -> str:
    """Return a problem's text without the node and its folder, which the line begins with."""
    text = problem.text.removeprefix(f"{problem.node}: ")
    head, colon, rest = text.partition(": ")
    return rest if colon and head.endswith(f"/{problem.node}") else text
