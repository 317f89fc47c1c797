"""The tree as a table on a console.

    zoo          weight     r    bytes
    ├── fr            1     2   1.0 kB
    │   └── legal   0.5     3   1.5 kB    stale: parent fr changed (weights)
    └── it            1                   adapter: …                            (in red)
    3 nodes over org/model: …

A line of the table is never wrapped: on a narrow terminal it has fewer columns, and a reason is cut
at the edge. The caller prints the reasons of broken nodes in full below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ..drawn.drawing import DrawnNode
from ..drawn.node_lines import NodeLine, remark_text
from ..errors import printable
from ..folder import Problem

__all__ = ["print_table"]

GAP = 3
SHORTEST_REMARK, MOST_FOR_REMARK = 12, 44
DROPPED_FIRST = ("modules", "parameters", "r", "weight")
"""Columns in the order in which they give way to the names and the remarks."""


def print_table(
    console: Console,
    title: str,
    drawn: Sequence[DrawnNode],
    lines: Mapping[str, NodeLine],
    broken: Mapping[str, Problem],
    *,
    dimmed: frozenset[str] = frozenset(),
) -> None:
    """Print the table.

    Args:
        console: its width decides how many columns there are.
        title: the heading of the names.
        drawn: the lines of the drawing, in order.
        lines: path → the facts about it.
        broken: path → why it can't be used.
        dimmed: paths that are drawn only because others lie below them.
    """
    names = [_name(node, node.path in broken, node.path in dimmed) for node in drawn]
    remarks = [_remark(lines[node.path], broken.get(node.path)) for node in drawn]
    columns = {
        "weight": [lines[node.path].weight_words for node in drawn],
        "r": ["/".join(map(str, lines[node.path].ranks)) for node in drawn],
        "modules": [_if_any(lines[node.path], "modules") for node in drawn],
        "parameters": [_if_any(lines[node.path], "parameters") for node in drawn],
        "bytes": [_if_any(lines[node.path], "bytes") for node in drawn],
    }
    head = Text(printable(title), "bold")
    widths = {heading: _widest([heading, *cells]) + GAP for heading, cells in columns.items()}
    name_width = max([head.cell_len, *(name.cell_len for name in names)]) + GAP
    longest_remark = max((text.cell_len for text in remarks), default=0)
    # A longer remark claims no more room than this: it would push out every column of numbers, and
    # is cut at the edge all the same.
    longest_remark = min(longest_remark, MOST_FOR_REMARK)
    for heading in DROPPED_FIRST:
        if name_width + sum(widths.values()) + longest_remark <= console.width:
            break
        del widths[heading], columns[heading]
    # Without a bound, rich would shrink all columns, the names first.
    remark_width = console.width - name_width - sum(widths.values())
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    table.add_column(head, no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(
        "", no_wrap=True, overflow="ellipsis", max_width=max(remark_width, SHORTEST_REMARK)
    )
    for name, *cells, text in zip(names, *columns.values(), remarks, strict=True):
        table.add_row(name, *cells, text)
    console.print(table)


def _name(node: DrawnNode, is_broken: bool, is_dimmed: bool) -> Text:
    style = ""
    if is_broken:
        style = "red"
    elif is_dimmed:
        style = "dim"
    name = Text(printable(node.guide + node.name), style)
    if node.hidden:
        name.append(f" (+{node.hidden:,})", "dim")
    return name


def _if_any(line: NodeLine, what: Literal["modules", "parameters", "bytes"]) -> str:
    """Return a number of an adapter as a cell; an empty one for a node without any."""
    if not line.ranks and not line.overrides:
        return ""
    number = getattr(line, what)
    return decimal(number) if what == "bytes" else f"{number:,}"


def _widest(cells: Sequence[str]) -> int:
    return max(len(cell) for cell in cells)


def _remark(line: NodeLine, problem: Problem | None) -> Text:
    """Return the last cell of a line, in the colour of its kind."""
    style = "dim"
    if problem is not None:
        style = "red"
    elif line.stale:
        style = "yellow"
    return Text(printable(remark_text(line, problem)), style)
