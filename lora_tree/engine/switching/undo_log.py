"""Undo log: two bits a weight, and a few exceptions, that bring the base's own numbers back.

A merge loses nothing but its rounding. With D the increment of a path,

    W' = round(W0 + D)        what the weight holds
    guess = round(W' − D)     which is W0, or a neighbour of it
    code = bits(W0) − bits(guess) + 1

where bits(x) are the bits of x read as an integer: neighbours of one sign differ by 1. Nearly all
codes are 0, 1, 2 or 3. The others are exceptions: a list of places and of W0's own bits there. A
switch from path to path goes block by block: it computes the old increment and W0, then the new
increment, W' and the codes.

Law: D has to be computed again with the same bits, from the same factors in blocks of the same
shape. So a log holds the factors that are merged, a copy of those that train, and the number of
threads.

The codes take 1/8 of a 16-bit weight and 1/16 of a 32-bit one. An exception takes 6 or 8 bytes.
They are rare while increments are small beside the weights (`benchmarks switch` prints the size).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ...lowrank import LowRank, stacked
from ...sites import Site
from ..arithmetic import LARGE_BLOCK, Scratch, compute_dtype, write_sum

__all__ = ["UndoLog", "add_in_blocks", "can_log", "unshared"]

BLOCK = 1 << 18
"""Numbers in a block on a CPU, and `LARGE_BLOCK` on a device with memory of its own. They decide
the bits, because sums are computed block by block.
"""

CODES = 4
"""The number of codes that two bits can hold; it is also the number of codes in a byte."""

INTEGERS = {2: torch.int16, 4: torch.int32}
"""Size of a number in bytes → the integers of that size."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def can_log(site: Site, weight: Tensor) -> bool:
    """Return whether a weight can have a log: its numbers lie row by row, in 16 or 32 bits."""
    if weight.dtype not in DTYPES or not weight.numel():
        return False
    return site.rows(weight).data_ptr() == weight.data_ptr()


@dataclass(frozen=True, eq=False)
class _BlockLog:
    """The codes and exceptions that bring a block back.

    Args:
        values: the terms that are in it.
        threads: the number of threads that computed their products.
        codes: (⌈numbers / 4⌉,) uint8.
        places: (exceptions,) int32: where in the block they are.
        bits: (exceptions,): the base's own bits there.
    """

    values: Sequence[LowRank]
    threads: int
    codes: Tensor
    places: Tensor
    bits: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.places.nbytes + self.bits.nbytes


class UndoLog:
    """The log of one site's weight.

    Args:
        site: the site.
        weight: its weight, which holds the base's own numbers now.
    """

    def __init__(self, site: Site, weight: Tensor) -> None:
        self.site = site
        self._device = weight.device
        # None: the block holds the base's own numbers.
        self._blocks: list[_BlockLog | None] = [None] * len(list(_parts(site.rows(weight))))

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the exceptions."""
        return sum(block.nbytes for block in self._blocks if block is not None)

    @property
    def is_bare(self) -> bool:
        """True: every block holds the base's own numbers."""
        return all(block is None for block in self._blocks)

    def write(self, weight: Tensor, values: Sequence[LowRank], scratch: Scratch) -> None:
        """``weight ← round_once(W0 + Σ values)``, in place; no values: W0.

        Each block is finished before the next is begun. If this fails half-way, the log knows what
        each block holds, so it can be called again, with other values too.

        Args:
            weight: the log's weight, as the last call left it.
            values: on the weight's device.
            scratch: buffers.
        """
        if weight.device != self._device:
            self._restore_moved(weight, scratch)
        rows = self.site.rows(weight)
        olds: dict[int, _Sides] = {}
        values = [unshared(value) for value in values]
        new = _sides(self.site, values, weight) if values else None
        threads = torch.get_num_threads()
        for i, (batch, part) in enumerate(_parts(rows)):
            block = rows[batch, part]
            own = self._own(i, block, batch, part, olds)
            if new is None:
                block.copy_(own)
                self._blocks[i] = None
                continue
            after = torch.empty_like(own)
            _add_block(after, own, new, batch, part, scratch)
            made = _encoded(own, after, _delta(new, batch, part), values, threads)
            block.copy_(after)
            self._blocks[i] = made

    def own(self, weight: Tensor) -> Tensor:
        """Return the base's own numbers, as a tensor of the weight's shape."""
        found = torch.empty_like(weight, requires_grad=False)
        rows, into = self.site.rows(weight.detach().to(self._device)), self.site.rows(found)
        olds: dict[int, _Sides] = {}
        for i, (batch, part) in enumerate(_parts(rows)):
            into[batch, part].copy_(self._own(i, rows[batch, part], batch, part, olds))
        return found

    # ------------------------------------------------------------------ private
    def _own(
        self, i: int, block: Tensor, batch: int, part: slice, olds: dict[int, _Sides]
    ) -> Tensor:
        """Return a block's own numbers, in new memory.

        Args:
            i: the block's number.
            block: what it holds now.
            batch, part: its place.
            olds: the factors that were stacked for other blocks of this call.
        """
        known = self._blocks[i]
        if known is None:
            return block.clone()
        # Nearly always the same for all blocks; two kinds after a call that failed half-way.
        sides = olds.get(id(known.values))
        if sides is None:
            sides = olds[id(known.values)] = _sides(self.site, known.values, block)
        with _threads(known.threads):
            delta = _delta(sides, batch, part)
        return _decoded(block, delta, known)

    def _restore_moved(self, weight: Tensor, scratch: Scratch) -> None:
        """Bring a weight that was moved to another device back to its own numbers.

        Another device computes an increment with other bits, so it is taken out where it was put
        in.
        """
        there = weight.detach().to(self._device, copy=True)
        self._device = there.device
        self.write(there, (), scratch)
        weight.copy_(there)
        self._device = weight.device
        # The blocks may have another size there; all of them are bare.
        self._blocks = [None] * len(list(_parts(self.site.rows(weight))))


def add_in_blocks(
    site: Site, target: Tensor, source: Tensor, values: Sequence[LowRank], scratch: Scratch
) -> None:
    """``target ← round_once(source + Σ values)`` with the bits that a log writes.

    Args:
        site: of the weight.
        target: the weight, for which `can_log` is true.
        source: the base's own numbers, on any device; may be ``target`` itself.
        values: on ``target``'s device; not empty.
        scratch: buffers.
    """
    rows, own = site.rows(target), site.rows(source)
    sides = _sides(site, values, target)
    for batch, part in _parts(rows):
        block = rows[batch, part]
        before = own[batch, part].to(block.device, copy=True)
        _add_block(block, before, sides, batch, part, scratch)


# ---------------------------------------------------------------------- increments
_Sides: TypeAlias = tuple[Tensor, Tensor]
"""(batch, rows, R) and (batch, R, cols), in the dtype of the sum."""


def _sides(site: Site, values: Sequence[LowRank], weight: Tensor) -> _Sides:
    dtypes = [value.A.dtype for value in values] + [value.B.dtype for value in values]
    wide = compute_dtype(weight.dtype, *dtypes)
    return site.sides_of(stacked(values, dtype=wide, device=weight.device))


def _delta(sides: _Sides, batch: int, part: slice) -> Tensor:
    left, right = sides
    return left[batch, part] @ right[batch]


def _add_block(
    into: Tensor, own: Tensor, sides: _Sides, batch: int, part: slice, scratch: Scratch
) -> None:
    left, right = sides[0][batch, part], sides[1][batch]
    write_sum(into[None], own[None], left[None], right[None], scratch)


def unshared(value: LowRank) -> LowRank:
    """Return a value whose factors no other code writes to."""
    if not value.is_trainable:
        return value
    return value.with_tensors(lambda tensor: tensor.detach().clone())


def _parts(rows: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the places of the blocks of (batch, rows, cols)."""
    batch, height, width = rows.shape
    numbers = BLOCK if rows.device.type == "cpu" else LARGE_BLOCK
    step = max(numbers // max(width, 1), 1)
    for b in range(batch):
        for i in range(0, height, step):
            yield b, slice(i, i + step)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Multiply with ``count`` threads for the length of a ``with``: how a product is divided among
    threads may decide its bits.
    """
    now = torch.get_num_threads()
    if now == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(now)


# ---------------------------------------------------------------------- codes
def _encoded(
    own: Tensor, after: Tensor, delta: Tensor, values: Sequence[LowRank], threads: int
) -> _BlockLog:
    """Return what brings ``own`` back from ``after``.

    Args:
        own: (rows, cols), the base's own numbers.
        after: what is written.
        delta: the increment, in the dtype of the sum; it is written over.
        values, threads: what it was made of.
    """
    codes = _guess(after, delta)
    torch.sub(_bits(own), codes, out=codes)
    codes += 1
    flat = codes.view(-1)
    # A code that does not fit has a bit outside of the lowest two.
    places = (flat & ~(CODES - 1)).nonzero().view(-1)
    packed = _packed(flat)
    bits = own.reshape(-1)[places].view(INTEGERS[own.element_size()])
    return _BlockLog(values, threads, packed, places.to(torch.int32), bits)


def _decoded(block: Tensor, delta: Tensor, log: _BlockLog) -> Tensor:
    """Return a block's own numbers; ``delta`` is written over."""
    bits = _guess(block, delta)
    flat = bits.view(-1)
    flat += _unpacked(log.codes, len(flat))
    flat -= 1
    flat[log.places.long()] = log.bits
    return bits.view(block.dtype)


def _guess(after: Tensor, delta: Tensor) -> Tensor:
    """Return the bits of round(after − delta), in new memory or in that of ``delta``."""
    torch.sub(after, delta, out=delta)
    return _bits(delta.to(after.dtype))


def _bits(numbers: Tensor) -> Tensor:
    """Return the bits of numbers as integers; they share their memory."""
    return numbers.view(INTEGERS[numbers.element_size()])


def _packed(codes: Tensor) -> Tensor:
    """Return codes in two bits each: (⌈n / 4⌉,) uint8."""
    narrow = codes.to(torch.uint8)
    narrow &= CODES - 1
    if missing := -len(narrow) % 4:
        narrow = torch.nn.functional.pad(narrow, (0, missing))
    # Four codes are the bytes of one integer, and are shifted together.
    four = narrow.view(torch.int32)
    packed = four | (four >> 6)
    packed |= packed >> 12
    return packed.to(torch.uint8)


def _unpacked(packed: Tensor, count: int) -> Tensor:
    """Return the codes, in bytes."""
    four = packed.to(torch.int32)
    four |= four << 12
    four |= four << 6
    four &= 0x03030303
    return four.view(torch.uint8)[:count]
