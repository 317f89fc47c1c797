"""Send small tables to a device: index lists, coefficients, addresses.

A copy from ordinary host memory makes CUDA wait until it is done. One from pinned memory is queued
behind the computation like everything else, so that a new batch costs no synchronisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["uploaded"]


def uploaded(numbers: Tensor, device: torch.device) -> Tensor:
    """Return ``numbers`` on ``device``; the host does not wait until they are there.

    Args:
        numbers: in host memory, small.
        device: where they are read, by the stream that is current now.
    """
    if device.type != "cuda" or numbers.device.type != "cpu":
        return numbers.to(device)
    # The pinned copy is dropped at once. torch's pinned allocator knows of the copy that is queued,
    # and hands this memory out again only when it is done.
    return numbers.pin_memory().to(device, non_blocking=True)
