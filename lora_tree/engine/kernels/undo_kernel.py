"""W ← round_once( W0 + Σ new ) for many weights in one launch, in place; a log brings W0 back.

    a tile      load W and its codes ─▶ D = Σ old ─▶ W0 = bits⁻¹(bits(round(W − D)) + code − 1)
                D' = Σ new ─▶ W' = round(W0 + D') ─▶ code' = bits(W0) − bits(round(W' − D')) + 1
                store W' and its codes

`undo_log.py` has the formula, and does the same with stock operations; `log_part.py` has the
layout. Exceptions, for which two bits are too few, lie in lists tile by tile. A tile with more
exceptions than it has room for is left as it was, and sets the flag of its part.

Law: D is computed with the same bits when it is put in and when it is taken out. Both are one
function here, over the same slots and tiles, and the subtraction is one fused operation. The bits
of W' equal those of `merge.py`: the order of the sum is the same.

The kernel has to move little more than the weights, and it is written so that only moving them
limits it. A tile is loaded while the tile before is computed, every number stays in the thread that
multiplied it, and there are few integer operations, of which a GPU does half as many as of others:

    pairs        two 16-bit numbers, side by side in a row, are one int32: one operation takes a
                 guess from both. It may carry from the lower into the upper one if the lower is an
                 exception. So the codes are decoded again, and a number that they do not bring back
                 is an exception, too.
    exceptions   of all rows at once: the smallest that a row has left, until no row has more
                 (nearly always there is one row in thirty with one, and none with two)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .merge import part_of_program
from .slots import increment_tile, left_tiles
from .tiles import added, greatest, smallest
from .undo_numbers import guess_bits, patched, written_bits

__all__ = ["rewrite_logged"]


# Triton specialises a kernel for integers that are 1 or multiples of 16. These numbers may be that
# in one launch and not in the next, and the kernel would be compiled again.
@triton.jit(do_not_specialize=["parts", "length", "first_flag"])  # type: ignore[untyped-decorator]
def rewrite_logged(  # type: ignore[no-untyped-def]
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
    FULL: tl.constexpr,  # no tile reaches beyond its weight
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
    # A lane holds a pair of numbers, with the codes of both 16 bits apart; or one number and code.
    EACH: tl.constexpr = 2 if PAIRS else 1
    LANES: tl.constexpr = COLUMNS // EACH
    LANE: tl.constexpr = tl.int32 if PAIRS else INTEGER
    CODES: tl.constexpr = tl.uint16 if PAIRS else tl.uint8
    CODE_LANES: tl.constexpr = LANES // 4
    ONE: tl.constexpr = 0x00010001 if PAIRS else 1
    THREE: tl.constexpr = 3 * ONE
    # Codes of 1. Codes are stored after an XOR with them, so that a right guess is stored as 0.
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
    own_program = program - tl.load(table + low).to(tl.int32)
    batch = own_program // (groups * down)
    row_tile = (own_program % (groups * down)) // groups
    stride = cols // EACH
    matrix = batch.to(tl.int64) * rows * stride
    code_stride = (cols + 31) // 32 * (8 // EACH)
    code_matrix = batch.to(tl.int64) * rows * code_stride
    line = tl.arange(0, ROWS)
    r = row_tile * ROWS + line
    start = (own_program % groups) * TILES * COLUMNS
    if HAS_OLD:
        old_lefts = left_tiles(
            slot_table, ratios, batch, r, rows,
            SLOTS, FACTOR, TURNED, FACTORS_ALIGNED, WIDEN, RANKS, SLOT_FIELDS,
        )  # fmt: skip
    new_table = slot_table + olds * SLOT_FIELDS
    new_ratios = ratios + olds
    if HAS_NEW:
        new_lefts = left_tiles(
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
        is_in_old_state = tl.load(states + tile) == old_state
        own = after.to(tl.int32)
        if HAS_OLD:
            if FULL:
                packed = tl.load(code_at, eviction_policy=POLICY)
            else:
                packed = tl.load(code_at, mask=inside_codes, other=0, eviction_policy=POLICY)
            depth = tl.where(is_in_old_state, tl.load(depths + tile), 0)
            # The first exceptions are loaded while the increment is computed, and the places of the
            # next tile's exceptions before that tile begins: waiting for either would take as long
            # as a tile.
            to_list = tile * room + row_begin.to(tl.int32)
            listed = row_end.to(tl.int32) - row_begin.to(tl.int32)
            column = tl.load(columns + to_list, mask=listed > 0, other=255)
            known = tl.load(exact + to_list, mask=listed > 0, other=0)
            next_rows = tl.where(begin + COLUMNS < end, ROWS, 0)
            row_begin = tl.load(end_at + ROWS, mask=line < next_rows, other=0)
            row_end = tl.load(end_at + ROWS + 1, mask=line < next_rows, other=0)
            total = increment_tile(
                slot_table, ratios, olds, old_lefts, batch, r, rows, c, cols,
                SLOTS, EVEN, FULL, FACTOR, TURNED, FACTORS_ALIGNED, PRECISION, WIDEN,
                ROWS, COLUMNS, RANKS, SLOT_FIELDS,
            )  # fmt: skip
            four = packed.to(tl.int32) ^ ONES
            if PAIRS:
                four = (four | (four << 8)) & 0x00FF00FF
            four = tl.reshape(four, (ROWS, COLUMNS // 32, 1, 8 // EACH))
            code = tl.reshape((four >> shifts) & THREE, (ROWS, LANES))
            own = guess_bits(
                own, total, old_scale, WEIGHT, INTEGER, PAIRS, WIDEN, ROWS, COLUMNS
            )  # fmt: skip
            own += code - ONE
            own = patched(own, column, known, PAIRS, ROWS, LANES)
            # The condition hides the loop from Triton's pipeliner, which would not pipeline the
            # outer loop because of it.
            if depth > 1:
                for i in range(1, depth):
                    column = tl.load(columns + to_list + i, mask=i < listed, other=255)
                    known = tl.load(exact + to_list + i, mask=i < listed, other=0)
                    own = patched(own, column, known, PAIRS, ROWS, LANES)
        if HAS_NEW:
            total = increment_tile(
                new_table, new_ratios, news, new_lefts, batch, r, rows, c, cols,
                SLOTS, EVEN, FULL, FACTOR, TURNED, FACTORS_ALIGNED, PRECISION, WIDEN,
                ROWS, COLUMNS, RANKS, SLOT_FIELDS,
            )  # fmt: skip
            written = written_bits(
                own, total, new_scale, WEIGHT, INTEGER, PAIRS, WIDEN, ROWS, COLUMNS
            )  # fmt: skip
            guess = guess_bits(
                written, total, new_scale, WEIGHT, INTEGER, PAIRS, WIDEN, ROWS, COLUMNS
            )  # fmt: skip
            # Outside of the weight everything is 0, and the code is 1.
            new_code = (own - guess + ONE) & THREE
            wrong = (guess + new_code - ONE) ^ own
            # Bits and column are packed into one number, so that the smallest one has both.
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
            # When all threads have counted, every one has read the old lists, and they may be
            # written over.
            exception_count = tl.reduce(counts, 0, added)
            deepest = tl.reduce(counts, 0, greatest)
            if is_in_old_state & (exception_count <= room):
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
            elif is_in_old_state:
                tl.store(flags + first_flag + low, 1)
        elif is_in_old_state:
            tl.store(at, own.to(LANE), mask=inside, eviction_policy=POLICY)
            tl.store(states + tile, new_state)
