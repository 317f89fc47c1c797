"""The forecast of a run, told before its first step: which nodes train, from what, and which become stale.

rows      fr/legal  fr/legal  de            the nodes that rows name train; those above them only on request
trains    fr/legal  (on fr, as it is now), de
stale     fr/legal/contracts                it was trained on what fr/legal is now
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import SpecError, listing
from ..model import TreeModel
from ..tree import AdapterTree
from .rows import Row

__all__ = ["NodeForecast", "becoming_stale", "chosen", "losses_of", "what_trains"]


@dataclass(frozen=True)
class NodeForecast:
    """One node of a run.

    Args:
        node: its path.
        is_new: its factors are fresh: they change nothing yet.
        trained_with: the nodes above it that train as well, from the root down.
        frozen: the nodes above it that have an adapter and stay as they are.
        rows: how many rows go through it.
    """

    node: str
    is_new: bool
    trained_with: tuple[str, ...]
    frozen: tuple[str, ...]
    rows: int

    def __str__(self) -> str:
        """One line: ``fr/legal: from its adapter, on fr as it is; 40 rows``."""
        start = "from new factors" if self.is_new else "from its adapter"
        above = [f"{node} as it is" for node in self.frozen] + [
            f"{node}, which trains" for node in self.trained_with
        ]
        on = listing(above) if above else "the bare base"
        return f"{self.node}: {start}, on {on}; {self.rows} row{'s' if self.rows != 1 else ''}"


def chosen(
    model: TreeModel, rows: Sequence[Row], nodes: Sequence[str], *, with_ancestors: bool
) -> list[str]:
    """The nodes that train: those given as paths or patterns, or those that rows name.

    Args:
        model: of the tree.
        rows: whose paths count where ``nodes`` is empty; groups, which have nothing to train, are passed over.
        nodes: paths or patterns.
        with_ancestors: and every node with an adapter above them.

    Raises:
        SpecError: rows name no node with an adapter.
        PathError: a path or pattern matches no node.
    """
    tree = model.tree
    named = set(model.tree.matching(nodes)) if nodes else {row.path for row in rows if row.path}
    found = {path for path in named if nodes or _can_train(tree, path)}
    if with_ancestors:
        found |= {
            above for path in named for above in tree.lineage(path) if _can_train(tree, above)
        }
    if not found:
        where = (
            f"{listing(sorted(named))} have none of their own"
            if named
            else "they are all for the bare base"
        )
        raise SpecError(
            f"the rows name no node with an adapter: {where}",
            'give rows the path of one: "path": "fr"; or name nodes to train',
        )
    return [path for path in tree.paths() if path in found]


def what_trains(tree: AdapterTree, nodes: Sequence[str], rows: Sequence[Row]) -> list[NodeForecast]:
    """The nodes of a run, as they are before its first step."""
    told = []
    counts = Counter(row.path for row in rows)
    lineages = {path: tree.lineage(path) for path in counts}
    for node in nodes:
        above = [path for path in tree.lineage(node)[:-1] if tree[path].has_adapter]
        through = sum(count for path, count in counts.items() if node in lineages[path])
        together = tuple(path for path in above if path in nodes)
        frozen = tuple(path for path in above if path not in nodes)
        told.append(NodeForecast(node, _is_new(tree, node), together, frozen, through))
    return told


def becoming_stale(tree: AdapterTree, nodes: Iterable[str]) -> list[str]:
    """The nodes that were trained on what these are now, and do not train with them."""
    nodes = set(nodes)
    below = {path for node in nodes for path in tree.paths(node)} - nodes
    return [
        path
        for path in tree.paths()
        if path in below and tree[path].has_adapter and not _is_new(tree, path)
    ]


def losses_of(
    tree: AdapterTree, nodes: Iterable[str], by_path: Mapping[str, float]
) -> dict[str, float]:
    """Node → the mean over the losses of the paths that go through it; nodes without one are left out."""
    found = {}
    for node in nodes:
        mine = [loss for path, loss in by_path.items() if path and node in tree.lineage(path)]
        if mine:
            found[node] = sum(mine) / len(mine)
    return found


def _can_train(tree: AdapterTree, path: str) -> bool:
    return tree[path].has_adapter or tree[path].fresh is not None


def _is_new(tree: AdapterTree, path: str) -> bool:
    """Its factors have never been trained: B is zero, as a fresh node's is."""
    loaded = tree[path].loaded
    return tree[path].fresh is not None or (
        loaded is not None and not any(bool(value.B.any()) for value in loaded.modules.values())
    )
