"""W ← round_once( W0 + Σ scale · left @ right ) for many weights in one launch.

    parts ──▶ one table: addresses, shapes, factors ──▶ a program for every few tiles of every weight

    a tile (64 rows, 128 columns):   load W0 ─┐
       for each term, for 16 of its ranks:    ├─▶ + acc · scale ─▶ round ─▶ store W
          acc += left (64, 16) @ right (16, 128)   in fp32

The weights are read once and written once, and so nearly all the time goes into moving them; how large the ranks are
hardly matters. Factors are read from where they are: nothing is stacked.

Law: the bits of a tile depend on W0, the factors and the scales alone. Tile sizes and the order of the sum are
constants, never tuned for a machine or a size; which weights share a launch changes nothing.

Products of bf16 and fp16 factors are exact, and summed in fp32. Factors in fp32 over narrow weights are taken apart
into three tf32 products (an error of about 2⁻²²); over fp32 weights they are multiplied in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..upload import uploaded
from .part import Part, Term

__all__ = ["is_right_on", "merge", "merged_plainly"]

ROWS, COLUMNS, RANKS = 64, 128, 16
"""Of a tile. They decide the bits."""

TILES = 4
"""Tiles that a program does one after the other."""

WARPS = 4

PART_FIELDS, TERM_FIELDS = 9, 7
"""Numbers that the table has for each."""

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    table,  # int64: programs before each part; then PART_FIELDS numbers a part; then TERM_FIELDS numbers a term
    scales,  # fp32: for each part its last term's scale; then for each term the one before's over its own
    parts,
    WEIGHT: tl.constexpr,
    FACTOR: tl.constexpr,
    TURNED: tl.constexpr,
    WEIGHTS_ALIGNED: tl.constexpr,
    FACTORS_ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    TILES: tl.constexpr,
    PART_FIELDS: tl.constexpr,
    TERM_FIELDS: tl.constexpr,
):
    program = tl.program_id(0)
    # The part that this program belongs to: the last one that begins at or before it.
    low = 0
    high = parts
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table + middle) <= program:
            low = middle
        else:
            high = middle
    fields = table + parts + low * PART_FIELDS
    pristine = tl.load(fields).to(tl.pointer_type(WEIGHT))
    weight = tl.load(fields + 1).to(tl.pointer_type(WEIGHT))
    rows = tl.load(fields + 2).to(tl.int32)
    cols = tl.load(fields + 3).to(tl.int32)
    across = tl.load(fields + 4).to(tl.int32)
    tiles_of_matrix = tl.load(fields + 5).to(tl.int32)
    tiles = tl.load(fields + 6).to(tl.int32)
    first_term = tl.load(fields + 7).to(tl.int32)
    terms = tl.load(fields + 8).to(tl.int32)
    scale = tl.load(scales + low)
    if WEIGHTS_ALIGNED:
        pristine = tl.multiple_of(pristine, 16)
        weight = tl.multiple_of(weight, 16)
        cols = tl.multiple_of(cols, 16)
    first = (program - tl.load(table + low).to(tl.int32)) * TILES
    for tile in range(first, tl.minimum(first + TILES, tiles)):
        batch = tile // tiles_of_matrix
        within = tile % tiles_of_matrix
        r = (within // across) * ROWS + tl.arange(0, ROWS)
        c = (within % across) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (r[:, None] < rows) & (c[None, :] < cols)
        offsets = r[:, None] * cols + c[None, :]
        matrix = batch.to(tl.int64) * rows * cols
        base = tl.load(pristine + matrix + offsets, mask=inside, other=0.0)
        total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        for term in range(first_term, first_term + terms):
            field = table + parts + parts * PART_FIELDS + term * TERM_FIELDS
            left = tl.load(field).to(tl.pointer_type(FACTOR))
            right = tl.load(field + 1).to(tl.pointer_type(FACTOR))
            rank = tl.load(field + 2).to(tl.int32)
            left_stride = tl.load(field + 3).to(tl.int32)
            right_stride = tl.load(field + 4).to(tl.int32)
            left += batch * tl.load(field + 5)
            right += batch * tl.load(field + 6)
            if FACTORS_ALIGNED:
                left = tl.multiple_of(left, 16)
                right = tl.multiple_of(right, 16)
                left_stride = tl.multiple_of(left_stride, 8)
                right_stride = tl.multiple_of(right_stride, 8)
            total *= tl.load(scales + parts + term)
            for begin in range(0, rank, RANKS):
                k = begin + tl.arange(0, RANKS)
                if TURNED:  # left is (rows, r) with its columns in one piece, right (r, cols) too
                    left_at = r[:, None] + k[None, :] * left_stride
                    right_at = k[:, None] + c[None, :] * right_stride
                else:
                    left_at = r[:, None] * left_stride + k[None, :]
                    right_at = k[:, None] * right_stride + c[None, :]
                x = tl.load(left + left_at, mask=(r[:, None] < rows) & (k[None, :] < rank), other=0.0)
                y = tl.load(right + right_at, mask=(k[:, None] < rank) & (c[None, :] < cols), other=0.0)
                if WIDEN:
                    x = x.to(tl.float32)
                    y = y.to(tl.float32)
                total = tl.dot(x, y, total, input_precision=PRECISION)
        result = base.to(tl.float32) + total * scale
        tl.store(weight + matrix + offsets, result.to(WEIGHT), mask=inside)


def merge(parts: Sequence[Part], *, interpreted: bool = False) -> None:
    """Write every part; one launch for all parts that lie alike on one device.

    Args:
        parts: `can_merge` says yes to each.
        interpreted: it runs in Triton's interpreter, which multiplies no bf16.
    """
    alike: dict[tuple[Any, ...], list[Part]] = {}
    for part in parts:
        part = _prepared(part)
        alike.setdefault(_kind(part), []).append(part)
    for (device, weight, factor, turned, weights_aligned, factors_aligned), group in alike.items():
        table, scales, programs = _table(group, device)
        exact = weight == torch.float32 or interpreted
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _kernel[(programs,)](
                table,
                scales,
                len(group),
                WEIGHT=TYPES[weight],
                FACTOR=TYPES[factor],
                TURNED=turned,
                WEIGHTS_ALIGNED=weights_aligned,
                FACTORS_ALIGNED=factors_aligned,
                PRECISION="ieee" if exact else "tf32x3",
                WIDEN=interpreted,
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                RANKS=RANKS,
                TILES=TILES,
                PART_FIELDS=PART_FIELDS,
                TERM_FIELDS=TERM_FIELDS,
                num_warps=WARPS,
            )
    # A kernel writes without autograd's knowledge: whoever saved a weight for a backward must hear of it.
    torch.autograd.graph.increment_version([part.weight for part in parts])


def merged_plainly(part: Part) -> Tensor:
    """What `merge` writes, from stock operations: the sum in fp32, rounded once; (batch, rows, cols)."""
    total = part.pristine.to(part.weight.device).float()
    for term in part.terms:
        total = total + (term.left.float() @ term.right.float()) * term.scale
    return total.to(part.weight.dtype)


def is_right_on(device: torch.device) -> bool:
    """Whether a small problem comes out right on a device: the compiler is there, and sums are kept in fp32."""
    draw = torch.Generator().manual_seed(0)
    base, left, right = (
        torch.randn(shape, generator=draw).to(torch.bfloat16) for shape in ((1, 96, 160), (1, 96, 24), (1, 24, 160))
    )
    exact = (base.double() + left.double() @ right.double()).to(torch.bfloat16)
    weight = base.to(device)
    merge([Part(weight, weight, [Term(left.to(device), right.to(device), 1.0)])])
    wrong = int((weight.cpu() != exact).sum())
    return wrong <= exact.numel() // 1000


# ---------------------------------------------------------------------- the table
def _prepared(part: Part) -> Part:
    """A part whose pristine values are where its weight is, and whose factors are all of one kind."""
    pristine = part.pristine
    if pristine.device != part.weight.device:
        pristine = part.weight.copy_(pristine, non_blocking=True)
    dtype, turned = part.factor_dtype, part.turned
    terms = [Term(_laid(t.left, dtype, turned), _laid(t.right, dtype, turned), t.scale) for t in part.terms]
    return Part(part.weight, pristine, terms)


def _laid(factor: Tensor, dtype: torch.dtype, turned: bool) -> Tensor:
    """A factor in ``dtype``, with its rows, or where it is turned its columns, in one piece."""
    factor = factor.to(dtype)
    if turned:
        return factor if factor.stride(-2) == 1 else factor.mT.contiguous().mT
    return factor if factor.stride(-1) == 1 else factor.contiguous()


def _kind(part: Part) -> tuple[Any, ...]:
    """Parts of one kind share a launch."""
    weight, pristine = part.weight, part.pristine
    first = part.terms[0].left
    addresses = weight.data_ptr() | pristine.data_ptr()
    weights_aligned = addresses % 16 == 0 and weight.shape[-1] % 16 == 0
    turned = part.turned
    factors_aligned = all(_is_aligned(f, turned) for t in part.terms for f in (t.left, t.right))
    return weight.device, weight.dtype, first.dtype, turned, weights_aligned, factors_aligned


def _is_aligned(factor: Tensor, turned: bool) -> bool:
    batch, stride = factor.stride(0), factor.stride(-1 if turned else -2)
    return factor.data_ptr() % 16 == 0 and stride % 8 == 0 and (len(factor) == 1 or batch % 16 == 0)


def _table(parts: Sequence[Part], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """The kernel's table and scales on the device, and how many programs there are."""
    starts: list[int] = []
    fields: list[int] = []
    terms: list[int] = []
    last: list[float] = []
    ratios: list[float] = []
    programs = 0
    for part in parts:
        batch, rows, cols = part.weight.shape
        across = -(-cols // COLUMNS)
        of_matrix = across * -(-rows // ROWS)
        tiles = of_matrix * batch
        starts.append(programs)
        programs += -(-tiles // TILES)
        begin = len(ratios)
        address = part.pristine.data_ptr(), part.weight.data_ptr()
        fields += [*address, rows, cols, across, of_matrix, tiles, begin, len(part.terms)]
        along = -1 if part.turned else -2
        before = part.terms[0].scale
        for term in part.terms:
            left, right = term.left, term.right
            terms += [left.data_ptr(), right.data_ptr(), left.shape[-1], left.stride(along), right.stride(along)]
            terms += [left.stride(0) if batch > 1 else 0, right.stride(0) if batch > 1 else 0]
            ratios.append(before / term.scale)
            before = term.scale
        last.append(before)
    numbers = torch.tensor([*starts, *fields, *terms], dtype=torch.int64, device="cpu")
    pad = [0.0] * ((len(last) + len(ratios)) % 2)
    scales = torch.tensor([*last, *ratios, *pad], dtype=torch.float32, device="cpu")
    whole = uploaded(torch.cat([numbers, scales.view(torch.int64)]), device)
    return whole[: len(numbers)], whole[len(numbers) :].view(torch.float32), programs
