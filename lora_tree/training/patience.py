"""Early stopping node by node: one that no longer improves goes back to where it was best.

    a node's loss    the mean over the held-out tokens of all paths through it
    it improves      if that loss is lower than ever before; a shared node by all paths below it
    it stops         after `patience` evaluations in succession without improving; one before which
                     it took no step does not count. Its factors of the best step come back and
                     stay, while its siblings go on

    evaluation   0     20    40    60    80
    fr/legal    3.21  2.60  2.71  2.66          stops after 60 with patience 2, back to step 20
    fr/medical  3.30  2.80  2.52  2.41  2.38    goes on

A node above or below may have moved since the best step, so the old factors may fit no longer. The
loss is therefore measured again, and if it is higher with them, the node stops where it is.

Law: bringing a node back never raises its loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..tree import AdapterTree
from .factors import Factors
from .node_factors import path_of

__all__ = ["NodePatience", "PathLosses", "mean_through"]

PathLosses: TypeAlias = Mapping[str, tuple[float, int]]
"""Path → (mean loss of its held-out rows, number of their tokens or preferences)."""

Measure: TypeAlias = Callable[[str], PathLosses]
"""Node → the losses of the paths through it, measured now."""


def mean_through(tree: AdapterTree, node: str, losses: PathLosses) -> float | None:
    """Return the mean loss over all tokens of the paths through a node; None if there are none.

    >>> tree = AdapterTree()
    >>> for path in ("fr", "fr/legal", "fr/tax"): _ = tree.add(path)
    >>> mean_through(tree, "fr", {"fr/legal": (2.0, 30), "fr/tax": (4.0, 10), "": (9.0, 5)})
    2.5
    """
    node_losses = [both for path, both in losses.items() if path and node in tree.lineage(path)]
    count = sum(tokens for _, tokens in node_losses)
    if count == 0:
        return None
    return math.fsum(loss * tokens for loss, tokens in node_losses) / count


@dataclass
class _Course:
    """The losses of one node on held-out rows so far."""

    before: float | None = None
    now: float | None = None
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    moved: bool = False
    stopped_at: int | None = None


@dataclass
class NodePatience:
    """The course of every node that trains, and its factors at its best.

    Args:
        factors: of the model.
        tree: of the model.
        nodes: the nodes that train, in the tree's order.
        patience: evaluations without improving after which a node stops; None: none ever does.
    """

    factors: Factors
    tree: AdapterTree
    nodes: Iterable[str]
    patience: int | None = None
    courses: dict[str, _Course] = field(init=False)
    _best: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.courses = {node: _Course() for node in self.nodes}

    @property
    def stopped(self) -> set[str]:
        """The nodes that no longer train."""
        return {node for node, one in self.courses.items() if one.stopped_at is not None}

    @property
    def all_stopped_at(self) -> int | None:
        """The step after which no node trained any more; None while one does."""
        steps = [one.stopped_at for one in self.courses.values()]
        known = [step for step in steps if step is not None]
        return max(known) if known and len(known) == len(steps) else None

    def note_moved(self, nodes: Iterable[str]) -> None:
        """Note which nodes had rows in a step."""
        for node in nodes:
            self.courses[node].moved = True

    def judge(self, step: int, losses: PathLosses, measure: Measure) -> list[str]:
        """Record an evaluation; bring back the nodes that stop because of it, and return them.

        Args:
            step: the step after which the evaluation was made.
            losses: of all paths with held-out rows.
            measure: measures the paths through one node again.
        """
        waited_long = []
        for node, course in self.courses.items():
            loss = mean_through(self.tree, node, losses)
            if loss is None or course.stopped_at is not None:
                course.now = loss if loss is not None else course.now
                continue
            if course.before is None:
                course.before = loss
            course.now = loss
            has_moved, course.moved = course.moved, False
            # A loss that is not finite never counts as an improvement.
            if math.isfinite(loss) and (course.best is None or loss < course.best):
                course.best, course.best_step, course.waited = loss, step, 0
                self._keep(node)
                continue
            # A node of few rows may have had none since the last evaluation.
            course.waited += 1 if has_moved else 0
            if self.patience is not None and course.waited >= self.patience:
                waited_long.append(node)
        for node in waited_long:
            self._bring_back(node, step, measure)
            self.courses[node].stopped_at = step
        return waited_long

    def settle(self, step: int, measure: Measure) -> None:
        """Bring back every node that still trains, after the last step of the run."""
        if self.patience is None:
            return
        for node, course in self.courses.items():
            if course.stopped_at is None and course.best_step is not None:
                self._bring_back(node, step, measure)

    def note_now(self, losses: PathLosses) -> None:
        """Record the losses of all paths after the last change of a node."""
        for node, one in self.courses.items():
            loss = mean_through(self.tree, node, losses)
            one.now = one.now if loss is None else loss

    # ------------------------------------------------------------------ in a checkpoint
    def plain(self) -> dict[str, Any]:
        """Return the courses as plain data, for a checkpoint's JSON, which has no NaN."""
        courses: dict[str, Any] = {}
        for node, course in self.courses.items():
            courses[node] = dict(vars(course))
            for word in ("before", "now"):
                loss = courses[node][word]
                if loss is not None and not math.isfinite(loss):
                    courses[node][word] = None
        return courses

    def best_factors(self) -> dict[str, Tensor]:
        """Return the factors that nodes may come back to, by name, on the CPU."""
        return {name: tensor.cpu() for name, tensor in self._best.items()}

    def take(self, plain: Mapping[str, Any], best: Mapping[str, Tensor]) -> None:
        """Restore the state that `plain` and `best_factors` returned."""
        for node, course in plain.items():
            if node in self.courses:
                self.courses[node] = _Course(**course)
        devices = {name: p.device for name, p in self.factors.named_parameters()}
        self._best = {name: t.to(devices[name]) for name, t in best.items() if name in devices}

    # ------------------------------------------------------------------ private
    def _own(self, node: str) -> dict[str, Tensor]:
        named = self.factors.named_parameters()
        return {name: p.detach() for name, p in named if path_of(name) == node}

    def _keep(self, node: str) -> None:
        if self.patience is not None:
            self._best |= {name: tensor.clone() for name, tensor in self._own(node).items()}

    def _bring_back(self, node: str, step: int, measure: Measure) -> None:
        """Give a node its best factors, if its loss with them is not higher than without."""
        course, own = self.courses[node], self._own(node)
        best = {name: self._best[name] for name in own if name in self._best}
        if course.best_step == step or len(best) < len(own):
            return  # the node is at its best, or its loss was never finite
        current = {name: tensor.clone() for name, tensor in own.items()}
        # Measured again, not taken from the evaluation: another node may have come back since.
        without = mean_through(self.tree, node, measure(node))
        _write(own, best)
        with_best = mean_through(self.tree, node, measure(node))
        assert without is not None
        assert with_best is not None
        # A comparison with NaN is false: of two losses the finite one wins.
        if with_best <= without or not math.isfinite(without):
            course.now = with_best
            return
        _write(own, current)
        course.now, course.best, course.best_step = without, without, step


@torch.no_grad()
def _write(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in own.items():
        tensor.copy_(values[name])
