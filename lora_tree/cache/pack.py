"""Pack an adapter into one buffer: its factors, and the tensors that it carries, back to back.

A file that was read is packed already. If a format had to transpose a factor (fused experts), or if
the adapter was put together otherwise, it is copied into a buffer once. Then one copy sends all of
it to a device.

The numbers keep the dtype of the file. Merged weights and flattened adapters are made from those,
bit for bit. A side path converts what it needs when it is laid out, so bf16 factors over an fp32
base take half the memory.

On a device an adapter outlives its memory. When it is evicted its buffer is freed, and its tensors
stay as they are, over nothing. When it is sent again they get memory again. So the plans and side
paths that were made of it are good again, and none of that work is done a second time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..adapter import Adapter
from ..engine.slab import ALIGNED, Slab
from ..overlay import over
from ..storage import Allocate

__all__ = ["buffer_of", "held_bytes", "is_vacated", "pack", "placed", "tensors", "vacate"]


def pack(adapter: Adapter, allocate: Allocate) -> Adapter:
    """Return the adapter in one buffer; the same object if it lies in one already."""
    if buffer_of(adapter) is not None:
        return adapter
    # By identity: one tensor may stand in two places of an adapter, and is copied once.
    distinct = {id(tensor): tensor for tensor in tensors(adapter)}
    slab = Slab(allocate(sum(Slab.takes(tensor.nbytes) for tensor in distinct.values())))
    copies: dict[int, Tensor] = {}
    for key, tensor in distinct.items():
        copies[key] = slab.cut(tensor.dtype, tensor.shape).copy_(tensor)
    return adapter.with_tensors(lambda tensor: copies[id(tensor)])


def buffer_of(adapter: Adapter) -> Tensor | None:
    """Return an adapter's one buffer, (bytes,) uint8; None if it has several, or one with gaps.

    A part of a larger buffer is no buffer of its own: to send it would send what lies beside it.
    """
    found = list(tensors(adapter))
    if not found or not all(t.is_contiguous() for t in found):
        return None
    storage = found[0].untyped_storage()
    start = storage.data_ptr()
    if any(t.untyped_storage().data_ptr() != start for t in found):
        return None
    used = sum(t.nbytes for t in found)
    # Each tensor begins at an aligned address, so there may be less
    # than `ALIGNED` bytes before each.
    if storage.nbytes() > used + ALIGNED * len(found):
        return None
    return torch.empty(0, dtype=torch.uint8, device=found[0].device).set_(storage)


def placed(
    adapter: Adapter, nbytes: int, device: torch.device, again: Adapter | None
) -> tuple[Adapter, Tensor]:
    """Return a packed adapter over memory of a device, uninitialised, and that memory.

    Args:
        adapter: packed.
        nbytes: of its buffer.
        device: where the memory is taken.
        again: what this returned for the adapter before, without its memory by now; it gets new
            memory, and every tensor made of it is good again. None: there is none.
    """
    if again is None:
        there = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return adapter.with_tensors(over(there)), there
    storage = next(tensors(again)).untyped_storage()
    storage.resize_(nbytes)
    return again, torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def vacate(adapter: Adapter) -> None:
    """Free the memory of a packed adapter; whatever refers to its tensors keeps none of it.

    Its tensors may not be read until `placed` has given it memory again.
    """
    one = next(tensors(adapter))
    # All tensors over one buffer share its version. A backward that saved one of them raises.
    torch.autograd.graph.increment_version(one)
    one.untyped_storage().resize_(0)


def is_vacated(adapter: Adapter) -> bool:
    """Return whether `vacate` took an adapter's memory."""
    return next(tensors(adapter)).untyped_storage().nbytes() == 0


def held_bytes(adapter: Adapter) -> int:
    """Return the bytes of memory that an adapter keeps alive: whole storages, each counted once."""
    sizes: dict[int, int] = {}
    for tensor in tensors(adapter):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def tensors(adapter: Adapter) -> Iterator[Tensor]:
    """Yield the tensors of an adapter: its factors, and the base's that it carries or replaces."""
    for value in adapter.modules.values():
        yield from value.tensors
    yield from adapter.unchanged.values()
    for override in adapter.overrides.values():
        yield override.values
