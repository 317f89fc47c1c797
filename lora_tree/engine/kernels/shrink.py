"""low ← coefficient · scale · x factorᵀ for every entry of a batch's segments, in one launch.

    a program: one entry (a node and a group of rows), a tile of the group's inputs, a part of the
    width
        acc (inputs, rank) += x (inputs, width) @ factor (width, rank)      in fp32

A node's factor is read where it is, once for all rows of a group. Long inputs are taken in parts,
so that a few rows give enough programs; who reads the result adds the parts up, in order. Inputs
that do not owe the node are neither read nor multiplied: their numbers may be infinite.

The forward takes x and A; the backward takes the gradient of the output, and B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .part import on
from .segments import FIELDS, FactorTable, Segments, Tiling, width_of
from .tiles import TYPES, larger, products

__all__ = ["shrink", "shrunk_plainly"]

WARPS, STAGES = 4, 3

# Numbers that change from batch to batch: to compile for their values would take a second each.
CHANGING = ["rows", "entries"]


@triton.jit(do_not_specialize=CHANGING)  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x,
    low,  # (parts, entries, inputs of a group in whole tiles, RANK) fp32
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
    PRECISION: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    FIELDS: tl.constexpr,
):
    entry = tl.program_id(0)
    chunk = tl.program_id(1)
    node = tl.load(nodes + entry)
    i = chunk * INPUTS + tl.arange(0, INPUTS)
    place = i // tokens
    row = tl.load(owners + entry) * GROUP + place
    inside = (place < GROUP) & (row < rows)
    coefficient = tl.load(coefficients + entry * GROUP + place, mask=inside, other=0.0)
    owes = coefficient != 0.0
    fields = table + tl.where(node < 0, 0, node) * FIELDS
    rank = tl.load(fields + 6)  # 0: the node changes other sites, and not this one
    if (tl.reduce(owes.to(tl.int32), 0, larger) > 0) & (rank > 0):
        factor = tl.load(fields + SIDE * 3).to(tl.pointer_type(FACTOR))
        stride = tl.load(fields + SIDE * 3 + 1)
        if ALIGNED:
            factor = tl.multiple_of(factor, 16)
            stride = tl.multiple_of(stride, 8)
        at = tl.load(order + row, mask=inside, other=0).to(tl.int64) * tokens + i % tokens
        source = x + at * width
        r = tl.arange(0, RANK)
        total = tl.full((INPUTS, RANK), 0.0, tl.float32)
        begin = tl.program_id(2) * part
        for start in range(begin, tl.minimum(begin + part, width), WIDTH):
            k = start + tl.arange(0, WIDTH)
            taken = tl.load(
                source[:, None] + k[None, :], mask=owes[:, None] & (k[None, :] < width), other=0.0
            )
            # A lies by ranks, (r, in), and B by outputs, (out, r).
            there = (
                r[None, :] * stride + k[:, None] if SIDE == 0 else k[:, None] * stride + r[None, :]
            )
            y = tl.load(factor + there, mask=(k[:, None] < width) & (r[None, :] < rank), other=0.0)
            total = tl.dot(taken.to(COMPUTE), y.to(COMPUTE), total, input_precision=PRECISION)
        total *= (coefficient * tl.load(scales + node))[:, None]
        to = (tl.program_id(2) * entries + entry).to(tl.int64) * room + i
        tl.store(low + to[:, None] * RANK + r[None, :], total, mask=owes[:, None])


def shrink(x: Tensor, segments: Segments, table: FactorTable, side: int, tiling: Tiling) -> Tensor:
    """Return (parts, entries, inputs of a group in whole tiles, rank) fp32.

    Numbers of inputs that owe the entry's node nothing are not written.

    Args:
        x: (rows · tokens, width), row by row.
        segments: of the batch.
        table: the factors.
        side: 0 for A, 1 for B.
        tiling: of the batch.
    """
    sizes, width = segments.sizes, table.wide[side]
    step = width_of(table.rank, tiling.compute)
    parts, room = tiling.parts(width), tiling.chunks * tiling.tile
    shape = (parts, sizes.entries, room, table.rank)
    low = torch.empty(shape, dtype=torch.float32, device=x.device)
    compute, precision = products(x.device, tiling.compute)
    with on(x.device):
        _kernel[(sizes.entries, tiling.chunks, parts)](
            x,
            low,
            segments.order,
            segments.nodes,
            segments.owners,
            segments.coefficients,
            table.numbers,
            table.scales,
            sizes.rows,
            tiling.tokens,
            width,
            sizes.entries,
            room,
            -(-width // (parts * step)) * step,
            GROUP=sizes.group,
            SIDE=side,
            FACTOR=TYPES[table.dtype],
            COMPUTE=compute,
            ALIGNED=table.aligned,
            PRECISION=precision,
            INPUTS=tiling.tile,
            RANK=table.rank,
            WIDTH=step,
            FIELDS=FIELDS,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return low


def shrunk_plainly(
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
    room = tiling.chunks * tiling.tile
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
            mine = x[row * tiling.tokens : (row + 1) * tiling.tokens].float()
            begin = place * tiling.tokens
            there = low[entry, begin : begin + tiling.tokens, : len(factor)]
            there.copy_(mine @ factor.mT * (coefficient * scale))
    return low
