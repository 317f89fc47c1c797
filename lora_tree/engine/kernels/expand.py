"""out ← base + Σ low factor, over every node that an input owes, in one launch.

    a program: a tile of a group's inputs, some outputs
        for the lanes of a few entries:   acc (inputs, outputs) += low (inputs, lanes) @ factor
        load base ─▶ + acc ─▶ round ─▶ store

All nodes of a row are added in fp32 and the sum is rounded once. A row that owes nothing keeps its
bits: in place it is not written, and otherwise the base's numbers are copied.

Reaching a factor takes three loads, each of which needs the one before: the entry's node, its
address, its numbers. The loads for the next entries are made while the present ones are multiplied,
and those for the first entries while `shrink` still runs, if the device lets a kernel begin early.

The forward takes the narrow sums of A, and B; the backward those of B, and A, without a base.
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
from .tiles import added, begins_early, options_for, shared_bytes, wait_for_last
from .tiling import Tiling, entries_at_once

__all__ = ["bound_expand", "expand", "factor_of", "outputs_of", "reference_expand", "store_sum"]

WARPS, STAGES = 4, 1

MANY, SPAN = 16, 4
"""A program computes a span of `SPAN` tiles of outputs if there are `MANY` tiles of inputs or more.
"""

FACTOR_BYTES, LARGE = 16 << 10, 160 << 10
"""Bytes of shared memory for a factor; and the bytes in which three factors fit beside outputs."""

# Compiling for each of their values would take a second, and `Relaunch` does not look at them.
CHANGING = ["rows", "tokens", "width", "entries", "room", "chunks"]


@triton.jit
def _nodes_of(nodes, entry, end):  # type: ignore[no-untyped-def]
    """Return the nodes of some entries; −1 past the group's last."""
    return tl.load(nodes + entry, mask=entry < end, other=-1)


@triton.jit  # type: ignore[untyped-decorator]
def _lanes_of(  # type: ignore[no-untyped-def]
    table, node, SIDE: tl.constexpr, FIELDS: tl.constexpr
):
    """Return the addresses, strides and ranks of some nodes' factors; a rank of 0 for none."""
    fields = table + node * FIELDS
    is_node = node >= 0
    address = tl.load(fields + SIDE * 3, mask=is_node, other=0)
    stride = tl.load(fields + SIDE * 3 + 1, mask=is_node, other=0)
    rank = tl.load(fields + 6, mask=is_node, other=0)
    return address, stride, rank


@triton.jit  # type: ignore[untyped-decorator]
def factor_of(  # type: ignore[no-untyped-def]
    address,
    stride,
    rank,
    r,
    c,
    width,
    SIDE: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
):
    """Return some nodes' factors, (lanes, outputs); zeros above their ranks."""
    factor = address.to(tl.pointer_type(FACTOR))
    used = r < rank
    if ALIGNED:
        used = tl.max_constancy(used, [8])  # ranks are multiples of 8: 8 lanes are one load
    if SIDE == 0:
        lanes = factor + r * stride
        if ALIGNED:
            lanes = tl.multiple_of(lanes, [16])
        pointers = lanes[:, None] + c[None, :]
    else:
        pointers = (factor + r)[:, None] + c[None, :] * stride[:, None]
        if ALIGNED:
            pointers = tl.max_contiguous(tl.multiple_of(pointers, [16, 1]), [RANK, 1])
    return tl.load(pointers, mask=used[:, None] & (c[None, :] < width), other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _narrow(  # type: ignore[no-untyped-def]
    low,
    entry,
    end,
    entries,
    room,
    i,
    inside,
    r,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return the narrow sum of some entries' lanes, (inputs, lanes); its parts are added up."""
    if INPUTS == 1:
        part = tl.arange(0, PARTS)
        lines = (part[:, None] * entries + entry[None, :]).to(tl.int64) * room
        pointers = low + lines * RANK + r[None, :]
        parts = tl.load(pointers, mask=(entry < end)[None, :], other=0.0).to(tl.float32)
        narrow = tl.reduce(parts, 0, added)[None, :]
    else:
        mask = inside[:, None] & (entry < end)[None, :]
        pointers = low + (entry[None, :].to(tl.int64) * room + i[:, None]) * RANK + r[None, :]
        narrow = tl.load(pointers, mask=mask, other=0.0)
        if PARTS > 1:
            narrow = narrow.to(tl.float32)
            for _ in tl.static_range(PARTS - 1):
                pointers += entries.to(tl.int64) * room * RANK
                narrow += tl.load(pointers, mask=mask, other=0.0)
    return narrow


@triton.jit  # type: ignore[untyped-decorator]
def store_sum(  # type: ignore[no-untyped-def]
    out, before, total, adapted, stored, FRESH: tl.constexpr
):
    """Write the sum, rounded once; a number to which nothing is added keeps its bits."""
    if FRESH:
        tl.store(out, total.to(out.dtype.element_ty), mask=stored)
    else:
        after = (before.to(tl.float32) + total).to(out.dtype.element_ty)
        # Masked, not a sum with 0: −0 + 0 would be +0.
        changed = adapted[:, None] & (total != 0.0)
        tl.store(out, tl.where(changed, after, before), mask=stored)


@triton.jit(do_not_specialize=CHANGING)  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    low,  # (PARTS, entries, inputs of a group in whole tiles, RANK)
    base,
    out,
    order,
    owed,
    begins,
    nodes,
    table,
    rows,
    tokens,
    width,
    entries,
    room,
    chunks,
    GROUP: tl.constexpr,
    SIDE: tl.constexpr,
    FACTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,  # rows of out begin at multiples of 16 numbers
    PRECISION: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ENTRIES: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,  # tiles of outputs of a program; above 1 its group has ENTRIES at most
    LOOP: tl.constexpr,  # stages of the loop over them
    FIELDS: tl.constexpr,
    FRESH: tl.constexpr,  # there is no base: rows that owe nothing are zeros
    IN_PLACE: tl.constexpr,  # out is base: rows that owe nothing are not written
    AHEAD: tl.constexpr,  # the next factor is read while this one is multiplied
    EARLY: tl.constexpr,
):
    if WHOLE:
        width = width // 16 * 16  # shows it to the compiler: a hint on an argument is lost
    group = tl.program_id(0) // chunks
    i = (tl.program_id(0) % chunks) * INPUTS + tl.arange(0, INPUTS)
    place = i // tokens
    row = group * GROUP + place
    inside = (place < GROUP) & (row < rows)
    first, end = tl.load(begins + group), tl.load(begins + group + 1)
    lane = tl.arange(0, ENTRIES * RANK)
    of, r = lane // RANK, lane % RANK
    at = tl.load(order + row, mask=inside, other=0).to(tl.int64) * tokens + i % tokens
    adapted = tl.load(owed + row, mask=inside, other=0) > 0
    kept = inside & adapted if IN_PLACE else inside
    node = _nodes_of(nodes, first + of, end)
    address, stride, rank = _lanes_of(table, node, SIDE, FIELDS)
    c = tl.program_id(1) * (SPAN * WIDTH) + tl.arange(0, WIDTH)
    if SPAN > 1:
        # The group has no other entries. Their narrow sum is read once, for a span of outputs.
        wait_for_last(EARLY)
        narrow = _narrow(low, first + of, end, entries, room, i, inside, r, INPUTS, RANK, PARTS)
        for _ in tl.range(SPAN, num_stages=LOOP):
            y = factor_of(address, stride, rank, r, c, width, SIDE, FACTOR, ALIGNED, RANK)
            to = at[:, None] * width + c[None, :]
            stored = kept[:, None] & (c[None, :] < width)
            before = tl.load(base + to, mask=stored & (not FRESH), other=0.0)
            total = tl.full((INPUTS, WIDTH), 0.0, tl.float32)
            total = tl.dot(narrow.to(COMPUTE), y.to(COMPUTE), total, input_precision=PRECISION)
            store_sum(out + to, before, total, adapted, stored, FRESH)
            c += WIDTH
    else:
        y = factor_of(address, stride, rank, r, c, width, SIDE, FACTOR, ALIGNED, RANK)
        node = _nodes_of(nodes, first + ENTRIES + of, end)
        address, stride, rank = _lanes_of(table, node, SIDE, FIELDS)
        node = _nodes_of(nodes, first + 2 * ENTRIES + of, end)
        to = at[:, None] * width + c[None, :]
        stored = kept[:, None] & (c[None, :] < width)
        before = tl.load(base + to, mask=stored & (not FRESH), other=0.0)
        wait_for_last(EARLY)  # for low; all else was complete before this kernel could begin
        total = tl.full((INPUTS, WIDTH), 0.0, tl.float32)
        for begin in range(first, end, ENTRIES):
            if AHEAD:
                later = factor_of(address, stride, rank, r, c, width, SIDE, FACTOR, ALIGNED, RANK)
                address, stride, rank = _lanes_of(table, node, SIDE, FIELDS)
                node = _nodes_of(nodes, begin + 3 * ENTRIES + of, end)
            narrow = _narrow(low, begin + of, end, entries, room, i, inside, r, INPUTS, RANK, PARTS)
            if INPUTS == 1:
                # Tensor cores take sixteen inputs; one is multiplied number by number.
                products = narrow.reshape(ENTRIES * RANK, 1) * y.to(tl.float32)
                total += tl.reduce(products, 0, added)[None, :]
            else:
                total = tl.dot(narrow.to(COMPUTE), y.to(COMPUTE), total, input_precision=PRECISION)
            if AHEAD:
                y = later
            elif begin + ENTRIES < end:
                y = factor_of(address, stride, rank, r, c, width, SIDE, FACTOR, ALIGNED, RANK)
                address, stride, rank = _lanes_of(table, node, SIDE, FIELDS)
                node = _nodes_of(nodes, begin + 3 * ENTRIES + of, end)
        store_sum(out + to, before, total, adapted, stored, FRESH)


_launch = Relaunch(_kernel)


def expand(
    low: Tensor,
    base: Tensor | None,
    out: Tensor,
    segments: Segments,
    table: FactorTable,
    side: int,
    tiling: Tiling,
) -> None:
    """Write ``base`` plus what its rows owe to ``out``.

    Args:
        low: as `shrink` returns it, for the same segments and tiling.
        base: (rows · tokens, width), row by row, of out's dtype; None: zeros.
        out: of that shape; may be ``base`` itself.
        segments: of the batch.
        table: the factors.
        side: 0 for A, 1 for B.
        tiling: of the batch.
    """
    launch = bound_expand(low, base, out, segments, table, side, tiling)
    launch(table.to_expand, low, out if base is None else base, out)


def bound_expand(
    low: Tensor,
    base: Tensor | None,
    out: Tensor,
    segments: Segments,
    table: FactorTable,
    side: int,
    tiling: Tiling,
) -> BoundLaunch:
    """Return the launch of `expand` for all tensors like these and all tables of one kind; it takes
    `FactorTable.to_expand`, low, base and out. The arguments are those of `expand`.
    """
    key = "expand", out.dtype, side, tiling, table.kind, base is None, base is out
    plan = segments.plans.get(key)
    if plan is None:
        plan = _plan(low, base, out, segments, table, side, tiling)
        segments.plans[key] = plan
    return _launch.bind(plan, segments.to_expand)


def _plan(
    low: Tensor,
    base: Tensor | None,
    out: Tensor,
    segments: Segments,
    table: FactorTable,
    side: int,
    tiling: Tiling,
) -> LaunchPlan:
    sizes, width = segments.sizes, table.wide[side]
    chunks = tiling.room // tiling.wide_tile
    together = entries_at_once(table.rank)
    is_wide = sizes.groups * chunks >= MANY and sizes.group == 1
    span = SPAN if is_wide and sizes.largest <= together else 1
    step = outputs_of(128 if is_wide else 64, together * table.rank, table.dtype)
    constants = (
        *shared_constants(segments, table, side, tiling),
        tiling.wide_tile,
        table.rank,
        together,
        len(low),
        step,
        span,
        loop_for(out.device),
        FIELDS,
        base is None,
        base is out,
        sizes.group > 1,
        begins_early(out.device),
    )
    numbers = sizes.rows, tiling.tokens, width, sizes.entries, tiling.room, chunks
    grid = sizes.groups * chunks, -(-width // (step * span)), 1
    options = options_for(out.device, 2 * WARPS if tiling.wide_tile > 16 else WARPS, STAGES)
    return LaunchPlan(grid, numbers, constants, (low.dtype, out.dtype, *constants), options)


def outputs_of(most: int, lanes: int, dtype: torch.dtype) -> int:
    """Return how many outputs a program computes at once, so that its factor fits into shared
    memory.

    >>> outputs_of(128, 64, torch.bfloat16), outputs_of(128, 128, torch.float32)
    (128, 32)
    """
    step = most
    while step > 32 and step * lanes * dtype.itemsize > FACTOR_BYTES:
        step //= 2
    return step


def loop_for(device: torch.device) -> int:
    """Return the stages of the loop over a span."""
    return 3 if device.type == "cuda" and shared_bytes(device) >= LARGE else 2


def reference_expand(
    low: Tensor,
    base: Tensor | None,
    segments: Segments,
    factors: Sequence[tuple[Tensor, Tensor, float]],
    side: int,
    tiling: Tiling,
    dtype: torch.dtype,
) -> Tensor:
    """Return what `expand` writes, computed with stock operations.

    Args:
        low: as `reference_shrink` returns it.
        base, segments, side, tiling: as `expand` takes them.
        factors: (A, B, scale) of every node of the table.
        dtype: of the result.
    """
    sizes, tokens = segments.sizes, tiling.tokens
    width = factors[0][0].shape[1] if side == 0 else factors[0][1].shape[0]
    shape = (sizes.rows * tokens, width)
    total = torch.zeros(shape, dtype=torch.float32, device=low.device)
    adapted = torch.zeros(shape[0], 1, dtype=torch.bool, device=low.device)
    for entry, node in enumerate(segments.nodes.tolist()):
        if node < 0:
            continue
        A, B, _ = factors[node]
        factor = (A if side == 0 else B.mT).float()
        first = int(segments.owners[entry]) * sizes.group
        for place in range(min(sizes.group, sizes.rows - first)):
            if not float(segments.coefficients[entry, place]):
                continue
            row, begin = int(segments.order[first + place]), place * tokens
            outputs = slice(row * tokens, (row + 1) * tokens)
            total[outputs] += low[entry, begin : begin + tokens, : len(factor)] @ factor
            adapted[outputs] = True
    if base is None:
        return total.to(dtype)
    return torch.where(adapted, (base.float() + total).to(dtype), base)
