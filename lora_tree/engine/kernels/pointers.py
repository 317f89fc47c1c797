"""Pointers: tensors that many launches read, with their addresses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Pointers"]


@dataclass(frozen=True, eq=False, slots=True)
class Pointers:
    """Some tensors in the order of a kernel's arguments.

    Args:
        tensors: they are not moved as long as this is used.
        addresses: of the tensors.
        aligned: all addresses are multiples of 16 bytes.
    """

    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]
    aligned: bool

    @staticmethod
    def to(*tensors: Tensor) -> Pointers:
        """Return the pointers to some tensors."""
        addresses = tuple([tensor.data_ptr() for tensor in tensors])
        return Pointers(tensors, addresses, not any(address % 16 for address in addresses))
