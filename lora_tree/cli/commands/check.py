"""``lora-tree check``: all problems of a folder, of its nodes together, and with a base.

With ``--merged`` it checks a merged checkpoint instead (`check_output`).

Only the base's modules are needed. The base is built without memory for its weights, so a model of
any size is checked at once.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from ...errors import SpecError, listing, plural
from ...fit import clashes, dropped, misfits
from ...folder import StaleWarning, check, load, moved_branches, notes
from ...folder.problem import HARMLESS
from ...tree import AdapterTree
from ..arguments import AsJson, TrustRemoteCode, file_name
from ..check_output import tell_comparison
from ..console import out, print_json
from ..open_base import skeleton_of

__all__ = ["list_problems"]


def list_problems(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A folder of adapters, or a tree.yaml.", metavar="FOLDER_OR_YAML", parser=file_name
        ),
    ],
    path: Annotated[
        str | None, typer.Argument(help="With --merged: a path or a blend.", metavar="PATH")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Compare with the modules of this model, a folder or a hub id.", metavar="MODEL"
        ),
    ] = None,
    merged: Annotated[
        str | None,
        typer.Option(
            help="Compare a merged checkpoint with PATH, and guess what happened.", metavar="DIR"
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """List every problem, of a folder or of a merged model; exit with 1 if there are any."""
    if merged is not None:
        tell_comparison(
            folder, path, merged, base, trust_remote_code=trust_remote_code, as_json=as_json
        )
        return
    if path is not None:
        raise SpecError(
            f"PATH ({path}) is only used with --merged",
            "lora-tree check FOLDER checks every node; lora-tree show FOLDER NODE shows one",
        )
    skeleton = None
    dtype = torch.float32
    if base is not None:
        skeleton = skeleton_of(base, what="check --base", trust_remote_code=trust_remote_code)
        # The dtype in which transformers loads the base: in fp16 a product may overflow that fits
        # in fp32.
        # A pipeline is several models, and has no config of its own.
        config = getattr(skeleton, "config", None)
        named = getattr(config, "dtype", None)
        dtype = named if isinstance(named, torch.dtype) else dtype
    found = check(folder, dtype=dtype)
    problems = [(problem.node, str(problem.kind), problem.text) for problem in found]
    without: list[str] = []
    # The nodes are compared with each other and with the base only if all of them can be opened:
    # a missing node would be reported again for each of its children.
    if all(kind in HARMLESS for _, kind, _ in problems):
        tree = _opened(folder)
        problems += [(path, "shape", text) for path, text in clashes(tree, skeleton)]
        without = dropped(tree)
        if skeleton is not None:
            problems += [(path, "base", text) for path, text in misfits(tree, skeleton)]
    # Notes are not problems: the tree opens in spite of them. So they don't count for the exit
    # code; otherwise checkpoints that a training run left in the folder would stop a script.
    remarks = [*notes(folder), *moved_branches(folder)]
    if without:
        remarks.append(f"increments under an override do not count: {listing(without)}")
    if as_json:
        entries = [{"node": node, "kind": kind, "text": text} for node, kind, text in problems]
        print_json({"folder": str(folder), "problems": entries, "notes": remarks})
    else:
        for _, kind, text in problems:
            out().print(f"{kind}: {text}", soft_wrap=True)
        for note in remarks:
            out().print(f"note: {note}", soft_wrap=True)
        out().print(_total(folder, len(problems)), soft_wrap=True)
    if problems:
        # The code comes after the whole list: a script that sees 1 has every problem, in JSON too.
        raise typer.Exit(1)


def _total(folder: Path, count: int) -> str:
    if not count:
        return f"{folder}: all is well"
    return plural(count, "problem")


def _opened(folder: Path) -> AdapterTree:
    """Open the tree without a warning of stale nodes: they are among the problems already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleWarning)
        return load(folder)
