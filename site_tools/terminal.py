"""A shell session as an animated SVG: the lines of real commands appear one after the other.

    Shown("lora-tree show zoo/", output)  ×  n   ──▶   one document: dark, no script, no font

The animation is CSS. A viewer that does not run it, or whose settings ask for reduced motion, shows
the whole session at once.
"""

from __future__ import annotations

import fcntl
import html
import os
import pty
import re
import shlex
import struct
import subprocess
import termios
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS, ROWS = 92, 40
CHARACTER_WIDTH, LINE_HEIGHT, MARGIN = 7.8, 18, 16  # of 13 px monospace
PAPER, INK, DIM, PROMPT = "#0d1117", "#e6edf3", "#8b949e", "#7ee787"
TYPED_S, THOUGHT_S, READ_S = 1.2, 0.5, 3.0
"""Seconds until a command is typed, until its output appears, and until the next one."""
WORDS = re.compile(r"\S+(?: \S+)*")
"""Pieces of text that are drawn where a terminal has them, whatever the width of the viewer's font.
More than one blank separates two columns, so each column is a piece.
"""


@dataclass(frozen=True)
class Shown:
    """One command, and its output with the colours that a terminal got."""

    command: str
    output: str


def run_in_terminal(command: str, place: Path, programs: Path) -> Shown:
    """Run a command as in a terminal of `COLUMNS`, and return it with its output.

    Args:
        command: its words; the program is looked up in ``programs``.
        place: the folder that it runs in. Its path is left out of the output.
        programs: a folder of programs.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    name, *words = shlex.split(command)
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [programs / name, *words], cwd=place, stdin=its, stdout=its, stderr=its, env=environment
    )
    os.close(its)
    sent = b""
    # Reading a terminal whose last program has ended is an error on Linux, and not an empty read.
    try:
        while more := os.read(ours, 65536):
            sent += more
    except OSError:
        pass
    os.close(ours)
    process.wait()
    return Shown(command, sent.decode().replace("\r\n", "\n").replace(f"{place}/", ""))


def session(shown: Sequence[Shown]) -> str:
    """Return the SVG document of a session."""
    console = Console(width=COLUMNS, color_system="truecolor", force_terminal=True)
    lines: list[str] = []
    at_s = 0.0
    for each in shown:
        prompt = [Segment("$ ", Style(color=PROMPT)), Segment(each.command, Style(bold=True))]
        lines.append(_line(prompt, len(lines), at_s))
        at_s += TYPED_S + THOUGHT_S
        for printed in each.output.rstrip().split("\n"):
            text = Text.from_ansi(printed)
            # A terminal breaks a long line wherever its edge is.
            for part in text.divide(range(COLUMNS, len(text), COLUMNS)):
                lines.append(_line(part.render(console), len(lines), at_s))
        lines.append("")
        at_s += READ_S
    width = COLUMNS * CHARACTER_WIDTH + 2 * MARGIN
    height = len(lines) * LINE_HEIGHT + 2 * MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="monospace" font-size="13" '
        f'fill="{INK}">\n'
        "<style>@keyframes wait{from{visibility:hidden}}"
        ".line{animation:wait .01s backwards}"
        "@media(prefers-reduced-motion:reduce){.line{animation:none}}</style>\n"
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="{PAPER}"/>\n'
    )
    return head + "".join(line for line in lines if line) + "</svg>\n"


def _line(segments: Sequence[Segment] | Iterator[Segment], row: int, at_s: float) -> str:
    """Return a line as SVG; it is hidden until ``at_s`` seconds have passed."""
    y = MARGIN + LINE_HEIGHT * row + 13
    parts = []
    column = 0
    for segment in segments:
        text = segment.text.rstrip("\n")
        for word in WORDS.finditer(text):
            x = MARGIN + CHARACTER_WIDTH * (column + word.start())
            parts.append(
                f'<tspan x="{x:g}" textLength="{CHARACTER_WIDTH * len(word[0]):g}"'
                f"{_attributes(segment.style)}>{html.escape(word[0])}</tspan>"
            )
        column += len(text)
    if not parts:
        return "\n"
    delay = f' style="animation-delay:{at_s:.1f}s"'
    return f'<text class="line" y="{y:g}"{delay}>{"".join(parts)}</text>\n'


def _attributes(style: Style | None) -> str:
    """Return a style of a terminal as attributes of SVG."""
    if style is None:
        return ""
    found = ""
    if style.color is not None and not style.color.is_default:
        found += f' fill="{style.color.get_truecolor(MONOKAI).hex}"'
    elif style.dim:
        found += f' fill="{DIM}"'
    if style.bold:
        found += ' font-weight="bold"'
    if style.italic:
        found += ' font-style="italic"'
    return found
