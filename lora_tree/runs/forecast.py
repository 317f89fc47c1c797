"""The forecast of a run, made before its first step: which nodes train, and which become stale.

rows      fr/legal  fr/legal  de            the nodes that rows name train, and no others
trains    fr/legal  (on fr, as it is now), de
stale     fr/legal/contracts                it was trained on what fr/legal is now

A node above them trains only on request, because its training changes every node below it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import SpecError, agreeing, listing, plural
from ..folder.adapters.source import FolderSource
from ..model import TreeModel
from ..tree import AdapterTree
from .rows import Row

__all__ = [
    "NodeForecast",
    "becoming_stale",
    "choose_nodes",
    "forecast_nodes",
    "why_not_fresh",
]


@dataclass(frozen=True)
class NodeForecast:
    """One node that is about to train.

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
        """One line: ``fr/legal: from its adapter, on fr (frozen); 40 rows``."""
        start = "from new factors" if self.is_new else "from its adapter"
        above = [f"{node} (frozen)" for node in self.frozen]
        above += [f"{node} (trains, too)" for node in self.trained_with]
        ground = listing(above) if above else "the bare base"
        return f"{self.node}: {start}, on {ground}; {plural(self.rows, 'row')}"


def choose_nodes(
    model: TreeModel, rows: Sequence[Row], nodes: Sequence[str], *, with_ancestors: bool
) -> list[str]:
    """Return the nodes that train, in the tree's order.

    Args:
        model: of the tree.
        rows: their paths count if ``nodes`` is empty; groups have nothing to train and are skipped.
        nodes: paths or patterns.
        with_ancestors: add every node with an adapter above those.

    Raises:
        SpecError: rows name no node with an adapter.
        PathError: a path or pattern matches no node.
    """
    tree = model.tree
    if nodes:
        # A group that was named is kept here, so that `trainable` refuses it with its reason.
        named = set(tree.matching(nodes))
        trainable = set(named)
    else:
        named = {row.path for row in rows if row.path}
        trainable = {path for path in named if _can_train(tree, path)}
    if with_ancestors:
        for path in named:
            trainable.update(above for above in tree.lineage(path) if _can_train(tree, above))
    if not trainable:
        if named:
            have = agreeing(len(named), "has none of its own", "have none of their own")
            reason = f"{listing(sorted(named))} {have}"
        else:
            reason = "they are all for the bare base"
        raise SpecError(
            f"the rows name no node with an adapter: {reason}",
            'give rows the path of one: "path": "fr"; or name nodes to train',
        )
    return [path for path in tree.paths() if path in trainable]


def forecast_nodes(
    tree: AdapterTree, nodes: Sequence[str], rows: Sequence[Row]
) -> list[NodeForecast]:
    """Return the forecast of each node, made before the first step."""
    forecasts = []
    counts = Counter(row.path for row in rows)
    # Looked up once per path, not per row: there are far fewer paths than rows.
    lineages = {path: tree.lineage(path) for path in counts}
    for node in nodes:
        above = [path for path in tree.lineage(node)[:-1] if tree[path].has_adapter]
        together = tuple(path for path in above if path in nodes)
        frozen = tuple(path for path in above if path not in nodes)
        through = sum(count for path, count in counts.items() if node in lineages[path])
        forecasts.append(NodeForecast(node, _is_new(tree, node), together, frozen, through))
    return forecasts


def becoming_stale(tree: AdapterTree, nodes: Iterable[str]) -> list[str]:
    """Return the nodes that training these makes stale: nodes below them that do not train."""
    training = set(nodes)
    below: set[str] = set()
    # A node that trains together with its parent does not become stale.
    for node in training:
        below.update(tree.paths(node))
    stale = []
    for path in tree.paths():
        stays = path in below and path not in training
        # New factors fit any parent. A new override does not: it is a copy of the parent's tensor.
        fits_any = _is_new(tree, path) and not _has_overrides(tree, path)
        if stays and tree[path].has_adapter and not fits_any:
            stale.append(path)
    return stale


def why_not_fresh(tree: AdapterTree, path: str) -> str | None:
    """Say why a node can't begin from new factors; None if it can."""
    adapter = tree.outline(path)
    if adapter is None or not adapter.overrides:
        return None
    return f"it replaces {listing(adapter.overrides, most=2)}, and only factors can be drawn anew"


def _can_train(tree: AdapterTree, path: str) -> bool:
    return tree[path].has_adapter or tree[path].fresh is not None


def _is_new(tree: AdapterTree, path: str) -> bool:
    """Tell whether a node's factors were never trained: a fresh node's B is zero."""
    node = tree[path]
    if node.fresh is not None:
        return True
    if node.loaded is None:
        # This is asked of every node below one that trains, so the adapter is not read for it: the
        # lock says whether it is untrained.
        source = node.source
        on = source.trained if isinstance(source, FolderSource) else None
        return on is not None and on.untrained
    # An adapter that was saved before its first step has B = 0, like a fresh one.
    # One with overrides alone has no B, and counts as trained.
    values = node.loaded.modules.values()
    return bool(values) and not any(bool(value.B.any()) for value in values)


def _has_overrides(tree: AdapterTree, path: str) -> bool:
    """Tell whether a node's adapter has overrides; False if the adapter is not in memory."""
    adapter = tree[path].loaded
    return adapter is not None and bool(adapter.overrides)
