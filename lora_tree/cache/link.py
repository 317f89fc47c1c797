"""The way from host to device: what a base's own memory asks of the cache.

    CPU     none: the host tier is the device tier, and adapters are used where they were read to
    CUDA    pinned host buffers; one copy each, on a stream of its own, which runs beside the computation.
            Whoever uses the adapter makes its own stream wait for that copy, and no other

What frees a device buffer must wait for the computation that reads it: `wait` records the reading stream on the buffer,
and torch's allocator hands the memory out again only when that stream has got past this point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..adapter import Adapter, over
from .pack import buffer_of, tensors

__all__ = ["Arrived", "CudaLink", "Link", "link_to"]


@dataclass(frozen=True, eq=False)
class Arrived:
    """An adapter on the device, what says that its numbers are there (None: they are), and the buffer they lie in."""

    adapter: Adapter
    event: Any = None
    buffer: Tensor | None = None


class Link(Protocol):
    """How adapters get to a device that has memory of its own."""

    def holds(self, adapter: Adapter) -> bool:
        """Whether an adapter's numbers lie on the device already."""
        ...

    def allocate(self, nbytes: int) -> Tensor:
        """Host memory for an adapter that is to be sent: (nbytes,) uint8."""
        ...

    def send(self, adapter: Adapter) -> Arrived:
        """Start the transfer of a packed adapter; any thread may ask."""
        ...

    def wait(self, arrived: Arrived) -> None:
        """What is computed from now on in this thread finds the numbers there, and keeps them there while it runs."""
        ...


class CudaLink:
    """To one CUDA device, by a side stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def holds(self, adapter: Adapter) -> bool:
        return all(tensor.device == self._device for tensor in tensors(adapter))

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def send(self, adapter: Adapter) -> Arrived:
        host = buffer_of(adapter)
        assert host is not None, "only packed adapters are sent"
        if not host.is_pinned():
            host = (
                host.pin_memory()
            )  # a caller's own buffer: a copy from it would make the host wait
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._stream):
            there = torch.empty(host.shape, dtype=torch.uint8, device=self._device)
            there.copy_(host, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return Arrived(adapter.with_tensors(over(there)), event, there)

    def wait(self, arrived: Arrived) -> None:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arrived.event)
        if arrived.buffer is not None:
            arrived.buffer.record_stream(stream)


def link_to(base: nn.Module) -> Link | None:
    """The link to the device that most of the base's weights are on; None for one that computes in host memory."""
    held: dict[torch.device, int] = {}
    for parameter in base.parameters():
        if not is_lazy(parameter):
            held[parameter.device] = held.get(parameter.device, 0) + parameter.numel()
    device = max(held, key=lambda d: held[d], default=torch.device("cpu"))
    return CudaLink(device) if device.type == "cuda" else None
