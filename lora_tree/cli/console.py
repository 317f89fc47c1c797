"""The two consoles: results on stdout, everything else on stderr.

Off a terminal nothing is wrapped or cut, and no line of a table ends in blanks. A character that a
stream's encoding can't hold is escaped: a command that has done its work must not fail while it
reports that. A control character, which a terminal would obey, is escaped, too: names of bases,
folders, tensors and config keys come from untrusted files. All output of a command goes through
this module.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..errors import LoraTreeError, printable

__all__ = [
    "err",
    "escape_unencodable",
    "is_quiet",
    "keep_quiet",
    "note",
    "out",
    "print_error",
    "print_json",
    "print_problem",
    "print_text",
    "stdout_is_json",
    "warnings_in_one_line",
]

# rich takes 80 columns where it can't ask a terminal, and would cut tables in files and pipes.
OFF_TERMINAL_WIDTH = 200
LINES = "\n\t"
TRACEBACK = "LORA_TREE_TRACEBACK"


def escape_unencodable() -> None:
    """Make stdout and stderr escape, from now on, characters that their encoding can't hold."""
    for stream in (sys.stdout, sys.stderr):
        # Where a program or a test has redirected the stream, it may be a StringIO. That one
        # encodes nothing, and has no `reconfigure`.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Console(Console):
    """A console on which no text is a command: not to the terminal, and not to rich."""

    def __init__(self, *, stderr: bool) -> None:
        stream = sys.stderr if stderr else sys.stdout
        super().__init__(
            stderr=stderr,
            highlight=False,  # numbers and paths in colours of rich's own choice
            markup=False,  # a name in [brackets] is a name
            emoji=False,  # and :name: is one, too
            width=None if stream.isatty() else OFF_TERMINAL_WIDTH,
        )

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; off a terminal, strip the blanks that pad the last column of a table.

        One long cell, such as the reason of a broken node, pads every line to its own length.
        """
        if self.is_terminal or not any(isinstance(each, Table) for each in objects):
            super().print(*objects, **options)
            return
        with self.capture() as captured:
            super().print(*objects, **options)
        lines = captured.get().removesuffix("\n").split("\n")
        super().print("\n".join(line.rstrip() for line in lines), soft_wrap=True)

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape before rich measures the text, and before it drops some control characters."""
        return super().render_str(printable(text, keep=LINES), **options)

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Escape every segment that is about to be written, those of tables and bars included."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text, keep=LINES), segment.style)


def out() -> Console:
    """Return the console for results.

    A new one each time, because sys.stdout may be another stream by now.
    """
    return _Console(stderr=False)


def err() -> Console:
    """Return the console for errors, warnings and progress."""
    return _Console(stderr=True)


def print_text(text: str) -> None:
    """Print text that a model wrote: unchanged for a program, escaped for a terminal."""
    # The text goes past the console, which escapes and wraps for a pipe as well: a program must get
    # the model's own characters, even those that a terminal would obey.
    sys.stdout.write((printable(text, keep=LINES) if sys.stdout.isatty() else text) + "\n")


_quiet = False


def is_quiet() -> bool:
    """Tell whether progress and notes are left out."""
    return _quiet


@contextmanager
def keep_quiet() -> Iterator[None]:
    """Leave out progress and notes; warnings, errors and results are printed."""
    global _quiet
    # The state before is put back, since `main` can be called many times in one process: a later
    # command that was not asked to be quiet must speak again.
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


def note(text: str) -> None:
    """Print a line about the work under way, on stderr, unless the user wants none."""
    if not _quiet:
        err().print(text, soft_wrap=True)


_document: TextIO | None = None
"""The stream for the JSON document while all other output is kept off stdout."""


@contextmanager
def stdout_is_json() -> Iterator[None]:
    """Keep stdout for `print_json`: what anything else writes there goes to stderr.

    A library that a command calls may print, and so may a base's own code where the user lets it
    run. A program that reads the command's answer must get the document and nothing before it.
    """
    global _document
    before, _document = _document, sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _document = before


def print_json(value: Any) -> None:
    """Print one JSON document on stdout; a number that is not finite is null.

    JSON has no NaN and no infinity, and strict readers refuse Python's spelling of them.
    """
    stdout = _document or sys.stdout  # the real one, while sys.stdout leads to stderr
    value = _finite(value)
    # `_finite` has left no NaN. If one got past it, allow_nan=False raises an error, and no
    # document comes out that a strict reader would refuse.
    text = _escaped(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
    try:
        # The encoding is tried here and not left to the stream: `escape_unencodable` makes the
        # stream write \xe9 for é, which is no escape in JSON, so the document could not be read
        # back.
        text.encode(stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # JSON has its own escapes
        text = json.dumps(value, indent=2, allow_nan=False)
    stdout.write(text + "\n")


def _escaped(document: str) -> str:
    """Return the same JSON with escapes in place of unprintable characters.

    JSON allows some of them: DEL, C1 controls, characters that change the direction of text.
    """
    if document.replace("\n", "").isprintable():
        return document
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in document)


def _finite(value: Any) -> Any:
    """Return the same with None for the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_error(error: Exception) -> None:
    """Print ``error: …`` for any exception; its traceback first if the environment asks for it."""
    # An OSError counts as well: it names the file and the system's reason, which a user can mend.
    ours = isinstance(error, (LoraTreeError, OSError))
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        for lines in traceback.format_exception(error):
            sys.stderr.write(printable(lines, keep=LINES))
    # Any other exception is a bug in this package, which its user can't mend but can report.
    hint = f"this should not happen; {TRACEBACK}=1 in the environment shows where it did"
    print_problem(
        "error", str(error) if ours else f"{type(error).__name__}: {error}\n  {hint}", "bold red"
    )


def print_problem(kind: str, message: str, style: str) -> None:
    """Print ``error: …`` or ``warning: …`` on stderr."""
    err().print(Text.assemble((f"{kind}: ", style), printable(message, keep=LINES)), soft_wrap=True)


def warnings_in_one_line() -> None:
    """Show Python's warnings as ``warning: …``, each once, without the line that raised them."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        # A command that opens a tree twice gets the same warning twice.
        if str(message) not in shown:
            shown.add(str(message))
            print_problem("warning", str(message), "bold yellow")

    # Only the display is replaced. Which warnings are shown is still up to Python's filters, so
    # that PYTHONWARNINGS works as for any other program.
    warnings.showwarning = show
