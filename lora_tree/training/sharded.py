"""Tensors that FSDP2 has split, so that every rank of a run holds a part.

Gathering such a tensor is a collective operation: a rank that calls `full` or `gather_adapter`
alone waits for ever.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..adapter import Adapter
from ..lowrank import LowRank, is_sharded

__all__ = ["full", "gather_adapter", "local_part"]


def full(tensor: Tensor) -> Tensor:
    """Return all of a tensor; if it is sharded, every rank has to call this."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which may be empty; no other rank is asked."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def gather_adapter(adapter: Adapter) -> Adapter:
    """Return the adapter with whole factors; if they are sharded, every rank has to call this."""
    if not any(is_sharded(tensor) for _, tensor in adapter.named_tensors()):
        return adapter

    def gathered_tensor(tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return tensor
        # A parameter, because a save writes the factors that are parameters: those have trained
        # since they were read.
        return nn.Parameter(full(tensor).detach(), requires_grad=False)

    def gathered_value(value: LowRank) -> LowRank:
        bias = None if value.bias is None else gathered_tensor(value.bias)
        return replace(value, A=gathered_tensor(value.A), B=gathered_tensor(value.B), bias=bias)

    overrides = {}
    for name, override in adapter.overrides.items():
        overrides[name] = override.with_values(gathered_tensor(override.values))
    return replace(adapter.map(gathered_value), overrides=overrides)
