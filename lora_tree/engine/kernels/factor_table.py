"""FactorTable: the addresses of some nodes' factors at one site, for kernels to read them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..upload import uploaded
from .part import DTYPES
from .pointers import Pointers
from .tiling import KEPT

__all__ = ["FIELDS", "FactorTable", "can_route"]

FIELDS = 8
"""Numbers that a factor table has for a node: for A and then for B the address, the stride of a
row and the place of its gradient; the rank; and one that is not used.
"""

LARGEST_RANK = 128


def can_route(factors: Sequence[tuple[Tensor, Tensor, float]], device: torch.device) -> bool:
    """Return whether the kernels cover some (A (r, in), B (out, r), scale).

    They have to be plain matrices of one dtype on the device, of a rank of at most `LARGEST_RANK`.
    """
    dtype = factors[0][0].dtype
    if dtype not in DTYPES:
        return False
    for A, B, _ in factors:
        if A.ndim != 2 or A.shape[0] > LARGEST_RANK:
            return False
        for factor in (A, B):
            plain = type(factor) in (Tensor, torch.nn.Parameter)
            if not plain or factor.dtype != dtype or factor.device != device:
                return False
            if factor.stride(1) != 1:
                return False
    return True


@dataclass(frozen=True, eq=False)
class FactorTable:
    """The addresses of some nodes' factors at one site.

    It does not keep the factors' memory alive.

    Args:
        numbers: (nodes, FIELDS) int64, on the device.
        scales: (nodes,) fp32, on the device.
        key: changes when a factor moves, or gets another rank or scale; see `key_of`.
        rank: the largest, rounded up to what a tile takes.
        wide: (in, out).
        dtype: of all factors.
        aligned: all begin at multiples of 16 bytes, and all their rows at multiples of 8 numbers.
        grad_sizes: numbers of the gradients of all A, and of all B.
    """

    numbers: Tensor
    scales: Tensor
    key: tuple[object, ...]
    rank: int
    wide: tuple[int, int]
    dtype: torch.dtype
    aligned: bool
    grad_sizes: tuple[int, int]

    @cached_property
    def to_shrink(self) -> Pointers:
        """The tensors of the table that `shrink` reads."""
        return Pointers.to(self.numbers, self.scales)

    @cached_property
    def to_expand(self) -> Pointers:
        """The tensor of the table that `expand` reads."""
        return Pointers.to(self.numbers)

    @cached_property
    def kind(self) -> object:
        """One object for all tables with which a kernel is launched in the same way."""
        return _kind(self.rank, self.wide, self.dtype, self.aligned)

    @staticmethod
    def key_of(factors: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[object, ...]:
        """Return the key of a table of these factors: tables with one key have the same content."""
        key: list[object] = []
        for A, B, scale in factors:
            key += [A.data_ptr(), B.data_ptr(), A.shape[0], scale]
        return tuple(key)

    @staticmethod
    def of(factors: Sequence[tuple[Tensor, Tensor, float]], device: torch.device) -> FactorTable:
        """Return the table of some (A (r, in), B (out, r), scale) for which `can_route` is true."""
        return FactorTable.of_all([factors], device)[0][0]

    @staticmethod
    def of_all(
        sites: Sequence[Sequence[tuple[Tensor, Tensor, float]]], device: torch.device
    ) -> tuple[list[FactorTable], Tensor]:
        """Return the tables of several sites, and the one tensor with the numbers of them all."""
        fields: list[int] = []
        all_scales: list[float] = []
        shapes: list[tuple[int, bool, tuple[int, int]]] = []
        for factors in sites:
            sizes = [0, 0]
            aligned, rank = True, 16
            for A, B, scale in factors:
                for i, factor in enumerate((A, B)):
                    address, stride = factor.data_ptr(), factor.stride(0)
                    fields += [address, stride, sizes[i]]
                    sizes[i] += factor.numel()
                    aligned = aligned and address % 16 == 0 and stride % 8 == 0
                fields += [A.shape[0], 0]
                rank = max(rank, 1 << (A.shape[0] - 1).bit_length())
                all_scales.append(scale)
            # Each site's scales begin at a multiple of 16 bytes. For a pointer that does not,
            # Triton would compile a kernel again.
            all_scales += [0.0] * (-len(factors) % 4)
            shapes.append((rank, aligned, (sizes[0], sizes[1])))
        numbers = torch.tensor(fields, dtype=torch.int64, device="cpu").view(-1, FIELDS)
        scales = torch.tensor(all_scales, dtype=torch.float32, device="cpu")
        lengths = [len(factors) for factors in sites]
        padded = [length + -length % 4 for length in lengths]
        # Tensors made under the caller's inference_mode could not be rewritten outside of it.
        with torch.inference_mode(False), torch.no_grad():
            all_numbers = uploaded(numbers, device)
            parts = torch.split(all_numbers, lengths)
            scale_parts = torch.split(uploaded(scales, device), padded)
        tables = []
        for i, factors in enumerate(sites):
            A, B, _ = factors[0]
            rank, aligned, grad_sizes = shapes[i]
            table = FactorTable(
                parts[i],
                scale_parts[i][: lengths[i]],
                FactorTable.key_of(factors),
                rank,
                (A.shape[1], B.shape[0]),
                A.dtype,
                aligned,
                grad_sizes,
            )
            tables.append(table)
        return tables, all_numbers


@lru_cache(KEPT)
def _kind(rank: int, wide: tuple[int, int], dtype: torch.dtype, aligned: bool) -> object:
    return object()
