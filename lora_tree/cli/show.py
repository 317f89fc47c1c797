"""``lora-tree show``: the tree, with what each node is, holds and weighs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ..errors import printable
from ..folder import load
from ..tree import AdapterTree
from .arguments import AsJson, Folder
from .console import out, print_json

__all__ = ["show"]


@dataclass(frozen=True)
class Row:
    """One node. ``ranks`` are the distinct ones of its modules, sorted."""

    path: str
    kind: Literal["adapter", "fresh", "group"]
    weight: float
    modules: int
    ranks: list[int]
    parameters: int
    bytes: int
    stale: str | None


def show(
    folder: Folder,
    as_json: AsJson = False,
) -> None:
    """Show the tree: ranks, parameters, bytes, weights, and what is stale."""
    tree = load(folder)
    rows = [_row(tree, path) for path in tree.paths()]
    if as_json:
        print_json({"folder": str(folder), "base": tree.base, "nodes": [asdict(row) for row in rows]})
    else:
        out().print(_table(tree, rows, str(folder)))


def _row(tree: AdapterTree, path: str) -> Row:
    node, adapter = tree[path], tree.outline(path)
    if adapter is None:
        return Row(path, "fresh" if node.fresh is not None else "group", node.weight, 0, [], 0, 0, node.stale)
    ranks = sorted(set(adapter.ranks.values()))
    return Row(path, "adapter", node.weight, len(adapter), ranks, adapter.numel, adapter.nbytes, node.stale)


def _table(tree: AdapterTree, rows: list[Row], title: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column(Text(printable(title), "bold"), no_wrap=True)
    for heading in ("weight", "r", "modules", "parameters", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    guides = dict(_guides(tree))
    for row in rows:
        ranks = "/".join(map(str, row.ranks))
        sizes = (ranks, str(row.modules), f"{row.parameters:,}", decimal(row.bytes)) if row.ranks else ("", "", "", "")
        table.add_row(guides[row.path], f"{row.weight:g}", *sizes, _remark(row))
    total = printable(f"{len(rows)} nodes over {tree.base or 'an unnamed base'}")
    table.add_row(
        Text(total, "dim"), "", "", "", f"{sum(r.parameters for r in rows):,}", decimal(sum(r.bytes for r in rows))
    )
    return table


def _remark(row: Row) -> Text:
    if row.stale:
        return Text(printable(f"stale: {row.stale}"), "yellow")
    return Text({"adapter": "", "fresh": "fresh: made when attached", "group": "group"}[row.kind], "dim")


def _guides(tree: AdapterTree, path: str = "", indent: str = "") -> Iterator[tuple[str, str]]:
    """(path, its name behind the lines that lead to it), depth-first."""
    children = tree.children(path)
    for child in children:
        last = child == children[-1]
        yield child, f"{indent}{'└── ' if last else '├── '}{tree[child].name}"
        yield from _guides(tree, child, indent + ("    " if last else "│   "))
