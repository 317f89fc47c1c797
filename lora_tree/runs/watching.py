"""Watching a run on rows that it does not train on: a loss for every path, every so many steps.

The rows are measured before the first step, every ``every`` steps and after the last one.
`training.patience` decides from a node's losses whether it stops. A checkpoint holds its state
(``watch`` in run.json) and, if nodes may stop, the factors to which they may come back
(``best.safetensors``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, SpecError, listing
from ..folder import disk
from ..folder.past.run_records import PathMetric
from ..formats.safetensors import read_tensors, render_tensors
from ..model import TreeModel
from ..provenance import DataFile, WatchedWith
from ..system.reading import is_file
from ..training.patience import NodePatience
from .held_back import losses_of_rows
from .identity import digest_of_rows
from .preferences import are_preferences
from .rows import Row
from .settings import Settings

__all__ = ["HeldOut", "RunWatch", "held_out_identity", "held_out_rows"]

BEST = "best.safetensors"


@dataclass(frozen=True)
class HeldOut:
    """The settings with which a run is measured on held-out rows.

    Args:
        every: steps between two evaluations.
        rows: to measure on; None: those that the run holds back.
        patience: evaluations in succession without improving after which a node stops; None: none
            stops.
        data: the files that the rows came from, for `Run.training`.

    Raises:
        SpecError: a number makes no sense.
    """

    every: int
    rows: Sequence[Row] | None = None
    patience: int | None = None
    data: Sequence[DataFile] = ()

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("patience", self.patience)):
            if value is not None and (isinstance(value, bool) or value < 1):
                raise SpecError(f"{name} must be a whole number from 1, got {value!r}")

    @property
    def noted(self) -> WatchedWith:
        """The settings as a lock notes them."""
        return WatchedWith(data=list(self.data), every=self.every, patience=self.patience)


class RunWatch:
    """The evaluations of one run.

    Args:
        model: of the tree, after `trainable`.
        held_out: how it is watched.
        rows: those of it, or the ones held back.
        nodes: the nodes that train.
        settings: of the run.
    """

    def __init__(
        self,
        model: TreeModel,
        held_out: HeldOut,
        rows: Sequence[Row],
        nodes: Sequence[str],
        settings: Settings,
    ) -> None:
        self._model, self._held_out, self._settings = model, held_out, settings
        self._by_path: dict[str, list[Row]] = {}
        for row in rows:
            self._by_path.setdefault(row.path, []).append(row)
        self.patience = NodePatience(model.factors, model.tree, nodes, held_out.patience)
        self.began = False

    @property
    def rows(self) -> int:
        """The number of rows on which the run is measured."""
        return sum(map(len, self._by_path.values()))

    def is_due(self, done: int) -> bool:
        """Tell whether a run that has taken ``done`` steps is to be evaluated now."""
        return done % self._held_out.every == 0 or done == self._settings.steps

    def evaluate(self, step: int) -> list[PathMetric]:
        """Measure every path, let nodes stop, and return the losses as they were measured."""
        self.began = True
        losses = {path: self._measured(path) for path in self._by_path}
        self.patience.judge(step, losses, self._through)
        is_last = step == self._settings.steps
        if is_last:
            self.patience.settle(step, self._through)
        if is_last or self.patience.all_stopped_at is not None:
            # A node that came back changes the losses of all nodes on its lineage and below it.
            self.patience.note_now({path: self._measured(path) for path in self._by_path})
        return [PathMetric(step, path, *both) for path, both in losses.items()]

    # ------------------------------------------------------------------ in a checkpoint
    def plain(self) -> dict[str, Any]:
        """Return its state as plain data."""
        return self.patience.plain()

    def save(self, checkpoint: Path) -> None:
        """Write the factors to which nodes may come back."""
        best = self.patience.best_factors()
        if best:
            disk.write(checkpoint / BEST, render_tensors(best, {"format": "pt"}))

    def resume(self, about: Mapping[str, Any], checkpoint: Path) -> None:
        """Go on from a checkpoint, whose run.json is given.

        Raises:
            FormatError: one of the two files is broken.
        """
        file = checkpoint / BEST
        best = read_tensors(file, str(file))[0] if is_file(file) else {}
        try:
            self.patience.take(about["watch"], best)
        except (AttributeError, KeyError, TypeError) as error:
            raise FormatError(
                f"{checkpoint}: run.json: watch: not what a run writes: {error!r}"
            ) from error
        self.began = True

    # ------------------------------------------------------------------ private
    def _through(self, node: str) -> dict[str, tuple[float, int]]:
        tree = self._model.tree
        paths = [path for path in self._by_path if path and node in tree.lineage(path)]
        return {path: self._measured(path) for path in paths}

    def _measured(self, path: str) -> tuple[float, int]:
        rows, settings = self._by_path[path], self._settings
        losses = losses_of_rows(self._model, rows, batch=settings.batch, beta=settings.beta)
        count = len(rows) if are_preferences(rows) else sum(row.learnt for row in rows)
        return math.fsum(losses) / count, count


def held_out_rows(
    held_out: HeldOut,
    held_back: Sequence[Row],
    model: TreeModel,
    nodes: Sequence[str],
    prefers: bool,
) -> Sequence[Row]:
    """Return the rows to measure on.

    Args:
        held_out: how the run is watched.
        held_back: the rows that the run does not train on.
        model: of the tree.
        nodes: the nodes that train.
        prefers: the run's rows are preferences.

    Raises:
        SpecError: there is none, none goes through a node that trains, or they are of another kind
            than the run's.
    """
    rows = held_back if held_out.rows is None else held_out.rows
    if held_out.rows is None and not rows:
        raise SpecError(
            "eval_every or patience needs held-out rows to measure on, and there are none",
            "give held-out rows (--eval-data), or hold back more (--hold-back)",
        )
    tree, training = model.tree, set(nodes)
    through = {path for path in {row.path for row in rows} if training & set(tree.lineage(path))}
    if not through:
        raise SpecError(
            f"no held-out row goes through {listing(nodes)}",
            "the path of a row is the node it is for",
        )
    if are_preferences(rows) != prefers:
        raise SpecError(
            f"{rows[0].where}: the held-out rows are of another kind than those that are learnt",
            "give both as preferences, or neither",
        )
    return rows


def held_out_identity(held_out: HeldOut, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the held-out part of a run's identity, for its run.json."""
    return {
        "every": held_out.every,
        "patience": held_out.patience,
        "rows": digest_of_rows(rows),
    }
