"""Put every factor that trains into every rank's backward.

A rank may have no row that goes through a factor's node.

    outputs of the forward ─→ the same outputs ─→ loss
    factors that train     ─↗                        backward: zeros for the factors

Data parallelism waits for a gradient of every parameter on every rank, and sharding adds them up by
position. A node with rows on one rank only would make the former hang and the latter add up wrong
gradients. A batch of bare rows, whose loss has no gradient, works too.

Sharded layers are gathered again for their backward, by all ranks at once. So `every_layer` puts
each of them into every rank's backward as well, even if nothing below it trains for that rank's
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..engine.hook import Hook
from ..engine.unpromised import pytree

__all__ = ["every_layer", "joined"]


def joined(out: Any, parameters: Sequence[Tensor]) -> Any:
    """Return ``out`` with every floating tensor in it depending on all of ``parameters``.

    The parameters get zeros for gradients.

    Args:
        out: what a model returned: a tensor, or tensors in tuples, lists, dictionaries and
            registered classes.
        parameters: of this rank; none leaves ``out`` as it is.
    """
    leaves, shape = pytree.tree_flatten(out)
    places = [i for i, leaf in enumerate(leaves) if _is_floating(leaf)]
    if not places or not parameters:
        return out
    outs = [leaves[i] for i in places]
    tied = _Tie.apply(len(outs), *outs, *parameters)  # type: ignore[no-untyped-call]
    for i, leaf in zip(places, tied, strict=True):
        leaves[i] = leaf
    return pytree.tree_unflatten(leaves, shape)


def every_layer(base: nn.Module) -> list[RemovableHandle]:
    """Put each module that FSDP2 shards by itself into the backward of every recorded forward.

    Returns:
        the handles of the hooks that do it.
    """

    def after(module: nn.Module, args: Any, out: Any) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves(out) if _is_floating(leaf)]
        if not tensors or not torch.is_grad_enabled() or any(t.requires_grad for t in tensors):
            return out
        leaf = tensors[0].new_zeros((), requires_grad=True)
        return joined(out, [leaf])

    handles = []
    for module in base.modules():
        if hasattr(module, "reshard") and hasattr(module, "set_requires_gradient_sync"):
            # Before FSDP's own hook, which looks at the output for tensors that require a gradient.
            handles.append(module.register_forward_hook(Hook(after), prepend=True))
    return handles


def _is_floating(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class _Tie(torch.autograd.Function):
    """The identity on outputs, with parameters as further inputs whose gradients are zeros."""

    @staticmethod
    def forward(ctx: Any, outs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        # An output that the loss does not use passes None on, not zeros of its size.
        ctx.set_materialize_grads(False)
        ctx.outs, ctx.parameters = outs, [(t.shape, t.dtype, t.device) for t in tensors[outs:]]
        # `detach` shares the memory, and makes no view: FSDP warns of views.
        return tuple(t.detach() for t in tensors[:outs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        zeros = []
        for shape, dtype, device in ctx.parameters:
            # Expanded from one number: zeros of the factors' size would take their memory again.
            zeros.append(torch.zeros((), dtype=dtype, device=device).expand(shape))
        return (None, *grads, *zeros)
