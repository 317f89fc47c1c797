"""Every trained factor in every rank's backward, also where no row of that rank goes through its node.

    outputs of the forward ─→ the same outputs ─→ loss
    factors that train     ─↗                        backward: zeros for the factors

Data parallelism waits for a gradient of every parameter on every rank, and sharding adds them up by position: a node
with rows on one rank only would stop or break both. A batch of bare rows, whose loss needs no gradient, works too.

Sharded layers are gathered again for their backward, by all ranks at once. So each of them has to be in every rank's
backward as well, also where nothing below it trains for that rank's rows (`every_layer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..engine.unpromised import pytree

__all__ = ["every_layer", "joined"]


def joined(out: Any, parameters: Sequence[Tensor]) -> Any:
    """``out`` with every floating tensor in it depending on all of ``parameters``, which get zeros for gradients."""
    leaves, shape = pytree.tree_flatten(out)
    places = [
        i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if not places or not parameters:
        return out
    tied = _Tie.apply(len(places), *(leaves[i] for i in places), *parameters)  # type: ignore[no-untyped-call]
    for i, leaf in zip(places, tied, strict=True):
        leaves[i] = leaf
    return pytree.tree_unflatten(leaves, shape)


def every_layer(base: nn.Module) -> list[RemovableHandle]:
    """Hooks that put each module of ``base`` that FSDP2 shards by itself into every recorded forward's backward."""

    def after(module: nn.Module, args: Any, out: Any) -> Any:
        tensors = [
            t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()
        ]
        if not tensors or not torch.is_grad_enabled() or any(t.requires_grad for t in tensors):
            return out
        return joined(
            out,
            [torch.zeros((), dtype=tensors[0].dtype, device=tensors[0].device, requires_grad=True)],
        )

    sharded = [
        m
        for m in base.modules()
        if hasattr(m, "reshard") and hasattr(m, "set_requires_gradient_sync")
    ]
    return [
        m.register_forward_hook(after, prepend=True) for m in sharded
    ]  # before FSDP's own, which looks at ``out``


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.outs, ctx.parameters = outs, [(t.shape, t.dtype, t.device) for t in tensors[outs:]]
        return tuple(
            t.detach() for t in tensors[:outs]
        )  # the same memory, and no view for FSDP to warn of

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        zeros = (
            torch.zeros((), dtype=dtype, device=device).expand(shape)
            for shape, dtype, device in ctx.parameters
        )
        return (None, *grads, *zeros)
