"""Slab: tensors back to back in one buffer, each from an aligned beginning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ALIGNED", "Slab"]

ALIGNED = 64  # bytes; what the widest vector loads want


class Slab:
    """Memory that is cut up into tensors: one allocation for all of them.

    Args:
        memory: (bytes,) uint8.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._end = memory, 0

    @staticmethod
    def takes(nbytes: int) -> int:
        """Bytes of it that a part of ``nbytes`` takes."""
        return -(-nbytes // ALIGNED) * ALIGNED

    def cut(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The next part of it, as a tensor; whatever is in it."""
        begin, nbytes = self._end, math.prod(shape) * dtype.itemsize
        self._end += self.takes(nbytes)
        return self._memory[begin : begin + nbytes].view(dtype).view(shape)
