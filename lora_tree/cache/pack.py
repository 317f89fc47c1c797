"""Pack an adapter into one buffer: its factors, and the tensors that it carries, back to back.

A file that was read is packed already. If a format had to transpose a factor (fused experts), or if
the adapter was made in memory, it is copied into a buffer once. Then one copy sends all of
it to a device.

The numbers keep the dtype of the file. Merged weights and flattened adapters are made from those,
bit for bit. A side path converts what it needs when it is laid out, so bf16 factors over an fp32
base take half the memory.

On a device an adapter outlives its memory. When it is evicted its buffer is freed, and its tensors
stay as they are, over nothing. When it is sent again they get memory again. So the plans and side
paths that were made of it are valid again, and none of that work is done a second time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from ..adapter import Adapter
from ..engine.slab import ALIGNED, Slab
from ..overlay import over
from ..storage import Allocate

__all__ = [
    "buffer_of",
    "held_bytes",
    "is_vacated",
    "pack",
    "packed_bytes",
    "packed_tensors",
    "placed",
    "tensors",
    "vacate",
]

_BUFFERS: weakref.WeakKeyDictionary[Adapter, Tensor] = weakref.WeakKeyDictionary()
"""Packed adapter → its buffer. To look at hundreds of tensors takes half as long as a transfer."""


def pack(adapter: Adapter, allocate: Allocate) -> Adapter:
    """Return the adapter in one buffer; the same object if it lies in one already."""
    if buffer_of(adapter) is not None:
        return adapter
    memory = allocate(packed_bytes(adapter))
    packed = _adapter_over(memory, adapter)
    # Both adapters have their tensors in the same order.
    for copy, tensor in zip(tensors(packed), tensors(adapter), strict=True):
        copy.copy_(tensor)
    return packed


def packed_bytes(adapter: Adapter) -> int:
    """Return the bytes of the one buffer that an adapter has, or will have once packed."""
    buffer = buffer_of(adapter)
    if buffer is not None:
        return buffer.numel()
    return sum([Slab.padded_bytes(tensor.nbytes) for tensor in packed_tensors(adapter)])


def packed_tensors(adapter: Adapter) -> list[Tensor]:
    """Return the tensors that `pack` copies, in the order in which it lays them out."""
    # By identity: one tensor may stand in two places of an adapter, and is copied once.
    return list({id(tensor): tensor for tensor in tensors(adapter)}.values())


def _adapter_over(memory: Tensor, adapter: Adapter) -> Adapter:
    """Return an adapter like this one whose tensors are uninitialised parts of ``memory``.

    Args:
        memory: (packed_bytes(adapter),) uint8.
        adapter: one that is not packed.
    """
    slab = Slab(memory)
    parts: dict[int, Tensor] = {}
    for tensor in packed_tensors(adapter):
        parts[id(tensor)] = slab.cut(tensor.dtype, tensor.shape)
    return adapter.with_tensors(lambda tensor: parts[id(tensor)])


def buffer_of(adapter: Adapter) -> Tensor | None:
    """Return an adapter's one buffer, (bytes,) uint8; None if it has several, or one with gaps.

    A part of a larger buffer does not count: to send it would send its neighbours as well.
    """
    known = _BUFFERS.get(adapter)
    # An adapter that was vacated has a buffer without bytes until it is given memory again.
    if known is not None and known.untyped_storage().nbytes() == known.numel():
        return known
    found = _find_buffer(adapter)
    if found is not None:
        _BUFFERS[adapter] = found
    return found


def _find_buffer(adapter: Adapter) -> Tensor | None:
    storage: torch.UntypedStorage | None = None
    start = used = count = 0
    for tensor in tensors(adapter):
        if storage is None:
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
        # The second tensor of an adapter that was put together in memory ends the search.
        elif tensor.untyped_storage().data_ptr() != start:
            return None
        if not tensor.is_contiguous():
            return None
        used += tensor.nbytes
        count += 1
    # Each tensor begins at an aligned address, so there may be less than `ALIGNED` bytes before
    # each.
    if storage is None or storage.nbytes() > used + ALIGNED * count:
        return None
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def placed(adapter: Adapter, device: torch.device, again: Adapter | None) -> tuple[Adapter, Tensor]:
    """Return an adapter over one buffer of a device, uninitialised, and that buffer.

    Args:
        adapter: in host memory.
        device: where the memory is taken.
        again: the adapter that an earlier call returned, vacated since; it gets new memory, and
            every tensor made of it is valid again. None: a new one is made.
    """
    nbytes = packed_bytes(adapter)
    if again is None:
        there = torch.empty(nbytes, dtype=torch.uint8, device=device)
        if buffer_of(adapter) is None:
            return _adapter_over(there, adapter), there
        return adapter.with_tensors(over(there)), there
    storage = next(tensors(again)).untyped_storage()
    storage.resize_(nbytes)
    return again, torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def vacate(adapter: Adapter) -> None:
    """Free the memory of a packed adapter, even if plans still refer to its tensors.

    Its tensors may not be read until `placed` has given it memory again.
    """
    one = next(tensors(adapter))
    # All tensors over one buffer share its version. A backward that saved one of them raises.
    torch.autograd.graph.increment_version(one)
    one.untyped_storage().resize_(0)


def is_vacated(adapter: Adapter) -> bool:
    """Return whether `vacate` freed an adapter's memory."""
    return next(tensors(adapter)).untyped_storage().nbytes() == 0


def held_bytes(adapter: Adapter) -> int:
    """Return the bytes of memory that an adapter keeps alive: whole storages, each counted once."""
    sizes: dict[int, int] = {}
    for tensor in tensors(adapter):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def tensors(adapter: Adapter) -> Iterator[Tensor]:
    """Yield the tensors of an adapter: factors, carried tensors of the base, and overrides."""
    for value in adapter.modules.values():
        yield from value.tensors
    yield from adapter.unchanged.values()
    for override in adapter.overrides.values():
        yield override.values
