"""Processes that begin with torch, transformers and lora_tree imported.

A new Python takes five seconds of CPU to import them, most of what a test of two processes costs.
So one server imports them once for all tests of a process, and each `Forked` is a fork of it. It
has memory, files, locks, signals and an end of its own, as any process has, and inherits nothing
from the tests, because the server was started before and imports alone.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing import get_context
from multiprocessing.connection import Connection

__all__ = ["Forked"]

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "lora_tree.cli.commands.train",
        "lora_tree.export.checkpoint",
        "lora_tree.integrations.flat_cache",
        "transformers.models.llama.modeling_llama",
        "transformers.tokenization_utils_tokenizers",
    ]
)


class Forked:
    """Code that runs in a process of its own; its output is read from ``stdout``.

    Args:
        code: a program.
        argv: its arguments, in ``sys.argv[1:]``.
        errors_too: what it writes to stderr is read from ``stdout`` as well.
    """

    def __init__(self, code: str, *argv: object, errors_too: bool = False) -> None:
        receiver, sender = SERVER.Pipe(duplex=False)
        words = [str(word) for word in argv]
        self.process = SERVER.Process(
            target=_run, args=(code, words, sender, errors_too), daemon=True
        )
        self.process.start()
        # Only the new process holds the other end, so that reading ends when it does.
        sender.close()
        self.stdout = os.fdopen(os.dup(receiver.fileno()), encoding="utf-8")
        receiver.close()

    def end(self, timeout_s: float = 120) -> tuple[int, str]:
        """Wait until it has ended; return its exit code, below 0 for a signal, and its output.

        After ``timeout_s`` seconds it is killed.
        """
        # Its output ends with it, so only a timer can end the wait for a process that hangs.
        timer = threading.Timer(timeout_s, self.process.kill)
        timer.start()
        with self.stdout:
            said = self.stdout.read()
        self.process.join()
        timer.cancel()
        code = self.process.exitcode
        assert code is not None  # it has ended
        self.process.close()
        return code, said

    def send(self, signum: int) -> None:
        """Send it a signal."""
        pid = self.process.pid
        assert pid is not None  # it was started
        os.kill(pid, signum)

    def kill(self) -> tuple[int, str]:
        """Kill it outright, and wait; return as `end`."""
        self.process.kill()
        return self.end()


def _run(code: str, argv: list[str], sender: Connection, errors_too: bool) -> None:
    # The streams of Python are made anew, because those of the server know where its output stands
    # in a file, and this is a pipe.
    os.dup2(sender.fileno(), 1)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if errors_too:
        os.dup2(sender.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    sender.close()
    sys.argv[1:] = argv
    exec(compile(code, "<code of a test>", "exec"), {"__name__": "__main__"})
