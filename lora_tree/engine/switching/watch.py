"""Notice a write to a watched weight that was not ours.

Between two switches the base's owner may load other weights into it, cast it or replace a module.
That makes the copy of the base's own weight stale. Three kinds of evidence show it, the cheapest
first:

    identity    the module shows another parameter, or one of another dtype or shape
    version     torch counted a write in place
    sample      some of the numbers differ: torch does not count what goes through ``.data``

The samples of all weights lie in one buffer for each device and dtype, so that the host waits for a
device once a switch and not once a weight.

Limit: a write through ``.data`` that misses every sampled number is not noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..kernels import sample_launch, usable

__all__ = ["Watch", "WatchedWeight"]

SAMPLES = 64
"""The approximate number of numbers of a weight that are compared."""


@dataclass(eq=False, slots=True)
class WatchedWeight:
    """A parameter of the base, and its state after our last write.

    Args:
        name: its full name, for messages.
        module, attribute: where the base shows it.
        parameter: the object that was there.
    """

    name: str
    module: nn.Module
    attribute: str
    parameter: Tensor
    dtype: torch.dtype = field(init=False)
    shape: torch.Size = field(init=False)
    version: int = field(init=False)

    def __post_init__(self) -> None:
        # Noted separately from the parameter, because other code may replace its `.data` by a
        # tensor of another dtype or shape.
        self.dtype, self.shape = self.parameter.dtype, self.parameter.shape
        self.version = self.parameter._version

    def is_untouched(self) -> bool:
        """Return whether the same parameter is there and torch counted no write. A move to another
        device is no write.
        """
        weight = self.parameter
        # The dictionary first: the weight is nearly always a parameter, this runs for every weight
        # at every switch, and getattr is slow on modules.
        is_there = self.module._parameters.get(self.attribute) is weight
        return (
            (is_there or getattr(self.module, self.attribute, None) is weight)
            and weight._version == self.version
            and weight.dtype == self.dtype
            and weight.shape == self.shape
        )


class Watch:
    """The last recorded state of some weights, with which the next one is compared."""

    def __init__(self) -> None:
        self._last: _Samples | None = None
        self.moves = 0
        """A count that grows when other weights are watched than before, or one has moved."""

    def look(self, weights: Sequence[WatchedWeight]) -> None:
        """Record the present state of the weights; all writes so far were ours."""
        for weight in weights:
            weight.version = weight.parameter._version
        self._last = self._sampled(weights)

    def touched(self, weights: Sequence[WatchedWeight]) -> list[WatchedWeight]:
        """Return the weights that other code has written to or replaced since the last look."""
        found = [weight for weight in weights if not weight.is_untouched()]
        rest = weights
        if found:
            touched = set(found)
            rest = [weight for weight in weights if weight not in touched]
        # Last, because it waits for the device; weights that are known to be touched are left out.
        if rest and self._last is not None:
            found += self._sampled(rest).differing(self._last)
        return found

    def _sampled(self, weights: Sequence[WatchedWeight]) -> _Samples:
        now = _Samples(weights, self._last)
        if self._last is None or not now.has_same_layout(self._last):
            self.moves += 1
        return now

    def forget(self) -> None:
        """Forget the last look, and the weights with it."""
        self._last = None


class _Samples:
    """A sample of each of some weights, in one buffer for every device and dtype.

    Args:
        weights: the weights.
        before: earlier samples. If they are of the same weights in the same places, their tables
            are used again.
    """

    def __init__(self, weights: Sequence[WatchedWeight], before: _Samples | None) -> None:
        self._weights = weights
        self._places = [weight.parameter.data_ptr() for weight in weights]
        # Laying out a launch takes about as long as the launch, and gives the same result from
        # switch to switch.
        if before is not None and before._places == self._places and before._weights == weights:
            groups = before._groups
        else:
            groups = _grouped(weights)
        self._groups: list[_SampleGroup] = groups
        self._buffers: list[Tensor] = [group.take() for group in self._groups]

    def has_same_layout(self, before: _Samples) -> bool:
        """Return whether these are samples of the same weights in the same places."""
        return self._groups is before._groups

    def differing(self, before: _Samples) -> list[WatchedWeight]:
        """Return the weights whose samples have changed; those that were not sampled
        before, too.
        """
        if self.has_same_layout(before) and all(map(torch.equal, self._buffers, before._buffers)):
            return []  # the host waited once for each buffer
        now, then = self._by_weight(), before._by_weight()
        return [weight for weight, sample in now.items() if not _same(sample, then.get(weight))]

    def _by_weight(self) -> dict[WatchedWeight, Tensor]:
        """Return each weight's own sample, on the host."""
        found: dict[WatchedWeight, Tensor] = {}
        for group, buffer in zip(self._groups, self._buffers, strict=True):
            found.update(zip(group.weights, torch.split(buffer.cpu(), group.lengths), strict=True))
        return found


@dataclass(frozen=True, eq=False)
class _SampleGroup:
    """Weights of one dtype on one device.

    Args:
        weights: the weights.
        steps: for each weight, the distance between the numbers that are sampled.
        lengths: for each weight, how many numbers are sampled.
        sampler: one launch that samples all; None where no kernel runs or fits.
    """

    weights: Sequence[WatchedWeight]
    steps: list[int]
    lengths: list[int]
    sampler: Callable[[], Tensor] | None

    def take(self) -> Tensor:
        """Return the samples of all weights, one after the other. They are integers, so that NaN
        equals NaN and 0 differs from −0.
        """
        if self.sampler is not None:
            return self.sampler()
        parts = []
        # The views are not kept: they would keep a weight's old memory alive after it was moved.
        for weight, step in zip(self.weights, self.steps, strict=True):
            tensor = weight.parameter.detach()
            flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
            parts.append(flat[::step])
        numbers = torch.cat(parts)
        return numbers.view(_INTEGERS[numbers.element_size()])


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Size of a number in bytes → the integers of that size."""


def _grouped(weights: Sequence[WatchedWeight]) -> list[_SampleGroup]:
    by_kind: dict[tuple[torch.device, torch.dtype], list[WatchedWeight]] = {}
    for weight in weights:
        kind = weight.parameter.device, weight.parameter.dtype
        by_kind.setdefault(kind, []).append(weight)
    groups = []
    for (device, dtype), group in by_kind.items():
        tensors = [weight.parameter for weight in group]
        # The step is odd, because an even one might sample only the first column of a matrix.
        steps = [max(tensor.numel() // SAMPLES, 1) | 1 for tensor in tensors]
        lengths = [-(-t.numel() // step) for t, step in zip(tensors, steps, strict=True)]
        plain = all(tensor.is_contiguous() and tensor.numel() for tensor in tensors)
        launched = plain and dtype.itemsize in (2, 4) and usable(device)
        sampler = sample_launch(tensors, steps) if launched else None
        groups.append(_SampleGroup(group, steps, lengths, sampler))
    return groups


def _same(now: Tensor, then: Tensor | None) -> bool:
    return then is not None and now.dtype == then.dtype and torch.equal(now, then)
