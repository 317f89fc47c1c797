"""``lora-tree diff``: two paths of a tree, two trees, or one path in two trees, compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ...algebra import Diff, TreeDiff, diff, diff_paths, diff_trees
from ...errors import SpecError, listing, plural, printable
from ...folder import load, load_versions
from ..arguments import AsJson, Folder, On, file_name
from ..console import out, print_json

__all__ = ["difference"]


def difference(
    folder: Folder,
    a: Annotated[
        str | None,
        typer.Argument(help="A path or a blend; fr@2 is an earlier version.", metavar="[A]"),
    ] = None,
    b: Annotated[
        str | None, typer.Argument(help="The path or blend to compare it with.", metavar="[B]")
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option(
            "--with", help="A second tree: compare node by node, or A in both.", parser=file_name
        ),
    ] = None,
    on: On = None,
    most: Annotated[int, typer.Option(min=1, help="Modules to list, most moved first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Compare two paths, two trees, or a path in two trees: which modules moved, and how far."""
    if other is None:
        if a is None or b is None:
            raise SpecError("name two paths, or a second tree: lora-tree diff zoo/ fr de")
        found: Diff | TreeDiff = _two_paths(folder, a, b, on or ())
        _tell_any(found, most, as_json=as_json)
        return
    if a is None:
        tree, _ = load_versions(folder, *(on or ()))
        found = diff_trees(tree, load(other))
    else:
        tree, (path, *_) = load_versions(folder, a, *(on or ()))
        # The path may have been renamed between the two trees; then B is its name in the other one.
        other_adapter = load(other).flatten(path if b is None else b)
        names = f"{folder}: {a}", f"{other}: {path if b is None else b}"
        found = diff(tree.flatten(path), other_adapter, names=names)
    _tell_any(found, most, as_json=as_json)


def _two_paths(folder: Path, a: str, b: str, on: Sequence[str]) -> Diff:
    """Compare two paths of one tree, each of which may be an earlier version."""
    if "@" not in a + b and not on:
        return diff_paths(load(folder), a, b)
    # A tree is opened for each, because both may be versions of one node.
    values = []
    for name in (a, b):
        tree, (path, *_) = load_versions(folder, name, *on)
        values.append(tree.flatten(path))
    return diff(*values, names=(a, b))


def _tell_any(found: Diff | TreeDiff, most: int, *, as_json: bool) -> None:
    if as_json:
        print_json(found.as_dict())
    elif isinstance(found, Diff):
        _tell(found, most)
    else:
        _tell_trees(found)


def _tell(found: Diff, most: int) -> None:
    if found.is_nothing:
        text = f"{found.a} and {found.b} are the same"
        if found.add_nothing:
            text = f"{found.a} and {found.b} add nothing: what differs between them never trained"
        out().print(text, soft_wrap=True)
        return
    out().print(f"{found.a} → {found.b}: {_figures(found)}", soft_wrap=True)
    for name in found.overrides:
        out().print(f"{name}: replaced otherwise", soft_wrap=True)
    for name in found.carried:
        out().print(f"they carry different values of {name}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("module", no_wrap=True)
    for heading in ("‖a‖", "‖b‖", "moved", "share", "cosine", "rank", "out°", "in°"):
        table.add_column(heading, justify="right", no_wrap=True)
    moved = sorted(found.modules, key=lambda name: -found.modules[name].moved)
    for name in moved[:most]:
        module = found.modules[name]
        table.add_row(
            printable(name),
            f"{module.norm_a:.3g}",
            f"{module.norm_b:.3g}",
            f"{module.moved:.3g}",
            f"{module.share:.1%}",
            _cosine(module.cosine),
            f"{module.rank_a:.1f} → {module.rank_b:.1f}",
            _mean(module.angles_out),
            _mean(module.angles_in),
        )
    out().print(table)
    if len(moved) > most:
        more = plural(len(moved) - most, "more module")
        out().print(f"and {more}: --most", soft_wrap=True)


def _tell_trees(found: TreeDiff) -> None:
    lines = []
    if found.is_nothing:
        lines.append("the two trees are the same")
    if found.base is not None:
        lines.append(f"base: {found.base[0]} → {found.base[1]}")
    if found.only_a:
        lines.append(f"only in the first: {listing(found.only_a)}")
    if found.only_b:
        lines.append(f"only in the second: {listing(found.only_b)}")
    for path, (before, after) in found.weights.items():
        lines.append(f"{path}: weight {before:g} → {after:g}")
    for path, node in found.nodes.items():
        if not node.is_nothing:
            lines.append(f"{path}: {_figures(node)}")
    for line in lines:
        out().print(line, soft_wrap=True)


def _figures(found: Diff) -> str:
    norms = f"‖a‖ {found.norm_a:.4g}, ‖b‖ {found.norm_b:.4g}"
    return f"moved {found.moved:.4g} ({norms}), cosine {_cosine(found.cosine)}"


def _cosine(cosine: float | None) -> str:
    return "–" if cosine is None else f"{cosine:.3f}"


def _mean(angles: tuple[float, ...]) -> str:
    """Return the mean of principal angles, in degrees."""
    return f"{sum(angles) / len(angles):.0f}" if angles else "–"
