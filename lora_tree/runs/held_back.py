"""Rows held back from a run, by which each leaf's weight is judged against its parent.

    weight   0      0.25   0.5    0.75   1        of a leaf trained on few rows
    loss     2.76   2.74   2.80   2.97   3.25     on its held-back rows: kept at 0.25

A node with few rows overfits, and then serves its path worse than its parent would. Training loss
can't show that; rows that were not trained on can. Only leaves are judged: another weight of a node
that has children would change the lineage on which these were trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blend import Blend
from ..errors import plural
from ..model import TreeModel
from ..tree import AdapterTree
from ..weights import Weight, scaled_weight
from .evaluation import evaluate_at
from .preferences import (
    answers_of,
    are_preferences,
    dpo_losses,
    log_probabilities,
    reference_of,
)
from .rows import Row

__all__ = [
    "PARTS",
    "Verdict",
    "at_part",
    "hold_back",
    "judge",
    "loss_of_rows",
    "losses_of_rows",
    "places_held_back",
    "reweigh_leaves",
]

PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""The parts of a leaf's weight that are tried."""


@dataclass(frozen=True)
class Verdict:
    """A leaf's losses on its held-back rows, in nats per token, and the weight that follows.

    Args:
        node: its path.
        rows: how many rows of it were held back.
        parent: the loss without the node.
        trained: the loss with the weight that it was trained with.
        kept: the loss with the weight that it has now.
        weight: that weight.
    """

    node: str
    rows: int
    parent: float
    trained: float
    kept: float
    weight: Weight

    @property
    def beats_parent(self) -> bool:
        """True if the node at its trained weight does at least as well as its parent."""
        return self.trained <= self.parent

    @property
    def is_reweighed(self) -> bool:
        """True if the node does better at a smaller weight than the one it was trained with."""
        return self.kept < self.trained

    def __str__(self) -> str:
        """One line: ``fr/legal: 3.247 on 12 held-back rows, its parent 2.759: kept at …``."""
        text = f"{self.node}: {self.trained:.3f} on {plural(self.rows, 'held-back row')}"
        text += f", its parent {self.parent:.3f}"
        if self.beats_parent:
            return text
        return f"{text}: kept at weight {self.weight:g}, {self.kept:.3f}"


def hold_back(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those held back, see `places_held_back`.

    >>> rows = [Row("fr", (i, 0), (i, 0), "x:1") for i in range(6)]
    >>> trained, held = hold_back(rows, 0.34)
    >>> [row.ids[0] for row in held], len(trained)
    ([1, 4], 4)
    """
    places = places_held_back([row.path for row in rows], share)
    held = set(places)
    trained = [row for place, row in enumerate(rows) if place not in held]
    return trained, [rows[place] for place in places]


def places_held_back(paths: Sequence[str], share: float) -> list[int]:
    """Return the indices of the rows to hold back: the share of each path's rows, rounded down.

    They are spread evenly over a path's rows, because files are often sorted: the last rows would
    not be representative.

    >>> places_held_back(["fr", "de", "fr", "fr", "fr"], 0.5)
    [2, 4]
    """
    own_of: dict[str, list[int]] = {}
    for place, path in enumerate(paths):
        own_of.setdefault(path, []).append(place)
    held: list[int] = []
    for own in own_of.values():
        count = int(share * len(own))
        held += [own[int((i + 0.5) * len(own) / count)] for i in range(count)]
    return sorted(held)


def reweigh_leaves(
    model: TreeModel,
    rows: Sequence[Row],
    nodes: Sequence[str],
    *,
    batch: int = 8,
    beta: float = 0.1,
) -> list[Verdict]:
    """Give every leaf that does worse than its parent on held-back rows the weight of least loss.

    Args:
        model: of the tree; nothing trains. The tree's weights are changed, no factor is.
        rows: held back. A leaf is judged by those of its own path.
        nodes: the nodes that trained. Nodes with an adapter below them are skipped, and so are
            leaves without rows.
        batch: rows at once.
        beta: of preferences. A parent's loss on them is log 2, since it is the reference.

    Returns:
        A verdict on each leaf that was judged, in the order of ``nodes``.
    """
    rows_by_path: dict[str, list[Row]] = {}
    for row in rows:
        rows_by_path.setdefault(row.path, []).append(row)

    def measure(part: float, leaves: Sequence[str]) -> dict[str, float]:
        losses = {}
        for leaf in leaves:
            at = at_part(leaf, part)
            losses[leaf] = evaluate_at(model, rows_by_path[leaf], at, batch=batch, beta=beta)
        return losses

    counts = {path: len(leaf_rows) for path, leaf_rows in rows_by_path.items()}
    verdicts = judge(model.tree, nodes, counts, measure)
    for verdict in verdicts:
        if verdict.is_reweighed:
            model.tree.update(verdict.node, weight=verdict.weight)
    return verdicts


def judge(
    tree: AdapterTree,
    nodes: Sequence[str],
    counts: Mapping[str, int],
    measure: Callable[[float, Sequence[str]], Mapping[str, float]],
) -> list[Verdict]:
    """Find the weight of least loss for every leaf that does worse than its parent.

    Args:
        tree: it is not changed.
        nodes: the nodes that trained. Nodes with an adapter below them are skipped, and so are
            leaves without rows.
        counts: path → the number of its rows held back.
        measure: (part, leaves) → the loss of each leaf on its own rows, at that part of its weight.
            It is called for few parts, with many leaves at once.

    Returns:
        A verdict on each leaf that was judged, in the order of ``nodes``.
    """
    leaves = []
    for node in nodes:
        has_children = any(tree[path].has_adapter for path in tree.paths(node))
        if counts.get(node) and not has_children:
            leaves.append(node)
    # Only rows of a leaf's own path are used, and no other leaf's path goes through it. So the
    # verdict on one leaf does not depend on the weight that another one gets.
    losses: dict[str, dict[float, float]] = {leaf: {} for leaf in leaves}
    for part in (0.0, 1.0) if leaves else ():
        for leaf, loss in measure(part, leaves).items():
            losses[leaf][part] = loss
    # Rows that learn no token give no loss, and no verdict.
    leaves = [leaf for leaf in leaves if len(losses[leaf]) == 2]
    # Each part in between costs a pass over the rows. They are needed only for a leaf that does
    # worse than its parent.
    worse = [leaf for leaf in leaves if losses[leaf][1.0] > losses[leaf][0.0]]
    for part in PARTS[1:-1] if worse else ():
        for leaf, loss in measure(part, worse).items():
            losses[leaf][part] = loss
    verdicts = []
    for leaf in leaves:
        losses_by_part = losses[leaf]
        # A tie goes to the larger weight: an untrained node, which adds nothing, keeps its own.
        best = min(sorted(losses_by_part, reverse=True), key=losses_by_part.__getitem__)
        weight = scaled_weight(tree[leaf].weight, best)
        verdicts.append(
            Verdict(
                leaf,
                counts[leaf],
                losses_by_part[0.0],
                losses_by_part[1.0],
                losses_by_part[best],
                weight,
            )
        )
    return verdicts


def loss_of_rows(
    model: TreeModel, rows: Sequence[Row], *, batch: int = 8, beta: float = 0.1
) -> float:
    """Return the mean loss of rows, each at its own path, in nats per learnt token.

    Of preferences it is the mean loss of DPO, each path against its parent. It may be called during
    a run: it changes and merges no factor, and draws no random number.

    Args:
        model: of the tree; its nodes may be training.
        rows: of any paths, and of one kind.
        batch: rows at once.
        beta: of preferences, as in `Settings`.

    Raises:
        SpecError: some rows are preferences, and some are not.
    """
    losses = losses_of_rows(model, rows, batch=batch, beta=beta)
    count = len(rows) if are_preferences(rows) else sum(row.learnt for row in rows)
    return math.fsum(losses) / count


@torch.no_grad()
def losses_of_rows(
    model: TreeModel, rows: Sequence[Row], *, batch: int = 8, beta: float = 0.1
) -> list[float]:
    """Return the loss of each row, summed over its tokens; arguments and errors of `loss_of_rows`.

    Of a preference it is the loss of the pair.
    """
    losses: list[float] = []
    prefer = are_preferences(rows)
    was_training = model.training
    model.eval()  # dropout would make the loss depend on chance
    try:
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            paths = [row.path for row in some]
            if not prefer:
                losses += (-_at_paths(model, some, paths)).tolist()
                continue
            answers = answers_of(some)  # the chosen ones, then the rejected ones
            policy = _at_paths(model, answers, paths * 2)
            reference = _at_paths(model, answers, [reference_of(path) for path in paths] * 2)
            losses += dpo_losses(policy, reference, beta).tolist()
    finally:
        model.train(was_training)
    return losses


def _at_paths(model: TreeModel, rows: Sequence[Row], paths: Sequence[str]) -> Tensor:
    """Return log p of each row's learnt tokens, each row at a path: (rows,)."""
    with model.route(list(paths)):
        return log_probabilities(model, rows)


def at_part(node: str, part: float) -> Blend:
    """Return the blend in which a leaf counts by a part, and the nodes above it in full."""
    parent = node.rpartition("/")[0]
    if part in (0.0, 1.0):
        return node if part else parent
    # A blend counts a node once for each path that goes through it. The two paths share all nodes
    # above the leaf, whose parts add up to 1 there.
    return {node: part, parent: 1 - part} if parent else {node: part}
