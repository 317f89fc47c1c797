"""LogPart: one weight of a switch by undo log, laid out as a kernel reads and writes it.

    codes      for every 32 columns of a row 8 bytes: byte j has columns j, j + 8, j + 16, j + 24
    ends       for every row of a tile, where its exceptions end in the tile's list
    columns    the list: which column of its row an exception is in
    bits       the list: the base's own bits there

The kernel holds the four columns of a byte in one thread, so packing them moves nothing between
threads. A list is sorted by rows, because all rows of a tile are read and written at once: first
the first exception of each row, then the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..slab import Slab
from .part import MergeTerm

__all__ = ["BARE", "NO_TERMS", "SHARE", "WIDTH", "LaidTerms", "LogMemory", "LogPart"]

BARE = 0
"""The state of a tile that holds the base's own numbers."""

WIDTH = 64
"""Columns of a tile: half as many as in `merge`, so that everything that a thread has to hold of a
tile fits into its registers. It changes no bits: a number of a product depends on its row and its
column alone.
"""

SHARE = 128
"""At first a tile has room for one exception in this many of its numbers."""

INTEGERS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, eq=False)
class LogMemory:
    """The memory of one weight's log, on its device.

    Args:
        codes: (batch, rows, 8 · ⌈cols / 32⌉) uint8, four codes a byte.
        states: (tiles,) int32: the terms in each tile, by the numbers that the log gave them.
        depths: (tiles,) int32: how many exceptions the row with the most of them has.
        ends: (tiles, 1 + height), integers that can hold the room: 0, and where each row ends.
        columns: (tiles, room) uint8.
        bits: (tiles, room): the base's own bits.
    """

    codes: Tensor
    states: Tensor
    depths: Tensor
    ends: Tensor
    columns: Tensor
    bits: Tensor

    @staticmethod
    def of(weight: Tensor, height: int, *, share: int = SHARE) -> LogMemory:
        """Return the memory of a log of ``weight``, which has no increment in it.

        Args:
            weight: (batch, rows, cols).
            height: rows of a tile.
            share: a tile has room for one exception in ``share`` of its numbers.
        """
        batch, rows, cols = weight.shape
        tiles = batch * -(-rows // height) * -(-cols // WIDTH)
        room = -(-min(rows, height) * min(cols, WIDTH) // share)
        counter = torch.uint8 if room <= torch.iinfo(torch.uint8).max else torch.int16
        bits = INTEGERS[weight.itemsize]
        # One allocation, because a base has hundreds of logs. The tables that have to be zeros come
        # first.
        zeros = ((torch.int32, (tiles,)), (counter, (tiles, height + 1)))
        others = (
            (torch.int32, (tiles,)),
            (torch.uint8, (batch, rows, 8 * -(-cols // 32))),
            (torch.uint8, (tiles, room)),
            (bits, (tiles, room)),
        )
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in (*zeros, *others)]
        padded_sizes = [Slab.padded_bytes(size) for size in sizes]
        memory = torch.empty(sum(padded_sizes), dtype=torch.uint8, device=weight.device)
        memory[: sum(padded_sizes[: len(zeros)])].zero_()
        slab = Slab(memory)
        states, ends, depths, codes, columns, exact = (
            slab.cut(dtype, shape) for dtype, shape in (*zeros, *others)
        )
        return LogMemory(codes, states, depths, ends, columns, exact)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(table.nbytes for table in self._tables)

    @cached_property
    def room(self) -> int:
        """The number of exceptions that a tile has room for."""
        return self.columns.shape[1]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """The addresses of its tensors, in the order in which the kernel's table has them."""
        return tuple([table.data_ptr() for table in self._tables])

    @property
    def _tables(self) -> tuple[Tensor, ...]:
        return self.codes, self.states, self.depths, self.ends, self.columns, self.bits


@dataclass(frozen=True, eq=False)
class LaidTerms:
    """The terms of one weight, as numbers for the kernel's table.

    It is made once and used in every switch from or to these terms: reading the address and the
    layout of each factor takes longer than everything else that the host does in a switch.

    Args:
        terms: of one dtype and layout, in the order of the sum; they keep the factors alive.
        slots, ratios: the ones that `merge.add_slots` makes of them.
        scale: of the last slot.
        layout: the factors' dtype, and whether they lie transposed; None if there are no terms.
        aligned: whether all factors begin at multiples of 16 bytes, row by row.
        even: whether all ratios are 1.
    """

    terms: Sequence[MergeTerm]
    slots: tuple[int, ...]
    ratios: tuple[float, ...]
    scale: float
    layout: tuple[torch.dtype, bool] | None
    aligned: bool
    even: bool


NO_TERMS = LaidTerms((), (), (), 0.0, None, aligned=True, even=True)
"""The base's own numbers."""


@dataclass(frozen=True, eq=False)
class LogPart:
    """``weight ← round_once(W0 + Σ new)``, where W0 + Σ old is in it now.

    Args:
        weight: (batch, rows, cols), a view of the weight itself.
        memory: its log.
        old: the terms that are in it, as they were put in; none: it holds W0. Tiles in another
            state than theirs are left as they are.
        new: the terms to put in, in the layout of the old ones; none: W0.
        states: of a tile that holds the old terms, and of one that holds the new ones.
    """

    weight: Tensor
    memory: LogMemory
    old: LaidTerms
    new: LaidTerms
    states: tuple[int, int]
