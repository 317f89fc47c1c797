"""Tensors over one buffer: the factors of an adapter in the memory that it was read into."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["apart", "over"]


def over(memory: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function: tensor → a view of ``memory`` with the tensor's shape, strides and offset.

    Nothing is copied. The tensors may be those of an outline on the meta device, which all share
    one storage.

    Args:
        memory: (bytes,) uint8, aligned for every dtype.

    >>> outline = torch.empty(16, dtype=torch.uint8, device="meta")[8:].view(torch.float32)
    >>> over(torch.arange(4.0).view(torch.uint8))(outline)
    tensor([2., 3.])
    """
    # One view of all the memory for each dtype. An adapter has hundreds of tensors, and each then
    # takes one call, `as_strided`, instead of three.
    views: dict[torch.dtype, Tensor] = {}

    def there(tensor: Tensor) -> Tensor:
        dtype = tensor.dtype
        if dtype not in views:
            # A view of another dtype needs a whole number of items, and the memory may end with a
            # tensor of a narrower dtype.
            whole_items = memory.numel() // dtype.itemsize * dtype.itemsize
            views[dtype] = memory[:whole_items].view(dtype)
        return views[dtype].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return there


def apart(tensor: Tensor) -> Tensor:
    """Return the tensor; a copy if it is a part of a larger buffer.

    torch pickles the whole buffer that a tensor lies in, and would pickle it once for each factor.
    """
    if tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size():
        return tensor
    own = tensor.detach().clone()
    if isinstance(tensor, Parameter):
        return Parameter(own, requires_grad=tensor.requires_grad)
    return own.requires_grad_(tensor.requires_grad)
