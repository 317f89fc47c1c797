"""W ← round_once( W0 + Σ new ) for many weights in one launch, in place: W0 comes out of a log.

    a tile      load W and its codes ─▶ D = Σ old ─▶ W0 = ord⁻¹(ord(round(W − D)) + code − 1)
                D' = Σ new ─▶ W' = round(W0 + D') ─▶ code' = ord(W0) − ord(round(W' − D')) + 1
                store W' and its codes

`undo_log.py` has the formula, and does the same with stock operations. Exceptions, for which two
bits are too few, lie tile by tile: so many of them, their places in the tile and W0's bits there.
A tile with more exceptions than it has room for is refused: it is left as it was, and says so.

Law: D is computed with the same bits when it is put in and when it is taken out. Both are one
function here, over the same slots and tiles, and the subtraction is one fused operation. The bits
of W' equal those of `merge.py`: the tiles and the order of the sum are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..upload import uploaded
from .log_part import BARE, LogMemory, LogPart
from .merge import COLUMNS, RANKS, ROWS, SLOT_FIELDS, add_slots, part_of_program, summed_slots
from .part import MergeTerm, on
from .tiles import TYPES, added

__all__ = ["is_exact_on", "rewrite"]

TILES = 4
"""Tiles, side by side in the same rows, that a program does one after the other."""

WARPS = 8

FIELDS = 16
"""Numbers that the table has for a part."""

INTEGERS = {2: tl.int16, 4: tl.int32}


@triton.jit  # type: ignore[untyped-decorator]
def _swapped(bits, MASK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The ordinals of bits, or the bits of ordinals, in int32."""
    return ((bits >> 31) & MASK) ^ bits


@triton.jit  # type: ignore[untyped-decorator]
def _guess(  # type: ignore[no-untyped-def]
    after,
    total,
    scale,
    WEIGHT: tl.constexpr,
    INTEGER: tl.constexpr,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return ord(round(after − total · scale))."""
    # Fused on purpose: a compiler that fuses it here and not there would change the bits.
    minus = tl.full((ROWS, COLUMNS), 0.0, tl.float32) - scale
    guess = tl.fma(total, minus, after.to(tl.float32)).to(WEIGHT)
    return _swapped(guess.to(INTEGER, bitcast=True).to(tl.int32), MASK)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    table,  # int64: programs before each part; then FIELDS numbers a part; then the slots
    scales,  # fp32: of each part the old and the new last slot's scale; then the slots' ratios
    flags,  # int32: for each part, whether a tile had no room
    parts,
    WEIGHT: tl.constexpr,
    INTEGER: tl.constexpr,
    MASK: tl.constexpr,
    FACTOR: tl.constexpr,
    TURNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    TILES: tl.constexpr,
    FIELDS: tl.constexpr,
    SLOT_FIELDS: tl.constexpr,
):
    program = tl.program_id(0)
    low = part_of_program(table, parts, program)
    fields = table + parts + low * FIELDS
    weight = tl.load(fields).to(tl.pointer_type(WEIGHT))
    codes = tl.load(fields + 1).to(tl.pointer_type(tl.uint8))
    states = tl.load(fields + 2).to(tl.pointer_type(tl.int32))
    counts = tl.load(fields + 3).to(tl.pointer_type(tl.int32))
    places = tl.load(fields + 4).to(tl.pointer_type(tl.int16))
    exact = tl.load(fields + 5).to(tl.pointer_type(INTEGER))
    room = tl.load(fields + 6)
    old_state = tl.load(fields + 7).to(tl.int32)
    new_state = tl.load(fields + 8).to(tl.int32)
    rows = tl.load(fields + 9).to(tl.int32)
    cols = tl.load(fields + 10).to(tl.int32)
    groups = tl.load(fields + 11).to(tl.int32)
    first_old = tl.load(fields + 12)
    olds = tl.load(fields + 13).to(tl.int32)
    first_new = tl.load(fields + 14)
    news = tl.load(fields + 15).to(tl.int32)
    slot_table = table + parts + parts * FIELDS
    ratios = scales + 2 * parts
    old_scale = tl.load(scales + 2 * low)
    new_scale = tl.load(scales + 2 * low + 1)
    down = (rows + ROWS - 1) // ROWS
    across = (cols + COLUMNS - 1) // COLUMNS
    mine = program - tl.load(table + low).to(tl.int32)
    batch = mine // (groups * down)
    row_tile = (mine % (groups * down)) // groups
    matrix = batch.to(tl.int64) * rows * cols
    stride = (cols + 3) // 4
    code_matrix = batch.to(tl.int64) * rows * stride
    r = row_tile * ROWS + tl.arange(0, ROWS)
    start = (mine % groups) * TILES * COLUMNS
    within = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    for begin in range(start, tl.minimum(start + TILES * COLUMNS, cols), COLUMNS):
        tile = (batch * down + row_tile).to(tl.int64) * across + begin // COLUMNS
        if tl.load(states + tile) == old_state:
            c = begin + tl.arange(0, COLUMNS)
            inside = (r[:, None] < rows) & (c[None, :] < cols)
            at = weight + matrix + r[:, None] * cols + c[None, :]
            after = tl.load(at, mask=inside, other=0.0)
            own = after.to(INTEGER, bitcast=True).to(tl.int32)
            if olds > 0:
                total = summed_slots(
                    slot_table + first_old * SLOT_FIELDS, ratios + first_old, olds, batch,
                    r, rows, c, cols,
                    FACTOR, TURNED, ALIGNED, PRECISION, WIDEN, ROWS, COLUMNS, RANKS, SLOT_FIELDS,
                )  # fmt: skip
                where = codes + code_matrix + r[:, None] * stride + (c // 4)[None, :]
                code = tl.load(where, mask=inside, other=0).to(tl.int32)
                code = (code >> ((c % 4) * 2)[None, :]) & 3
                guess = _guess(after, total, old_scale, WEIGHT, INTEGER, MASK, ROWS, COLUMNS)
                own = _swapped(guess + code - 1, MASK)
                for i in range(tl.load(counts + tile)):
                    place = tl.load(places + tile * room + i).to(tl.int32)
                    known = tl.load(exact + tile * room + i).to(tl.int32)
                    own = tl.where(within == place, known, own)
            base = own.to(INTEGER).to(WEIGHT, bitcast=True)
            if news == 0:
                tl.store(at, base, mask=inside)
                tl.store(states + tile, new_state)
            else:
                total = summed_slots(
                    slot_table + first_new * SLOT_FIELDS, ratios + first_new, news, batch,
                    r, rows, c, cols,
                    FACTOR, TURNED, ALIGNED, PRECISION, WIDEN, ROWS, COLUMNS, RANKS, SLOT_FIELDS,
                )  # fmt: skip
                result = (base.to(tl.float32) + total * new_scale).to(WEIGHT)
                guess = _guess(result, total, new_scale, WEIGHT, INTEGER, MASK, ROWS, COLUMNS)
                code = tl.where(inside, _swapped(own, MASK) - guess + 1, 0)
                escaped = tl.reshape(((code & -4) != 0).to(tl.int32), (ROWS * COLUMNS,))
                found = tl.reduce(escaped, 0, added)
                if found <= room:
                    tl.store(at, result, mask=inside)
                    parts_of_byte = (code & 3) << ((c % 4) * 2)[None, :]
                    four = tl.reshape(parts_of_byte, (ROWS, COLUMNS // 4, 4))
                    packed = tl.reduce(four, 2, added)
                    b = begin // 4 + tl.arange(0, COLUMNS // 4)
                    to = codes + code_matrix + r[:, None] * stride + b[None, :]
                    there = (r[:, None] < rows) & (b[None, :] < stride)
                    tl.store(to, packed.to(tl.uint8), mask=there)
                    if found > 0:
                        rank = tl.associative_scan(escaped, 0, added) - 1
                        to_list = tile * room + rank
                        place = tl.arange(0, ROWS * COLUMNS).to(tl.int16)
                        tl.store(places + to_list, place, mask=escaped > 0)
                        known = tl.reshape(own, (ROWS * COLUMNS,)).to(INTEGER)
                        tl.store(exact + to_list, known, mask=escaped > 0)
                    tl.store(counts + tile, found)
                    tl.store(states + tile, new_state)
                else:
                    tl.store(flags + low, 1)


def rewrite(parts: Sequence[LogPart], *, interpreted: bool = False) -> list[bool]:
    """Rewrite weights and their logs in place; return which parts had tiles without room.

    Those tiles are as they were. One launch is made for all parts that lie alike; then the host
    waits for their flags.

    Args:
        parts: their terms are covered by `can_merge`; of each, old and new lie alike.
        interpreted: it runs in Triton's interpreter, which multiplies no bf16.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, part in enumerate(parts):
        alike.setdefault((part.weight.device, part.weight.dtype, *part.lie), []).append(i)
    # All memory is taken before the first launch, so that a want of it changes nothing.
    launches = []
    for kind, group in alike.items():
        flags = torch.zeros(len(group), dtype=torch.int32, device=kind[0])
        launches.append((group, flags, _call(kind, [parts[i] for i in group], flags, interpreted)))
    for *_, call in launches:
        call()
    short = [False] * len(parts)
    for group, flags, _ in launches:
        for i, flag in zip(group, flags.tolist(), strict=True):
            short[i] = bool(flag)
    return short


def _call(
    kind: tuple[Any, ...], parts: Sequence[LogPart], flags: Tensor, interpreted: bool
) -> Callable[[], object]:
    device, weight, factor, turned, aligned = kind
    height = ROWS[factor]
    starts: list[int] = []
    fields: list[int] = []
    slots: list[int] = []
    scales: list[float] = []
    ratios: list[float] = []
    programs = 0
    for part in parts:
        batch, rows, cols = part.weight.shape
        groups = -(-cols // (COLUMNS * TILES))
        starts.append(programs)
        programs += groups * -(-rows // height) * batch
        fields += [part.weight.data_ptr(), *part.memory.addresses, part.memory.room, *part.states]
        fields += [rows, cols, groups]
        for terms in (part.old, part.new):
            begin = len(ratios)
            scales.append(add_slots(terms, turned, batch, slots, ratios))
            fields += [begin, len(ratios) - begin]
    numbers = torch.tensor([*starts, *fields, *slots], dtype=torch.int64, device="cpu")
    pad = [0.0] * ((len(scales) + len(ratios)) % 2)
    floats = torch.tensor([*scales, *ratios, *pad], dtype=torch.float32, device="cpu")
    table = uploaded(torch.cat([numbers, floats.view(torch.int64)]), device)
    exact = weight == torch.float32 or interpreted

    def call() -> None:
        with on(device):
            _kernel[(programs,)](
                table[: len(numbers)],
                table[len(numbers) :].view(torch.float32),
                flags,
                len(parts),
                WEIGHT=TYPES[weight],
                INTEGER=INTEGERS[weight.itemsize],
                MASK=0x7FFF if weight.itemsize == 2 else 0x7FFFFFFF,
                FACTOR=TYPES[factor],
                TURNED=turned,
                ALIGNED=aligned,
                PRECISION="ieee" if exact else "tf32x3",
                WIDEN=interpreted,
                ROWS=height,
                COLUMNS=COLUMNS,
                RANKS=RANKS,
                TILES=TILES,
                FIELDS=FIELDS,
                SLOT_FIELDS=SLOT_FIELDS,
                num_warps=WARPS,
            )

    return call


def is_exact_on(device: torch.device) -> bool:
    """Return whether a small weight comes back bit for bit on a device, from path to path."""
    draw = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device="cpu").to(device, torch.bfloat16)

    weight = normal(1, 96, 160)
    own = weight.clone()
    first = [MergeTerm(normal(1, 96, 24), normal(1, 24, 160), 0.01)]
    other = [MergeTerm(normal(1, 96, 8), normal(1, 8, 160), 0.02)]
    memory = LogMemory.of(weight, ROWS[torch.bfloat16], share=1)
    once = (own.double() + first[0].left.double() @ first[0].right.double() * 0.01).bfloat16()
    history: tuple[Sequence[MergeTerm], ...] = ((), first, other, first, ())
    right = True
    for i, (old, new) in enumerate(pairwise(history)):
        states = (i if old else BARE), (i + 1 if new else BARE)
        right = right and not any(rewrite([LogPart(weight, memory, old, new, states)]))
        if new is first:
            right = right and int((weight != once).sum()) <= once.numel() // 1000
    return right and torch.equal(weight, own)
