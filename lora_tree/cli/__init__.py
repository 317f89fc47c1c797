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
from typing import Any

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
        from .console import escape_unencodable, print_error, warnings_in_one_line

        # Before the commands are imported: an import may warn already.
        escape_unencodable()
        warnings_in_one_line()
    codes: list[int] = []
    try:
        with _interrupts_end_it() if own_process else nullcontext():
            from .application import application
            from .command_notes import noted_command

            # Imports torch for most commands, which takes seconds in which Ctrl-C must work.
            app = application(given)
        with noted_command(given), _signals_clean_up(codes) if own_process else nullcontext():
            app(given, prog_name="lora-tree")  # also where it runs as python -m lora_tree
    # typer ends a command by SystemExit, with the command's code. That is no Exception, so it
    # passes.
    except Exception as error:  # the last resort: a user of a shell does not read tracebacks
        # A signal's exception came out as this error; see `_signals_clean_up`.
        if codes:
            sys.exit(codes[0])
        print_error(error)
        sys.exit(1)


@contextmanager
def _signals_clean_up(codes: list[int]) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into exceptions while a command runs, so that it removes its
    half-made files.

    By default SIGTERM ends the process at once. A command that has something to finish first, such
    as a training run, installs its own handlers for that time.

    Args:
        codes: receives the exit code of each signal, so that the caller knows the cause. The
            exception is raised wherever the main thread is; inside a package's import it may come
            out as that package's own error, such as transformers' "Could not import module".
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may install handlers
        return

    def interrupt(number: int, frame: object) -> None:
        codes.append(128 + number)
        raise KeyboardInterrupt

    def end(number: int, frame: object) -> None:
        codes.append(128 + number)
        # A second one ends the process at once, if the clean-up should hang.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.exit(143)

    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: end}
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    # Any handler but Python's own is the caller's decision: a shell, for example, ignores Ctrl-C
    # for what it runs in the background.
    replaced = [number for number in handlers if signal.getsignal(number) is usual[number]]
    for number in replaced:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, usual[number])


@contextmanager
def _interrupts_end_it() -> Iterator[None]:
    """Let Ctrl-C end the process at once while modules are imported.

    Nothing has begun that would have to be undone. An exception would be worse: it is raised
    somewhere inside torch or numpy, which may swallow it or turn it into another error.
    """
    before = signal.getsignal(signal.SIGINT)
    if (
        before is not signal.default_int_handler
        or threading.current_thread() is not threading.main_thread()
    ):
        yield  # the caller has its own handler, or this thread may not install one
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
