"""The tree as an SVG picture: guides, names, and beside each name its rank, size and state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.filesize import decimal

from ..errors import printable
from ..folder import Problem
from ..svg import Picture
from .drawing import DrawnNode
from .node_lines import NodeLine, remark_text

__all__ = ["tree_picture"]

LINE_HEIGHT, INDENT, MARGIN = 20, 22, 12
CHARACTER_WIDTH = 7.3  # of 12 px monospace, rounded up: a viewer chooses the font
GAP = 14
INK, QUIET, STALE, BROKEN, GUIDE = "#1f2328", "#6a737d", "#9a6700", "#cf222e", "#b8c0c8"
PAPER = "#fff"
MOST_CHARACTERS = 100
"""Characters of a remark; a tooltip shows the whole of it."""


def tree_picture(
    title: str,
    drawn: Sequence[DrawnNode],
    lines: Mapping[str, NodeLine],
    broken: Mapping[str, Problem],
    total: str,
) -> str:
    """Return an SVG document.

    Args:
        title: its first line.
        drawn: the lines of the drawing, in order.
        lines: path → the facts about it.
        broken: path → why it can't be used.
        total: its last line.
    """
    names = [node.name + (f" (+{node.hidden:,})" if node.hidden else "") for node in drawn]
    notes = [_note(lines[node.path], broken.get(node.path)) for node in drawn]
    ends = [_x(node) + CHARACTER_WIDTH * len(name) for node, name in zip(drawn, names, strict=True)]
    # Notes are in one column, behind the longest name, so that they are easy to scan.
    column = max(ends, default=0) + GAP
    longest = max((len(note) for note, _, _ in notes), default=0)
    texts = max(len(title), len(total)) * CHARACTER_WIDTH
    width = max(column + CHARACTER_WIDTH * longest, MARGIN + texts) + MARGIN
    height = LINE_HEIGHT * (len(drawn) + 2) + 2 * MARGIN
    picture = Picture(font_size=12)
    picture.box(0, 0, width, height, fill=PAPER)  # on a dark page the ink would be invisible
    picture.text(MARGIN, _y(0), title, bold=True, fill=INK)
    for i, node in enumerate(drawn, 1):
        _guides(picture, node, i, drawn)
        note, ink, tip = notes[i - 1]
        picture.text(_x(node), _y(i), names[i - 1], fill=BROKEN if ink == BROKEN else INK)
        # The tooltip has the whole reason; the words beside the name may be cut.
        picture.text(column, _y(i), note, fill=ink, tip=tip)
    picture.text(MARGIN, _y(len(drawn) + 1), total, fill=QUIET)
    return picture.document(width, height)


def _x(node: DrawnNode) -> float:
    return MARGIN + INDENT * len(node.is_last)


def _y(row: int) -> float:
    """Return the baseline of a row."""
    return MARGIN + LINE_HEIGHT * row + 14


def _guides(picture: Picture, node: DrawnNode, row: int, drawn: Sequence[DrawnNode]) -> None:
    """Draw the elbow that leads to a name, up to its parent or to the sibling before it."""
    middle = _y(row) - 4
    x = _x(node) - INDENT + 6
    level = len(node.is_last)
    above = row - 1
    # The rows in between are descendants of earlier siblings, which lie deeper.
    while above > 0 and len(drawn[above - 1].is_last) > level:
        above -= 1
    top = _y(above) - 4 if above and len(drawn[above - 1].is_last) == level else _y(above) + 4
    picture.line((x, top), (x, middle), (_x(node) - 4, middle), stroke=GUIDE)


def _note(line: NodeLine, problem: Problem | None) -> tuple[str, str, str]:
    """Return the words beside a name, their colour, and their tooltip."""
    remark = printable(remark_text(line, problem))
    ink = QUIET
    if problem is not None:
        ink = BROKEN
    elif line.stale:
        ink = STALE
    parts = []
    if line.weight != 1.0:
        parts.append(f"× {line.weight_words}")
    if line.ranks:
        parts.append(f"r {'/'.join(map(str, line.ranks))}")
        parts.append(decimal(line.bytes))
    if remark:
        is_short = len(remark) <= MOST_CHARACTERS
        parts.append(remark if is_short else f"{remark[: MOST_CHARACTERS - 1]}…")
    tip = problem.text if problem is not None else line.stale or ""
    return " · ".join(parts), ink, tip.replace("\n", " ")
