"""Ctrl-C during a run: the step in progress is finished and saved first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["noted_interrupts"]


@contextmanager
def noted_interrupts() -> Iterator[Callable[[], int]]:
    """Note Ctrl-C and SIGTERM instead of raising them; a second one goes to its earlier handler.

    Yields a function that returns the exit code of the signal that was noted; 0 if none was.
    """
    noted: list[int] = []  # exit codes

    # Python runs a handler between any two instructions of the main thread. One that printed or
    # saved could do so in the middle of a step or of another print, so the signal is only noted.
    def note(number: int, frame: Any) -> None:
        # The second one is from a user who does not want to wait for the step to end.
        if noted:
            earlier = before[number]
            if callable(earlier):
                earlier(number, frame)
            raise KeyboardInterrupt
        noted.append(128 + number)

    before: dict[int, Any] = {}  # signal → its handler, to be put back
    for number in (signal.SIGINT, signal.SIGTERM):
        # A shell ignores Ctrl-C for what it runs in the background: it is not meant for this run.
        # None is a handler that was not set in Python, which can't be put back.
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, note)
    try:
        yield lambda: noted[0] if noted else 0
    finally:
        # The handlers are put back after an error, too. If `note` stayed in place, it would swallow
        # the next Ctrl-C of this process, which is then meant for something else.
        for each, handler in before.items():
            signal.signal(each, handler)
