"""A training run's checkpoint: what is in it of ours, and how it appears whole or not at all.

    checkpoint-120/
      factors.safetensors          every parameter of every node that trains, bit for bit: what a run resumes from
      nodes/fr/legal/…             the same nodes as PEFT adapters: tree.update("fr/legal", adapter=…) takes one
      optimizer.pt, …              what the trainer writes of its own

All of it is written below ``.unfinished/`` first, synced, and then has its name at once. A run that was killed while it
wrote leaves only that folder, which nobody takes for a checkpoint and the next save clears.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FolderError, FormatError, listing
from ..folder import disk
from ..formats.safetensors import read_tensors, render_tensors
from ..model import TreeModel

__all__ = ["FACTORS", "NODES", "UNFINISHED", "appearing", "load_factors", "save_factors"]

FACTORS = "factors.safetensors"
NODES = "nodes"
UNFINISHED = ".unfinished"


def save_factors(model: TreeModel, folder: Path) -> None:
    """Write what trains into a folder, as one file to resume from and as a PEFT adapter per node.

    Raises:
        FolderError: the folder can't be written.
        FormatError: PEFT has no way to write a node; names the node and the module.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in _trained(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    disk.write(folder / FACTORS, render_tensors(tensors, {"format": "pt"}))
    for path in model.tree.paths():
        adapter = model.tree.adapter(path)
        if path in model.factors.training_paths and adapter is not None:
            adapter.save(folder / NODES / path)


def load_factors(model: TreeModel, folder: Path) -> None:
    """Put a checkpoint's numbers into the nodes that train: all of them, or on an error none.

    Raises:
        FolderError: it is no checkpoint of a tree.
        FormatError: its file is broken, or is not of the nodes that train now; names them.
    """
    file = folder / FACTORS
    if not file.is_file():
        raise FolderError(f"{folder}: no {FACTORS}, so no checkpoint of a tree", "name a checkpoint-N of a TreeTrainer")
    saved, _ = read_tensors(file, str(file))
    now = _trained(model)
    if saved.keys() != now.keys():
        there, here = ({_node(name) for name in names} for names in (saved, now))
        what = f"of {listing(sorted(there))}, and {listing(sorted(here))} train now"
        what = what if there != here else f"with other modules: {listing(sorted(saved.keys() ^ now.keys()))}"
        raise FormatError(f"{file}: {what}", "resume with the nodes that trained then: model.trainable(…)")
    for name, new in saved.items():
        own = now[name]
        if new.shape != own.shape or new.dtype != own.dtype:
            raise FormatError(
                f"{file}: {name}: {tuple(new.shape)} {new.dtype}, the node has {tuple(own.shape)} {own.dtype}",
                "resume with the rank and dtype of then",
            )
    with torch.no_grad():
        for name, new in saved.items():
            now[name].copy_(new)


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
        with disk.named("clear it", stage):
            shutil.rmtree(stage, ignore_errors=True)
            os.makedirs(stage)
    meet()
    yield stage
    meet()
    if writes:
        _sync_all(stage / name)
        old = stage / f"{name}.replaced"
        if (parent / name).exists():
            disk.rename(parent / name, old)
        disk.rename(stage / name, parent / name)
        disk.sync(parent)
        with disk.named("clear it", stage):
            shutil.rmtree(stage)
    meet()


def _sync_all(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for file in files:
            path = os.path.join(root, file)
            with disk.named("sync it", path):
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
        disk.sync(root)


def _trained(model: TreeModel) -> dict[str, Tensor]:
    """Name → parameter of every node that trains."""
    return {name: p for name, p in model.factors.named_parameters() if p.requires_grad}


def _node(name: str) -> str:
    return name.partition(".")[0].replace("\N{ONE DOT LEADER}", ".")
