"""out ← base + Σ low factor, over every node that an input owes, in one launch.

    a program: a tile of a group's inputs, some outputs
        for each entry of the group:   acc (inputs, outputs) += low (inputs, rank) @ factor
        load base ─▶ + acc ─▶ round ─▶ store

All nodes of a row are added in fp32 and the sum is rounded once. A row that owes nothing keeps its
bits: in place it is not written, and a copy holds its base's numbers.

The forward takes the sums of A, and B; the backward those of B, and A, without a base.
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

__all__ = ["expand", "expanded_plainly"]

WARPS, STAGES = 4, 2

# Numbers that change from batch to batch: to compile for their values would take a second each.
CHANGING = ["rows", "entries", "chunks", "parts"]


@triton.jit(do_not_specialize=CHANGING)  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    low,  # (parts, entries, inputs of a group in whole tiles, RANK) fp32
    base,
    out,
    order,
    begins,
    nodes,
    coefficients,
    table,
    rows,
    tokens,
    width,
    entries,
    room,
    chunks,
    parts,
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
    FRESH: tl.constexpr,  # there is no base: rows that owe nothing are zeros
    IN_PLACE: tl.constexpr,  # out is base: rows that owe nothing are not written
):
    group = tl.program_id(0) // chunks
    i = (tl.program_id(0) % chunks) * INPUTS + tl.arange(0, INPUTS)
    place = i // tokens
    row = group * GROUP + place
    inside = (place < GROUP) & (row < rows)
    r = tl.arange(0, RANK)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.full((INPUTS, WIDTH), 0.0, tl.float32)
    adapted = tl.full((INPUTS,), 0, tl.int32)
    for entry in range(tl.load(begins + group), tl.load(begins + group + 1)):
        mine = tl.load(coefficients + entry * GROUP + place, mask=inside, other=0.0)
        owes = (mine != 0.0).to(tl.int32)
        fields = table + tl.load(nodes + entry) * FIELDS
        rank = tl.load(fields + 6)  # 0: the node changes other sites, and not this one
        if (tl.reduce(owes, 0, larger) > 0) & (rank > 0):
            adapted = adapted | owes
            factor = tl.load(fields + SIDE * 3).to(tl.pointer_type(FACTOR))
            stride = tl.load(fields + SIDE * 3 + 1)
            if ALIGNED:
                factor = tl.multiple_of(factor, 16)
                stride = tl.multiple_of(stride, 8)
            narrow = tl.full((INPUTS, RANK), 0.0, tl.float32)
            for part in range(parts):
                at = (part * entries + entry).to(tl.int64) * room + i
                narrow += tl.load(
                    low + at[:, None] * RANK + r[None, :], mask=owes[:, None] > 0, other=0.0
                )
            if SIDE == 0:
                there = r[:, None] * stride + c[None, :]
            else:
                there = c[None, :] * stride + r[:, None]
            y = tl.load(factor + there, mask=(r[:, None] < rank) & (c[None, :] < width), other=0.0)
            total = tl.dot(narrow.to(COMPUTE), y.to(COMPUTE), total, input_precision=PRECISION)
    at = tl.load(order + row, mask=inside, other=0).to(tl.int64) * tokens + i % tokens
    to = at[:, None] * width + c[None, :]
    stored = inside[:, None] & (c[None, :] < width)
    if IN_PLACE:
        stored = stored & (adapted[:, None] > 0)
    if FRESH:
        tl.store(out + to, total.to(out.dtype.element_ty), mask=stored)
    else:
        before = tl.load(base + to, mask=stored, other=0.0)
        after = (before.to(tl.float32) + total).to(out.dtype.element_ty)
        # Not a sum with 0: −0 + 0 would be +0.
        tl.store(out + to, tl.where(adapted[:, None] > 0, after, before), mask=stored)


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
    sizes, width = segments.sizes, table.wide[side]
    step = width_of(table.rank, tiling.compute)
    compute, precision = products(out.device, tiling.compute)
    with on(out.device):
        _kernel[(sizes.groups * tiling.chunks, -(-width // step))](
            low,
            out if base is None else base,
            out,
            segments.order,
            segments.begins,
            segments.nodes,
            segments.coefficients,
            table.numbers,
            sizes.rows,
            tiling.tokens,
            width,
            sizes.entries,
            tiling.chunks * tiling.tile,
            tiling.chunks,
            len(low),
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
            FRESH=base is None,
            IN_PLACE=base is out,
            num_warps=WARPS,
            num_stages=STAGES,
        )


def expanded_plainly(
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
        low: as `shrunk_plainly` returns it.
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
            there = slice(row * tokens, (row + 1) * tokens)
            total[there] += low[entry, begin : begin + tokens, : len(factor)] @ factor
            adapted[there] = True
    if base is None:
        return total.to(dtype)
    return torch.where(adapted, (base.float() + total).to(dtype), base)
