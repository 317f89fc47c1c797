"""Tensors of which every rank of a run holds a part, as FSDP2 leaves them; to read one, all ranks have to meet."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..adapter import Adapter
from ..engine.plan import Plan
from ..errors import StateError
from ..lowrank import LowRank

__all__ = ["check_whole", "full", "is_sharded", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Every rank holds a part of it."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """All of it; where it is sharded, every rank has to call this."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def whole(adapter: Adapter) -> Adapter:
    """The adapter with every factor whole; where they are sharded, every rank has to call this."""

    def one(tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return tensor
        return nn.Parameter(full(tensor).detach(), requires_grad=False)  # a parameter: a save writes what trained since

    def all_of(value: LowRank) -> LowRank:
        return replace(value, A=one(value.A), B=one(value.B), bias=None if value.bias is None else one(value.bias))

    return adapter.map(all_of) if any(value.is_sharded for value in adapter.modules.values()) else adapter


def check_whole(plan: Plan) -> None:
    """That a path can be merged: nobody has the whole of a sharded weight to write to.

    Raises:
        StateError: a site's weight is sharded; names the site.
    """
    for name, site in plan.sites.items():
        weight = site.weight
        if weight is not None and is_sharded(weight):
            raise StateError(
                f"{name}: the base is sharded, and a path can't be merged into parts of its weights",
                'activate(…, mode="unmerged")',
            )
