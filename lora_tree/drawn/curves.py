"""The losses of runs as curves: in training on the left, on held-out rows on the right.

Each node has one colour on both sides. A box marks the step after which its held-out loss was
lowest. A long run is drawn by means over its steps, at most `MOST_POINTS` for each line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..folder import RunRecord
from ..svg import Picture

__all__ = ["curves_picture"]

WIDTH, HEIGHT = 420, 240
LEFT, TOP, GAP, LINE_HEIGHT = 56, 44, 70, 18
MOST_POINTS = 200
CHARACTER_WIDTH = 7.3  # of 12 px monospace, rounded up: a viewer chooses the font
INK, QUIET, GRID, PAPER = "#1f2328", "#6a737d", "#e4e8ec", "#fff"
COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e",
    "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
)  # fmt: skip

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class _Curve:
    """A node of a run: its losses in training and on held-out rows, (step, loss) each."""

    name: str
    colour: str
    trained: Points
    held_out: Points
    best_step: int | None


def curves_picture(records: Sequence[RunRecord]) -> str:
    """Return an SVG document of one run, or of several to compare.

    Raises:
        FolderError, FormatError: the metrics of a run can't be read.
    """
    curves: list[_Curve] = []
    for record in records:
        trained: dict[str, Points] = {node: [] for node in record.nodes}
        for line in record.metrics():
            trained.setdefault(line.node, []).append((line.step, line.loss))
        held_out = record.node_evaluations()
        for node in trained:
            name = node if len(records) == 1 else f"{record.number}: {node}"
            outcome = record.outcomes.get(node)
            best = None if outcome is None else outcome.best_step
            colour = COLOURS[len(curves) % len(COLOURS)]
            own = [(float(step), loss) for step, loss in held_out.get(node, [])]
            curves.append(_Curve(name, colour, _thinned(trained[node]), _finite(own), best))
    is_watched = any(curve.held_out for curve in curves)
    steps = max((record.done for record in records), default=0)
    picture = Picture(font_size=12)
    width = LEFT + (WIDTH + GAP if is_watched else 0) + WIDTH + LEFT / 2
    height = TOP + HEIGHT + 40 + LINE_HEIGHT * len(curves) + 8
    picture.box(0, 0, width, height, fill=PAPER)  # on a dark page the ink would be invisible
    unit = records[0].unit if records else ""
    _panel(picture, LEFT, f"loss in training, {unit}", [c.trained for c in curves], curves, steps)
    if is_watched:
        x = LEFT + WIDTH + GAP
        _panel(picture, x, "on held-out rows", [c.held_out for c in curves], curves, steps)
        _best_steps(picture, x, curves, steps)
    for row, curve in enumerate(curves):
        y = TOP + HEIGHT + 44 + LINE_HEIGHT * row
        picture.box(LEFT, y - 9, 10, 10, fill=curve.colour)
        picture.text(LEFT + 18, y, curve.name, fill=INK)
    return picture.document(width, height)


def _panel(
    picture: Picture,
    left: float,
    title: str,
    lines: Sequence[Points],
    curves: Sequence[_Curve],
    steps: int,
) -> None:
    """Draw one side: its title, its grid with numbers, and a line for each node."""
    low, high = _range(lines)
    picture.text(left, TOP - 20, title, fill=INK, bold=True)
    for tick in _ticks(low, high):
        y = _y(tick, low, high)
        picture.line((left, y), (left + WIDTH, y), stroke=GRID)
        picture.text(left - 6, y + 4, f"{tick:.4g}", anchor="end", fill=QUIET)
    for step in _ticks(0, steps):
        x = _x(step, left, steps)
        picture.text(x, TOP + HEIGHT + 18, f"{step:g}", anchor="middle", fill=QUIET)
    for points, curve in zip(lines, curves, strict=True):
        drawn = [(_x(x, left, steps), _y(y, low, high)) for x, y in points]
        if len(drawn) == 1:
            picture.box(drawn[0][0] - 1, drawn[0][1] - 1, 3, 3, fill=curve.colour)
        elif drawn:
            picture.line(*drawn, stroke=curve.colour)


def _best_steps(picture: Picture, left: float, curves: Sequence[_Curve], steps: int) -> None:
    low, high = _range([curve.held_out for curve in curves])
    for curve in curves:
        for step, loss in curve.held_out:
            if step == curve.best_step:
                x, y = _x(step, left, steps), _y(loss, low, high)
                picture.box(x - 3, y - 3, 6, 6, fill=curve.colour)


# ---------------------------------------------------------------------- numbers
def _x(step: float, left: float, steps: int) -> float:
    return left + WIDTH * step / max(steps, 1)


def _y(loss: float, low: float, high: float) -> float:
    return TOP + HEIGHT * (high - loss) / (high - low)


def _range(lines: Iterable[Points]) -> tuple[float, float]:
    """Return the lowest and the highest loss, with a margin; they are never equal."""
    losses = [loss for points in lines for _, loss in points]
    low, high = min(losses, default=0.0), max(losses, default=1.0)
    air = 0.05 * (high - low) or max(abs(high), 1.0) * 0.05
    return low - air, high + air


def _ticks(low: float, high: float) -> list[float]:
    """Return about four round numbers between two.

    >>> _ticks(0, 200), _ticks(2.31, 3.02)
    ([0.0, 50.0, 100.0, 150.0, 200.0], [2.4, 2.6, 2.8, 3.0])
    """
    if not high > low:
        return [float(low)]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    first = math.ceil(low / apart - 1e-9)
    last = math.floor(high / apart + 1e-9)
    return [round(number * apart, 10) for number in range(first, last + 1)]


def _thinned(points: Points) -> Points:
    """Return the means of groups of successive points, at most `MOST_POINTS`."""
    points = _finite(points)
    size = math.ceil(len(points) / MOST_POINTS) or 1
    thinned = []
    for first in range(0, len(points), size):
        group = points[first : first + size]
        x = math.fsum(step for step, _ in group) / len(group)
        thinned.append((x, math.fsum(loss for _, loss in group) / len(group)))
    return thinned


def _finite(points: Points) -> Points:
    return [(step, loss) for step, loss in points if math.isfinite(loss)]
