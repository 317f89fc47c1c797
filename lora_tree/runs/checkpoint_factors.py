"""What a checkpoint holds of ours: the factors that train, what each of them stands on, and the nodes as adapters.

checkpoint-120/
  factors.safetensors          every parameter of every node that trains, bit for bit: a run resumes from this.
                               Its metadata tells what each node stands on, which has to be the same then
  nodes/fr/legal/…             the same nodes as PEFT adapters: tree.update("fr/legal", adapter=…) takes one
  optimizer.pt, …              the trainer's own files
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import distribute_tensor

from ..adapter import Adapter
from ..errors import FolderError, FormatError, listing
from ..folder import disk
from ..formats import strict_json
from ..formats.safetensors import read_tensors, render_tensors
from ..lowrank import is_sharded
from ..model import TreeModel
from ..node_names import check_path
from ..system.reading import is_file
from ..training.node_factors import path_of
from ..training.sharded import full
from ..tree import AdapterTree

__all__ = ["FACTORS", "NODES", "ancestors_now", "ancestors_then", "load_factors", "save_factors"]

FACTORS = "factors.safetensors"
NODES = "nodes"
# It stands in place of the hash of a node that is in the checkpoint itself.
TRAINED = "trained"


def save_factors(model: TreeModel, folder: Path, *, writes: bool = True) -> None:
    """Write what trains into a folder, as one file to resume from and as a PEFT adapter per node.

    Args:
        model: where its factors are sharded, every rank has to call this.
        folder: made where missing.
        writes: this process writes; one of all.

    Raises:
        FolderError: the folder can't be written.
        FormatError: PEFT has no way to write a node; names the node and the module.
    """
    with model.gathered() as tree:
        tensors = {name: full(t.detach()).cpu().contiguous() for name, t in _trained(model).items()}
        if not writes:
            return
        with disk.named("make the folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
        disk.write(
            folder / FACTORS,
            render_tensors(tensors, {"format": "pt", "stands_on": json.dumps(_stands_on(model))}),
        )
        for path in tree.paths():
            adapter = tree.adapter(path)
            if path in model.factors.training_paths and adapter is not None:
                adapter.save(folder / NODES / path)


def load_factors(model: TreeModel, folder: Path) -> None:
    """Put a checkpoint's numbers into the nodes that train: all of them, or on an error none.

    Raises:
        FolderError: it is no checkpoint of a tree.
        FormatError: its file is broken, or is not of the nodes that train now; names them.
    """
    file = folder / FACTORS
    if not is_file(file):
        raise FolderError(
            f"{folder}: no {FACTORS}, so no checkpoint of a tree",
            "name a checkpoint-N of a TreeTrainer",
        )
    saved, said = read_tensors(file, str(file))
    model.factors.refresh(model.tree, model)
    now = _trained(model)
    if saved.keys() != now.keys():
        there, here = ({path_of(name) for name in names} for names in (saved, now))
        what = f"of {listing(sorted(there))}, and {listing(sorted(here))} train now"
        what = (
            what
            if there != here
            else f"with other modules: {listing(sorted(saved.keys() ^ now.keys()))}"
        )
        raise FormatError(
            f"{file}: {what}", "resume with the nodes that trained then: model.trainable(…)"
        )
    for name, new in saved.items():
        own = now[name]
        if new.shape != own.shape or new.dtype != own.dtype:
            raise FormatError(
                f"{file}: {name}: {tuple(new.shape)} {new.dtype}, the node has {tuple(own.shape)} {own.dtype}",
                "resume with the rank and dtype of then",
            )
    then = _recorded(said, file)
    changed = [path for path, on in _stands_on(model).items() if then.get(path) != on]
    if changed:
        raise FormatError(
            f"{file}: {listing(changed)}: a frozen ancestor, or a weight, has changed since",
            "resume on the tree with which the run began; or take its nodes: tree.update(path, adapter='…/nodes/…')",
        )
    with torch.no_grad():
        for name, own in now.items():  # the same order on every rank, for they meet
            new = saved[name]
            own.copy_(
                distribute_tensor(new, own.device_mesh, own.placements) if is_sharded(own) else new
            )


def ancestors_then(folder: Path, path: str) -> dict[str, str]:
    """What the node ``path`` of a checkpoint was trained on: each ancestor's weight and hash, from the root down.

    Raises:
        FormatError: a file of the checkpoint is broken.
        PathError: it names what is no node.
    """
    file = folder / FACTORS
    _, said = read_tensors(file, str(file), outline=True)
    record = _recorded(said, file).get(path, {})
    if not (isinstance(record, dict) and all(isinstance(told, str) for told in record.values())):
        raise FormatError(
            f"{file}: stands_on: {path}: expected what each node was, got {str(record)[:80]}"
        )
    return {
        node: told.removesuffix(TRAINED)
        + _hash(Adapter.load(folder.joinpath(NODES, *check_path(node))))
        if told.endswith(TRAINED)
        else told
        for node, told in record.items()
        if node != path
    }


def ancestors_now(tree: AdapterTree, path: str) -> dict[str, str]:
    """The same of a place in a tree: every node above ``path`` that has an adapter, its weight and its hash."""
    above = tree.lineage(path.rpartition("/")[0])
    return {node: told for node in above if (told := _told(tree, node)) is not None}


def _trained(model: TreeModel) -> dict[str, Any]:
    """Name → parameter of every node that trains."""
    return {name: p for name, p in model.factors.named_parameters() if p.requires_grad}


def _recorded(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """What `_stands_on` told when the file was written."""
    return strict_json.loads(metadata.get("stands_on", "{}").encode(), f"{file}: stands_on")


def _told(tree: AdapterTree, node: str) -> str | None:
    """A node's weight and hash; None where it has no adapter, so that nothing depends on it."""
    adapter = tree.adapter(node)
    return None if adapter is None else f"{tree[node].weight!r} {_hash(adapter)}"


def _hash(adapter: Adapter) -> str:
    """A hash of an adapter's numbers, and of nothing else about it."""
    told = hashlib.sha256()
    for name, value in sorted(adapter.modules.items()):
        numbers = dict(zip(("A", "B", "bias"), value.tensors, strict=False))
        told.update(f"{name} {value.scale!r} {value.layout}".encode())
        told.update(render_tensors({part: t.detach().cpu() for part, t in numbers.items()}, {}))
    return told.hexdigest()


def _stands_on(model: TreeModel) -> dict[str, dict[str, str]]:
    """Node that trains → every node down to it: its weight, and its hash or that it trains as well."""
    tree, training = model.tree, model.factors.training_paths
    told = {
        node: f"{tree[node].weight!r} {TRAINED}" if node in training else _told(tree, node)
        for node in dict.fromkeys(node for path in training for node in tree.lineage(path))
    }
    return {
        path: {n: found for n in tree.lineage(path) if (found := told[n]) is not None}
        for path in training
    }
