"""The figures as tables: a row a budget, a column a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Point", "least_bytes", "markdown"]

LOSS = 0.01


@dataclass(frozen=True)
class Point:
    """The figures of a method at a budget.

    Args:
        method: its name.
        budget: a part of the flat adapters' bytes.
        kept: the part that it took; None if the method does not fit.
        error: of the increments, relative.
        bits: held out, per byte.
        cpu_s: seconds of CPU time.
    """

    method: str
    budget: float
    kept: float | None = None
    error: float | None = None
    bits: float | None = None
    cpu_s: float | None = None


def least_bytes(points: Sequence[Point], method: str) -> float | None:
    """Return the smallest part of the bytes at which a method loses at most 1 % of held-out bits.

    Between two budgets the loss is interpolated linearly. None means that it loses more at all.
    """
    flat = next(point.bits for point in points if point.method == "flat")
    assert flat is not None
    most = flat * (1 + LOSS)
    own = [(p.kept, p.bits) for p in points if p.method == method]
    known = sorted((kept, bits) for kept, bits in own if kept is not None and bits is not None)
    before: tuple[float, float] | None = None
    for kept, bits in known:
        if bits <= most:
            if before is None:
                return kept
            left, above = before
            return left + (kept - left) * (above - most) / (above - bits)
        before = kept, bits
    return None


def markdown(points: Sequence[Point]) -> str:
    """Return three tables: error, bits and CPU seconds of every method at every budget."""
    methods = list(dict.fromkeys(p.method for p in points if p.method not in ("base", "flat")))
    budgets = sorted({p.budget for p in points if p.method in methods})
    by = {(p.method, p.budget): p for p in points}
    lines: list[str] = []
    for title, form in FIGURES.items():
        lines += [f"{title}:", "", "| of the flat bytes | " + " | ".join(methods) + " |"]
        lines.append("|---:|" + "---:|" * len(methods))
        for budget in budgets:
            row = [by.get((method, budget)) for method in methods]
            cells = [f"{budget:.0%}", *_best_in_bold(row, form)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    for name in ("base", "flat"):
        bits = by[(name, 0.0 if name == "base" else 1.0)].bits
        lines.append(f"{name}: {bits:.4f} bits per byte.  ")
    told = []
    for method in methods:
        least = least_bytes(points, method)
        told.append(f"{method} {'more than all tried' if least is None else f'{least:.0%}'}")
    lines.append(f"Bytes at 1 % more bits than flat: {', '.join(told)}.")
    return "\n".join(lines) + "\n"


Figure = Callable[[Point], tuple[float | None, str]]


def _error(point: Point) -> tuple[float | None, str]:
    return point.error, "" if point.error is None else f"{point.error:.3f}"


def _bits(point: Point) -> tuple[float | None, str]:
    return point.bits, "" if point.bits is None else f"{point.bits:.4f}"


def _seconds(point: Point) -> tuple[float | None, str]:
    return point.cpu_s, "" if point.cpu_s is None else f"{point.cpu_s:.2f}"


FIGURES: Mapping[str, Figure] = {
    "Relative error of the increments": _error,
    "Held-out bits per byte": _bits,
    "CPU seconds": _seconds,
}


def _best_in_bold(row: Sequence[Point | None], form: Figure) -> list[str]:
    values = [form(point)[0] for point in row if point is not None]
    best = min((value for value in values if value is not None), default=None)
    cells = []
    for point in row:
        value, text = (None, "") if point is None else form(point)
        if value is None:
            cells.append("–")
        elif value == best:
            cells.append(f"**{text}**")
        else:
            cells.append(text)
    return cells
