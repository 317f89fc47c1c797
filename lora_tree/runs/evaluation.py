"""The loss of every node on every domain.

            fr      fr/legal   de         columns: the rows of one path each
(base)      3.21    3.40       3.10       rows of the matrix: the active path
fr          2.80    3.05       3.11
fr/legal    2.84    2.61       3.20       mean loss in nats over a domain's learnt tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..blend import Blend, depth_first
from ..errors import SpecError
from ..model import TreeModel
from ..training.losses import IGNORED, row_losses
from .loss_map import loss_map
from .preferences import (
    answers_of,
    are_preferences,
    dpo_losses,
    log_probabilities,
    reference_of,
)
from .rows import Row, padded

__all__ = ["LossMatrix", "evaluate", "evaluate_at", "inputs_of"]


@dataclass(frozen=True)
class LossMatrix:
    """The losses that `evaluate` measured.

    Args:
        paths: the active paths; ``""`` is the bare base.
        domains: the paths of the rows.
        losses: (paths, domains), mean loss in nats over the domain's learnt tokens; or over its
            preferences, against the parent of the domain's path.
        tokens: learnt in each domain.
        unit: of the losses.
    """

    paths: tuple[str, ...]
    domains: tuple[str, ...]
    losses: tuple[tuple[float, ...], ...]
    tokens: tuple[int, ...]
    unit: str = "nats per token"

    def picture(self) -> str:
        """Return a heat map as an SVG document: each column from its best (dark) to its worst.

        >>> matrix = LossMatrix(("", "fr"), ("fr",), ((2.0,), (1.0,)), (10,))
        >>> matrix.picture().count("<rect"), "1.00" in matrix.picture()
        (2, True)
        """
        return loss_map(self.paths, self.domains, self.losses, self.unit)


@torch.no_grad()
def evaluate(
    model: TreeModel,
    rows: Sequence[Row],
    *,
    nodes: Sequence[str] | None = None,
    batch: int = 8,
    mode: Literal["merged", "unmerged"] = "merged",
    beta: float = 0.1,
    tick: Callable[[], object] = lambda: None,
) -> LossMatrix:
    """Measure the loss of some nodes, and of the bare base, on every path's rows.

    Args:
        model: of the tree; its base as for a `Run`.
        rows: see `read_rows`; those of one path are a domain.
        nodes: paths to make active, beside the bare base; None: every node that has an adapter.
        batch: rows at once.
        mode: how a path is made active.
        beta: of preferences, as in `Settings`.
        tick: called after every node.

    Raises:
        SpecError: there are no rows, or some are preferences and some are not.
        PathError: a node is not in the tree.
    """
    if not rows:
        raise SpecError("evaluate needs rows, got none", "give it what read_rows returned")
    tree = model.tree
    domains = _by_path(rows)
    if nodes is None:
        chosen = [path for path in tree.paths() if tree[path].has_adapter]
    else:
        chosen = list(nodes)
    # A typo is reported before the first path is measured, which may take an hour.
    for path in chosen:
        tree.lineage(path)
    paths = ("", *(path for path in chosen if path))
    losses = []
    prefers = are_preferences(rows)
    # Dropout would make a loss depend on chance.
    was_training = model.training
    model.eval()
    try:
        measures = []
        for path, domain_rows in domains.items():
            reference = reference_of(path) if prefers else None
            measures.append(_Measure(model, domain_rows, batch, reference, beta, mode))
        for path in paths:
            with model.using(path, mode=mode):
                losses.append(tuple(measure.mean() for measure in measures))
            tick()
    finally:
        model.train(was_training)
    tokens = tuple(_learnt(domain_rows) for domain_rows in domains.values())
    unit = "nats per preference" if prefers else "nats per token"
    return LossMatrix(paths, tuple(domains), tuple(losses), tokens, unit)


@torch.no_grad()
def evaluate_at(
    model: TreeModel, rows: Sequence[Row], blend: Blend, *, batch: int = 8, beta: float = 0.1
) -> float:
    """Return the mean loss of one path's rows under a path or blend, in nats per learnt token.

    Of preferences it is the mean over them, against the parent of their path.

    Raises:
        PathError: a node is not in the tree.
        SpecError: some are preferences and some are not.
    """
    was_training = model.training
    model.eval()
    try:
        reference = reference_of(rows[0].path) if are_preferences(rows) else None
        measure = _Measure(model, rows, batch, reference, beta, "merged")
        with model.using(blend):
            return measure.mean()
    finally:
        model.train(was_training)


class _Measure:
    """The mean loss of one path's rows, under the path that is active when `mean` is called.

    Args:
        model: in evaluation mode.
        rows: of one path.
        batch: rows at once.
        reference: the preferences' reference path, measured once, when this object is made; None:
            the rows are no preferences.
        beta: of preferences.
        mode: how the reference is made active.
    """

    def __init__(
        self,
        model: TreeModel,
        rows: Sequence[Row],
        batch: int,
        reference: str | None,
        beta: float,
        mode: Literal["merged", "unmerged"],
    ) -> None:
        self._model, self._rows, self._batch, self._beta = model, rows, batch, beta
        self._references: list[Tensor] | None = None
        if reference is not None:
            with model.using(reference, mode=mode):
                self._references = self._answers()

    def mean(self) -> float:
        """Return the mean in nats: per learnt token, or per preference."""
        if self._references is None:
            return _mean(self._model, self._rows, self._batch)
        losses: list[float] = []
        for policy, reference in zip(self._answers(), self._references, strict=True):
            losses += dpo_losses(policy, reference, self._beta).tolist()
        return math.fsum(losses) / len(losses)

    def _answers(self) -> list[Tensor]:
        """Return the log-probabilities of the answers, batch by batch in a fixed order."""
        ordered = _by_length(self._rows)
        found = []
        for i in range(0, len(ordered), self._batch):
            some = answers_of(ordered[i : i + self._batch])
            found.append(log_probabilities(self._model, some))
        return found


def _by_path(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by their path, in depth-first order of the paths."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: depth_first(row.path)):
        found.setdefault(row.path, []).append(row)
    return found


def _learnt(rows: Sequence[Row]) -> int:
    return sum(row.learnt for row in rows)


def _by_length(rows: Sequence[Row]) -> list[Row]:
    """Return rows by length, so that similar ones share a batch and little of it is padding."""
    return sorted(rows, key=lambda row: len(row.ids))


def _mean(model: TreeModel, rows: Sequence[Row], batch: int) -> float:
    """Return the mean loss of some rows under the active path, in nats per learnt token."""
    ordered = _by_length(rows)
    sums = []
    for i in range(0, len(ordered), batch):
        inputs, labels = inputs_of(model, ordered[i : i + batch])
        logits = model(**inputs).logits[:, : labels.shape[1]]
        sums.append(float(row_losses(logits, labels, shift=False)[0].sum()))
    # fsum rounds once, so the result does not depend on how rows fell into batches.
    return math.fsum(sums) / _learnt(rows)


def inputs_of(model: TreeModel, rows: Sequence[Row]) -> tuple[dict[str, Any], Tensor]:
    """Return the base's inputs, and the labels to which its first logits belong.

    Raises:
        SpecError: the base has an encoder, and a row has nothing for it to read.
    """
    device = next(model.base.parameters()).device
    if getattr(getattr(model.base, "config", None), "is_encoder_decoder", False):
        inputs: dict[str, Any] = _split_for_encoder(rows, device)
        # The base shifts these labels itself: its decoder begins with a start token.
        return inputs, inputs["labels"]
    inputs = padded(rows, device=device)
    # The logits at a token are for the next one, and those at the last for none.
    return inputs, inputs.pop("labels")[:, 1:]


def _split_for_encoder(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    """Split rows for an encoder, which reads the prompt, and a decoder, which writes the rest.

    Raises:
        SpecError: a row has nothing to read; names its file and line.
    """
    read, written = [], []
    for row in rows:
        start = next(at for at, label in enumerate(row.labels) if label != IGNORED)
        if start == 0:
            raise SpecError(
                f"{row.where}: the base has an encoder, and this row has nothing for it to read",
                'give it a prompt: {"prompt": …, "completion": …}',
            )
        read.append(replace(row, ids=row.ids[:start], labels=row.ids[:start]))
        written.append(replace(row, ids=row.ids[start:], labels=row.labels[start:]))
    inputs = padded(read, device=device)
    return {**inputs, "labels": padded(written, device=device)["labels"]}
