"""The way from host to device: how an adapter gets into a base's own memory.

    CPU     no link: the host tier is the device tier, and adapters are used where they were read to
    CUDA    page-locked host buffers; one copy each, on a side stream that runs beside the
            computation; a thread that uses the adapter makes its own stream wait for that copy
            alone. What lies in ordinary memory goes through small staging buffers.

The allocator must not hand out a device buffer while a computation still reads it. So `wait`
records the reading stream on the buffer, and torch's allocator reuses the memory only when that
stream has passed this point.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..adapter import Adapter
from ..engine.slab import ALIGNED
from .pack import buffer_of, packed_tensors, placed, tensors, vacate
from .staging import STAGE_BYTES, send_staged

__all__ = ["Arrived", "CudaLink", "Link", "link_to"]


@dataclass(frozen=True, eq=False)
class Arrived:
    """An adapter on its way to the device.

    Args:
        adapter: with its tensors on the device.
        event: complete when the copy is done; None: the numbers are there.
        buffer: the device memory of all its tensors, in which `Link.wait` records the streams that
            read it; None in host memory, which is freed when nothing refers to it.
    """

    adapter: Adapter
    event: Any = None
    buffer: Tensor | None = None

    def vacate(self) -> None:
        """Free the device memory, though plans may still refer to the adapter; see `pack.py`."""
        # The allocator waits for the streams that `Link.wait` recorded, as for any freed memory.
        if self.buffer is not None:
            vacate(self.adapter)


class Link(Protocol):
    """Sends adapters to a device that has memory of its own. Any thread may call any method."""

    def holds(self, adapter: Adapter) -> bool:
        """Return whether an adapter lies on the device already."""
        ...

    def allocate(self, nbytes: int) -> Tensor:
        """Allocate page-locked host memory for a small adapter: (nbytes,) uint8."""
        ...

    def lock_pages(self, address: int, nbytes: int) -> bool:
        """Page-lock host memory, so that it is sent faster; return False if the system refuses."""
        ...

    def unlock_pages(self, address: int) -> None:
        """Undo `lock_pages`; no copy from that memory may be running."""
        ...

    def send(self, adapter: Adapter, again: Adapter | None = None) -> Arrived:
        """Start the transfer of an adapter, without waiting for its end.

        Args:
            adapter: in host memory.
            again: the adapter that an earlier call sent, vacated since; it gets memory again and
                is what arrives. None: a new adapter arrives.
        """
        ...

    def wait(self, arrived: Arrived) -> None:
        """Make work that this thread starts from now on wait for the transfer.

        The buffer is not reused before that work is done.
        """
        ...


class CudaLink:
    """The link to one CUDA device, over a side stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._locked: set[int] = set()
        """Addresses of the host memory that this link has page-locked."""

    def holds(self, adapter: Adapter) -> bool:
        return all(tensor.device == self._device for tensor in tensors(adapter))

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def lock_pages(self, address: int, nbytes: int) -> bool:
        with torch.cuda.device(self._device):
            cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            failed = int(cuda.cudaHostRegister(address, nbytes, 0))
            if failed:
                # CUDA remembers the error, and would raise it at the next launch. So a launch is
                # made here to take it.
                with contextlib.suppress(RuntimeError):
                    torch.ones(1, device=self._device)
                return False
        self._locked.add(address)
        return True

    def unlock_pages(self, address: int) -> None:
        with torch.cuda.device(self._device):
            cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            cuda.cudaHostUnregister(address)
        self._locked.discard(address)

    def send(self, adapter: Adapter, again: Adapter | None = None) -> Arrived:
        host = buffer_of(adapter)
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._stream):
            sent, there = placed(adapter, self._device, again)
            if host is not None and self._is_locked(host):
                there.copy_(host, non_blocking=True)
            else:
                parts = packed_tensors(adapter) if host is None else [host]
                send_staged(parts, there, self._stages(there.numel()), self._copy)
            # `host` may be dropped from now on: torch reuses its own page-locked memory only after
            # the copy, and ours waits for this event.
            event = self._copy_done()
        return Arrived(sent, event, there)

    def _is_locked(self, host: Tensor) -> bool:
        """Return whether memory is page-locked, so that a copy from it does not block the host."""
        return host.data_ptr() in self._locked or host.is_pinned()

    def _stages(self, nbytes: int) -> list[Tensor]:
        """Return page-locked staging buffers, which torch's allocator keeps from the last time."""
        size = min(STAGE_BYTES, -(-nbytes // ALIGNED) * ALIGNED)
        count = 1 if nbytes <= size else 2
        return [self.allocate(size) for _ in range(count)]

    def _copy(self, to: Tensor, stage: Tensor) -> Any:
        to.copy_(stage, non_blocking=True)
        return self._copy_done()

    def _copy_done(self) -> Any:
        """Return an event after all copies that were started so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def wait(self, arrived: Arrived) -> None:
        # The stream of the calling thread; only the caller knows which one will compute.
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arrived.event)
        if arrived.buffer is not None:
            arrived.buffer.record_stream(stream)


def link_to(base: nn.Module) -> Link | None:
    """Return the link to the device with most of a base's weights; None if that is the CPU."""
    held: dict[torch.device, int] = {}
    for parameter in base.parameters():
        if not is_lazy(parameter):  # which has no shape yet
            held[parameter.device] = held.get(parameter.device, 0) + parameter.numel()
    device = max(held, key=lambda d: held[d], default=torch.device("cpu"))
    return CudaLink(device) if device.type == "cuda" else None
