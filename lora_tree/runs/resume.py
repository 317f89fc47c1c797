"""Write an optimiser's state into a checkpoint, and read factors and state back.

checkpoint-40/factors.safetensors        the factors that train
              optimizer.safetensors      "3.exp_avg": of the optimiser's parameter 3
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats.safetensors import read_tensors, render_tensors
from ..model import TreeModel
from .checkpoint_factors import FACTORS, current_ancestors, load_factors, recorded_ancestors
from .place import LastCheckpoint

__all__ = ["STATE", "is_unchanged_since", "render_state", "resume_state"]

STATE = "optimizer.safetensors"


def render_state(optimizer: torch.optim.Optimizer) -> bytes:
    """Return an optimiser's state as the bytes of a safetensors file."""
    by_parameter: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    tensors: dict[str, Tensor] = {}
    for index, state in by_parameter.items():
        for name, tensor in state.items():
            # On the CPU, because a run may be resumed on another device.
            tensors[f"{index}.{name}"] = tensor.detach().cpu()
    return render_tensors(tensors, {"format": "pt"})


def resume_state(model: TreeModel, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Put a checkpoint's numbers into the factors and into the optimiser.

    Raises:
        FolderError, FormatError: the checkpoint can't be read.
    """
    file = checkpoint / STATE
    tensors, _ = read_tensors(file, str(file))
    by_parameter: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, part = name.partition(".")
        by_parameter.setdefault(int(index), {})[part] = tensor
    load_factors(model, checkpoint)
    # The groups are those of this run's settings: a checkpoint keeps no rates.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": by_parameter, "param_groups": groups})
    # load_state_dict replaces the groups' dicts, so the model has to read them again.
    model.follow(optimizer)


def is_unchanged_since(model: TreeModel, nodes: Sequence[str], before: LastCheckpoint) -> bool:
    """Tell whether the nodes, and those above them, are still what a finished run saved."""
    file = before.folder / FACTORS
    saved, _ = read_tensors(file, str(file))
    # The user may have trained the node elsewhere since, or replaced its files.
    current: dict[str, Tensor] = {}
    for name, parameter in model.factors.named_parameters():
        if parameter.requires_grad:
            current[name] = parameter.detach().cpu()
    if saved.keys() != current.keys():
        return False
    for name, tensor in saved.items():
        if not torch.equal(tensor, current[name]):
            return False
    for node in nodes:
        # Compared by content, not by name: a parent that was renamed is the same model.
        recorded, ancestors = (
            recorded_ancestors(before.folder, node),
            current_ancestors(model.tree, node),
        )
        if list(recorded.values()) != list(ancestors.values()):
            return False
    return True
