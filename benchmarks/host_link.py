"""A link to a device that is more host memory: transfers can be counted where there is no GPU."""

from __future__ import annotations

import torch
from torch import Tensor

import lora_tree as lt
from lora_tree.cache.link import Arrived
from lora_tree.cache.pack import buffer_of, placed

__all__ = ["HostLink"]


class HostLink:
    """A link whose transfers are copies within host memory.

    Args:
        transfers: how many adapters were sent, each time counted.
        waits: how often an arrival was waited for.
    """

    def __init__(self) -> None:
        self.transfers = 0
        self.waits = 0

    def holds(self, adapter: lt.Adapter) -> bool:
        """Return False: every adapter has to be sent."""
        return False

    def allocate(self, nbytes: int) -> Tensor:
        """Return memory of the host."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def send(self, adapter: lt.Adapter, again: lt.Adapter | None = None) -> Arrived:
        """Copy a packed adapter."""
        self.transfers += 1
        buffer = buffer_of(adapter)
        assert buffer is not None, "one copy for all of an adapter"
        sent, there = placed(adapter, buffer.numel(), torch.device("cpu"), again)
        return Arrived(sent, buffer=there.copy_(buffer))

    def wait(self, arrived: Arrived) -> None:
        """Count it; the copy is whole already."""
        self.waits += 1
