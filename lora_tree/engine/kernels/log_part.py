"""LogPart: one weight of a switch by undo log, laid out as a kernel reads and writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .part import MergeTerm

__all__ = ["BARE", "SHARE", "LogMemory", "LogPart", "lie_of"]

BARE = 0
"""The state of a tile that holds the base's own numbers."""

WIDTH = 128
"""Columns of a tile."""

SHARE = 128
"""A tile has room for one exception in so many numbers at first."""

INTEGERS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, eq=False)
class LogMemory:
    """The memory of one weight's log, on its device.

    Args:
        codes: (batch, rows, ⌈cols / 4⌉) uint8, four codes a byte.
        states: (tiles,) int32: which terms a tile has in it, by the numbers that the log gave them.
        counts: (tiles,) int32: how many exceptions it has.
        places: (tiles, room) int16: where in the tile they are.
        bits: (tiles, room): the base's own bits there.
        height: rows of a tile.
    """

    codes: Tensor
    states: Tensor
    counts: Tensor
    places: Tensor
    bits: Tensor
    height: int

    @staticmethod
    def of(weight: Tensor, height: int, *, share: int = SHARE) -> LogMemory:
        """Return the memory of a log of ``weight``, which has no increment in it.

        Args:
            weight: (batch, rows, cols).
            height: rows of a tile.
            share: a tile has room for one exception in so many of its numbers.
        """
        batch, rows, cols = weight.shape
        tiles = batch * -(-rows // height) * -(-cols // WIDTH)
        room = -(-min(rows, height) * min(cols, WIDTH) // share)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=weight.device)

        return LogMemory(
            empty(batch, rows, -(-cols // 4), dtype=torch.uint8),
            torch.zeros(tiles, dtype=torch.int32, device=weight.device),
            empty(tiles, dtype=torch.int32),
            empty(tiles, room, dtype=torch.int16),
            empty(tiles, room, dtype=INTEGERS[weight.itemsize]),
            height,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        tables = self.codes, self.states, self.counts, self.places, self.bits
        return sum(table.nbytes for table in tables)

    @property
    def tiles(self) -> int:
        """How many tiles the weight has."""
        return len(self.counts)

    @property
    def room(self) -> int:
        """How many exceptions a tile has room for."""
        return self.places.shape[1]

    @property
    def addresses(self) -> list[int]:
        """Where codes, states, counts, places and bits are."""
        return [
            self.codes.data_ptr(),
            self.states.data_ptr(),
            self.counts.data_ptr(),
            self.places.data_ptr(),
            self.bits.data_ptr(),
        ]


@dataclass(frozen=True, eq=False)
class LogPart:
    """``weight ← round_once(W0 + Σ new)``, where W0 + Σ old is in it now.

    Args:
        weight: (batch, rows, cols), a view of the weight itself.
        memory: its log.
        old: the terms that are in it, as they were put in; none: it holds W0. Tiles in another
            state than theirs are left as they are.
        new: the terms to put in, alike and laid as the old ones; none: W0.
        states: the numbers of both.
    """

    weight: Tensor
    memory: LogMemory
    old: Sequence[MergeTerm]
    new: Sequence[MergeTerm]
    states: tuple[int, int]

    @property
    def lie(self) -> tuple[torch.dtype, bool, bool]:
        """The factors' dtype, whether they lie transposed, and whether all are aligned."""
        dtype, turned = lie_of(self.old or self.new)
        aligned = True
        for term in (*self.old, *self.new):
            for factor in (term.left, term.right):
                stride = factor.stride(-1 if turned else -2)
                aligned = aligned and factor.data_ptr() % 16 == 0 and stride % 8 == 0
                aligned = aligned and (len(factor) == 1 or factor.stride(0) % 16 == 0)
        return dtype, turned, aligned


def lie_of(terms: Sequence[MergeTerm]) -> tuple[torch.dtype, bool]:
    """Return the dtype of some terms' factors, and whether they lie transposed."""
    first = terms[0]
    return first.left.dtype, first.left.stride(-1) != 1 or first.right.stride(-1) != 1
