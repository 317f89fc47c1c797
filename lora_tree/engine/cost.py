"""What a form of the sum costs, roughly: calls, bytes and arithmetic, and the machine that turns these into time.

    time = calls · call_s + max(bytes / bytes_per_s, flops / flops_per_s)

A machine's numbers decide only which form runs, never what comes of it beyond rounding, so they are constants: the
CPU's were fitted to two AVX2 cores (`python -m benchmarks routed`), the GPU's to one H100 whose host launches slowly
(`python -m benchmarks gpu`, 64 rows over 64 paths).
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
    """How fast a kind of device is."""

    call_s: float
    bytes_per_s: float
    flops_per_s: float


CPU = Machine(call_s=8e-6, bytes_per_s=1.5e10, flops_per_s=1.2e11)
GPU = Machine(call_s=2e-5, bytes_per_s=2.9e12, flops_per_s=6e14)


def machine(device: torch.device) -> Machine:
    """The constants for a device."""
    return CPU if device.type == "cpu" else GPU


@dataclass(frozen=True)
class Cost:
    """Calls of an operation, bytes read and written, and multiplications and additions."""

    calls: float = 0
    bytes: float = 0
    flops: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.calls + other.calls, self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, on: Machine) -> float:
        """The estimate for one machine."""
        return self.calls * on.call_s + max(
            self.bytes / on.bytes_per_s, self.flops / on.flops_per_s
        )

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
        """The two products of an increment of ``shape`` (…, out, in) and ``rank`` for ``inputs`` vectors.

        ``gathered``: the inputs are taken out of the batch, and the results added back in their places; ``copies``: how
        many different factors of this size are read.
        """
        out, into = shape[-2], shape[-1]
        moved = into + 2 * out + (into + 3 * out if gathered else 0)
        numbers = copies * rank * (into + out) + inputs * moved
        flops = (
            2.0 * (inputs + FEW) * rank * (into + out)
        )  # a product of few inputs runs far below the rate
        return cls(4 if gathered else 2, numbers * dtype.itemsize, flops)
