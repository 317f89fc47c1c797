"""``lora-tree show``: the tree, with what each node is, holds and weighs, and what in its folder can't be used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ..errors import LoraTreeError, printable
from ..folder import Problem, load, notes, survey
from ..folder.problem import HARMLESS
from ..tree import AdapterTree
from .arguments import AsJson, Folder
from .console import out, print_json

__all__ = ["show"]

NEVER_WRAPPED = 100_000


@dataclass(frozen=True)
class NodeLine:
    """One node. ``ranks`` are the distinct ones of its modules, sorted."""

    path: str
    kind: Literal["adapter", "fresh", "group", "broken"]
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
    """Show the tree: ranks, parameters, bytes, weights, what is stale, and what can't be used; then exit with 1."""
    tree, problems, error = _opened(folder)
    rows, broken = _rows(tree, problems)
    remarks = notes(folder)
    if as_json:
        told = [{"node": p.node, "kind": p.kind, "text": p.text} for p in broken.values()]
        nodes = [asdict(row) for row in rows]
        print_json(
            {
                "folder": str(folder),
                "base": tree.base,
                "nodes": nodes,
                "problems": told,
                "notes": remarks,
            }
        )
    else:
        console = out()
        if not sys.stdout.isatty():
            console.width = NEVER_WRAPPED  # a reason is one line, for grep
        console.print(_table(tree, rows, broken, str(folder)))
        for note in remarks:
            out().print(f"note: {note}", markup=False, soft_wrap=True)
    if error is not None:
        raise error
    if broken:
        raise typer.Exit(1)


def _opened(folder: Path) -> tuple[AdapterTree, list[Problem], LoraTreeError | None]:
    """The tree as far as it can be told, and the error with which `load` refuses the rest of it."""
    try:
        return load(folder), [], None
    except LoraTreeError as refused:
        tree, problems = survey(folder)
        return tree, problems, refused


def _rows(tree: AdapterTree, problems: list[Problem]) -> tuple[list[NodeLine], dict[str, Problem]]:
    """A row for each node, and for each place that can't be one; and the reasons for the latter."""
    broken: dict[str, Problem] = {}
    for problem in problems:
        if problem.kind not in HARMLESS:
            broken.setdefault(problem.node, problem)
    rows: list[NodeLine] = []
    for path in tree.paths():
        if path in broken:
            continue
        try:
            rows.append(_row(tree, path))
        except LoraTreeError as error:
            broken[path] = Problem(path, "adapter", str(error))
    for path in broken:
        weight = tree[path].weight if path in tree else 1.0
        rows.append(NodeLine(path, "broken", weight, 0, [], 0, 0, None))
    rows.sort(key=lambda row: row.path.split("/"))
    return rows, broken


def _row(tree: AdapterTree, path: str) -> NodeLine:
    node, adapter = tree[path], tree.outline(path)
    if adapter is None:
        return NodeLine(
            path,
            "fresh" if node.fresh is not None else "group",
            node.weight,
            0,
            [],
            0,
            0,
            node.stale,
        )
    ranks = sorted(set(adapter.ranks.values()))
    return NodeLine(
        path, "adapter", node.weight, len(adapter), ranks, adapter.numel, adapter.nbytes, node.stale
    )


def _table(
    tree: AdapterTree, rows: list[NodeLine], broken: dict[str, Problem], title: str
) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column(Text(printable(title), "bold"), no_wrap=True)
    for heading in ("weight", "r", "modules", "parameters", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    guides = dict(_guides([row.path for row in rows]))
    for row in rows:
        ranks = "/".join(map(str, row.ranks))
        sizes = (
            (ranks, str(row.modules), f"{row.parameters:,}", decimal(row.bytes))
            if row.ranks
            else ("", "", "", "")
        )
        name = Text(printable(guides[row.path]), "red" if row.path in broken else "")
        table.add_row(name, f"{row.weight:g}", *sizes, _remark(row, broken.get(row.path)))
    total = printable(f"{len(rows)} nodes over {tree.base or 'an unnamed base'}")
    table.add_row(
        Text(total, "dim"),
        "",
        "",
        "",
        f"{sum(r.parameters for r in rows):,}",
        decimal(sum(r.bytes for r in rows)),
    )
    return table


def _remark(row: NodeLine, problem: Problem | None) -> Text:
    if problem is not None:
        return Text(printable(f"{problem.kind}: {problem.text}", keep="\n"), "red")
    if row.stale:
        return Text(printable(f"stale: {row.stale}"), "yellow")
    words = {"adapter": "", "fresh": "fresh: made when attached", "group": "group", "broken": ""}
    return Text(words[row.kind], "dim")


def _guides(paths: list[str]) -> Iterator[tuple[str, str]]:
    """(path, its name behind the lines that lead to it), depth-first.

    A path whose parent has no row of its own hangs below the nearest one that has, with the rest of its name.
    """
    known = set(paths)
    children: dict[str, list[str]] = {}
    for path in paths:
        above = path.rpartition("/")[0]
        while above and above not in known:
            above = above.rpartition("/")[0]
        children.setdefault(above, []).append(path)
    yield from _drawn(children, "", "")


def _drawn(children: dict[str, list[str]], above: str, indent: str) -> Iterator[tuple[str, str]]:
    below = children.get(above, [])
    for child in below:
        last = child == below[-1]
        name = child.removeprefix(f"{above}/")
        yield child, f"{indent}{'└── ' if last else '├── '}{name}"
        yield from _drawn(children, child, indent + ("    " if last else "│   "))
