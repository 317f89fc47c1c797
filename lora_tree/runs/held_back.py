"""Rows held back from a run, and what they decide: a leaf is kept as far as it beats its parent.

    weight   0      0.25   0.5    0.75   1        of a leaf trained on few rows
    loss     2.76   2.74   2.80   2.97   3.25     on its held-back rows: kept at 0.25

A node with few rows learns them by heart, and serves its path worse than its parent would. Training
loss can't show that; rows that were not trained on can. Only leaves are judged: another weight of a
node that has children would change what these were trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..blend import Blend
from ..model import TreeModel
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

__all__ = ["PARTS", "Verdict", "hold_back", "keep_what_helps", "loss_of_rows", "losses_of_rows"]

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
        """Whether the node as it was trained does at least as well as its parent."""
        return self.trained <= self.parent

    def __str__(self) -> str:
        """One line: ``fr/legal: 3.247 on 12 held-back rows, its parent 2.759: kept at …``."""
        plural = "s" if self.rows != 1 else ""
        said = f"{self.node}: {self.trained:.3f} on {self.rows} held-back row{plural}"
        said += f", its parent {self.parent:.3f}"
        if self.beats_parent:
            return said
        return f"{said}: kept at weight {self.weight:g}, {self.kept:.3f}"


def hold_back(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those held back: of each path the share, rounded down.

    The rows that are held back lie evenly over a path's rows. Files are often sorted, and the end
    of one would not be like the rest.

    >>> rows = [Row("fr", (i, 0), (i, 0), "x:1") for i in range(6)]
    >>> trained, held = hold_back(rows, 0.34)
    >>> [row.ids[0] for row in held], len(trained)
    ([1, 4], 4)
    """
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.path, []).append(place)
    held: set[int] = set()
    for own in places.values():
        count = int(share * len(own))
        held.update(own[int((i + 0.5) * len(own) / count)] for i in range(count))
    trained = [row for place, row in enumerate(rows) if place not in held]
    return trained, [rows[place] for place in sorted(held)]


def keep_what_helps(
    model: TreeModel,
    rows: Sequence[Row],
    nodes: Sequence[str],
    *,
    batch: int = 8,
    beta: float = 0.1,
) -> list[Verdict]:
    """Give every leaf that does not beat its parent on held-back rows the weight that does.

    Args:
        model: of the tree; nothing trains. The tree's weights are changed, no factor is.
        rows: held back. A leaf is judged by those of its own path.
        nodes: what trained. Nodes with an adapter below them are passed over, and so are leaves
            without rows.
        batch: rows at once.
        beta: of preferences. A parent's loss on them is log 2, since it is the reference.

    Returns:
        A verdict on each leaf that was judged, in the order of ``nodes``.
    """
    tree = model.tree
    verdicts = []
    for node in nodes:
        # Only rows of the leaf's own path are used, and no other leaf's path goes through this one.
        # So a new weight for one leaf does not change the verdict on another.
        own = [row for row in rows if row.path == node]
        has_children = any(tree[path].has_adapter for path in tree.paths(node))
        if not own or has_children:
            continue
        measured = partial(evaluate_at, model, own, batch=batch, beta=beta)
        losses = {part: measured(_at(node, part)) for part in (0.0, 1.0)}
        # Each part in between costs a pass over the rows. They are needed only for a leaf that does
        # worse than its parent.
        if losses[1.0] > losses[0.0]:
            for part in PARTS[1:-1]:
                losses[part] = measured(_at(node, part))
        # A tie goes to the weight as it is: a node that was not trained yet adds nothing.
        best = min(sorted(losses, reverse=True), key=losses.__getitem__)
        weight = scaled_weight(tree[node].weight, best)
        if best != 1.0:
            tree.update(node, weight=weight)
        verdicts.append(Verdict(node, len(own), losses[0.0], losses[1.0], losses[best], weight))
    return verdicts


def loss_of_rows(
    model: TreeModel, rows: Sequence[Row], *, batch: int = 8, beta: float = 0.1
) -> float:
    """Return the mean loss of rows, each at its own path, in nats per learnt token.

    Of preferences it is the mean loss of DPO, each path against its parent. For a run that goes on:
    nothing that trains is changed, merged or drawn.

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


def _at(node: str, part: float) -> Blend:
    """Return the blend in which a leaf counts by a part, and the nodes above it in full."""
    parent = node.rpartition("/")[0]
    if part in (0.0, 1.0):
        return node if part else parent
    # A blend counts a node once for each path that goes through it. The two paths share all nodes
    # above the leaf, whose parts add up to 1 there.
    return {node: part, parent: 1 - part} if parent else {node: part}
