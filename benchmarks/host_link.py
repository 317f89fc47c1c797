"""A link to host memory in place of a device: it counts transfers where there is no GPU."""

from __future__ import annotations

import torch
from torch import Tensor

import lora_tree as lt
from lora_tree.cache.link import Arrived
from lora_tree.cache.pack import buffer_of, packed_tensors, placed
from lora_tree.cache.staging import send_staged
from lora_tree.engine.slab import ALIGNED

__all__ = ["HostLink"]


class HostLink:
    """A link whose transfers are copies within host memory.

    Args:
        transfers: how many times an adapter was sent.
        waits: how many times an arrival was awaited.
        locked: address → bytes of page-locked memory.
    """

    def __init__(self) -> None:
        self.transfers = 0
        self.waits = 0
        self.locked: dict[int, int] = {}

    def holds(self, adapter: lt.Adapter) -> bool:
        """Return False: every adapter has to be sent."""
        return False

    def allocate(self, nbytes: int) -> Tensor:
        """Return host memory."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def lock_pages(self, address: int, nbytes: int) -> bool:
        """Record memory as page-locked."""
        self.locked[address] = nbytes
        return True

    def unlock_pages(self, address: int) -> None:
        """Record memory as no longer page-locked."""
        del self.locked[address]

    def send(self, adapter: lt.Adapter, again: lt.Adapter | None = None) -> Arrived:
        """Copy an adapter; through small buffers if it is not packed in one buffer."""
        self.transfers += 1
        buffer = buffer_of(adapter)
        sent, there = placed(adapter, torch.device("cpu"), again)
        if buffer is None:
            stages = [self.allocate(ALIGNED) for _ in range(2)]
            send_staged(packed_tensors(adapter), there, stages, self._copy)
        else:
            there.copy_(buffer)
        return Arrived(sent, buffer=there)

    def _copy(self, to: Tensor, stage: Tensor) -> None:
        to.copy_(stage)

    def wait(self, arrived: Arrived) -> None:
        """Count the wait; the copy is complete already."""
        self.waits += 1
