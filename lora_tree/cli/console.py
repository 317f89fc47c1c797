"""The two consoles: results on stdout, everything else on stderr. Off a terminal nothing is wrapped or cut."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

from rich.console import Console
from rich.text import Text

__all__ = ["err", "out", "print_json", "print_problem", "warnings_in_one_line"]

OFF_TERMINAL_WIDTH = 200


def out() -> Console:
    """Where results go."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else OFF_TERMINAL_WIDTH)


def err() -> Console:
    """Where errors, warnings and progress go."""
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else OFF_TERMINAL_WIDTH)


def print_json(value: Any) -> None:
    """One JSON document on stdout, for programs: no colours, no wrapping."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_problem(kind: str, message: str, style: str) -> None:
    """``error: …`` or ``warning: …`` on stderr."""
    err().print(Text.assemble((f"{kind}: ", style), message), soft_wrap=True)


def warnings_in_one_line() -> None:
    """Show Python's warnings as ``warning: …``, without the source line that raised them."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print_problem("warning", str(message), "bold yellow")

    warnings.showwarning = show
