"""A bar on a terminal; nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .console import err

__all__ = ["steps_done"]


@contextmanager
def steps_done(what: str, total: int, done: int) -> Iterator[Callable[[str], None]]:
    """A function to call after every step, with what to say beside the bar."""
    said = TextColumn("{task.description}", markup=False)
    columns = TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), said
    with Progress(*columns, console=err(), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda text: bar.update(task, advance=1, description=text)
