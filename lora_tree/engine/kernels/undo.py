"""W ← round_once( W0 + Σ new ) for many weights in one launch, in place: W0 comes out of a log.

    a tile      load W and its codes ─▶ D = Σ old ─▶ W0 = bits⁻¹(bits(round(W − D)) + code − 1)
                D' = Σ new ─▶ W' = round(W0 + D') ─▶ code' = bits(W0) − bits(round(W' − D')) + 1
                store W' and its codes

`undo_log.py` has the formula, and does the same with stock operations; `log_part.py` has the
layout. Exceptions, for which two bits are too few, lie in lists tile by tile. A tile with more
exceptions than it has room for is refused: it is left as it was, and says so.

Law: D is computed with the same bits when it is put in and when it is taken out. Both are one
function here, over the same slots and tiles, and the subtraction is one fused operation. The bits
of W' equal those of `merge.py`: the order of the sum is the same.

It has to move little more than the weights, so it is written to be bound by that. What it needs of
a tile is loaded while the tile before is computed, every number stays in the thread that multiplied
it, and integer operations, of which a GPU does half as many as of others, are few:

    pairs        two 16-bit numbers, side by side in a row, are one int32: one operation takes a
                 guess from both. It may carry from the lower into the upper one if the lower is an
                 exception; so the codes are tried, and a number that they do not bring back is an
                 exception, too.
    exceptions   of all rows at once: the smallest that a row has left, until no row has more
                 (nearly always there is one row in thirty with one, and none with two)
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..upload import uploaded
from .log_part import BARE, NO_TERMS, WIDTH, LaidTerms, LogMemory, LogPart
from .merge import (
    POLICY,
    RANKS,
    ROWS,
    SLOT_FIELDS,
    UNROLLED,
    add_slots,
    is_aligned,
    lay_out_parts,
    left_tile,
    part_of_program,
    right_tile,
    summed_slots,
)
from .part import MergePart, MergeTerm, on
from .tiles import TYPES, added, greatest, smallest

__all__ = ["LaidLogs", "is_exact_on", "lay_out_logs", "lay_out_terms", "rewrite"]

TILES = 16
"""Tiles, side by side in the same rows, that a program does one after the other."""

WARPS, STAGES = 4, 2

REGISTERS = 168
"""Registers of a thread, so that three programs share a multiprocessor: while one computes, the
others load.
"""

FIELDS = 15
"""Numbers that the table has for a part."""

INTEGERS = {2: tl.int16, 4: tl.int32}

COUNTERS = {torch.uint8: tl.uint8, torch.int16: tl.int16}

TWO_BF16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
TWO_FP16 = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")


@triton.jit  # type: ignore[untyped-decorator]
def _low(pair, WEIGHT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first numbers of pairs, in fp32."""
    if WEIGHT == tl.bfloat16:
        return (pair << 16).to(tl.float32, bitcast=True)
    else:
        return pair.to(tl.int16).to(WEIGHT, bitcast=True).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _high(pair, WEIGHT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The second numbers of pairs, in fp32."""
    if WEIGHT == tl.bfloat16:
        return (pair & -65536).to(tl.float32, bitcast=True)
    else:
        return (pair >> 16).to(tl.int16).to(WEIGHT, bitcast=True).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _pair(low, high, WEIGHT: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs of fp32 numbers, rounded to the weight's dtype."""
    # Triton itself rounds them one by one, which takes more than twice as long. The interpreter
    # knows no assembly.
    if WIDEN:
        first = low.to(WEIGHT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        second = high.to(WEIGHT).to(tl.int16, bitcast=True).to(tl.int32) << 16
        return first | second
    elif WEIGHT == tl.bfloat16:
        return tl.inline_asm_elementwise(
            TWO_BF16, "=r,r,r", [low, high], tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            TWO_FP16, "=r,r,r", [low, high], tl.int32, is_pure=True, pack=1
        )


@triton.jit  # type: ignore[untyped-decorator]
def _halves(total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of a tile in even and in odd columns."""
    return tl.split(tl.reshape(total, (ROWS, COLUMNS // 2, 2)))


@triton.jit  # type: ignore[untyped-decorator]
def _wide(bits, WEIGHT: tl.constexpr, INTEGER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of some bits, in fp32."""
    return bits.to(INTEGER).to(WEIGHT, bitcast=True).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(x, WEIGHT: tl.constexpr, INTEGER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits, in int32, of fp32 numbers that are rounded to the weight's dtype."""
    return x.to(WEIGHT).to(INTEGER, bitcast=True).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _written(  # type: ignore[no-untyped-def]
    own,
    total,
    scale,
    WEIGHT: tl.constexpr,
    INTEGER: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the bits of round(W0 + total · scale)."""
    if PAIRS:
        even, odd = _halves(total, ROWS, COLUMNS)
        low = _low(own, WEIGHT) + even * scale
        return _pair(low, _high(own, WEIGHT) + odd * scale, WEIGHT, WIDEN)
    else:
        return _rounded(_wide(own, WEIGHT, INTEGER) + total * scale, WEIGHT, INTEGER)


@triton.jit  # type: ignore[untyped-decorator]
def _guess(  # type: ignore[no-untyped-def]
    after,
    total,
    scale,
    WEIGHT: tl.constexpr,
    INTEGER: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the bits of round(after − total · scale)."""
    # Fused on purpose: a compiler that fuses it here and not there would change the bits.
    if PAIRS:
        minus = tl.full((ROWS, COLUMNS // 2), 0.0, tl.float32) - scale
        even, odd = _halves(total, ROWS, COLUMNS)
        low = tl.fma(even, minus, _low(after, WEIGHT))
        return _pair(low, tl.fma(odd, minus, _high(after, WEIGHT)), WEIGHT, WIDEN)
    else:
        minus = tl.full((ROWS, COLUMNS), 0.0, tl.float32) - scale
        return _rounded(tl.fma(total, minus, _wide(after, WEIGHT, INTEGER)), WEIGHT, INTEGER)


@triton.jit  # type: ignore[untyped-decorator]
def _patched(  # type: ignore[no-untyped-def]
    own, column, known, PAIRS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """Put one exception of every row into its column; a column outside of the tile is none."""
    within = tl.arange(0, LANES)[None, :]
    column = column.to(tl.int32)
    known = known.to(tl.int32)
    if PAIRS:
        is_high = column % 2 == 1
        kept = tl.where(is_high, 0xFFFF, -65536)
        known = tl.where(is_high, known << 16, known & 0xFFFF)
        changed = (own & kept[:, None]) | known[:, None]
        return tl.where(within == (column // 2)[:, None], changed, own)
    else:
        return tl.where(within == column[:, None], known[:, None], own)


@triton.jit  # type: ignore[untyped-decorator]
def _left_tiles(  # type: ignore[no-untyped-def]
    slot_table,
    ratios,
    batch,
    r,
    rows,
    SLOTS: tl.constexpr,
    FACTOR: tl.constexpr,
    TURNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDEN: tl.constexpr,
    RANKS: tl.constexpr,
    SLOT_FIELDS: tl.constexpr,
):
    """What serves for all tiles of a program: left tiles, and where the right ones are."""
    xs = ()
    rights = ()
    strides = ()
    counts = ()
    factors = ()
    for i in tl.static_range(SLOTS):
        here = slot_table + i * SLOT_FIELDS
        x, right, stride, count = left_tile(here, batch, r, rows, FACTOR, TURNED, ALIGNED, RANKS)
        if WIDEN:
            x = x.to(tl.float32)
        # Sums of tuples, because Triton unpacks no tuple into another.
        xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005
        rights = rights + (right,)  # type: ignore[assignment]  # noqa: RUF005
        strides = strides + (stride,)  # type: ignore[assignment]  # noqa: RUF005
        counts = counts + (count,)  # type: ignore[assignment]  # noqa: RUF005
        factors = factors + (tl.load(ratios + i),)  # type: ignore[assignment]  # noqa: RUF005
    return xs, rights, strides, counts, factors


@triton.jit  # type: ignore[untyped-decorator]
def _total(  # type: ignore[no-untyped-def]
    slot_table,
    ratios,
    slots,
    lefts,
    batch,
    r,
    rows,
    c,
    cols,
    SLOTS: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
    FACTOR: tl.constexpr,
    TURNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    SLOT_FIELDS: tl.constexpr,
):
    """A tile of an increment in fp32, but for the scale of its last slot, as `merge` sums it."""
    if SLOTS > 0:
        xs, rights, strides, counts, factors = lefts
        total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        # All are loaded before the first is multiplied, so that their latencies overlap.
        ys = ()
        for i in tl.static_range(SLOTS):
            if FULL:
                k = tl.arange(0, RANKS)
                y_at = (
                    k[:, None] + c[None, :] * strides[i]
                    if TURNED
                    else k[:, None] * strides[i] + c[None, :]
                )
                y = tl.load(rights[i] + y_at, mask=k[:, None] < counts[i], other=0.0)
            else:
                y = right_tile(rights[i], strides[i], counts[i], c, cols, TURNED, RANKS)
            if WIDEN:
                y = y.to(tl.float32)
            ys = ys + (y,)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(SLOTS):
            if i > 0 and not EVEN:
                total *= factors[i]
            total = tl.dot(xs[i], ys[i], total, input_precision=PRECISION)
    else:
        total = summed_slots(
            slot_table, ratios, slots, batch, r, rows, c, cols,
            FACTOR, TURNED, ALIGNED, PRECISION, WIDEN, ROWS, COLUMNS, RANKS, SLOT_FIELDS,
        )  # fmt: skip
    return total


# Numbers that a compiler would take for multiples of 16, or for 1, in one launch and not in the
# next: it would be compiled anew.
@triton.jit(do_not_specialize=["parts", "length", "first_flag"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    # int64: programs before each part; then FIELDS numbers a part; then the slots; then as fp32:
    # of each part the old and the new last slot's scale; then the slots' ratios
    table,
    flags,  # int32: for each part, whether a tile had no room
    parts,
    length,  # integers in the table
    first_flag,
    WEIGHT: tl.constexpr,
    INTEGER: tl.constexpr,
    COUNTER: tl.constexpr,
    FACTOR: tl.constexpr,
    TURNED: tl.constexpr,
    WEIGHTS_ALIGNED: tl.constexpr,
    FACTORS_ALIGNED: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_NEW: tl.constexpr,
    SLOTS: tl.constexpr,
    EVEN: tl.constexpr,  # all ratios are 1
    FULL: tl.constexpr,  # no tile sticks out
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    POLICY: tl.constexpr,
    FIELDS: tl.constexpr,
    SLOT_FIELDS: tl.constexpr,
):
    # What a lane holds: a pair of numbers with the codes of both, 16 bits apart; or one of each.
    EACH: tl.constexpr = 2 if PAIRS else 1
    LANES: tl.constexpr = COLUMNS // EACH
    LANE: tl.constexpr = tl.int32 if PAIRS else INTEGER
    CODES: tl.constexpr = tl.uint16 if PAIRS else tl.uint8
    CODE_LANES: tl.constexpr = LANES // 4
    ONE: tl.constexpr = 0x00010001 if PAIRS else 1
    THREE: tl.constexpr = 3 * ONE
    # Codes of 1, by which those of a guess that is right are stored as 0.
    ONES: tl.constexpr = 0x5555 if PAIRS else 0x55
    NONE: tl.constexpr = 0x7FFFFFFF if PAIRS else 0x7FFFFFFFFFFFFFFF  # no exception
    program = tl.program_id(0)
    low = part_of_program(table, parts, program)
    fields = table + parts + low * FIELDS
    weight = tl.load(fields).to(tl.pointer_type(LANE))
    codes = tl.load(fields + 1).to(tl.pointer_type(CODES))
    states = tl.load(fields + 2).to(tl.pointer_type(tl.int32))
    depths = tl.load(fields + 3).to(tl.pointer_type(tl.int32))
    ends = tl.load(fields + 4).to(tl.pointer_type(COUNTER))
    columns = tl.load(fields + 5).to(tl.pointer_type(tl.uint8))
    exact = tl.load(fields + 6).to(tl.pointer_type(INTEGER))
    room = tl.load(fields + 7)
    old_state = tl.load(fields + 8).to(tl.int32)
    new_state = tl.load(fields + 9).to(tl.int32)
    rows = tl.load(fields + 10).to(tl.int32)
    cols = tl.load(fields + 11).to(tl.int32)
    first_slot = tl.load(fields + 12)
    olds = tl.load(fields + 13).to(tl.int32)
    news = tl.load(fields + 14).to(tl.int32)
    slot_table = table + parts + parts * FIELDS + first_slot * SLOT_FIELDS
    scales = (table + length).to(tl.pointer_type(tl.float32))
    ratios = scales + 2 * parts + first_slot
    old_scale = tl.load(scales + 2 * low)
    new_scale = tl.load(scales + 2 * low + 1)
    if WEIGHTS_ALIGNED:
        weight = tl.multiple_of(weight, 16)
        cols = tl.multiple_of(cols, 16)
    codes = tl.multiple_of(codes, 16)
    groups = (cols + TILES * COLUMNS - 1) // (TILES * COLUMNS)
    down = (rows + ROWS - 1) // ROWS
    across = (cols + COLUMNS - 1) // COLUMNS
    mine = program - tl.load(table + low).to(tl.int32)
    batch = mine // (groups * down)
    row_tile = (mine % (groups * down)) // groups
    stride = cols // EACH
    matrix = batch.to(tl.int64) * rows * stride
    code_stride = (cols + 31) // 32 * (8 // EACH)
    code_matrix = batch.to(tl.int64) * rows * code_stride
    line = tl.arange(0, ROWS)
    r = row_tile * ROWS + line
    start = (mine % groups) * TILES * COLUMNS
    if HAS_OLD:
        old_lefts = _left_tiles(
            slot_table, ratios, batch, r, rows,
            SLOTS, FACTOR, TURNED, FACTORS_ALIGNED, WIDEN, RANKS, SLOT_FIELDS,
        )  # fmt: skip
    new_table = slot_table + olds * SLOT_FIELDS
    new_ratios = ratios + olds
    if HAS_NEW:
        new_lefts = _left_tiles(
            new_table, new_ratios, batch, r, rows,
            SLOTS, FACTOR, TURNED, FACTORS_ALIGNED, WIDEN, RANKS, SLOT_FIELDS,
        )  # fmt: skip
    within = tl.arange(0, LANES)
    shifts = (tl.arange(0, 4) * 2)[None, None, :, None]
    end = tl.minimum(start + TILES * COLUMNS, cols)
    if HAS_OLD:
        tile = (batch * down + row_tile).to(tl.int64) * across + start // COLUMNS
        row_begin = tl.load(ends + tile * (ROWS + 1) + line)
        row_end = tl.load(ends + tile * (ROWS + 1) + 1 + line)
    for begin in tl.range(start, end, COLUMNS, num_stages=STAGES):
        tile = (batch * down + row_tile).to(tl.int64) * across + begin // COLUMNS
        c = begin + tl.arange(0, COLUMNS)
        lane = begin // EACH + within
        at = weight + matrix + r[:, None] * stride + lane[None, :]
        code_lane = begin // (4 * EACH) + tl.arange(0, CODE_LANES)
        code_at = codes + code_matrix + r[:, None] * code_stride + code_lane[None, :]
        end_at = ends + tile * (ROWS + 1) + 1 + line
        if FULL:
            inside = None
            inside_codes = None
            after = tl.load(at, eviction_policy=POLICY)
        else:
            inside = (r[:, None] < rows) & (lane[None, :] < stride)
            inside_codes = (r[:, None] < rows) & (code_lane[None, :] < code_stride)
            after = tl.load(at, mask=inside, other=0, eviction_policy=POLICY)
        # A tile in another state is computed like the others, and not written.
        is_mine = tl.load(states + tile) == old_state
        own = after.to(tl.int32)
        if HAS_OLD:
            if FULL:
                packed = tl.load(code_at, eviction_policy=POLICY)
            else:
                packed = tl.load(code_at, mask=inside_codes, other=0, eviction_policy=POLICY)
            depth = tl.where(is_mine, tl.load(depths + tile), 0)
            # The first exceptions are on their way while the increment is computed, and the places
            # of the next tile's until that begins: each would be waited for as long as a tile.
            to_list = tile * room + row_begin.to(tl.int32)
            listed = row_end.to(tl.int32) - row_begin.to(tl.int32)
            column = tl.load(columns + to_list, mask=listed > 0, other=255)
            known = tl.load(exact + to_list, mask=listed > 0, other=0)
            next_rows = tl.where(begin + COLUMNS < end, ROWS, 0)
            row_begin = tl.load(end_at + ROWS, mask=line < next_rows, other=0)
            row_end = tl.load(end_at + ROWS + 1, mask=line < next_rows, other=0)
            total = _total(
                slot_table, ratios, olds, old_lefts, batch, r, rows, c, cols,
                SLOTS, EVEN, FULL, FACTOR, TURNED, FACTORS_ALIGNED, PRECISION, WIDEN,
                ROWS, COLUMNS, RANKS, SLOT_FIELDS,
            )  # fmt: skip
            four = packed.to(tl.int32) ^ ONES
            if PAIRS:
                four = (four | (four << 8)) & 0x00FF00FF
            four = tl.reshape(four, (ROWS, COLUMNS // 32, 1, 8 // EACH))
            code = tl.reshape((four >> shifts) & THREE, (ROWS, LANES))
            own = _guess(
                own, total, old_scale, WEIGHT, INTEGER, PAIRS, WIDEN, ROWS, COLUMNS
            )  # fmt: skip
            own += code - ONE
            own = _patched(own, column, known, PAIRS, ROWS, LANES)
            # The condition keeps the loop out of sight of Triton's pipeliner, which would leave the
            # outer one alone because of it.
            if depth > 1:
                for i in range(1, depth):
                    column = tl.load(columns + to_list + i, mask=i < listed, other=255)
                    known = tl.load(exact + to_list + i, mask=i < listed, other=0)
                    own = _patched(own, column, known, PAIRS, ROWS, LANES)
        if HAS_NEW:
            total = _total(
                new_table, new_ratios, news, new_lefts, batch, r, rows, c, cols,
                SLOTS, EVEN, FULL, FACTOR, TURNED, FACTORS_ALIGNED, PRECISION, WIDEN,
                ROWS, COLUMNS, RANKS, SLOT_FIELDS,
            )  # fmt: skip
            written = _written(
                own, total, new_scale, WEIGHT, INTEGER, PAIRS, WIDEN, ROWS, COLUMNS
            )  # fmt: skip
            guess = _guess(
                written, total, new_scale, WEIGHT, INTEGER, PAIRS, WIDEN, ROWS, COLUMNS
            )  # fmt: skip
            # Outside of the weight everything is 0, and the code is 1.
            new_code = (own - guess + ONE) & THREE
            wrong = (guess + new_code - ONE) ^ own
            # Bits and column are one number, so that the smallest brings both.
            if PAIRS:
                is_low = (wrong & 0xFFFF) != 0
                is_high = wrong.to(tl.uint32, bitcast=True) > 0xFFFF
                counts = tl.reduce(is_low.to(tl.int32) + is_high.to(tl.int32), 1, added)
                keys = tl.where(is_low, (own << 16) | (2 * within)[None, :], NONE)
                others = tl.where(is_high, (own & -65536) | (2 * within + 1)[None, :], NONE)
                least = tl.reduce(tl.minimum(keys, others), 1, smallest)
            else:
                counts = tl.reduce((wrong != 0).to(tl.int32), 1, added)
                keys = tl.where(wrong != 0, (own.to(tl.int64) << 16) | within[None, :], NONE)
                least = tl.reduce(keys, 1, smallest)
            four = tl.reshape(new_code, (ROWS, COLUMNS // 32, 4, 8 // EACH))
            four = tl.reshape(tl.reduce(four << shifts, 2, added), (ROWS, CODE_LANES))
            if PAIRS:
                four |= four >> 8
            # Every thread has read the old lists when all have counted.
            found = tl.reduce(counts, 0, added)
            deepest = tl.reduce(counts, 0, greatest)
            if is_mine & (found <= room):
                tl.store(at, written.to(LANE), mask=inside, eviction_policy=POLICY)
                packed = (four ^ ONES).to(CODES)
                tl.store(code_at, packed, mask=inside_codes, eviction_policy=POLICY)
                new_end = tl.associative_scan(counts, 0, added)
                tl.store(end_at, new_end.to(COUNTER))
                tl.store(depths + tile, deepest)
                tl.store(states + tile, new_state)
                for i in range(deepest):
                    is_left = i < counts
                    to_list = tile * room + new_end - counts + i
                    tl.store(columns + to_list, (least & 0xFF).to(tl.uint8), mask=is_left)
                    tl.store(exact + to_list, (least >> 16).to(INTEGER), mask=is_left)
                    if i + 1 < deepest:
                        more = tl.where(keys > least[:, None], keys, NONE)
                        if PAIRS:
                            others = tl.where(others > least[:, None], others, NONE)
                            more = tl.minimum(more, others)
                        least = tl.reduce(more, 1, smallest)
            elif is_mine:
                tl.store(flags + first_flag + low, 1)
        elif is_mine:
            tl.store(at, own.to(LANE), mask=inside, eviction_policy=POLICY)
            tl.store(states + tile, new_state)


def lay_out_terms(terms: Sequence[MergeTerm], batch: int) -> LaidTerms:
    """Lay the terms of a weight out, for any number of switches.

    Args:
        terms: alike, in the order of the sum.
        batch: matrices of the weight.
    """
    if not terms:
        return NO_TERMS
    left, right = terms[0].left, terms[0].right
    turned = left.stride(-1) != 1 or right.stride(-1) != 1
    slots: list[int] = []
    ratios: list[float] = []
    scale = add_slots(terms, turned, batch, slots, ratios)
    aligned = True
    for term in terms:
        aligned = aligned and is_aligned(term.left, turned) and is_aligned(term.right, turned)
    lie = left.dtype, turned
    even = all(ratio == 1.0 for ratio in ratios)
    return LaidTerms(terms, tuple(slots), tuple(ratios), scale, lie, aligned, even)


class LaidLogs:
    """Parts laid out for the kernel, to be run whenever their weights and logs are as they say.

    It holds addresses, and none of the memory that they lead to.

    Args:
        calls: of each kind of part, what launches the kernel over them; it takes the flags.
        order: the parts, as the calls take them.
        devices: of the calls.
    """

    def __init__(
        self,
        calls: Sequence[Callable[[Tensor], object]],
        order: Sequence[int],
        devices: Sequence[torch.device],
    ) -> None:
        self._calls, self._order, self._devices = calls, order, devices
        self._flags = {device: self._no_flags(device) for device in devices}

    def run(self) -> list[bool]:
        """Rewrite weights and their logs in place; return which parts had tiles without room.

        Those tiles are as they were. The host waits once for a device, for the flags of all parts.
        """
        for call, device in zip(self._calls, self._devices, strict=True):
            call(self._flags[device])
        short = [False] * len(self._order)
        for device, flags in self._flags.items():
            found = flags.tolist()
            if any(found):
                self._flags[device] = self._no_flags(device)
            for i, flag in zip(self._order, found, strict=True):
                short[i] = short[i] or bool(flag)
        return short

    def _no_flags(self, device: torch.device) -> Tensor:
        return torch.zeros(len(self._order), dtype=torch.int32, device=device)


def lay_out_logs(parts: Sequence[LogPart], *, interpreted: bool = False) -> LaidLogs:
    """Lay parts out: one launch for all that lie alike on one device.

    Args:
        parts: of each, old and new lie alike.
        interpreted: it runs in Triton's interpreter, which multiplies no bf16.
    """
    alike: dict[_Kind, list[int]] = {}
    for i, part in enumerate(parts):
        alike.setdefault(_Kind.of(part), []).append(i)
    # All memory is taken before the first launch, so that a want of it changes nothing.
    calls = []
    order: list[int] = []
    for kind, group in alike.items():
        calls.append(_call(kind, [parts[i] for i in group], len(order), interpreted))
        order += group
    return LaidLogs(calls, order, [kind.device for kind in alike])


def rewrite(parts: Sequence[LogPart], *, interpreted: bool = False) -> list[bool]:
    """Lay parts out and run them; return which had tiles without room."""
    return lay_out_logs(parts, interpreted=interpreted).run()


class _Kind(NamedTuple):
    """What a launch is compiled for; parts of one kind share a launch."""

    device: torch.device
    weight: torch.dtype
    factor: torch.dtype
    counter: torch.dtype
    turned: bool
    weights_aligned: bool
    factors_aligned: bool
    pairs: bool
    has_old: bool
    has_new: bool
    slots: int
    even: bool
    full: bool

    @staticmethod
    def of(part: LogPart) -> _Kind:
        weight, old, new = part.weight, part.old, part.new
        _, rows, cols = weight.shape
        lie = old.lie or new.lie
        assert lie is not None
        factor, turned = lie
        slots = max(len(old.ratios), len(new.ratios))
        return _Kind(
            device=weight.device,
            weight=weight.dtype,
            factor=factor,
            counter=part.memory.ends.dtype,
            turned=turned,
            weights_aligned=weight.data_ptr() % 16 == 0 and cols % 16 == 0,
            factors_aligned=old.aligned and new.aligned,
            pairs=weight.itemsize == 2 and cols % 2 == 0 and weight.data_ptr() % 4 == 0,
            has_old=bool(old.terms),
            has_new=bool(new.terms),
            slots=slots if slots <= UNROLLED else 0,
            even=old.even and new.even,
            full=rows % ROWS[factor] == 0 and cols % WIDTH == 0,
        )


def _call(
    kind: _Kind, parts: Sequence[LogPart], first_flag: int, interpreted: bool
) -> Callable[[Tensor], object]:
    """Return a function that launches the kernel over parts of one kind, and takes the flags.

    Args:
        kind: what they have in common.
        parts: the parts.
        first_flag: the place of their first flag.
        interpreted: it runs in Triton's interpreter.
    """
    table, length, programs = _table(parts, ROWS[kind.factor], kind.slots, kind.device)
    exact = kind.weight == torch.float32 or interpreted

    count = len(parts)

    # Everything that the launch needs is settled here: a switch runs it again as it is.
    def call(flags: Tensor) -> None:
        with on(kind.device):
            _kernel[(programs,)](
                table,
                flags,
                count,
                length,
                first_flag,
                WEIGHT=TYPES[kind.weight],
                INTEGER=INTEGERS[kind.weight.itemsize],
                COUNTER=COUNTERS[kind.counter],
                FACTOR=TYPES[kind.factor],
                TURNED=kind.turned,
                WEIGHTS_ALIGNED=kind.weights_aligned,
                FACTORS_ALIGNED=kind.factors_aligned,
                PAIRS=kind.pairs,
                HAS_OLD=kind.has_old,
                HAS_NEW=kind.has_new,
                SLOTS=kind.slots,
                EVEN=kind.even,
                FULL=kind.full,
                PRECISION="ieee" if exact else "tf32x3",
                WIDEN=interpreted,
                ROWS=ROWS[kind.factor],
                COLUMNS=WIDTH,
                RANKS=RANKS,
                TILES=TILES,
                STAGES=STAGES,
                POLICY=POLICY,
                FIELDS=FIELDS,
                SLOT_FIELDS=SLOT_FIELDS,
                num_warps=WARPS,
                maxnreg=REGISTERS,
            )

    return call


def _table(
    parts: Sequence[LogPart], height: int, unrolled: int, device: torch.device
) -> tuple[Tensor, int, int]:
    """Return the kernel's table on the device, how many integers it has, and how many programs
    there are.

    Args:
        parts: of one kind.
        height: rows of a tile.
        unrolled: slots that the terms of each part have in the table; 0: their own number.
    """
    starts: list[int] = []
    fields: list[int] = []
    slots: list[int] = []
    scales: list[float] = []
    ratios: list[float] = []
    programs = 0
    for part in parts:
        batch, rows, cols = part.weight.shape
        starts.append(programs)
        programs += -(-cols // (WIDTH * TILES)) * -(-rows // height) * batch
        memory = part.memory
        fields += [part.weight.data_ptr(), *memory.addresses, memory.room, *part.states]
        fields += [rows, cols, len(ratios)]
        for laid in (part.old, part.new):
            begin = len(ratios)
            if laid.terms:
                # Slots of rank 0 before the others: they add 0 to a sum of 0, so the bits are those
                # of the same terms in any launch.
                for _ in range(unrolled - len(laid.ratios)):
                    slots += [*laid.slots[:2], 0, *laid.slots[3:SLOT_FIELDS]]
                    ratios.append(1.0)
                slots += laid.slots
                ratios += laid.ratios
            scales.append(laid.scale)
            fields.append(len(ratios) - begin)
    # The scales lie behind the integers, as pairs of fp32, and begin at a multiple of 16 bytes.
    integers = [*starts, *fields, *slots]
    integers += [0] * (len(integers) % 2)
    floats = [*scales, *ratios]
    floats += [0.0] * (len(floats) % 2)
    numbers = torch.frombuffer(array("q", integers), dtype=torch.int64)
    as_integers = torch.frombuffer(array("f", floats), dtype=torch.int64)
    table = uploaded(torch.cat([numbers, as_integers]), device)
    return table, len(integers), programs


def is_exact_on(device: torch.device) -> bool:
    """Return whether a small weight comes back bit for bit on a device, from path to path, and has
    the bits of a merge on the way.
    """
    draw = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device="cpu").to(device, torch.bfloat16)

    weight = normal(1, 96, 160)
    own, merged = weight.clone(), torch.empty_like(weight)
    first = lay_out_terms([MergeTerm(normal(1, 96, 24), normal(1, 24, 160), 0.01)], 1)
    other = lay_out_terms([MergeTerm(normal(1, 96, 8), normal(1, 8, 160), 0.02)], 1)
    memory = LogMemory.of(weight, ROWS[torch.bfloat16], share=1)
    history = (NO_TERMS, first, other, first, NO_TERMS)
    right = True
    for i, (old, new) in enumerate(pairwise(history)):
        states = (i if old.terms else BARE), (i + 1 if new.terms else BARE)
        right = right and not any(rewrite([LogPart(weight, memory, old, new, states)]))
        if new is first:
            lay_out_parts([MergePart(merged, own, first.terms)]).run()
            right = right and torch.equal(weight, merged)
    return right and torch.equal(weight, own)
