"""A checkpoint's factors, the ancestors that each node stands on, and the nodes as adapters.

checkpoint-120/
  factors.safetensors    every parameter of every node that trains, bit for bit: a run resumes from
                         this. Its metadata names the ancestors, which must be the same then
  nodes/fr/legal/…       the same nodes as PEFT adapters: tree.update("fr/legal", adapter=…)
  optimizer.pt, …        the trainer's own files
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
from ..errors import FolderError, FormatError, agreeing, listing
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

__all__ = [
    "FACTORS",
    "NODES",
    "current_ancestors",
    "load_factors",
    "recorded_ancestors",
    "save_factors",
]

FACTORS = "factors.safetensors"
NODES = "nodes"
# It takes the place of the hash of a node that is in the checkpoint itself.
TRAINED = "trained"


def save_factors(model: TreeModel, folder: Path, *, writes: bool = True) -> None:
    """Write the factors that train: one file to resume from, and a PEFT adapter for each node.

    Args:
        model: where its factors are sharded, every rank has to call this.
        folder: made where missing.
        writes: this process writes; one of all.

    Raises:
        FolderError: the folder can't be written.
        FormatError: PEFT has no way to write a node; names the node and the module.
    """
    with model.gathered() as tree:
        # Every rank gathers before the ranks that do not write return. Gathering is a collective
        # operation, so the writer would wait for a rank that had left.
        tensors = {name: full(t.detach()).cpu().contiguous() for name, t in _trained(model).items()}
        if not writes:
            return
        with disk.named("make the folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
        lineages = json.dumps(_describe_lineages(model))
        metadata = {"format": "pt", "stands_on": lineages}
        disk.write(folder / FACTORS, render_tensors(tensors, metadata))
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
    saved, metadata = read_tensors(file, str(file))
    model.factors.refresh(model.tree, model)
    current = _trained(model)
    if saved.keys() != current.keys():
        saved_nodes = {path_of(name) for name in saved}
        current_nodes = {path_of(name) for name in current}
        if saved_nodes != current_nodes:
            train = agreeing(len(current_nodes), "trains", "train")
            listed = listing(sorted(current_nodes))
            what = f"it holds {listing(sorted(saved_nodes))}, and {listed} {train} now"
        else:
            what = f"with other modules: {listing(sorted(saved.keys() ^ current.keys()))}"
        raise FormatError(
            f"{file}: {what}", "resume with the nodes that trained then: model.trainable(…)"
        )
    # Shapes, dtypes and ancestors are all checked before the first number is copied, so that an
    # error leaves every node as it was.
    for name, new in saved.items():
        parameter = current[name]
        if new.shape != parameter.shape or new.dtype != parameter.dtype:
            raise FormatError(
                f"{file}: {name}: {tuple(new.shape)} {new.dtype}, "
                f"the node has {tuple(parameter.shape)} {parameter.dtype}",
                "resume with the rank and dtype that the run began with",
            )
    recorded = _recorded(metadata, file)
    changed = [path for path, on in _describe_lineages(model).items() if recorded.get(path) != on]
    if changed:
        raise FormatError(
            f"{file}: {listing(changed)}: a frozen ancestor, or a weight, has changed since",
            "resume on the tree with which the run began; "
            "or take its nodes: tree.update(path, adapter='…/nodes/…')",
        )
    with torch.no_grad():
        # In the model's order, which all ranks share: distributing a tensor is a collective
        # operation.
        for name, parameter in current.items():
            new = saved[name]
            if is_sharded(parameter):
                new = distribute_tensor(new, parameter.device_mesh, parameter.placements)
            parameter.copy_(new)


def recorded_ancestors(folder: Path, path: str) -> dict[str, str]:
    """Return the ancestors that a checkpoint's node was trained on, each as its weight and hash.

    They are in the order of the lineage, from the root down.

    Raises:
        FormatError: a file of the checkpoint is broken.
        PathError: it names something that is no node.
    """
    file = folder / FACTORS
    _, metadata = read_tensors(file, str(file), outline=True)
    record = _recorded(metadata, file).get(path, {})
    if not (isinstance(record, dict) and all(isinstance(value, str) for value in record.values())):
        raise FormatError(
            f"{file}: stands_on: {path}: expected a mapping from nodes, got {str(record)[:80]}"
        )
    found = {}
    for node, description in record.items():
        if node == path:
            continue
        if description.endswith(TRAINED):
            # It trained in the same run, so its numbers of then are in the checkpoint itself.
            own = Adapter.load(folder.joinpath(NODES, *check_path(node)))
            description = description.removesuffix(TRAINED) + _hash(own)
        found[node] = description
    return found


def current_ancestors(tree: AdapterTree, path: str) -> dict[str, str]:
    """Return the nodes with an adapter above a place in a tree, each as its weight and hash."""
    found = {}
    for node in tree.lineage(path.rpartition("/")[0]):
        description = _describe(tree, node)
        if description is not None:
            found[node] = description
    return found


def _trained(model: TreeModel) -> dict[str, Any]:
    """Return the parameters of all nodes that train, by name."""
    return {name: p for name, p in model.factors.named_parameters() if p.requires_grad}


def _recorded(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """Return the ancestors as `_describe_lineages` returned them when the file was written."""
    return strict_json.loads(metadata.get("stands_on", "{}").encode(), f"{file}: stands_on")


def _describe(tree: AdapterTree, node: str) -> str | None:
    """Return a node's weight and hash; None if it has no adapter, so that nothing depends on it."""
    adapter = tree.adapter(node)
    return None if adapter is None else f"{tree[node].weight!r} {_hash(adapter)}"


def _hash(adapter: Adapter) -> str:
    """Return a hash of an adapter's numbers, and of nothing else about it."""
    digest = hashlib.sha256()
    for name, value in sorted(adapter.modules.items()):
        numbers = dict(zip(("A", "B", "bias"), value.tensors, strict=False))
        digest.update(f"{name} {value.scale!r} {value.layout}".encode())
        # The numbers are hashed in the form of a file, whose header holds dtype and shape as well.
        # The bare bytes of two different tensors may be the same.
        digest.update(render_tensors({part: t.detach().cpu() for part, t in numbers.items()}, {}))
    for name, override in sorted(adapter.overrides.items()):
        digest.update(f"{name} {override.rows}".encode())
        digest.update(render_tensors({"override": override.values.detach().cpu()}, {}))
    return digest.hexdigest()


def _describe_lineages(model: TreeModel) -> dict[str, dict[str, str]]:
    """Return for each node that trains the nodes down to it, itself included.

    Each is described by its weight and its hash; `TRAINED` replaces the hash of a node that trains.
    """
    tree, training = model.tree, model.factors.training_paths
    descriptions: dict[str, str | None] = {}
    found: dict[str, dict[str, str]] = {}
    for path in training:
        found[path] = {}
        for node in tree.lineage(path):
            if node not in descriptions:  # hashed once: nodes share their ancestors
                is_training = node in training
                descriptions[node] = (
                    f"{tree[node].weight!r} {TRAINED}" if is_training else _describe(tree, node)
                )
            description = descriptions[node]
            if description is not None:
                found[path][node] = description
    return found
