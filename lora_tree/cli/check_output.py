"""``lora-tree check --merged``: how a merged checkpoint differs from the path that it should
hold.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

import typer

from ..errors import LoraTreeError, SpecError, plural
from ..export import MergedCheck, check_merged
from ..folder import load
from ..tree import AdapterTree
from .console import out, print_json
from .progress import Bar

__all__ = ["tell_comparison"]


def tell_comparison(
    folder: Path,
    path: str | None,
    merged: str,
    base: str | None,
    *,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Compare a merged checkpoint with a path, and print what differs; exit with 1 where it does.

    Args:
        folder: of the tree; if ``path`` is None, the path instead, and the tree is that of the
            working directory.
        path: the path or blend; None: it was given as the only argument.
        merged, base: as the user gave them.
    """
    if path is None:
        tree, path = _load_working_tree(folder, merged), str(folder)
    else:
        tree = load(folder)
    with Bar() as bar:
        task = bar.add_task("comparing", total=None)
        check = check_merged(
            tree,
            path,
            merged,
            base=base,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        print_json({"merged": merged, "is_that_path": check.is_that_path, **asdict(check)})
    else:
        _print(check, merged)
    if not check.is_that_path:
        raise typer.Exit(1)


def _load_working_tree(path: Path, merged: str) -> AdapterTree:
    """Return the working directory's tree, for a user who gave a path and no folder."""
    try:
        tree = load(".")
        tree.coefficients(str(path))
    except LoraTreeError as error:
        raise SpecError(
            "check --merged needs the path that the checkpoint should hold",
            shlex.join(["lora-tree", "check", str(path), "fr/legal", "--merged", str(merged)]),
        ) from error
    return tree


def _print(check: MergedCheck, merged: str) -> None:
    for tensor in check.tensors:
        if tensor.verdict == "other":
            text = f"other: {tensor.name}: {tensor.said} (error {tensor.error:.2g})"
            out().print(text, soft_wrap=True)
    out().print(f"{merged}: {check.guess}", soft_wrap=True)
    text = f"{plural(len(check.tensors), 'tensor')}: {check.count('equal')} bit-equal, "
    text += f"{check.count('rounding')} a rounding off, {check.count('other')} another sum"
    out().print(text, soft_wrap=True)
