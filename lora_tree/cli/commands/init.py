"""``lora-tree init``: begin a new tree, or write a tree.yaml for a folder of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import FolderError, SpecError, plural
from ...folder import load
from ...tree import AdapterTree
from ..arguments import AsJson, SkipBroken, advise_skip, file_name
from ..command_notes import command_note
from ..console import out, print_json
from ..editing import DryRun

__all__ = ["new_tree"]


def new_tree(
    folder: Annotated[
        Path,
        typer.Argument(
            help="The tree's folder, made if missing.", metavar="FOLDER", parser=file_name
        ),
    ],
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Begin with copies of the adapters in this folder or tree.",
            parser=file_name,
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Folder or hub id of the base.")] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank of fresh adapters.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Their lora_alpha.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="A module that they target, q_proj; repeat it.")
    ] = None,
    skip_broken: SkipBroken = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Begin a tree: empty, from the adapters in the folder, or with copies of others."""
    if (folder / "tree.yaml").exists():
        raise FolderError(
            f"{folder}: it has a tree.yaml already", "lora-tree add, mv, rm and set change a tree"
        )
    given = {"r": r, "lora_alpha": lora_alpha, "target_modules": target or None}
    words = {word: value for word, value in given.items() if value is not None}
    if source is not None:
        tree = load(source, skip_broken=skip_broken)
    else:
        # The folder may not exist yet, and `load` would refuse it. A glob finds nothing there and
        # raises nothing, so it is asked first.
        holds_adapters = any(folder.rglob("adapter_config.json"))
        # Nothing can be left out here: the folder is the tree, and its broken adapter lies in it.
        if skip_broken:
            raise SpecError(
                "--skip-broken is only for --from, which copies the nodes that are not broken",
                "copy the tree without them: lora-tree init NEW --from FOLDER --skip-broken",
            )
        tree = load(folder) if holds_adapters else AdapterTree()
    tree.base = base or tree.base
    # A copied tree keeps its own defaults, unless the user names others. Blank ones would change
    # the rank at which its fresh nodes are made.
    if words or source is None:
        tree.defaults = AdapterTree(defaults=words).defaults
    # The new tree gets copies of the source's files. If tree.yaml only pointed to them, a change of
    # the source would change this tree as well.
    with advise_skip(source or folder, skips=skip_broken or source is None):
        tree.save(folder, copy=source is not None, note=command_note(), dry_run=dry_run)
    if as_json:
        summary = {"base": tree.base, "nodes": tree.paths(), "dry_run": dry_run}
        print_json({"folder": str(folder), **summary})
        return
    over = tree.base or "an unnamed base"
    nodes = plural(len(tree), "node")
    out().print(f"{folder}: a tree of {nodes} over {over}", soft_wrap=True)
