"""Processes that begin with torch and lora_tree imported.

A new Python takes three seconds of CPU to import them, most of what a test of two processes costs.
So one server imports them once for all tests of a process, and each `Forked` is a fork of it. It
has memory, files, locks, signals and an end of its own, as any process has, and inherits nothing
from the tests, because the server was started before and imports alone.
"""

from __future__ import annotations

import os
import sys
from multiprocessing import get_context
from multiprocessing.connection import Connection

__all__ = ["Forked"]

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "lora_tree.folder", "lora_tree.tree", "lora_tree.integrations.flatcache"]
)


class Forked:
    """Code that runs in a process of its own; its output is read from ``stdout``.

    Args:
        code: a program.
        argv: its arguments, in ``sys.argv[1:]``.
    """

    def __init__(self, code: str, *argv: object) -> None:
        receiver, sender = SERVER.Pipe(duplex=False)
        words = [str(word) for word in argv]
        self.process = SERVER.Process(target=_run, args=(code, words, sender), daemon=True)
        self.process.start()
        # Only the new process holds the other end, so that reading ends when it does.
        sender.close()
        self.stdout = os.fdopen(os.dup(receiver.fileno()), encoding="utf-8")
        receiver.close()

    def end(self, timeout_s: float = 120) -> tuple[int, str]:
        """Wait until it has ended; return its exit code, below 0 for a signal, and its output."""
        with self.stdout:
            said = self.stdout.read()
        self.process.join(timeout_s)
        code = self.process.exitcode
        assert code is not None, "the process did not end"
        self.process.close()
        return code, said

    def kill(self) -> tuple[int, str]:
        """Kill it outright, and wait; return as `end`."""
        self.process.kill()
        return self.end()


def _run(code: str, argv: list[str], sender: Connection) -> None:
    os.dup2(sender.fileno(), 1)
    sender.close()
    sys.argv[1:] = argv
    exec(compile(code, "<code of a test>", "exec"), {"__name__": "__main__"})
