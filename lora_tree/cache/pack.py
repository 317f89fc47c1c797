"""One adapter in one buffer: all its factors, and the base's tensors that came along, back to back.

A file that was read is packed already. Where a format had to turn a factor (fused experts), or an adapter was put
together otherwise, it is copied into a buffer once, so that the way to a device is one copy for all of it.

The numbers stay in the dtype of the file: what is merged and what is flattened is made from those, bit for bit; what a
side path computes in is laid out from them when it is needed, and bf16 factors over an fp32 base take half the memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..adapter import Adapter
from ..engine.slab import ALIGNED, Slab
from ..storage import Allocate

__all__ = ["buffer_of", "held_bytes", "pack", "tensors"]


def pack(adapter: Adapter, allocate: Allocate) -> Adapter:
    """The same adapter in one buffer; the same object where it lies in one already."""
    if buffer_of(adapter) is not None:
        return adapter
    spans = {id(t): t for t in tensors(adapter)}
    slab = Slab(allocate(sum(Slab.takes(t.nbytes) for t in spans.values())))
    copies = {key: slab.cut(t.dtype, t.shape).copy_(t) for key, t in spans.items()}
    return adapter.with_tensors(lambda tensor: copies[id(tensor)])


def buffer_of(adapter: Adapter) -> Tensor | None:
    """The bytes of the one buffer of an adapter; None where it lies in several, or not row by row."""
    found = list(tensors(adapter))
    if not found or not all(t.is_contiguous() for t in found):
        return None
    storage = found[0].untyped_storage()
    start = storage.data_ptr()
    if any(t.untyped_storage().data_ptr() != start for t in found):
        return None
    used = sum(t.nbytes for t in found)
    if storage.nbytes() > used + ALIGNED * len(found):
        return None  # a view of something larger, or what a factor was turned from lies beside it
    return torch.empty(0, dtype=torch.uint8, device=found[0].device).set_(storage)


def held_bytes(adapter: Adapter) -> int:
    """Bytes of the memory that an adapter keeps alive."""
    storages = [t.untyped_storage() for t in tensors(adapter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def tensors(adapter: Adapter) -> Iterator[Tensor]:
    """Everything in it that takes memory."""
    for value in adapter.modules.values():
        yield from value.tensors
    yield from adapter.unchanged.values()
