"""Training that leaves the finite numbers: noticed at the step where it happens, before anything of it is saved.

A learning rate that is too large, or a row that overflows, makes factors or losses NaN or infinite. What comes after is
NaN as well, so a run has nothing to go on to. It stops, and its nodes become what they were when it began.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import DivergedError, listing
from ..lowrank import is_sharded
from .factors import Factors
from .losses import ranks

__all__ = ["BASE_LABEL", "Start", "check_finite_step"]

BASE_LABEL = "(base)"
"""The name of the bare base in logs and tables. No node can have it: a path holds no parentheses."""


class Start:
    """The factors that train, as they are now: copies in host memory, to go back to.

    Args:
        factors: of the model.
    """

    def __init__(self, factors: Factors) -> None:
        trained = [p for p in factors.parameters() if p.requires_grad]
        self._kept: list[tuple[nn.Parameter, Tensor]] = [(p, _copy(p)) for p in trained]

    def restore(self) -> None:
        """Put them back, and drop the gradients."""
        with torch.no_grad():
            for parameter, before in self._kept:
                parameter.copy_(before)
                parameter.grad = None


def check_finite_step(
    factors: Factors, losses: Mapping[str, float] | Mapping[str, Tensor], *, step: int
) -> None:
    """Raise where a step made factors or losses that are not finite; the device is waited for once.

    Args:
        factors: of the model. With several ranks every one of them has to call this.
        losses: path → its loss in this step, on this rank.
        step: its number, from 1.

    Raises:
        DivergedError: names the nodes, the step and the losses.
    """
    nodes = factors.training_paths
    norms = [
        nn.utils.get_total_norm([_here(p) for p in factors.of(node)], math.inf) for node in nodes
    ]
    device = norms[0].device if norms else torch.device("cpu")
    found = [
        torch.as_tensor(x).detach().to(device, torch.float64) for x in (*norms, *losses.values())
    ]
    numbers = torch.stack(found).tolist() if found else []
    told = dict(zip(losses, numbers[len(nodes) :], strict=True))
    broken = [not math.isfinite(x) for x in numbers[: len(nodes)]]
    lost = any(not math.isfinite(x) for x in told.values())
    if ranks() > 1:  # one rank's loss stops all of them
        flags = torch.tensor([*broken, lost], dtype=torch.int64, device=device)
        dist.all_reduce(flags)
        *broken, lost = (bool(flag) for flag in flags.tolist())
    if lost or any(broken):
        _refuse(
            [node for node, is_broken in zip(nodes, broken, strict=True) if is_broken], told, step
        )


def _refuse(broken: list[str], losses: Mapping[str, float], step: int) -> NoReturn:
    """Say what diverged: the nodes whose factors did, or else the paths whose losses did."""
    lost = [path for path, loss in losses.items() if not math.isfinite(loss)]
    where = listing(path or BASE_LABEL for path in broken or lost) or "another rank"
    what = "the factors are" if broken else "the loss is"
    said = listing(f"{path or BASE_LABEL} {loss:.4g}" for path, loss in losses.items())
    raise DivergedError(
        f"{where}: step {step}: {what} not finite; losses of this step: {said or 'none on this rank'}",
        "nothing of it was saved, and what trained is again what it was when the run began",
        "train with a smaller learning rate or clip norm; its checkpoints of the steps before are good",
    )


def _here(parameter: Tensor) -> Tensor:
    """The part of a factor that this rank holds; one number where that is nothing, since nothing has no norm."""
    local: Tensor = parameter.to_local() if is_sharded(parameter) else parameter  # type: ignore[attr-defined]
    local = local.detach()
    return local if local.numel() else local.new_zeros(1)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if is_sharded(tensor) else tensor.detach().to("cpu", copy=True)
