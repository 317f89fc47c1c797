"""The curves of a run, thinned out for a page: a few hundred points look like thousands."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from ..folder import RunRecord

__all__ = ["POINTS", "plain_run", "thinned"]

POINTS = 300
"""The most points of one curve."""


class _Measured(Protocol):
    @property
    def step(self) -> int: ...

    @property
    def loss(self) -> float: ...


def plain_run(record: RunRecord) -> dict[str, Any]:
    """Return a run as plain data, with a curve for each node and each held-out path.

    Raises:
        FolderError, FormatError: its metrics can't be read.
    """
    outcomes = {node: vars(outcome) for node, outcome in record.outcomes.items()}
    return {
        "number": record.number,
        "state": record.state,
        "by": record.by,
        "began": record.began,
        "ended": record.ended,
        "done": record.done,
        "steps": record.steps,
        "unit": record.unit,
        "nodes": list(record.nodes),
        "settings": {key: str(value) for key, value in record.settings.items()},
        "curves": _curves((metric.node, metric) for metric in record.metrics()),
        "evaluations": _curves((metric.path, metric) for metric in record.evaluations()),
        "outcomes": outcomes,
        "stale": list(record.stale),
    }


def _curves(named: Iterable[tuple[str, _Measured]]) -> dict[str, dict[str, list[Any]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for name, metric in named:
        points.setdefault(name, []).append((metric.step, metric.loss))
    curves: dict[str, dict[str, list[Any]]] = {}
    for name, own in points.items():
        kept = thinned(own, POINTS)
        losses = [float(f"{loss:.4g}") if math.isfinite(loss) else None for _, loss in kept]
        curves[name] = {"step": [step for step, _ in kept], "loss": losses}
    return curves


def thinned(points: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """Return at most ``most`` points, each a mean of neighbours; fewer points stay unchanged.

    >>> thinned([(1, 4.0), (2, 2.0), (3, 1.0), (4, 1.0)], 2)
    [(2, 3.0), (4, 1.0)]
    """
    if len(points) <= most:
        return list(points)
    found = []
    for i in range(most):
        part = points[len(points) * i // most : len(points) * (i + 1) // most]
        found.append((part[-1][0], sum(loss for _, loss in part) / len(part)))
    return found
