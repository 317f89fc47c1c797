"""``lora-tree add``: add one node, or all nodes of another tree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ...algebra import Edited, graft
from ...errors import FormatError, LoraTreeError, plural
from ...folder import load
from ...folder.hub_name import is_on_hub
from ...formats.peft import WEIGHTS, adapter_name_of
from ...formats.recognise import recognise
from ...tree import AdapterTree
from ...weights import Weight
from ..arguments import AsJson, Folder, WeightText, file_name, parse_weight_option
from ..editing import DryRun, Work

__all__ = ["add_node"]


def add_node(
    folder: Folder,
    path: Annotated[str, typer.Argument(help="The new node; its parent has to exist.")],
    adapter: Annotated[
        Path | None,
        typer.Argument(help="An adapter, or a tree to hang below PATH.", parser=file_name),
    ] = None,
    weight: WeightText = None,
    group: Annotated[bool, typer.Option("--group", help="A node without an adapter.")] = False,
    r: Annotated[int | None, typer.Option("--r", help="Rank of a fresh adapter.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Its lora_alpha.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="A module that it targets, q_proj; repeat it.")
    ] = None,
    copy: Annotated[
        bool,
        typer.Option("--copy", help="Copy the files; without it tree.yaml says where they lie."),
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Add a node: an adapter of any known format, a group, a fresh one, or another tree."""
    parsed_weight = parse_weight_option(weight)
    node_weight = 1.0 if parsed_weight is None else parsed_weight
    work = Work(load(folder), folder, dry_run=dry_run)
    given = {"r": r, "lora_alpha": lora_alpha, "target_modules": target or None}
    lora = {word: value for word, value in given.items() if value is not None}
    if adapter is None or lora or group:
        # Options of a fresh node are passed on even beside an adapter: the tree refuses that
        # mixture, while leaving them out here would ignore them silently.
        work.tree.add(path, adapter=adapter, weight=node_weight, group=group, **lora)
        edited = Edited(added=(path,))
    else:
        edited = _from_files(work.tree, path, adapter, node_weight)
    work.finish(edited, as_json=as_json, copy_files=copy)


def _from_files(tree: AdapterTree, path: str, adapter: Path, weight: Weight) -> Edited:
    try:
        # Try it as an adapter first. A node's folder with children also opens as a tree, but that
        # tree has only the children, and the node itself would be lost.
        tree.add(path, adapter=adapter, weight=weight)
    except FormatError as no_adapter:
        try:
            other = load(adapter)
        except LoraTreeError:
            raise no_adapter from None  # this error says more than the one about a tree
        edited = graft(tree, path, other)
        note = f"{adapter}: a tree of {plural(len(other), 'node')}"
        return replace(edited, notes=(*edited.notes, note))
    if is_on_hub(str(adapter)):
        return Edited(added=(path,), notes=(f"{adapter}: from the model hub",))
    found = recognise(adapter)
    note = f"{adapter}: {found.kind}: {found.sign}"
    name = adapter_name_of(found.file or adapter / WEIGHTS)
    if name is not None:
        note += f"; its keys carry the adapter's name, {name!r:.80}, which is left out"
    return Edited(added=(path,), notes=(note,))
