"""``lora-tree show``: the tree, with each node's ranks, size and weight, and what can't be used.

Programs (``--json``) and pipes get the whole tree. On a terminal, as many levels are shown as fit
into `MOST_LINES`, and a line says how many nodes are hidden.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from ...drawn.drawing import DrawnNode, arrange_nodes
from ...drawn.node_lines import NodeLine, lines_below, lines_of, matching_lines
from ...drawn.tree_picture import tree_picture
from ...errors import LoraTreeError, plural
from ...folder import Problem, StaleWarning, disk, load, load_versions, notes, survey
from ...tree import AdapterTree
from ...weights import Weight, plain_weight
from ..arguments import AsJson, Folder, On, file_name
from ..console import out, print_json
from ..picture_place import check_picture_place
from ..tree_table import print_table

__all__ = ["show"]

MOST_LINES = 200
# rich wants a width in any case, so "never" is a number that no line reaches.
NEVER_WRAPPED = 100_000


class Sort(StrEnum):
    """The order of siblings; numbers from the largest down."""

    name = "name"
    bytes = "bytes"
    parameters = "parameters"
    rank = "rank"
    weight = "weight"


def show(
    folder: Folder,
    node: Annotated[
        str | None,
        typer.Argument(
            help="Show this node and what is below it; fr@2 is an earlier version.", metavar="NODE"
        ),
    ] = None,
    on: On = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Show this many levels, counted from the top or NODE.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--filter",
            help="Show only paths that match a pattern like 'fr/*', or that contain a word.",
            metavar="PATTERN",
        ),
    ] = None,
    sort: Annotated[Sort, typer.Option(help="Order siblings by name or from the largest.")] = (
        Sort.name
    ),
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Show at most this many lines, 0 for all; on a terminal "
            f"{MOST_LINES} without it, and the deepest levels are hidden first.",
        ),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(
            help="Write the tree as a picture into this file.", metavar="FILE", parser=file_name
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the tree: ranks, sizes, weights, stale nodes and, in red, nodes that can't be used."""
    check_picture_place(svg)
    # A broken node must not hide the others, so the error is raised after the table.
    versions = [name for name in (node, *(on or ())) if name is not None and "@" in name]
    tree, problems, error = _opened(folder, versions)
    if node is not None:
        node = node.partition("@")[0]
    all_lines, broken = lines_of(tree, problems)
    lines = all_lines if node is None else lines_below(all_lines, node)
    matched = lines if pattern is None else matching_lines(lines, pattern)
    remarks = notes(folder)
    known = {line.path: line for line in lines}
    paths = {line.path for line in matched}
    # Nodes above a match are drawn as well, or the drawing would not be a tree.
    context = _ancestors(paths) & known.keys() - paths

    def drawing(most: int | None) -> list[DrawnNode]:
        return arrange_nodes(
            paths | context,
            key=_order(sort, known),
            depth=depth,
            limit=most or None,
            # A broken node is the reason for exit code 1, so it is drawn however deep it lies.
            always=[path for path in broken if path in paths],
        )

    total = _total(tree, matched, all_lines, broken)
    if svg is not None:
        # Written before the table is printed, so that an error is the only output, and before the
        # terminal's limit is set, which does not apply to a picture.
        picture = tree_picture(str(folder), drawing(limit), known, broken, total)
        disk.replace(svg, picture.encode())
    if as_json:
        _print_json(folder, versions, tree, matched, broken, remarks)
    else:
        is_terminal = sys.stdout.isatty()
        if limit is None and depth is None and is_terminal:
            limit = MOST_LINES
        drawn = drawing(limit)
        console = out()
        if not is_terminal:
            console.width = NEVER_WRAPPED  # a reason is one line, for grep
        title = (folder.name or str(folder)) if is_terminal else str(folder)
        if versions:
            title += f" with {', '.join(versions)}"
        print_table(console, title, drawn, known, broken, dimmed=frozenset(context))
        out().print(total, style="dim", soft_wrap=True)
        hidden = len(paths | context) - len(drawn)
        if hidden:
            out().print(
                f"{plural(hidden, 'line is', 'lines are')} hidden: name a node, "
                "or use --depth, --filter or --limit 0",
                style="dim",
                soft_wrap=True,
            )
        if any(line.stale for line in matched):
            out().print(
                "train stale nodes again, or accept them as they are: "
                f"lora-tree lock --accept-stale {shlex.quote(str(folder))}",
                style="dim",
                soft_wrap=True,
            )
        if is_terminal:
            _print_reasons(drawn, broken, str(error))
        for line in drawn:
            weight = known[line.path].weight
            if not isinstance(weight, float):
                out().print(f"weight of {line.path}: {weight:g}", soft_wrap=True)
        for note in remarks:
            out().print(f"note: {note}", soft_wrap=True)
    if error is not None:
        raise error
    if broken:
        raise typer.Exit(1)


def _opened(
    folder: Path, versions: Sequence[str]
) -> tuple[AdapterTree, list[Problem], LoraTreeError | None]:
    """Return the tree as far as it can be opened, and the error with which `load` refuses it.

    Raises:
        PathError: there is no such version.
        LoraTreeError: a tree with earlier versions in place can't be opened.
    """
    if versions:
        return load_versions(folder, *versions)[0], [], None
    try:
        # `survey` alone would give the nodes. `load` goes first for its error: the other commands
        # fail with it, so show ends with the same one.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StaleWarning)  # the table says it beside the node
            return load(folder), [], None
    except LoraTreeError as refused:
        tree, problems = survey(folder)
        return tree, problems, refused


def _print_json(
    folder: Path,
    versions: Sequence[str],
    tree: AdapterTree,
    lines: Sequence[NodeLine],
    broken: Mapping[str, Problem],
    remarks: Sequence[str],
) -> None:
    entries = []
    for problem in broken.values():
        entries.append({"node": problem.node, "kind": problem.kind, "text": problem.text})
    print_json(
        {
            "folder": str(folder),
            "versions": versions,
            "base": tree.base,
            "nodes": [line.as_dict() for line in lines],
            "problems": entries,
            "notes": remarks,
        }
    )


def _print_reasons(drawn: Sequence[DrawnNode], broken: Mapping[str, Problem], error: str) -> None:
    """Print in full why nodes can't be used: a line of the table has no room for it.

    The reasons in ``error`` are left out, since it is printed after this.
    """
    for node in drawn:
        problem = broken.get(node.path)
        if problem is not None and problem.text not in error:
            out().print(f"{problem.kind}: {problem.text}", style="red", soft_wrap=True)


def _ancestors(paths: set[str]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        above = path.rpartition("/")[0]
        while above and above not in found:
            found.add(above)
            above = above.rpartition("/")[0]
    return found


def _order(sort: Sort, lines: Mapping[str, NodeLine]) -> Callable[[str], Any] | None:
    if sort is Sort.name:
        return None
    # The largest first, so the order is that of the negative number.
    if sort is Sort.rank:
        return lambda path: -max(lines[path].ranks, default=0)
    if sort is Sort.weight:
        return lambda path: -_largest_number(lines[path].weight)
    return lambda path: -getattr(lines[path], sort.value)


def _largest_number(weight: Weight) -> float:
    """Return the largest number of a weight."""
    numbers = [weight] if isinstance(weight, float) else plain_weight(weight).values()
    return max(numbers)


def _total(
    tree: AdapterTree,
    lines: Sequence[NodeLine],
    whole: Sequence[NodeLine],
    broken: Mapping[str, Problem],
) -> str:
    nodes = plural(len(whole), "node")
    if len(lines) < len(whole):
        nodes = f"{len(lines):,} of {nodes}"
    parts = [f"{nodes} over {tree.base or 'an unnamed base'}"]
    stale = sum(line.stale is not None for line in lines)
    cannot = sum(line.path in broken for line in lines)
    if stale:
        parts.append(f"{stale:,} stale")
    if cannot:
        parts.append(f"{cannot:,} broken")
    parts.append(plural(sum(line.parameters for line in lines), "parameter"))
    parts.append(decimal(sum(line.bytes for line in lines)))
    return ", ".join(parts)
