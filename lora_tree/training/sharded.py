"""Tensors of which every rank of a run holds a part, as FSDP2 leaves them; to read one, all ranks have to meet."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..adapter import Adapter
from ..lowrank import LowRank, is_sharded

__all__ = ["full", "whole"]


def full(tensor: Tensor) -> Tensor:
    """All of it; where it is sharded, every rank has to call this."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def whole(adapter: Adapter) -> Adapter:
    """The adapter with every factor whole; where they are sharded, every rank has to call this."""

    def one(tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return tensor
        return nn.Parameter(
            full(tensor).detach(), requires_grad=False
        )  # a parameter: a save writes what trained since

    def all_of(value: LowRank) -> LowRank:
        return replace(
            value,
            A=one(value.A),
            B=one(value.B),
            bias=None if value.bias is None else one(value.bias),
        )

    return (
        adapter.map(all_of)
        if any(value.is_sharded for value in adapter.modules.values())
        else adapter
    )
