"""grad_n ← Σ lowᵀ x, over the inputs that owe node n, for every node in one launch.

    a program: one node, a part of the width
        for each entry of the node, each tile of its group:
            acc (rank, width) += lowᵀ (rank, inputs) @ x (inputs, width)      in fp32

It makes the gradients of all A from the backward's narrow sums and the forward's input, and those
of all B from the forward's narrow sums and the gradient of the output. One program adds up all of a
node's inputs in order, so that the bits do not depend on a race.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .factor_table import FIELDS, FactorTable
from .part import on
from .segments import Segments
from .tiles import larger, products
from .tiling import Tiling, width_of

__all__ = ["outer", "reference_outer"]

WARPS, STAGES = 4, 2

# Numbers that change from batch to batch: compiling for each of their values would take a second.
CHANGING = ["rows", "entries", "chunks", "parts"]


@triton.jit(do_not_specialize=CHANGING)  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    low,  # (parts, entries, inputs of a group in whole tiles, RANK)
    x,
    grads,
    order,
    owners,
    coefficients,
    by_node,
    node_begins,
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
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    FIELDS: tl.constexpr,
):
    node = tl.program_id(0)
    fields = table + node * FIELDS
    rank = tl.load(fields + 6)
    grad = grads + tl.load(fields + SIDE * 3 + 2)
    r = tl.arange(0, RANK)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.full((RANK, WIDTH), 0.0, tl.float32)
    for turn in range(tl.load(node_begins + node), tl.load(node_begins + node + 1)):
        entry = tl.load(by_node + turn)
        group = tl.load(owners + entry)
        for chunk in range(chunks):
            i = chunk * INPUTS + tl.arange(0, INPUTS)
            place = i // tokens
            row = group * GROUP + place
            inside = (place < GROUP) & (row < rows)
            coefficient = tl.load(coefficients + entry * GROUP + place, mask=inside, other=0.0)
            owes = coefficient != 0.0
            if tl.reduce(owes.to(tl.int32), 0, larger) > 0:
                narrow = tl.full((RANK, INPUTS), 0.0, tl.float32)
                for part in range(parts):
                    at = (part * entries + entry).to(tl.int64) * room + i
                    pointers = low + at[None, :] * RANK + r[:, None]
                    narrow += tl.load(pointers, mask=owes[None, :], other=0.0).to(tl.float32)
                at = tl.load(order + row, mask=inside, other=0).to(tl.int64) * tokens + i % tokens
                y = tl.load(
                    x + at[:, None] * width + c[None, :],
                    mask=owes[:, None] & (c[None, :] < width),
                    other=0.0,
                )
                total = tl.dot(narrow.to(COMPUTE), y.to(COMPUTE), total, input_precision=PRECISION)
    to = r[:, None] * width + c[None, :] if SIDE == 0 else c[None, :] * rank + r[:, None]
    stored = (r[:, None] < rank) & (c[None, :] < width)
    tl.store(grad + to, total.to(grads.dtype.element_ty), mask=stored)


def outer(
    low: Tensor, x: Tensor, segments: Segments, table: FactorTable, side: int, tiling: Tiling
) -> Tensor:
    """Return the gradients of all A, or of all B, one after the other, in the factors' dtype.

    Args:
        low: as `shrink` returns it for the other side.
        x: (rows · tokens, width), row by row.
        segments: of the batch.
        table: the factors.
        side: 0 for the gradients of A, 1 for those of B.
        tiling: of the batch.
    """
    sizes, width = segments.sizes, table.wide[side]
    step = width_of(table.rank, tiling.compute)
    grads = torch.empty(table.grad_sizes[side], dtype=table.dtype, device=x.device)
    compute, precision = products(x.device, tiling.compute)
    tile = max(16, tiling.wide_tile)
    with on(x.device):
        _kernel[(sizes.nodes, -(-width // step))](
            low,
            x,
            grads,
            segments.order,
            segments.owners,
            segments.coefficients,
            segments.by_node,
            segments.node_begins,
            table.numbers,
            sizes.rows,
            tiling.tokens,
            width,
            sizes.entries,
            tiling.room,
            -(-tiling.inputs // tile),
            len(low),
            GROUP=sizes.group,
            SIDE=side,
            COMPUTE=compute,
            PRECISION=precision,
            INPUTS=tile,
            RANK=table.rank,
            WIDTH=step,
            FIELDS=FIELDS,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return grads


def reference_outer(
    low: Tensor,
    x: Tensor,
    segments: Segments,
    factors: Sequence[tuple[Tensor, Tensor, float]],
    side: int,
    tiling: Tiling,
) -> list[Tensor]:
    """Return each node's gradient, computed with stock operations.

    Args:
        low: as `reference_shrink` returns it for the other side.
        x, segments, side, tiling: as `outer` takes them.
        factors: (A, B, scale) of every node of the table.
    """
    sizes, tokens = segments.sizes, tiling.tokens
    grads: list[Tensor] = []
    for A, B, _ in factors:
        grads.append(torch.zeros_like(A if side == 0 else B, dtype=torch.float32))
    for entry, node in enumerate(segments.nodes.tolist()):
        if node < 0:
            continue
        first = int(segments.owners[entry]) * sizes.group
        for place in range(min(sizes.group, sizes.rows - first)):
            if not float(segments.coefficients[entry, place]):
                continue
            row, begin = int(segments.order[first + place]), place * tokens
            inputs = x[row * tokens : (row + 1) * tokens].float()
            narrow = low[entry, begin : begin + tokens, : len(factors[node][0])]
            product = narrow.mT @ inputs  # (r, width)
            grads[node] += product if side == 0 else product.mT
    return grads
