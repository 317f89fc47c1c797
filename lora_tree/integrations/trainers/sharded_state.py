"""The state of an optimiser whose parameters are sharded, and of its schedule, in one file.

    checkpoint-40/optimizer.safetensors    "3.exp_avg": of parameter 3, whole
                                           metadata: the groups' numbers, the schedule's

Every rank has a part of each tensor. The tensors are gathered one by one, and one process writes
them whole, like the factors in the same checkpoint. So a run may go on with another number of
ranks. The Trainer itself has no such file: it refuses to resume a model that its user sharded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import distribute_tensor

from ...errors import FormatError, SpecError
from ...folder import disk
from ...formats import strict_json
from ...formats.safetensors import read_tensors, render_tensors
from ...lowrank import is_sharded
from ...training.sharded import full

__all__ = ["load_state", "save_state"]

STATE = "optimizer.safetensors"


def save_state(
    optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path, *, writes: bool
) -> None:
    """Write the state of an optimiser and of its schedule; every rank has to call this.

    Args:
        optimizer: its parameters may be sharded.
        scheduler: of its learning rates.
        folder: of the checkpoint.
        writes: True on the one process that writes.

    Raises:
        SpecError: a state is not made of numbers, strings and tensors.
        FolderError: the folder can't be written.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    # In the order of the parameters, which all ranks share: gathering is a collective operation.
    for index in sorted(state["state"]):
        for name, value in sorted(state["state"][index].items()):
            if isinstance(value, Tensor):
                gathered = full(value.detach()).cpu().contiguous()
                tensors[f"{index}.{name}"] = gathered
    if not writes:
        return
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in state["param_groups"]
    ]
    try:
        options_json = json.dumps(
            {"groups": groups, "schedule": scheduler.state_dict()}, default=float
        )
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"{type(optimizer).__name__} or {type(scheduler).__name__} has state that is neither "
            f"a tensor nor a number: {error}",
            "pass save_only_model=True; such a run can't be resumed",
        ) from error
    disk.write(folder / STATE, render_tensors(tensors, {"format": "pt", "state": options_json}))


def load_state(optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path) -> None:
    """Put a checkpoint's state into an optimiser and its schedule; every rank has to call this.

    Raises:
        FolderError, FormatError: the file is missing, broken, or of other parameters.
    """
    file = folder / STATE
    tensors, metadata = read_tensors(file, str(file))
    options = strict_json.loads(metadata.get("state", "").encode(), f"{file}: state")
    now = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = options.get("groups")
    if not isinstance(groups, list) or len(groups) != len(now["param_groups"]):
        raise FormatError(
            f"{file}: it holds the state of other parameter groups than those that train now",
            "resume with the nodes that trained then: model.trainable(…)",
        )
    by_parameter: dict[int, dict[str, Tensor]] = {}
    # Sorted, so that all ranks distribute the same tensor at the same time: a mapping that was read
    # has no fixed order.
    for name, tensor in sorted(tensors.items()):
        index, _, part = name.partition(".")
        if not index.isdigit() or int(index) >= len(parameters):
            raise FormatError(f"{file}: {name}: no parameter of that number trains now")
        own = parameters[int(index)]
        # A count of steps is the same number on every rank; other state is sharded like its
        # parameter.
        if is_sharded(own) and tensor.shape == own.shape:
            device = own.device
            tensor = distribute_tensor(tensor.to(device), own.device_mesh, own.placements)
        by_parameter.setdefault(int(index), {})[part] = tensor
    merged = []
    for group, saved_group in zip(now["param_groups"], groups, strict=True):
        merged.append({**group, **_restore_tuples(saved_group, group), "params": group["params"]})
    optimizer.load_state_dict({"state": by_parameter, "param_groups": merged})
    scheduler.load_state_dict(options["schedule"])


def _restore_tuples(saved_group: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's options as they were before JSON, which turns tuples into lists."""
    found = {}
    for name, value in saved_group.items():
        found[name] = tuple(value) if isinstance(group.get(name), tuple) else value
    return found
