"""A bar on a terminal; elsewhere a line now and then, for logs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from .console import err, is_quiet

__all__ = ["Bar", "bars_are_wanted", "steps_done"]


LINES = 20
"""Lines, approximately, that a whole run prints where stderr is no terminal."""


class Bar(Progress):
    """A bar on stderr, or nothing where that is no terminal."""

    def __init__(self, *columns: ProgressColumn) -> None:
        console = err()
        hidden = is_quiet() or not console.is_terminal
        # A disabled bar accepts every update and shows nothing, so callers need not ask. A bar that
        # is done is erased (transient), because only the result is worth a line that stays.
        super().__init__(*columns, console=console, disable=hidden, transient=True)

    def stop(self) -> None:
        """End the bar, if it was shown: rich before 14 ends a hidden bar with an empty line."""
        if not self.disable:
            super().stop()


def bars_are_wanted() -> bool:
    """Tell whether another library may draw its bars: on a terminal, unless the user wants none."""
    return not is_quiet() and sys.stderr.isatty()


@contextmanager
def steps_done(what: str, total: int, done: int) -> Iterator[Callable[[str], None]]:
    """Yield a function to call after every step, with the text to show beside the bar.

    Where stderr is no terminal, the first step, the last one and some in between print a line
    each, if they have text.
    """
    if is_quiet():
        yield lambda text: None
        return
    # A bar moves the cursor, which a file or a pipe would keep as bytes.
    if not sys.stderr.isatty():
        yield _in_lines(what, total, done)
        return
    # A TextColumn parses markup even on a console that does not, unless markup=False. The
    # description holds numbers and paths, which must not turn into styles.
    text_column = TextColumn("{task.description}", markup=False)
    columns = (
        TextColumn(what, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        text_column,
    )
    with Bar(*columns) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda text: bar.update(task, advance=1, description=text)


def _in_lines(what: str, total: int, done: int) -> Callable[[str], None]:
    # A job's log should have few lines, and the first one soon, which shows that the job runs.
    began, every = done, max(total // LINES, 1)

    def tell(text: str) -> None:
        nonlocal done
        done += 1
        if text and (done in (began + 1, total) or done % every == 0):
            err().print(f"{what} {done}/{total} {text}", soft_wrap=True)

    return tell
