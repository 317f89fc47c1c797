"""A step of an optimiser, node by node: what had no rows is not moved, and gradients are clipped for each on its own.

    rows of a node, over micro-batches and ranks    0       its gradients are dropped before the step: no momentum,
                                                            no decay, no count of a step
                                                    > 0     clipped to its group's own ``clip_norm``, where it has one

Law: an optimiser over many nodes does to each what one over that node alone would do. A missing gradient would not
decide it: `zero_grad(set_to_none=False)` and data parallelism leave zeros where a node had no rows.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import SpecError
from .factors import Factors
from .losses import ranks

__all__ = ["NodeSteps"]


class NodeSteps:
    """The watch over one optimiser's steps.

    Args:
        optimizer: over groups as `TreeModel.trainable` returns them; a group may have a ``clip_norm``.
        factors: where the nodes' parameters are.
        rows: node → rows since its last step; a step forgets those of its own nodes.

    Raises:
        SpecError: a group is not one node's, or a clip norm is not a positive number.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factors: Factors, rows: Counter[str]) -> None:
        for group in optimizer.param_groups:
            _check(group, factors)
        self._rows = rows
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Let the optimiser go."""
        while self._handles:
            self._handles.pop().remove()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups
        for group, rows in zip(groups, self._counted(groups), strict=True):
            if not rows:
                for parameter in group["params"]:
                    parameter.grad = None
            elif group.get("clip_norm") is not None:
                nn.utils.clip_grad_norm_(group["params"], group["clip_norm"])

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:  # another optimiser may have nodes of its own
            del self._rows[group["name"]]

    def _counted(self, groups: list[dict[str, Any]]) -> list[int]:
        mine = [self._rows[group["name"]] for group in groups]
        if ranks() == 1:
            return mine
        total = torch.tensor(mine, dtype=torch.int64, device=groups[0]["params"][0].device)
        dist.all_reduce(total)
        return [int(rows) for rows in total.tolist()]


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
