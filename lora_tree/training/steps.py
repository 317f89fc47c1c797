"""A step of an optimiser, node by node: a node without rows does not move, each is clipped alone.

    has a gradient come back through a side path of the node since its last step, on any rank?

    no      its gradients, zeros at most, are dropped before the step:
            no momentum, no decay, no step counted
    yes     they are clipped to its group's own ``clip_norm``, if it has one

Law: an optimiser over many nodes does to each node what an optimiser over that node alone would do.

Whether a gradient is missing can't decide it: `zero_grad(set_to_none=False)` and data parallelism
leave zeros for a node without rows. When gradients are thrown away, as after a step that a
`GradScaler` skipped, the notes about their rows are thrown away too.
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
from .factors import Factors
from .rank_names import ranks
from .sharded import local_part

__all__ = ["NodeSteps"]


class NodeSteps:
    """Hooks on one optimiser's steps.

    Args:
        optimizer: over groups as `TreeModel.trainable` returns them; a group may have a
            ``clip_norm``.
        factors: hold the nodes' parameters.
        reached: the nodes that a gradient has come back to; a step forgets its own nodes, and so
            does `zero_grad`.

    Raises:
        SpecError: a group is not one node's, or a clip norm is not a positive number.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, factors: Factors, reached: set[str]
    ) -> None:
        for group in optimizer.param_groups:
            _check(group, factors)
        self._reached = reached
        # Weak: the model keeps this object for as long as the optimiser
        # lives, and must not keep that alive.
        self._optimizer = weakref.ref(optimizer)
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        # torch has hooks for a step, and none for this.
        optimizer.zero_grad = self._zero_grad  # type: ignore[method-assign]

    def remove(self) -> None:
        """Take the hooks off the optimiser."""
        while self._handles:
            self._handles.pop().remove()
        optimizer = self._optimizer()
        # If other code has replaced the method since, that one stays.
        if optimizer is not None and vars(optimizer).get("zero_grad") == self._zero_grad:
            del optimizer.zero_grad

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget that gradients came back to this optimiser's nodes, but not to another's."""
        for group in optimizer.param_groups:
            self._reached.discard(group["name"])

    def _zero_grad(self, set_to_none: bool = True) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            type(optimizer).zero_grad(optimizer, set_to_none)
            self.forget(optimizer)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Drop or clip the gradients of every group; torch calls this before a step."""
        groups = optimizer.param_groups
        moving = self._moving(groups)
        still = [group for group, moves in zip(groups, moving, strict=True) if not moves]
        # The check is before the first drop: an error must leave all gradients as they are.
        _refuse_stray_gradients(still)
        for group in still:
            for parameter in group["params"]:
                parameter.grad = None
        # Each group is clipped separately: otherwise the norm of one node would shrink the step of
        # another.
        for group, moves in zip(groups, moving, strict=True):
            if moves and group.get("clip_norm") is not None:
                _clip(group["params"], group["clip_norm"], getattr(optimizer, "grad_scale", None))

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.forget(optimizer)

    def _moving(self, groups: Sequence[dict[str, Any]]) -> list[bool]:
        """Return which groups had rows, on any rank."""
        # All ranks have to agree: a node that moved on one of them only would differ from then on.
        has_rows = [group["name"] in self._reached for group in groups]
        if ranks() == 1:
            return has_rows
        total = torch.tensor(has_rows, dtype=torch.int64, device=groups[0]["params"][0].device)
        dist.all_reduce(total)
        return list(map(bool, total.tolist()))


def _refuse_stray_gradients(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse to drop a gradient that came from something else than a row.

    Usually there are no gradients at all, and nothing is read. Zeros are read from the device once,
    for all groups.

    Raises:
        StateError: a node that had no rows has a gradient that is not zero; names the node.
    """
    has_gradient: dict[str, Tensor] = {}
    for group in groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        if gradients:
            has_gradient[group["name"]] = torch.stack([_is_any(t) for t in gradients]).any()
    if not has_gradient:
        return
    device = next(iter(has_gradient.values())).device
    wrong = torch.stack([flag.to(device) for flag in has_gradient.values()]).tolist()
    for name, is_wrong in zip(has_gradient, wrong, strict=True):
        if is_wrong:
            raise StateError(
                f"{name}: its factors have gradients, "
                "and no row went through it since the last step",
                "the loss used the factors themselves (a penalty on them, say), "
                "or they were written into .grad: "
                "step this node with an optimiser that model.follow does not know, "
                "or zero these gradients first",
            )


def _is_any(gradient: Tensor) -> Tensor:
    """Return whether this rank's part of a gradient has a number that is not zero, ()."""
    return local_part(gradient).ne(0).any()


def _clip(parameters: Sequence[nn.Parameter], norm: float, scale: Tensor | None) -> None:
    """Clip a node's gradients.

    Args:
        parameters: of the node.
        norm: the largest norm that its gradients may have together.
        scale: (), the factor that a `GradScaler` multiplied them by, and by which a fused step will
            divide them.
    """
    if scale is None:
        nn.utils.clip_grad_norm_(parameters, norm)
        return
    # The norm is that of the unscaled gradients, so they are clipped as without a scaler.
    total_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    nn.utils.clip_grads_with_norm_(parameters, norm, total_norm / scale.to(total_norm.device))


def _check(group: dict[str, Any], factors: Factors) -> None:
    """Refuse a group that is not one training node's.

    Raises:
        SpecError: names the group.
    """
    name, clip = group.get("name"), group.get("clip_norm")
    if name not in factors.training_paths:
        raise SpecError(
            f"the optimiser has a group {name!r}, and no node of that name trains",
            "make the optimiser from the groups that model.trainable(…) returns",
        )
    # By identity: tensors compare number by number.
    own = set(map(id, factors.of(name)))
    if not own.issuperset(map(id, group["params"])):
        raise SpecError(f"the optimiser's group {name!r} has parameters that are not that node's")
    if clip is not None and not (isinstance(clip, (int, float)) and clip > 0):
        raise SpecError(f"{name}: clip_norm must be a positive number, got {clip!r}")
