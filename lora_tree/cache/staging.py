"""Send tensors from ordinary host memory to a device through two small page-locked buffers.

    tensors  ─▶ buffer 0 ─▶ device     one buffer is filled while the other is copied from
             ─▶ buffer 1 ─▶ device

CUDA copies from ordinary memory at half the speed of this, and makes the host wait for each tensor.
To page-lock memory for a whole adapter takes ten times as long as to send it. That pays for a
buffer that is sent from again and again, which the host's tier has; an adapter that lies in the
tree is sent once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.slab import ALIGNED

__all__ = ["STAGE_BYTES", "send_staged"]

STAGE_BYTES = 8 << 20
"""The size of a buffer: so large that the calls for a copy take next to none of its time."""


def send_staged(
    tensors: Iterable[Tensor],
    there: Tensor,
    stages: Sequence[Tensor],
    copy: Callable[[Tensor, Tensor], Any],
) -> None:
    """Copy host tensors into ``there``, back to back as a `Slab` lays them out.

    Args:
        tensors: in any memory.
        there: (bytes,) uint8, on the device; of the size of the slab.
        stages: page-locked buffers, (bytes,) uint8 of one size, a multiple of `ALIGNED`.
        copy: starts a copy, (to, from), and returns an event that ``synchronize`` waits for.
    """
    size = stages[0].numel()
    events: list[Any] = [None] * len(stages)
    turn = begin = filled = 0

    def flush() -> None:
        """Send what the present buffer holds, and begin the next one."""
        nonlocal turn, begin, filled
        events[turn] = copy(there[begin : begin + filled], stages[turn][:filled])
        begin, filled = begin + filled, 0
        turn = (turn + 1) % len(stages)
        if events[turn] is not None:
            # The device may still read what this buffer held before.
            events[turn].synchronize()

    for tensor in tensors:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        taken, nbytes = 0, data.numel()
        while taken < nbytes:
            if filled == size:
                flush()
            part = min(size - filled, nbytes - taken)
            stages[turn][filled : filled + part].copy_(data[taken : taken + part])
            filled += part
            taken += part
        filled += -filled % ALIGNED
    if filled:
        flush()
