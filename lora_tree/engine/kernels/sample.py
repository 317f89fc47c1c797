"""A sample of many tensors in one launch, for the watch over written weights to compare.

    addresses ──▶ a program for each tensor ──▶ some of its numbers, at fixed steps, as integers in
    one buffer

Stock operations would cut a view of each tensor and concatenate them; on a GPU these are a thousand
small calls a switch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..upload import uploaded
from .part import on

__all__ = ["lay_out_samples"]

INTEGERS = {2: (torch.int16, tl.int16), 4: (torch.int32, tl.int32)}
"""Size of a number in bytes → the integers as which its bits are read."""


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(table, out, NUMBER: tl.constexpr, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sample one tensor a program: the table has its address, step, count, and place in ``out``."""
    fields = table + tl.program_id(0) * 4
    address = tl.load(fields).to(tl.pointer_type(NUMBER))
    step = tl.load(fields + 1)
    i = tl.arange(0, MOST)
    mask = i < tl.load(fields + 2)
    numbers = tl.load(address + i * step, mask=mask, other=0)
    tl.store(out + tl.load(fields + 3) + i, numbers, mask=mask)


def lay_out_samples(tensors: Sequence[Tensor], steps: Sequence[int]) -> Callable[[], Tensor]:
    """Return a function that takes a sample of some tensors, as long as these are not moved.

    Args:
        tensors: on one device, of 2 or 4 bytes a number, each laid out row by row and not empty.
        steps: for each tensor, the distance between its samples, in numbers.

    Returns:
        A function that returns a new buffer of integers: the samples of all tensors, one after the
        other.
    """
    # Everything is computed here, so that taking the sample is one launch and asks no tensor.
    fields: list[int] = []
    total = most = 0
    for tensor, step in zip(tensors, steps, strict=True):
        count = -(-tensor.numel() // step)
        fields += [tensor.data_ptr(), step, count, total]
        total += count
        most = max(most, count)
    device = tensors[0].device
    table = uploaded(torch.tensor(fields, dtype=torch.int64, device="cpu"), device)
    dtype, number = INTEGERS[tensors[0].element_size()]
    # Triton wants the width of a block as a power of two; the mask cuts the rest off.
    programs, width = len(tensors), 1 << (most - 1).bit_length()

    def take() -> Tensor:
        out = torch.empty(total, dtype=dtype, device=device)
        with on(device):
            _kernel[(programs,)](table, out, NUMBER=number, MOST=width, num_warps=1)
        return out

    return take
