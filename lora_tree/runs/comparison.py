"""Comparison: is a node better in a checkpoint than in the tree, by its loss on held-out rows?

slice      rows   now     then
contracts    40   2.31    2.12
statutes     25   2.44    2.47    worse: so it is not better, though the whole is
all          65   2.36    2.26
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..errors import SpecError
from ..model import attach
from ..tree import AdapterTree
from .held_back import loss_of_rows
from .rows import Row

__all__ = ["Comparison", "SliceLosses", "compare_trees"]


@dataclass(frozen=True)
class SliceLosses:
    """The losses on some rows, in nats per learnt token.

    Args:
        rows: the number of rows.
        before: the loss with the tree as it is.
        after: the loss with the changed node.
    """

    rows: int
    before: float
    after: float


@dataclass(frozen=True)
class Comparison:
    """The losses of the rows that go through a node, before and after a change of it.

    Args:
        path: the node.
        whole: on all of them.
        slices: value of the column that names the slice → on its rows.
    """

    path: str
    whole: SliceLosses
    slices: Mapping[str, SliceLosses]

    @property
    def worse(self) -> list[str]:
        """The slices on which the loss rises, or is no number."""
        return [name for name, found in self.slices.items() if not found.after <= found.before]

    @property
    def is_better(self) -> bool:
        """True if the loss falls on the whole, and rises on no slice."""
        return self.whole.after < self.whole.before and not self.worse


def compare_trees(
    before: AdapterTree,
    after: AdapterTree,
    path: str,
    base: nn.Module,
    rows: Sequence[Row],
    *,
    batch: int = 8,
    beta: float = 0.1,
) -> Comparison:
    """Measure two states of a tree on the rows that go through a node, each at its own path.

    Args:
        before: the tree as it is. A path that it lacks counts as the nearest node above.
        after: the tree with the changed node.
        path: the node that differs.
        base: no model is attached to it.
        rows: those that do not go through ``path`` are left out.
        batch: rows at once.
        beta: of preferences, as in `Settings`.

    Raises:
        SpecError: no row goes through the node.
    """
    rows_through = [row for row in rows if path in after.lineage(row.path)]
    if not rows_through:
        raise SpecError(
            f"no row goes through {path}, so nothing can be compared",
            "the path of a row is the node it is for",
        )
    groups: dict[str, list[Row]] = {}
    for row in rows_through:
        groups.setdefault(row.slice, []).append(row)
    measured: list[tuple[float, dict[str, float]]] = []
    for tree in (before, after):
        model = attach(tree, base)
        try:
            loss = loss_of_rows(model, _within(tree, rows_through), batch=batch, beta=beta)
            parts = {}
            for name, own in groups.items():
                parts[name] = loss_of_rows(model, _within(tree, own), batch=batch, beta=beta)
        finally:
            model.detach()
        measured.append((loss, parts))
    (old, old_parts), (new, new_parts) = measured
    slices = {}
    # Without a slice column all rows are one slice, whose losses are those of the whole.
    for name in sorted(groups) if len(groups) > 1 or "" not in groups else ():
        slices[name] = SliceLosses(len(groups[name]), old_parts[name], new_parts[name])
    return Comparison(path, SliceLosses(len(rows_through), old, new), slices)


def _within(tree: AdapterTree, rows: Sequence[Row]) -> list[Row]:
    """Return rows at paths that a tree has: a node that is yet to come counts as its parent."""
    found = []
    for row in rows:
        path = row.path
        while path and path not in tree:
            path = path.rpartition("/")[0]
        found.append(replace(row, path=path))
    return found
