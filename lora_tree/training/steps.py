"""A step of an optimiser, node by node: what had no rows is not moved, and gradients are clipped for each on its own.

    has a gradient come back through a side path of the node since its last step, on any rank?

    no      its gradients, zeros at most, are dropped before the step: no momentum, no decay, no count of a step
    yes     they are clipped to its group's own ``clip_norm``, where it has one

Law: an optimiser over many nodes does to each what one over that node alone would do. A missing gradient would not
decide it: `zero_grad(set_to_none=False)` and data parallelism leave zeros where a node had no rows. Gradients that are
thrown away, as after a step that a `GradScaler` skipped, take with them what was noted of their rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import SpecError, StateError
from ..lowrank import is_sharded
from .factors import Factors
from .losses import ranks

__all__ = ["NodeSteps"]


class NodeSteps:
    """The watch over one optimiser's steps.

    Args:
        optimizer: over groups as `TreeModel.trainable` returns them; a group may have a ``clip_norm``.
        factors: where the nodes' parameters are.
        reached: the nodes that a gradient has come back to; a step forgets its own nodes, and so does `zero_grad`.

    Raises:
        SpecError: a group is not one node's, or a clip norm is not a positive number.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, factors: Factors, reached: set[str]
    ) -> None:
        for group in optimizer.param_groups:
            _check(group, factors)
        self._reached = reached
        self._optimizer = weakref.ref(
            optimizer
        )  # the model keeps this object for as long as the optimiser lives
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]  # torch has no hook for it

    def remove(self) -> None:
        """Let the optimiser go."""
        while self._handles:
            self._handles.pop().remove()
        optimizer = self._optimizer()
        if optimizer is not None and vars(optimizer).get("zero_grad") == self._zero_grad:
            del optimizer.zero_grad

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradients of its nodes are gone, and with them what they came of."""
        for group in optimizer.param_groups:  # another optimiser may have nodes of its own
            self._reached.discard(group["name"])

    def _zero_grad(self, set_to_none: bool = True) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            type(optimizer).zero_grad(optimizer, set_to_none)
            self.forget(optimizer)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups
        moving = self._moving(groups)
        still = [group for group, moves in zip(groups, moving, strict=True) if not moves]
        _check_still(still)
        for group in still:
            for parameter in group["params"]:
                parameter.grad = None
        for group, moves in zip(groups, moving, strict=True):
            if moves and group.get("clip_norm") is not None:
                _clip(group["params"], group["clip_norm"], getattr(optimizer, "grad_scale", None))

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.forget(optimizer)

    def _moving(self, groups: Sequence[dict[str, Any]]) -> list[bool]:
        """Which groups had rows, on any rank."""
        mine = [group["name"] in self._reached for group in groups]
        if ranks() == 1:
            return mine
        total = torch.tensor(mine, dtype=torch.int64, device=groups[0]["params"][0].device)
        dist.all_reduce(total)
        return [bool(count) for count in total.tolist()]


def _check_still(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse to drop a gradient that came about otherwise than by a row.

    Where there are no gradients at all, which is the rule, nothing is read; zeros are read from the device once.

    Raises:
        StateError: a node that had no rows has one; names the node.
    """
    of_node = {
        group["name"]: [p.grad for p in group["params"] if p.grad is not None] for group in groups
    }
    found = {
        name: torch.stack([_any(t) for t in grads]).any()
        for name, grads in of_node.items()
        if grads
    }
    if not found:
        return
    device = next(iter(found.values())).device
    wrong = torch.stack([flag.to(device) for flag in found.values()]).tolist()
    for name, is_wrong in zip(found, wrong, strict=True):
        if is_wrong:
            raise StateError(
                f"{name}: its factors have gradients, and no row went through it since the last step",
                "the loss took the factors themselves (a penalty on them, say), or they were written into .grad: "
                "step this node with an optimiser that model.follow does not know, or zero these gradients first",
            )


def _any(gradient: Tensor) -> Tensor:
    local: Tensor = gradient.to_local() if is_sharded(gradient) else gradient  # type: ignore[attr-defined]
    return local.ne(0).any()


def _clip(parameters: Sequence[nn.Parameter], norm: float, scale: Tensor | None) -> None:
    """Clip a node's gradients; ``scale``: what a `GradScaler` multiplied them by and a fused step will divide by."""
    if scale is None:
        nn.utils.clip_grad_norm_(parameters, norm)
        return
    found = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    nn.utils.clip_grads_with_norm_(parameters, norm, found / scale.to(found.device))


def _check(group: dict[str, Any], factors: Factors) -> None:
    name, clip = group.get("name"), group.get("clip_norm")
    if name not in factors.training_paths:
        raise SpecError(
            f"an optimiser's group is called {name!r}, and no node of that name trains",
            "make the optimiser of what model.trainable(…) returns, with its names",
        )
    own = {id(parameter) for parameter in factors.of(name)}
    if any(id(parameter) not in own for parameter in group["params"]):
        raise SpecError(f"the optimiser's group {name!r} has parameters that are not that node's")
    if clip is not None and not (isinstance(clip, (int, float)) and clip > 0):
        raise SpecError(f"{name}: clip_norm must be a positive number, got {clip!r}")
