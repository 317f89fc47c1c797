"""A tree of paths as lines: their order, their depth, and the guides in front of them.

    ├── fr                 a guide leads to each name
    │   ├── legal (+12)    12 nodes below it are hidden
    │   └── medical
    └── de

A tree of ten thousand nodes is read from the top. So if there are more nodes than lines, whole
levels are hidden, the deepest first. Nodes that must be seen, such as broken ones, are shown all
the same, with the nodes above them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DrawnNode", "arrange_nodes"]


@dataclass(frozen=True)
class DrawnNode:
    """One line of the drawing.

    Args:
        path: the node.
        name: the path without that of its parent in the drawing.
        is_last: for each level down to this one, whether no sibling follows.
        hidden: how many nodes below it are not drawn.
    """

    path: str
    name: str
    is_last: tuple[bool, ...]
    hidden: int

    @property
    def guide(self) -> str:
        """The lines that lead to the name: ``│   └── ``."""
        above = "".join("    " if last else "│   " for last in self.is_last[:-1])
        return above + ("└── " if self.is_last[-1] else "├── ")


def arrange_nodes(
    paths: Iterable[str],
    *,
    key: Callable[[str], Any] | None = None,
    depth: int | None = None,
    limit: int | None = None,
    always: Iterable[str] = (),
) -> list[DrawnNode]:
    """Return the lines of a drawing, depth-first.

    A path whose parent is not among the paths hangs below the nearest ancestor that is.

    Args:
        paths: of the nodes.
        key: of a path: siblings are drawn in its order; None: by name.
        depth: how many levels to draw; None: as many as ``limit`` allows.
        limit: how many lines to draw at most; None: all.
        always: paths that are drawn however deep they lie.

    >>> for node in arrange_nodes(["fr", "fr/legal", "fr/legal/eu", "de"], depth=2):
    ...     print(f"{node.guide}{node.name} {node.hidden}")
    ├── de 0
    └── fr 0
        └── legal 1
    """
    # By names and not by text: "fr-x" would come between "fr" and "fr/legal", since "-" sorts
    # before "/". In this order each parent stands before its children, which `_levels` and
    # `_counts_below` rely on.
    paths = sorted(paths, key=lambda path: path.split("/"))
    parents = _parents(paths)
    levels = _levels(parents)
    if depth is None:
        depth = _depth_within(levels.values(), limit)
    shown = {path for path in paths if levels[path] <= depth}
    needed = _with_ancestors(always, parents)
    shown |= needed
    # Paths come sorted, so each list of siblings is in the order of their names.
    children: dict[str, list[str]] = {}
    for path in paths:
        children.setdefault(parents[path], []).append(path)
    if key is not None:
        for siblings in children.values():
            siblings.sort(key=key)  # stable: equal ones stay in the order of their names
    below = _counts_below(parents)
    drawn = list(_walk(children, shown, below))
    if limit is None or len(drawn) <= limit:
        return drawn
    # Even the top level has more nodes than there are lines: the first ones, and the needed ones.
    spare = max(limit - len(needed), 0)
    others = [node.path for node in drawn if node.path not in needed]
    kept = needed.union(others[:spare])
    # The slice is for a limit below the number of needed nodes, which are all in `kept`.
    return [node for node in drawn if node.path in kept][:limit]


def _parents(paths: list[str]) -> dict[str, str]:
    """Return for each path the nearest ancestor among the paths; ``""`` above the top ones."""
    known = set(paths)
    parents = {}
    for path in paths:
        above = path.rpartition("/")[0]
        while above and above not in known:
            above = above.rpartition("/")[0]
        parents[path] = above
    return parents


def _levels(parents: Mapping[str, str]) -> dict[str, int]:
    levels = {"": 0}
    for path, above in parents.items():  # a parent comes before its children
        levels[path] = levels[above] + 1
    del levels[""]
    return levels


def _depth_within(levels: Iterable[int], limit: int | None) -> int:
    """Return how many levels fit into ``limit`` lines, at least one."""
    levels = list(levels)
    depth = max(levels, default=1)
    # One level is left even if it has more nodes than lines: an empty drawing says nothing, and
    # `arrange_nodes` cuts this level by lines.
    while limit is not None and depth > 1:
        if sum(level <= depth for level in levels) <= limit:
            break
        depth -= 1
    return depth


def _with_ancestors(paths: Iterable[str], parents: Mapping[str, str]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        while path in parents and path not in found:
            found.add(path)
            path = parents[path]
    return found


def _counts_below(parents: dict[str, str]) -> dict[str, int]:
    """Return for each path how many nodes lie below it."""
    counts = dict.fromkeys(parents, 0)
    # Last to first: a node's own count is whole before it is added to its parent's.
    for path in reversed(parents):
        above = parents[path]
        if above:
            counts[above] += counts[path] + 1
    return counts


def _walk(
    children: Mapping[str, list[str]], shown: set[str], below: Mapping[str, int]
) -> Iterator[DrawnNode]:
    """Yield the shown nodes depth-first."""

    def nodes(above: str, is_last: tuple[bool, ...]) -> Iterator[DrawnNode]:
        siblings = [path for path in children.get(above, ()) if path in shown]
        for i, path in enumerate(siblings):
            own_is_last = (*is_last, i == len(siblings) - 1)
            # Drawn first, because a node's line says how many below it are hidden.
            inner = list(nodes(path, own_is_last))
            visible = len(inner)
            # Each hidden node counts at its nearest drawn ancestor alone. Otherwise it would be
            # counted again at every level above, and the numbers would not add up to the nodes of
            # the tree.
            hidden_deeper = sum(node.hidden for node in inner)
            yield DrawnNode(
                path,
                path.removeprefix(f"{above}/"),
                own_is_last,
                below[path] - visible - hidden_deeper,
            )
            yield from inner

    yield from nodes("", ())
