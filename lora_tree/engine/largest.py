"""The largest numbers of factors, found with one pass over the buffers in which they lie and one
wait for a device.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..lowrank import LowRank, spans
from .plan import Plan

__all__ = ["largest_in_plan", "largest_of", "size_key"]

_LARGEST: weakref.WeakKeyDictionary[Adapter, _Known] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Known:
    """The largest number of an adapter.

    Args:
        parameters: its factors that are parameters; only those are ever written to in place.
        writes: how often they had been written to when the number was found.
        largest: the number.
    """

    parameters: Sequence[Tensor]
    writes: int
    largest: float


def size_key(size: float) -> float:
    """Return a key by which sizes are compared; NaN counts as the largest."""
    return math.inf if math.isnan(size) else size


def largest_of(value: LowRank) -> tuple[float, float, float]:
    """Return the largest absolute numbers of A, of B and of the bias; 0 for no bias."""
    a, b, *bias = _largest(value.tensors)
    return a, b, bias[0] if bias else 0.0


def largest_in_plan(plan: Plan, adapters: Iterable[Adapter]) -> float:
    """Return the largest number in any factor of some adapters as a plan has them; NaN if one is
    NaN.

    Args:
        plan: the plan. Its values are not the adapter's own where the base fuses modules that the
            adapter has separately.
        adapters: the adapters of the plan that are looked at.
    """
    largest = [_largest_in(adapter) for adapter in adapters]
    own: set[int] = set()
    for adapter in plan.adapters:
        own.update(map(id, adapter.modules.values()))
    made: list[Tensor] = []
    for terms in plan.terms.values():
        for term in terms:
            # Fused values have scales folded into them, so the adapter's own largest number says
            # nothing of these.
            if id(term.value) not in own and not term.trains:
                made += term.value.tensors
    if made:
        largest += _largest(spans(made))
    if any(map(math.isnan, largest)):
        return math.nan
    return max(largest, default=0.0)


def _largest_in(adapter: Adapter) -> float:
    known = _LARGEST.get(adapter)
    # Versions are compared, not numbers: a look at the numbers waits for a device.
    if known is not None and _writes(known.parameters) == known.writes:
        return known.largest
    tensors: list[Tensor] = []
    for value in adapter.modules.values():
        tensors += value.tensors
    if any(hasattr(tensor, "full_tensor") for tensor in tensors):
        return 0.0  # every rank has a part; `Mergeable.check` keeps these from being merged
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    writes = _writes(parameters)
    largest = max(_largest(spans(tensors)), default=0.0, key=size_key)
    _LARGEST[adapter] = _Known(parameters, writes, largest)
    return largest


def _writes(parameters: Sequence[Tensor]) -> int:
    return sum([parameter._version for parameter in parameters])


def _largest(tensors: Iterable[Tensor]) -> list[float]:
    """Return max |x| of each tensor, NaN if it has one; the host waits once for each device and
    dtype.
    """
    ends: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    places: list[tuple[tuple[torch.device, torch.dtype], int]] = []
    for tensor in tensors:
        plain = tensor.detach()
        if plain.element_size() == 1:
            plain = plain.float()  # torch finds no extremes of 8-bit floats
        key = plain.device, plain.dtype
        extremes = ends.setdefault(key, [])
        places.append((key, len(extremes) // 2))
        extremes += torch.aminmax(plain)
    sizes = {key: _sizes(extremes) for key, extremes in ends.items()}
    return [sizes[key][i] for key, i in places]


def _sizes(ends: Sequence[Tensor]) -> list[float]:
    """Return the larger absolute value of each tensor's minimum and maximum; 0 on the meta device.

    Args:
        ends: a minimum and a maximum for each tensor, in turn.
    """
    if ends[0].is_meta:
        return [0.0] * (len(ends) // 2)
    found: list[float] = torch.stack(list(ends)).abs().view(-1, 2).amax(1).tolist()
    return found
