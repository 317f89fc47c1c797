"""Slab: tensors back to back in one buffer, each from an aligned beginning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ALIGNED", "Slab"]

ALIGNED = 64
"""Bytes: the widest vector loads want addresses that are multiples of it."""


class Slab:
    """Memory that is cut up into tensors: one allocation for all of them.

    Args:
        memory: (bytes,) uint8.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._end = memory, 0

    @staticmethod
    def padded_bytes(nbytes: int) -> int:
        """Return the bytes of a slab that a part of ``nbytes`` takes."""
        return -(-nbytes // ALIGNED) * ALIGNED

    def cut(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """Return the next part as an uninitialised tensor."""
        begin, nbytes = self._end, math.prod(shape) * dtype.itemsize
        self._end += self.padded_bytes(nbytes)
        # A view: the buffer lives as long as any tensor that was cut from it.
        return self._memory[begin : begin + nbytes].view(dtype).view(shape)
