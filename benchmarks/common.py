"""Timing and printing: interleaved repeats, medians with quartiles, a table or JSON.

One round runs every case once, in order, so that a slow moment of the machine falls on all of them;
the first round warms up and is dropped. A case's preparation is not timed.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import quantiles

from rich.console import Console
from rich.table import Table

__all__ = ["Case", "Form", "Ratio", "Result", "Stage", "Timing", "cycle", "interleaved", "tell"]

HEADINGS = ("", "median", "quartiles", "aim")


class Form(StrEnum):
    """A form in which results are printed."""

    table = "table"
    markdown = "markdown"
    json = "json"


@dataclass(frozen=True)
class Case:
    """A function to time, and one that is called before it, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of every counted round."""

    rounds_ms: tuple[float, ...]

    @property
    def quartiles_ms(self) -> tuple[float, float, float]:
        first, middle, third = quantiles(self.rounds_ms, n=4, method="inclusive")
        return first, middle, third

    @property
    def ms(self) -> float:
        """The median."""
        return self.quartiles_ms[1]

    def over(self, other: Timing) -> Timing:
        """Return the time that this adds over ``other``, round by round."""
        return Timing(tuple(x - y for x, y in zip(self.rounds_ms, other.rounds_ms, strict=True)))

    def plus(self, other: Timing) -> Timing:
        """Return the time of both, one after the other, round by round."""
        return Timing(tuple(x + y for x, y in zip(self.rounds_ms, other.rounds_ms, strict=True)))


@dataclass(frozen=True)
class Ratio:
    """A figure with an aim: at least, or at most, a bound."""

    what: str
    value: float
    bound: float
    at_least: bool = False
    unit: str = "×"

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass
class Result:
    """One table: its title says the setting."""

    title: str
    timings: dict[str, Timing] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)

    def aim(
        self,
        what: str,
        value: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        unit: str = "×",
    ) -> None:
        """Add a figure with an aim."""
        bound = at_least if at_least is not None else at_most
        assert bound is not None
        self.ratios.append(Ratio(what, value, bound, at_least is not None, unit))


def interleaved(cases: Mapping[str, Case], repeats: int) -> dict[str, Timing]:
    """Time ``repeats`` rounds over all cases; return name → timing."""
    rounds: dict[str, list[float]] = {name: [] for name in cases}
    for count in range(repeats + 1):
        for name, case in cases.items():
            case.prepare()
            start = time.perf_counter()
            case.run()
            took = 1e3 * (time.perf_counter() - start)
            if count:
                rounds[name].append(took)
    return {name: Timing(tuple(took)) for name, took in rounds.items()}


class Stage:
    """A slot for one context: entering another leaves the one before."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()

    def leave(self) -> None:
        self._open.close()

    def enter(self, context: contextlib.AbstractContextManager[object]) -> None:
        self.leave()
        self._open.enter_context(context)


def cycle(*values: str) -> Callable[[], str]:
    """Return a function that returns the values in turn, endlessly."""

    def forever() -> Iterator[str]:
        while True:
            yield from values

    return forever().__next__


def tell(results: list[Result], form: Form = Form.table) -> None:
    """Print everything on stdout."""
    if form is Form.json:
        sys.stdout.write(json.dumps([_plain(result) for result in results], indent=2) + "\n")
    elif form is Form.markdown:
        sys.stdout.writelines(_markdown(result) for result in results)
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
        for result in results:
            console.print(_table(result))


def _plain(result: Result) -> dict[str, object]:
    timings = {
        name: dict(
            zip(
                ("first_quartile_ms", "median_ms", "third_quartile_ms"), t.quartiles_ms, strict=True
            )
        )
        | {"rounds": len(t.rounds_ms)}
        for name, t in result.timings.items()
    }
    ratios = [asdict(ratio) | {"met": ratio.met} for ratio in result.ratios]
    return {"title": result.title, "timings": timings, "ratios": ratios, "facts": result.facts}


def _rows(result: Result) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return rows of timings and then of ratios: name, median, quartiles and aim."""
    timed: list[tuple[str, ...]] = []
    made: list[tuple[str, ...]] = []
    for name, timing in result.timings.items():
        first, middle, third = timing.quartiles_ms
        timed.append((name, f"{middle:,.3f} ms", f"{first:,.3f} – {third:,.3f}", ""))
    for name, value in result.facts.items():
        made.append((name, f"{value:.4g}", "", ""))
    for ratio in result.ratios:
        aim = f"{'≥' if ratio.at_least else '≤'} {ratio.bound:g}{'' if ratio.met else '  missed'}"
        made.append((ratio.what, f"{ratio.value:,.3g} {ratio.unit}", "", aim))
    return timed, made


def _table(result: Result) -> Table:
    table = Table(title=result.title, title_justify="left")
    for heading, side in zip(HEADINGS, ("left", "right", "right", "right"), strict=True):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for section in _rows(result):
        for row in section:
            table.add_row(*row)
        table.add_section()
    return table


def _markdown(result: Result) -> str:
    timed, made = _rows(result)
    bold = [tuple(f"**{cell}**" if cell else "" for cell in row) for row in made]
    lines = [HEADINGS, ("---", "---:", "---:", "---:"), *timed, *bold]
    return f"### {result.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
