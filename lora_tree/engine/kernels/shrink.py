"""low ← coefficient · scale · x factorᵀ for every entry of a batch's segments, in one launch.

    a program: a tile of a group's inputs, the lanes of a few entries, a part of the width
        acc (inputs, lanes) += x (inputs, width) @ factor (width, lanes)      in fp32

An entry has as many lanes as the largest node has ranks. A group of one row owes all its entries,
so a program takes several of them and reads the row once for all. A group of many rows has few
inputs, and mostly each row owes nodes of its own: a program takes one entry, and reads the rows
that owe it. Inputs that do not owe a node are not multiplied: their numbers may be infinite.

A node's factor is read where it is. Few inputs make few programs, so the width is taken in parts;
`expand` adds the parts up, in order.

The forward takes x and A; the backward takes the gradient of the output, and B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .factor_table import FIELDS, FactorTable
from .relaunch import BoundLaunch, LaunchPlan, Relaunch, shared_constants
from .segments import Segments
from .tiles import (
    added,
    begin_next,
    begins_early,
    larger,
    options_for,
    shared_bytes,
    wait_for_last,
)
from .tiling import Tiling, entries_at_once

__all__ = [
    "BoundShrink",
    "bound_shrink",
    "of_few_inputs",
    "reference_shrink",
    "shares_of",
    "shrink",
    "warps_of",
    "width_at_once",
]

WARPS, MOST_STAGES = 4, 5

LARGEST_STEP, STAGE_BYTES, SPARE_BYTES = 512, 40 << 10, 4 << 10
"""The most numbers of a width that a program takes at once; the bytes of shared memory for them in
one stage of the loop; and the bytes of shared memory that are left free for the sum.
"""

# Compiling for each of their values would take a second, and `Relaunch` does not look at them.
CHANGING = ["rows", "tokens", "width", "entries", "room", "part"]


@triton.jit  # type: ignore[untyped-decorator]
def _factor_at(  # type: ignore[no-untyped-def]
    lanes, stride, k, used, width, SIDE: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr
):
    """Return some of a width of the factors, (width, lanes)."""
    if SIDE == 0:
        there = lanes[None, :] + k[:, None]
    else:
        there = lanes[None, :] + k[:, None] * stride[None, :]
        if ALIGNED:
            there = tl.max_contiguous(tl.multiple_of(there, [1, 16]), [1, RANK])
    return tl.load(there, mask=(k[:, None] < width) & used[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _of_one_input(  # type: ignore[no-untyped-def]
    source, lanes, stride, used, begin, end, width,
    SIDE: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the sum for a single input, (1, lanes): tensor cores take sixteen, so it is multiplied
    number by number.
    """
    products = tl.full((WIDTH, LANES), 0.0, tl.float32)
    for start in range(begin, end, WIDTH):
        k = start + tl.arange(0, WIDTH)
        y = _factor_at(lanes, stride, k, used, width, SIDE, ALIGNED, RANK)
        x = tl.load(source + k, mask=k < width, other=0.0)
        products += x.to(tl.float32)[:, None] * y.to(tl.float32)
    return tl.reduce(products, 0, added)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def of_few_inputs(  # type: ignore[no-untyped-def]
    source, owes, lanes, stride, used, begin, end, width,
    SIDE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    INPUTS: tl.constexpr, RANK: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    """Return the sum for one tile of sixteen inputs, (inputs, lanes).

    Products that are added to one sum wait for each other, so each warp has a share of the width.
    """
    total = tl.full((SHARES, INPUTS, LANES), 0.0, tl.float32)
    share = tl.arange(0, SHARES) * (WIDTH // SHARES)
    for start in range(begin, end, WIDTH):
        k = start + share[:, None] + tl.arange(0, WIDTH // SHARES)[None, :]
        x = tl.load(
            source[None, :, None] + k[:, None, :],
            mask=owes[None, :, :] & (k[:, None, :] < width),
            other=0.0,
        )
        if SIDE == 0:
            pointers = lanes[None, None, :] + k[:, :, None]
        else:
            pointers = lanes[None, None, :] + k[:, :, None] * stride[None, None, :]
            if ALIGNED:
                pointers = tl.max_contiguous(tl.multiple_of(pointers, [1, 1, 16]), [1, 1, RANK])
        mask = (k[:, :, None] < width) & used[None, None, :]
        y = tl.load(pointers, mask=mask, other=0.0)
        total = tl.dot(x.to(COMPUTE), y.to(COMPUTE), total, input_precision=PRECISION)
    return tl.reduce(total, 0, added)


@triton.jit  # type: ignore[untyped-decorator]
def _of_many_inputs(  # type: ignore[no-untyped-def]
    source, owes, lanes, stride, used, begin, end, width,
    SIDE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    INPUTS: tl.constexpr, RANK: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the sum for a large tile of inputs, (inputs, lanes)."""
    total = tl.full((INPUTS, LANES), 0.0, tl.float32)
    for start in range(begin, end, WIDTH):
        k = start + tl.arange(0, WIDTH)
        y = _factor_at(lanes, stride, k, used, width, SIDE, ALIGNED, RANK)
        x = tl.load(source[:, None] + k[None, :], mask=owes & (k[None, :] < width), other=0.0)
        total = tl.dot(x.to(COMPUTE), y.to(COMPUTE), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=CHANGING)  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x,
    low,  # (parts, entries, inputs of a group in whole tiles, RANK)
    order,
    nodes,
    owners,
    coefficients,
    table,
    scales,
    rows,
    tokens,
    width,
    entries,
    room,
    part,
    GROUP: tl.constexpr,
    SIDE: tl.constexpr,
    FACTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,  # rows of x begin at multiples of 16 numbers
    PRECISION: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARES: tl.constexpr,
    FIELDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if WHOLE:
        width = width // 16 * 16  # shows it to the compiler: a hint on an argument is lost
    part = part // WIDTH * WIDTH
    LANES: tl.constexpr = ENTRIES * RANK
    first = tl.program_id(0) * ENTRIES
    lane = tl.arange(0, LANES)
    entry, r = first + lane // RANK, lane % RANK
    node = tl.load(nodes + entry)
    fields = table + tl.where(node < 0, 0, node) * FIELDS
    rank = tl.load(fields + 6)  # 0: the node changes other sites, and not this one
    used = (node >= 0) & (r < rank)
    if ALIGNED:
        used = tl.max_constancy(used, [8])  # ranks are multiples of 8: 8 lanes are one load
    factor = tl.load(fields + SIDE * 3).to(tl.pointer_type(FACTOR))
    stride = tl.load(fields + SIDE * 3 + 1)
    i = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    place = i // tokens
    owner = tl.load(owners + first)
    row = owner * GROUP + place
    inside = (place < GROUP) & (row < rows)
    if GROUP > 1:
        # The program has one entry, and this says which rows of the group owe it.
        coefficient = tl.load(coefficients + first * GROUP + place, mask=inside, other=0.0)[:, None]
        owes = coefficient != 0.0
    else:
        coefficient = tl.load(coefficients + entry)[None, :]
        owes = inside[:, None]
    total = tl.full((INPUTS, LANES), 0.0, tl.float32)
    if tl.reduce(used.to(tl.int32), 0, larger) > 0:
        begin = tl.program_id(2) * part
        end = tl.minimum(begin + part, width)
        # A lies by ranks, (r, in), and B by outputs, (out, r).
        lanes = factor + r * stride if SIDE == 0 else factor + r
        if ALIGNED:
            stride = tl.multiple_of(stride, [8])
            if SIDE == 0:
                lanes = tl.multiple_of(lanes, [16])
        at = tl.load(order + row, mask=inside, other=0).to(tl.int64) * tokens + i % tokens
        source = x + at * width
        wait_for_last(EARLY)  # for x; the lists and the factors were there before it
        begin_next(EARLY)
        if INPUTS == 1:
            row_start = x + tl.load(order + owner).to(tl.int64) * width
            total = _of_one_input(
                row_start, lanes, stride, used, begin, end, width, SIDE, ALIGNED, RANK, LANES, WIDTH
            )
        elif SHARES > 1:
            total = of_few_inputs(
                source, owes, lanes, stride, used, begin, end, width,
                SIDE, COMPUTE, ALIGNED, PRECISION, INPUTS, RANK, LANES, WIDTH, SHARES,
            )  # fmt: skip
        else:
            total = _of_many_inputs(
                source, owes, lanes, stride, used, begin, end, width,
                SIDE, COMPUTE, ALIGNED, PRECISION, INPUTS, RANK, LANES, WIDTH,
            )  # fmt: skip
        total *= tl.load(scales + tl.where(node < 0, 0, node))[None, :]
        # Masked, not multiplied by 0: an input that owes nothing may have made a number infinite.
        total = tl.where((coefficient != 0.0) & used[None, :], total * coefficient, 0.0)
    else:
        wait_for_last(EARLY)  # low may be memory that the last kernel still reads
    to = (tl.program_id(2) * entries + entry[None, :]).to(tl.int64) * room + i[:, None]
    tl.store(low + to * RANK + r[None, :], total.to(low.dtype.element_ty))


_launch = Relaunch(_kernel)


def shrink(x: Tensor, segments: Segments, table: FactorTable, side: int, tiling: Tiling) -> Tensor:
    """Return the narrow sums, (parts, entries, inputs of a group in whole tiles, rank): in fp32, or
    in the tiling's dtype if there is one part.

    Args:
        x: (rows · tokens, width), row by row.
        segments: of the batch.
        table: the factors.
        side: 0 for A, 1 for B.
        tiling: of the batch.
    """
    return bound_shrink(x, segments, table, side, tiling)(x, table)


def bound_shrink(
    x: Tensor, segments: Segments, table: FactorTable, side: int, tiling: Tiling
) -> BoundShrink:
    """Return `shrink` for all inputs like ``x`` and all tables of one kind; it takes both. The
    arguments are those of `shrink`.
    """
    key = "shrink", x.dtype, side, tiling, table.kind
    planned = segments.plans.get(key)
    if planned is None:
        planned = segments.plans[key] = _plan(x, segments, table, side, tiling)
    plan, shape, dtype = planned
    return BoundShrink(_launch.bind(plan, segments.to_shrink), shape, dtype)


class BoundShrink:
    """`shrink` for one batch, and for inputs and tables of one kind.

    Args:
        launch: takes `FactorTable.to_shrink`, an input and the memory of its narrow sum.
        shape: of the narrow sum.
        dtype: of the narrow sum.
    """

    __slots__ = ("_dtype", "_launch", "_shape")

    def __init__(self, launch: BoundLaunch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._launch, self._shape, self._dtype = launch, shape, dtype

    @property
    def low(self) -> Tensor:
        """A tensor without memory, of the narrow sum's shape and dtype."""
        return torch.empty(self._shape, dtype=self._dtype, device="meta")

    def __call__(self, x: Tensor, table: FactorTable) -> Tensor:
        """Return the narrow sum, as `shrink` does."""
        low = torch.empty(self._shape, dtype=self._dtype, device=x.device)
        self._launch(table.to_shrink, x, low)
        return low


def _plan(
    x: Tensor, segments: Segments, table: FactorTable, side: int, tiling: Tiling
) -> tuple[LaunchPlan, tuple[int, ...], torch.dtype]:
    """Return the plan of a launch, and the shape and the dtype of its result."""
    sizes, width = segments.sizes, table.wide[side]
    parts, room = tiling.parts(width), tiling.room
    together = 1 if sizes.group > 1 else entries_at_once(table.rank)
    widest = max(x.dtype, table.dtype, key=lambda dtype: dtype.itemsize)
    step = width_at_once(tiling.tile, together * table.rank, widest)
    constants = (
        *shared_constants(segments, table, side, tiling),
        tiling.tile,
        table.rank,
        together,
        step,
        shares_of(tiling.tile),
        FIELDS,
        begins_early(x.device),
    )
    part = -(-width // (parts * step)) * step
    numbers = sizes.rows, tiling.tokens, width, sizes.entries, room, part
    grid = sizes.entries // together, room // tiling.tile, parts
    # `expand` multiplies the sum in the tiling's dtype. Parts are added up in fp32 before that.
    is_narrow = parts == 1 and x.device.type == "cuda"
    low = tiling.compute if is_narrow else torch.float32
    options = options_for(x.device, warps_of(tiling.tile), stages_for(x.device))
    plan = LaunchPlan(grid, numbers, constants, (x.dtype, low, *constants), options)
    return plan, (parts, sizes.entries, room, table.rank), low


def shares_of(tile: int) -> int:
    """Return the number of shares into which a program's warps divide each step of a width."""
    return WARPS if tile == 16 else 1


def warps_of(tile: int) -> int:
    """Return the warps of a program."""
    return 2 * WARPS if tile == 1 else WARPS


def stages_for(device: torch.device) -> int:
    """Return the stages of the loop: with more, more of a factor is being loaded at a time."""
    if device.type != "cuda":
        return 1
    stages = MOST_STAGES
    while stages > 3 and (stages - 1) * STAGE_BYTES > shared_bytes(device) - SPARE_BYTES:
        stages -= 1
    return stages


def width_at_once(tile: int, lanes: int, dtype: torch.dtype) -> int:
    """Return how much of a width a program takes at once, so that the stages of its loop fit into a
    GPU's shared memory.

    Args:
        tile: inputs of a program.
        lanes: of its entries.
        dtype: the widest that it reads.

    >>> width_at_once(16, 64, torch.bfloat16), width_at_once(64, 64, torch.float32)
    (256, 64)
    """
    if tile == 1:
        return 128 if lanes <= 64 else 64
    step = LARGEST_STEP
    while step > 32 and step * (tile + lanes) * dtype.itemsize > STAGE_BYTES:
        step //= 2
    return step


def reference_shrink(
    x: Tensor,
    segments: Segments,
    factors: Sequence[tuple[Tensor, Tensor, float]],
    side: int,
    tiling: Tiling,
) -> Tensor:
    """Return the sum of `shrink`'s parts, computed with stock operations; zeros where nothing is
    owed.

    Args:
        x, segments, side, tiling: as `shrink` takes them.
        factors: (A, B, scale) of every node of the table.
    """
    sizes = segments.sizes
    rank = max(A.shape[0] for A, _, _ in factors)
    room = tiling.room
    low = torch.zeros(sizes.entries, room, rank, dtype=torch.float32, device=x.device)
    for entry, node in enumerate(segments.nodes.tolist()):
        if node < 0:
            continue
        A, B, scale = factors[node]
        factor = (A if side == 0 else B.mT).float()
        first = int(segments.owners[entry]) * sizes.group
        for place in range(min(sizes.group, sizes.rows - first)):
            coefficient = float(segments.coefficients[entry, place])
            if not coefficient:
                continue
            row = int(segments.order[first + place])
            inputs = x[row * tiling.tokens : (row + 1) * tiling.tokens].float()
            begin = place * tiling.tokens
            part = low[entry, begin : begin + tiling.tokens, : len(factor)]
            part.copy_(inputs @ factor.mT * (coefficient * scale))
    return low
