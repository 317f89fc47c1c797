"""Tiling: how the kernels of routed sums cut a batch up.

    group     rows side by side with one list of entries; enough for a tile of inputs, or one row
    tile      inputs of a program
    lanes     ranks of the entries that a program takes
    parts     programs that share a width

These are constants by the size of a batch, never tuned for a machine: they decide the bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .segments import TOGETHER, SegmentSizes

__all__ = ["KEPT", "Tiling", "entries_at_once", "group_of", "width_of"]

LARGEST_GROUP = 16
"""The most rows of a group: a tile of a product has at least this many inputs on a GPU."""

LANES = 64
"""Lanes of a program that takes several entries: one lane is one rank of one entry."""

LEAST, MOST_PARTS = 128, 64
"""The least width of a part, and the most parts that a single input has."""

LARGEST_TILE, PROGRAMS = 64, 64
"""The most inputs of a program, and the number of programs that a launch has if it can."""

KEPT = 1024
"""Tilings, and kinds of tables, that are remembered."""


def group_of(tokens: int, rows: int = LARGEST_GROUP) -> int:
    """Return how many rows make a group: enough for one tile of inputs, or a single row.

    >>> group_of(1), group_of(6), group_of(128)
    (16, 2, 1)
    """
    return 1 if rows == 1 else max(1, LARGEST_GROUP // max(tokens, 1))


def width_of(rank: int, compute: torch.dtype) -> int:
    """Return how much of a width `outer` takes at once, so that its tiles fit into a GPU's shared
    memory and registers.

    >>> width_of(16, torch.bfloat16), width_of(128, torch.float32)
    (64, 32)
    """
    narrow_from = 32 if compute == torch.float32 else 64
    return 64 if rank <= narrow_from else 32


def entries_at_once(rank: int) -> int:
    """Return how many entries fill the lanes of a program.

    >>> entries_at_once(16), entries_at_once(32), entries_at_once(128)
    (4, 2, 1)
    """
    return max(1, min(TOGETHER, LANES // rank))


@dataclass(frozen=True, eq=False)
class Tiling:
    """The sizes by which kernels cut a batch's inputs up: constants by its size, never tuned.

    Args:
        tokens: inputs of a row.
        inputs: of a group.
        tile: inputs of a program that shrinks.
        wide_tile: inputs of a program that expands.
        most_parts: the most programs that share a width.
        compute: the dtype in which factors and inputs are multiplied; sums are fp32.
    """

    tokens: int
    inputs: int
    tile: int
    wide_tile: int
    most_parts: int
    compute: torch.dtype

    @staticmethod
    @lru_cache(KEPT)
    def of(sizes: SegmentSizes, tokens: int, compute: torch.dtype) -> Tiling:
        """Return the tiling of a batch whose rows have ``tokens`` inputs each.

        It is one object for all batches of a size, so that a launch knows it by identity.
        """
        inputs = sizes.group * tokens
        if inputs == 1:
            return Tiling(tokens, 1, 1, 1, MOST_PARTS, compute)
        wide_tile = tile = 16
        while wide_tile < LARGEST_TILE and wide_tile < inputs:
            wide_tile *= 2
        # Larger tiles read factors less often, and leave fewer programs.
        while tile < wide_tile and sizes.groups * (inputs // (2 * tile)) >= PROGRAMS:
            tile *= 2
        programs = sizes.groups * -(-inputs // tile)
        if sizes.group > 1:
            programs = 2 * sizes.rows  # each entry has programs of its own
        parts = 1
        while parts < LARGEST_GROUP and parts * programs < PROGRAMS:
            parts *= 2
        return Tiling(tokens, inputs, tile, wide_tile, parts, compute)

    @property
    def room(self) -> int:
        """Inputs of a group in whole tiles of both kinds."""
        return -(-self.inputs // self.wide_tile) * self.wide_tile

    def parts(self, width: int) -> int:
        """Return how many programs share a width: each takes at least `LEAST` of it."""
        parts = self.most_parts
        while parts > 1 and width < parts * LEAST:
            parts //= 2
        return parts
