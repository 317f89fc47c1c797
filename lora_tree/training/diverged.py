"""Stop training at the step in which factors or losses become NaN or infinite.

Nothing of such a step is saved.

A learning rate that is too large, or a row that overflows, makes factors or losses NaN or infinite.
Every later step is NaN as well, so the run can't go on. It stops, and its nodes get back the
factors that they had when it began.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import DivergedError, listing
from ..lowrank import is_sharded
from .factors import Factors
from .rank_names import ranks
from .sharded import local_part

__all__ = ["BASE_LABEL", "Cause", "Start", "check_finite_step"]

BASE_LABEL = "(base)"
"""The name of the bare base in logs and tables.

No node can have it: a path holds no parentheses.
"""


class Start:
    """Copies of the factors that train, as they are now, from which `restore` can put them back.

    Args:
        factors: of the model.
    """

    def __init__(self, factors: Factors) -> None:
        # In host memory: a device that is full of a run has no room for a second set.
        self._copies: list[tuple[nn.Parameter, Tensor]] = []
        for parameter in factors.parameters():
            if parameter.requires_grad:
                self._copies.append((parameter, _copy(parameter)))

    def restore(self) -> None:
        """Put the copies back into the parameters, and drop the gradients."""
        with torch.no_grad():
            for parameter, before in self._copies:
                parameter.copy_(before)
                parameter.grad = None


Cause: TypeAlias = Callable[[Sequence[str]], str | None]
"""The paths whose loss is not finite → the frozen node, or "" for the bare base, whose outputs are
not finite without what trains; None: there is none.
"""


def check_finite_step(
    factors: Factors,
    losses: Mapping[str, float] | Mapping[str, Tensor],
    *,
    step: int,
    cause: Cause | None = None,
) -> None:
    """Raise if a step made factors or losses that are not finite.

    The host waits for the device once.

    Args:
        factors: of the model. With several ranks every one of them has to call this.
        losses: path → its loss in this step, on this rank.
        step: its number, from 1.
        cause: looks for a frozen node that is to blame. With several ranks it is not asked, because
            one rank alone can't run a forward of a sharded model.

    Raises:
        DivergedError: names the nodes, the step and the losses.
    """
    nodes = factors.training_paths
    norms = [_largest(factors.of(node)) for node in nodes]
    device = norms[0].device if norms else torch.device("cpu")
    # One tensor of all numbers, so that they come from the device in one transfer.
    numbers: list[float] = []
    if norms or losses:
        scalars = []
        for number in (*norms, *losses.values()):
            scalars.append(torch.as_tensor(number).detach().to(device, torch.float64))
        numbers = torch.stack(scalars).tolist()
    losses_now = dict(zip(losses, numbers[len(nodes) :], strict=True))
    is_broken = [not math.isfinite(norm) for norm in numbers[: len(nodes)]]
    is_lost = any(not math.isfinite(loss) for loss in losses_now.values())
    if ranks() > 1:
        # One rank's loss stops all of them; a rank that went on alone
        # would wait for the others forever.
        flags = torch.tensor([*is_broken, is_lost], dtype=torch.int64, device=device)
        dist.all_reduce(flags)
        *is_broken, is_lost = map(bool, flags.tolist())
    broken = list(itertools.compress(nodes, is_broken))
    if broken or is_lost:
        _refuse(broken, losses_now, step, cause if ranks() == 1 else None)


def _refuse(
    broken: list[str], losses: Mapping[str, float], step: int, cause: Cause | None
) -> NoReturn:
    """Raise for a step that diverged: name the nodes whose factors did, or the paths."""
    lost = [path for path, loss in losses.items() if not math.isfinite(loss)]
    where = listing(path or BASE_LABEL for path in broken or lost) or "another rank"
    what = "the factors are" if broken else "the loss is"
    losses_text = listing(f"{path or BASE_LABEL} {loss:.4g}" for path, loss in losses.items())
    frozen = cause(lost) if cause is not None else None
    if frozen is not None:
        _refuse_frozen(frozen, step, losses_text)
    advice = "train with a smaller learning rate or clip norm"
    if step > 1:
        advice += "; the run's checkpoints of earlier steps are good"
    raise DivergedError(
        f"{where}: step {step}: {what} not finite; "
        f"losses of this step: {losses_text or 'none on this rank'}",
        "nothing was saved; the nodes that trained have the factors from before the run again",
        advice,
    )


def _refuse_frozen(node: str, step: int, losses_text: str) -> NoReturn:
    """Raise for a step that could not be finite: name the frozen node, or the base."""
    advice = (
        "its factors times their scale and weight are too large: put an earlier version of it "
        "back, or look at lora_alpha and r in its adapter_config.json"
    )
    if not node:
        advice = "load the base in bfloat16 or float32, and look at its files and at the rows"
    raise DivergedError(
        f"{node or BASE_LABEL}: step {step}: this frozen part alone makes the outputs not finite, "
        f"without the nodes that train; losses of this step: {losses_text or 'not known'}",
        "nothing was saved; the nodes that trained have the factors from before the run again",
        advice,
    )


def _largest(parameters: list[nn.Parameter]) -> Tensor:
    """Return max |x| over this rank's parts of some parameters, (); NaN if there is one."""
    parts = []
    for parameter in parameters:
        part = local_part(parameter).detach()
        # A rank may hold no part of a small factor, and torch has no norm of an empty tensor.
        parts.append(part if part.numel() else part.new_zeros(1))
    return nn.utils.get_total_norm(parts, math.inf)


def _copy(tensor: Tensor) -> Tensor:
    # A sharded tensor stays where it is: its copy has to be sharded in the same way.
    if is_sharded(tensor):
        return tensor.detach().clone()
    return tensor.detach().to("cpu", copy=True)
