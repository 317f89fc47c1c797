"""Every trained factor in every rank's backward, also where no row of that rank goes through its node.

    outputs of the forward ─→ the same outputs ─→ loss
    factors that train     ─↗                        backward: zeros for the factors

Data parallelism waits for a gradient of every parameter on every rank, and sharding adds them up by position: a node
with rows on one rank only would stop or break both. A batch of bare rows, whose loss needs no gradient, works too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

__all__ = ["joined"]


def joined(out: Any, parameters: Sequence[Tensor]) -> Any:
    """``out`` with every floating tensor in it depending on all of ``parameters``, which get zeros for gradients."""
    leaves, shape = _pytree.tree_flatten(out)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not places or not parameters:
        return out
    tied = _Tie.apply(len(places), *(leaves[i] for i in places), *parameters)  # type: ignore[no-untyped-call]
    for i, leaf in zip(places, tied, strict=True):
        leaves[i] = leaf
    return _pytree.tree_unflatten(leaves, shape)


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.outs, ctx.parameters = outs, [(t.shape, t.dtype, t.device) for t in tensors[outs:]]
        return tuple(t.view_as(t) for t in tensors[:outs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.parameters)
        return (None, *grads, *zeros)
