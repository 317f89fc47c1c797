"""``lora-tree``: the public Python surface from a shell. No command can do more than Python can.

0  done          1  an error, in one message on stderr; problems found by check
2  wrong usage   130  interrupted          143  terminated

LORA_TREE_TRACEBACK=1 in the environment shows where an error came from.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code.

    Args:
        arguments: of the command line; None: the process's own.
    """
    own_process = arguments is None
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        _run(given, own_process=own_process)
    # typer turns a Ctrl-C inside of a command into this code itself. This one catches a Ctrl-C
    # outside of the command, which would otherwise end in a traceback.
    except KeyboardInterrupt:
        sys.exit(130)


def _run(given: list[str], *, own_process: bool) -> None:
    with _interrupts_end_it() if own_process else nullcontext():
        from .console import any_encoding, print_error, warnings_in_one_line

        # Before the commands are imported: an import may warn already.
        any_encoding()
        warnings_in_one_line()
    try:
        with _interrupts_end_it() if own_process else nullcontext():
            from .commands import application
            from .typed import noted_command

            # Imports torch for most commands, which takes seconds in which Ctrl-C must work.
            app = application(given)
        with noted_command(given), _terminations_clean_up() if own_process else nullcontext():
            app(given, prog_name="lora-tree")  # also where it runs as python -m lora_tree
    # typer ends a command by SystemExit, with the command's code. That is no Exception, so it
    # passes.
    except Exception as error:  # the last resort: a user of a shell does not read tracebacks
        print_error(error)
        sys.exit(1)


@contextmanager
def _terminations_clean_up() -> Iterator[None]:
    """Let a polite kill end a command by an exception, so that it takes its half-made files along.

    Python would end the process at once. A command that has something to finish first, as a
    training has, puts in a handler of its own for as long.
    """
    if (
        signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        or threading.current_thread() is not threading.main_thread()
    ):
        yield  # the caller has decided about it, or this thread may not
        return

    def end(number: int, frame: object) -> None:
        # A second one ends the process at once, if the clean-up should hang.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.exit(143)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _interrupts_end_it() -> Iterator[None]:
    """Let Ctrl-C end the process at once while modules are imported.

    Nothing has begun that would have to be put back. An exception would fare worse: it is raised
    somewhere inside torch or numpy, which may swallow it, or turn it into an error of their own.
    """
    before = signal.getsignal(signal.SIGINT)
    if (
        before is not signal.default_int_handler
        or threading.current_thread() is not threading.main_thread()
    ):
        yield  # the caller has decided about interrupts, or this thread may not
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
