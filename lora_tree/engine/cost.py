"""Estimate the time of a form of the sum: its calls, bytes and arithmetic, on a machine that turns
these into seconds.

    time = calls · call_s + max(bytes / bytes_per_s, flops / flops_per_s)

A machine's numbers decide which form runs, and of its result only the rounding, so they are
constants. The CPU's were fitted to two AVX2 cores (`python -m benchmarks routed`), the GPU's to one
H100 whose host launches slowly (`python -m benchmarks gpu`, 64 rows over 64 paths).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Cost", "Machine", "machine"]

FEW = 64
"""A product of so many inputs runs at half of a machine's rate."""


@dataclass(frozen=True)
class Machine:
    """The speed of a kind of device."""

    call_s: float
    bytes_per_s: float
    flops_per_s: float


CPU = Machine(call_s=8e-6, bytes_per_s=1.5e10, flops_per_s=1.2e11)
GPU = Machine(call_s=2e-5, bytes_per_s=2.9e12, flops_per_s=6e14)


def machine(device: torch.device) -> Machine:
    """Return the constants for a device."""
    return CPU if device.type == "cpu" else GPU


@dataclass(frozen=True)
class Cost:
    """Calls of an operation, bytes read and written, and multiplications and additions."""

    calls: float = 0
    bytes: float = 0
    flops: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.calls + other.calls, self.bytes + other.bytes, self.flops + other.flops)

    def times(self, count: int) -> Cost:
        """Return the cost of doing it ``count`` times."""
        return Cost(self.calls * count, self.bytes * count, self.flops * count)

    def seconds(self, on: Machine) -> float:
        """Return the estimate for one machine."""
        # Memory and arithmetic overlap, so the slower of the two counts.
        working = max(self.bytes / on.bytes_per_s, self.flops / on.flops_per_s)
        return self.calls * on.call_s + working

    @classmethod
    def product(
        cls,
        shape: Sequence[int],
        rank: int,
        inputs: int,
        dtype: torch.dtype,
        *,
        gathered: bool,
        copies: int = 1,
    ) -> Cost:
        """Return the cost of the two products of an increment of ``shape`` (…, out, in) and
        ``rank``.

        Args:
            shape: of the increment.
            rank: of the increment.
            inputs: how many vectors go through it.
            dtype: of the factors.
            gathered: the inputs are taken out of the batch, and the results added back in their
                places.
            copies: how many different factors of this size are read.
        """
        out, into = shape[-2], shape[-1]
        # The input is read, the output read and written.
        moved = into + 2 * out
        calls = 2
        if gathered:
            # The input is copied, and so is the result before it is added in its place.
            moved += into + 3 * out
            calls = 4
        numbers = copies * rank * (into + out) + inputs * moved
        # A product of few inputs runs far below the machine's rate.
        flops = 2.0 * (inputs + FEW) * rank * (into + out)
        return cls(calls, numbers * dtype.itemsize, flops)
