"""``lora-tree check``: everything that is wrong with a folder or a tree.yaml, its nodes together, and a base for it.

A base is asked for its modules only: it is made without memory for weights, so a model of any size is checked at once.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..fit import clashes, misfits
from ..folder import StaleWarning, check, load, notes
from ..tree import AdapterTree
from .arguments import AsJson, TrustRemoteCode
from .console import out, print_json
from .open_base import skeleton_of

__all__ = ["list_problems"]


def list_problems(
    folder: Annotated[
        Path, typer.Argument(help="A folder of adapters, or a tree.yaml.", metavar="FOLDER_OR_YAML")
    ],
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id of a model whose modules must fit.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """List every problem; exit with 1 where there are any."""
    skeleton = None
    dtype = torch.float32
    if base is not None:
        skeleton = skeleton_of(base, what="check --base", trust_remote_code=trust_remote_code)
        named = getattr(
            getattr(skeleton, "config", None), "dtype", None
        )  # what transformers loads it in
        dtype = named if isinstance(named, torch.dtype) else dtype
    found = check(folder, dtype=dtype)
    problems = [(problem.node, str(problem.kind), problem.text) for problem in found]
    if all(kind in ("stale", "leftover", "numbers") for _, kind, _ in problems):
        tree = _opened(folder)
        problems += [(path, "shape", text) for path, text in clashes(tree, skeleton)]
        if skeleton is not None:
            problems += [(path, "base", text) for path, text in misfits(tree, skeleton)]
    remarks = notes(folder)
    if as_json:
        told = [{"node": n, "kind": k, "text": t} for n, k, t in problems]
        print_json({"folder": str(folder), "problems": told, "notes": remarks})
    else:
        for _, kind, text in problems:
            out().print(f"{kind}: {text}", markup=False, soft_wrap=True)
        for note in remarks:
            out().print(f"note: {note}", markup=False, soft_wrap=True)
        total = (
            f"{len(problems)} problem{'s' * (len(problems) != 1)}"
            if problems
            else f"{folder}: all is well"
        )
        out().print(total, markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)


def _opened(folder: Path) -> AdapterTree:
    """The tree; that a node is stale is one of the problems already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleWarning)
        return load(folder)
