"""A training run's checkpoint: what is in it of ours, and how it appears whole or not at all.

    checkpoint-120/
      factors.safetensors          every parameter of every node that trains, bit for bit: what a run resumes from;
                                   and what each of them stands on, node by node, which has to be the same then
      nodes/fr/legal/…             the same nodes as PEFT adapters: tree.update("fr/legal", adapter=…) takes one
      optimizer.pt, …              what the trainer writes of its own

All of it is written below ``.unfinished/`` first, synced, and then has its name at once. A run that was killed while it
wrote leaves only that folder, which nobody takes for a checkpoint and the next save clears. A checkpoint that is
replaced lies there as ``checkpoint-120.replaced`` between two renames: where a run was killed just then its place is
empty. Resuming and saving put it back first; reading reads it there. A checkpoint that is deleted
goes there first too, so that nothing half deleted has a checkpoint's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from ..spec import check_path
from ..system.durable import sync_file
from ..system.reading import is_file, is_folder, stat_of
from ..training.factors import path_of
from ..training.sharded import full
from ..tree import AdapterTree

__all__ = [
    "FACTORS",
    "NODES",
    "UNFINISHED",
    "ancestors_now",
    "ancestors_then",
    "appearing",
    "load_factors",
    "put_back",
    "retire",
    "save_factors",
    "where_it_lies",
]

FACTORS = "factors.safetensors"
NODES = "nodes"
UNFINISHED = ".unfinished"
REPLACED = ".replaced"
TRAINED = "trained"  # in place of the hash of a node that is in the checkpoint itself


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


def put_back(parent: Path) -> None:
    """Put back a checkpoint that was to be replaced when its run was killed, where its place is empty.

    Args:
        parent: of the checkpoints; need not be there.

    Raises:
        FolderError: the folder can't be read or written.
    """
    stage = parent / UNFINISHED
    with disk.named("look into it", stage):
        names = os.listdir(stage) if is_folder(stage) else []
    for name in names:
        place = parent / name.removesuffix(REPLACED)
        if name.endswith(REPLACED) and stat_of(place, follow=False) is None:
            disk.rename(stage / name, place)


def where_it_lies(checkpoint: Path) -> Path:
    """Return where to read a checkpoint: at its place, or where a run had put it aside when it was killed."""
    aside = checkpoint.parent / UNFINISHED / f"{checkpoint.name}{REPLACED}"
    return aside if stat_of(checkpoint, follow=False) is None and is_folder(aside) else checkpoint


def retire(checkpoint: Path) -> None:
    """Delete a checkpoint. It loses its name first: a run that is killed meanwhile leaves none that is torn.

    What can't be deleted is left for the next save, which clears it.
    """
    stage = checkpoint.parent / UNFINISHED
    gone = stage / f"{checkpoint.name}.{uuid.uuid4().hex}"
    with suppress(OSError):
        stage.mkdir(exist_ok=True)
        os.rename(checkpoint, gone)
        shutil.rmtree(gone)
        os.rmdir(stage)


@contextmanager
def appearing(parent: Path, name: str, *, writes: bool, meet: Callable[[], None]) -> Iterator[Path]:
    """A folder to fill, which appears as ``parent/name`` when the block ends, whole, in place of one that was there.

    Args:
        parent: where.
        name: of the folder.
        writes: this process clears up, and gives the name; one of all.
        meet: waits for the other processes.

    Raises:
        FolderError: the folder can't be written.
    """
    stage = parent / UNFINISHED
    if writes:
        put_back(parent)
        with disk.named("clear it", stage):
            shutil.rmtree(stage, ignore_errors=True)
            os.makedirs(stage)
    meet()
    yield stage
    meet()
    if writes:
        _sync_all(stage / name)
        old = stage / f"{name}{REPLACED}"
        replaces = stat_of(parent / name) is not None
        if replaces:
            disk.rename(parent / name, old)
        disk.rename(stage / name, parent / name)
        if (
            replaces
        ):  # by a name that nobody puts back: it is whole no longer once its removal has begun
            disk.rename(old, stage / name)
        disk.sync(parent)
        with disk.named("clear it", stage):
            shutil.rmtree(stage)
    meet()


def _sync_all(folder: Path) -> None:
    for root, _, files in os.walk(folder, onerror=disk.refuse):
        for file in files:
            path = os.path.join(root, file)
            with disk.named("sync it", path):
                # Windows syncs only what may be written
                handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
                try:
                    sync_file(handle)
                finally:
                    os.close(handle)
        disk.sync(root)


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
