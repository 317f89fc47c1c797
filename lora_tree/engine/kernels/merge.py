"""W ← round_once( W0 + Σ scale · left @ right ) for many weights in one launch.

    parts ──▶ one table: addresses, shapes, factors ──▶ a program for every few tiles of every
    weight

    a tile (64 rows, 128 columns):   load W0 ────┐
       for each slot, 16 ranks of a term:        ├─▶ + acc · scale ─▶ round ─▶ store W
          acc += left (64, 16) @ right (16, 128)    in fp32

The weights are read once and written once. Moving them takes nearly all the time, so the size of
the ranks hardly matters. Factors are read where they lie: nothing is stacked.

Law: the bits of a tile depend on W0, the factors and the scales alone. Tile sizes and the order of
the sum are constants, never tuned for a machine or a size; which weights share a launch changes
nothing.

Products of bf16 and fp16 factors are exact, and summed in fp32. Factors in fp32 over narrow weights
are taken apart into three tf32 products (an error of about 2⁻²²); over fp32 weights they are
multiplied in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..upload import uploaded
from .part import MergePart, MergeTerm, on
from .slots import increment_tile, left_tiles
from .tiles import TYPES

__all__ = [
    "COLUMNS",
    "POLICY",
    "RANKS",
    "ROWS",
    "SLOT_FIELDS",
    "UNROLLED",
    "MergeLaunch",
    "add_slots",
    "is_aligned",
    "is_merging_correct_on",
    "lay_out_parts",
    "part_of_program",
    "reference_merge",
]

COLUMNS, RANKS = 128, 16
ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}
"""Rows of a tile, by the factors' dtype: wide factors need more registers. These constants decide
the bits.
"""

UNROLLED = 4
"""The most slots whose loads are in flight together; more are loaded one after the other. It
changes no bits.
"""

TILES = 8
"""Tiles, side by side in the same rows, that a program does one after the other."""

WARPS, STAGES = 4, 2

POLICY = "evict_first"
"""Cache hint for weights: each is read once, and the factors many times."""

PART_FIELDS, SLOT_FIELDS = 8, 7
"""Numbers that the table has for a part, and for a slot."""


@triton.jit
def part_of_program(table, parts, program):  # type: ignore[no-untyped-def]
    """Return the part of a program: the last one whose first program is not after it."""
    low = 0
    high = parts
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table + middle) <= program:
            low = middle
        else:
            high = middle
    return low


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    # int64: programs before each part; then PART_FIELDS numbers a part; then SLOT_FIELDS a slot
    table,
    # fp32: each part's last slot's scale; then for each slot the scale of the one before over its
    # own
    scales,
    parts,
    WEIGHT: tl.constexpr,
    FACTOR: tl.constexpr,
    TURNED: tl.constexpr,
    WEIGHTS_ALIGNED: tl.constexpr,
    FACTORS_ALIGNED: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    TILES: tl.constexpr,
    POLICY: tl.constexpr,
    PART_FIELDS: tl.constexpr,
    SLOT_FIELDS: tl.constexpr,
):
    program = tl.program_id(0)
    low = part_of_program(table, parts, program)
    fields = table + parts + low * PART_FIELDS
    pristine = tl.load(fields).to(tl.pointer_type(WEIGHT))
    weight = tl.load(fields + 1).to(tl.pointer_type(WEIGHT))
    rows = tl.load(fields + 2).to(tl.int32)
    cols = tl.load(fields + 3).to(tl.int32)
    groups = tl.load(fields + 4).to(tl.int32)
    of_matrix = tl.load(fields + 5).to(tl.int32)
    first_slot = tl.load(fields + 6).to(tl.int32)
    slots = tl.load(fields + 7).to(tl.int32)
    scale = tl.load(scales + low)
    slot_table = table + parts + parts * PART_FIELDS + first_slot * SLOT_FIELDS
    ratios = scales + parts + first_slot
    if WEIGHTS_ALIGNED:
        pristine = tl.multiple_of(pristine, 16)
        weight = tl.multiple_of(weight, 16)
        cols = tl.multiple_of(cols, 16)
    own_program = program - tl.load(table + low).to(tl.int32)
    batch = own_program // of_matrix
    within = own_program % of_matrix
    matrix = batch.to(tl.int64) * rows * cols
    r = (within // groups) * ROWS + tl.arange(0, ROWS)
    start = (within % groups) * TILES * COLUMNS
    lefts = left_tiles(
        slot_table, ratios, batch, r, rows,
        SLOTS, FACTOR, TURNED, FACTORS_ALIGNED, WIDEN, RANKS, SLOT_FIELDS,
    )  # fmt: skip
    for begin in range(start, tl.minimum(start + TILES * COLUMNS, cols), COLUMNS):
        c = begin + tl.arange(0, COLUMNS)
        inside = (r[:, None] < rows) & (c[None, :] < cols)
        offsets = r[:, None] * cols + c[None, :]
        base = tl.load(pristine + matrix + offsets, mask=inside, other=0.0, eviction_policy=POLICY)
        total = increment_tile(
            slot_table, ratios, slots, lefts, batch, r, rows, c, cols,
            SLOTS, False, False, FACTOR, TURNED, FACTORS_ALIGNED, PRECISION, WIDEN,
            ROWS, COLUMNS, RANKS, SLOT_FIELDS,
        )  # fmt: skip
        result = base.to(tl.float32) + total * scale
        tl.store(weight + matrix + offsets, result.to(WEIGHT), mask=inside, eviction_policy=POLICY)


@dataclass(frozen=True, eq=False)
class MergeLaunch:
    """Parts laid out for the kernel: a table on the device, for each kind of part.

    It holds addresses, and keeps no memory alive: the caller makes sure that the weights, their
    pristine values and the factors are still where they were.
    """

    calls: tuple[Callable[[], object], ...]

    def run(self) -> None:
        """Write all of them; this returns before the device is done."""
        for call in self.calls:
            call()


def lay_out_parts(parts: Sequence[MergePart], *, interpreted: bool = False) -> MergeLaunch:
    """Lay parts out: one launch for all parts of one kind.

    Args:
        parts: `can_merge` is true for each; their pristine values are on their weights' devices.
        interpreted: it runs in Triton's interpreter, which multiplies no bf16.
    """
    by_kind: dict[tuple[Any, ...], list[MergePart]] = {}
    for part in parts:
        by_kind.setdefault(_kind(part), []).append(part)
    return MergeLaunch(tuple(_call(kind, group, interpreted) for kind, group in by_kind.items()))


def _call(
    kind: tuple[Any, ...], parts: Sequence[MergePart], interpreted: bool
) -> Callable[[], object]:
    device, weight, factor, turned, weights_aligned, factors_aligned, slots = kind
    table, scales, programs = _table(parts, device)
    count, exact = len(parts), weight == torch.float32 or interpreted

    # Everything that the launch needs is computed here, so that later switches just run it again.
    def call() -> None:
        with on(device):
            _kernel[(programs,)](
                table,
                scales,
                count,
                WEIGHT=TYPES[weight],
                FACTOR=TYPES[factor],
                TURNED=turned,
                WEIGHTS_ALIGNED=weights_aligned,
                FACTORS_ALIGNED=factors_aligned,
                SLOTS=slots,
                PRECISION="ieee" if exact else "tf32x3",
                WIDEN=interpreted,
                ROWS=ROWS[factor],
                COLUMNS=COLUMNS,
                RANKS=RANKS,
                TILES=TILES,
                POLICY=POLICY,
                PART_FIELDS=PART_FIELDS,
                SLOT_FIELDS=SLOT_FIELDS,
                num_warps=WARPS,
                num_stages=STAGES,
            )

    return call


def reference_merge(part: MergePart) -> Tensor:
    """Return what a launch writes, computed with stock operations: (batch, rows, cols).

    The sum is in fp32 and rounded once.
    """
    total = part.pristine.to(part.weight.device).float()
    for term in part.terms:
        total = total + (term.left.float() @ term.right.float()) * term.scale
    return total.to(part.weight.dtype)


def is_merging_correct_on(device: torch.device) -> bool:
    """Return whether a small problem comes out right on a device.

    If so, there is a compiler, and sums are kept in fp32.
    """
    draw = torch.Generator("cpu").manual_seed(0)
    base, left, right = (
        torch.randn(shape, generator=draw, device="cpu").to(torch.bfloat16)
        for shape in ((1, 96, 160), (1, 96, 24), (1, 24, 160))
    )
    exact = (base.double() + left.double() @ right.double()).to(torch.bfloat16)
    weight = base.to(device)
    lay_out_parts(
        [MergePart(weight, weight, [MergeTerm(left.to(device), right.to(device), 1.0)])]
    ).run()
    # The order of an fp32 sum may move a number to its neighbour, here and there. A sum that is
    # rounded to bf16 in between moves many.
    wrong_numbers = int((weight.cpu() != exact).sum())
    return wrong_numbers <= exact.numel() // 1000


# ---------------------------------------------------------------------- the table
def _kind(part: MergePart) -> tuple[Any, ...]:
    """Return the constants that a launch is compiled for; parts of one kind share a launch."""
    # All of it follows from the part alone, so that its bits do not depend on the other parts.
    weight, pristine = part.weight, part.pristine
    factor = part.terms[0].left.dtype
    # Triton makes wide loads where it is told that addresses and rows are multiples of 16.
    addresses = weight.data_ptr() | pristine.data_ptr()
    weights_aligned = addresses % 16 == 0 and weight.shape[-1] % 16 == 0
    turned = part.turned
    factors_aligned = True
    for term in part.terms:
        aligned = is_aligned(term.left, turned) and is_aligned(term.right, turned)
        factors_aligned = factors_aligned and aligned
    slots = sum(-(-term.left.shape[-1] // RANKS) for term in part.terms)
    unrolled = slots if slots <= UNROLLED else 0
    return weight.device, weight.dtype, factor, turned, weights_aligned, factors_aligned, unrolled


def is_aligned(factor: Tensor, turned: bool) -> bool:
    """Return whether a factor's rows, or if it is turned its columns, begin at multiples of 16
    bytes.
    """
    batch, stride = factor.stride(0), factor.stride(-1 if turned else -2)
    return factor.data_ptr() % 16 == 0 and stride % 8 == 0 and (len(factor) == 1 or batch % 16 == 0)


def _table(parts: Sequence[MergePart], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return the kernel's table and scales on the device, and how many programs there are."""
    # Plain lists and one copy at the end: a tensor for each number would cost more than the launch.
    starts: list[int] = []
    fields: list[int] = []
    slots: list[int] = []
    last: list[float] = []
    ratios: list[float] = []
    programs = 0
    height = ROWS[parts[0].terms[0].left.dtype]
    for part in parts:
        batch, rows, cols = part.weight.shape
        groups = -(-cols // (COLUMNS * TILES))
        of_matrix = groups * -(-rows // height)
        starts.append(programs)
        programs += of_matrix * batch
        begin = len(ratios)
        last.append(add_slots(part.terms, part.turned, batch, slots, ratios))
        address = part.pristine.data_ptr(), part.weight.data_ptr()
        fields += [*address, rows, cols, groups, of_matrix, begin, len(ratios) - begin]
    # One buffer for both, so that one copy goes to the device. The scales lie behind the integers
    # as pairs of fp32, so there have to be an even number of them.
    numbers = torch.tensor([*starts, *fields, *slots], dtype=torch.int64, device="cpu")
    pad = [0.0] * ((len(last) + len(ratios)) % 2)
    scales = torch.tensor([*last, *ratios, *pad], dtype=torch.float32, device="cpu")
    buffer = uploaded(torch.cat([numbers, scales.view(torch.int64)]), device)
    return buffer[: len(numbers)], buffer[len(numbers) :].view(torch.float32), programs


def add_slots(
    terms: Sequence[MergeTerm], turned: bool, batch: int, slots: list[int], ratios: list[float]
) -> float:
    """Append some terms' slots to a table; return the scale of the last one, 0 if there is none.

    Args:
        terms: of one dtype and layout, in the order of the sum.
        turned: they lie transposed.
        batch: matrices of the weight.
        slots: gets `SLOT_FIELDS` numbers a slot.
        ratios: gets the scale of the slot before over a slot's own.
    """
    along = -1 if turned else -2
    before = terms[0].scale if terms else 0.0
    for term in terms:
        left, right, rank = term.left, term.right, term.left.shape[-1]
        strides = left.stride(along), right.stride(along)
        apart = (left.stride(0), right.stride(0)) if batch > 1 else (0, 0)
        # A slot is `RANKS` ranks of a term. From one to the next it is this many bytes.
        steps = (
            RANKS * left.stride(-1) * left.itemsize,
            RANKS * right.stride(-2) * right.itemsize,
        )
        start = left.data_ptr(), right.data_ptr()
        for i in range(-(-rank // RANKS)):
            slots += [
                start[0] + i * steps[0],
                start[1] + i * steps[1],
                min(rank - i * RANKS, RANKS),
            ]
            slots += [*strides, *apart]
            ratios.append(before / term.scale)
            before = term.scale
    return before
