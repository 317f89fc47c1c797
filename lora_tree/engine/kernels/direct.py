"""out ← out + Σ coefficient · scale · B (A x) for a few inputs that owe the same, in one launch.

    a program: all inputs, some outputs
        for the lanes of a few entries:
            low (inputs, lanes)    = x (inputs, width) @ A (width, lanes)
            acc (inputs, outputs) += low @ B (lanes, outputs)
        load out ─▶ + acc ─▶ round ─▶ store

Every program computes the whole narrow sum, so each of them reads all of A: more work for the
device than `shrink` and `expand` have, and one launch less. A model that writes one token after the
other waits for its host, and the device has time to spare. In a captured graph nothing waits for
the host, so the pair of `shrink` and `expand` is taken there.

Law: the sum of an input does not depend on what ran before. It may differ in its last bits from the
pair's, which adds the parts of a width in another order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .expand import factor_of, outputs_of, store_sum
from .factor_table import FIELDS, FactorTable
from .pointers import Pointers
from .relaunch import BoundLaunch, LaunchPlan, Relaunch
from .segments import Segments
from .shrink import of_few_inputs, shares_of, warps_of, width_at_once
from .tiles import TYPES, begins_early, larger, options_for, products, wait_for_last
from .tiling import Tiling, entries_at_once

__all__ = ["bound_direct", "is_direct"]

INPUTS, STAGES = 16, 3
"""The most inputs: one tile of a product. A single input takes a tile too, because only loops with
products read ahead. And the stages of that loop: with so many, two programs fit beside each other.
"""

MOST_BYTES = 2 << 20
"""The most bytes of all A of a site, because every program reads them."""

WIDE = 8192
"""The number of outputs from which on a program computes 128 at once, and not 64."""

# Compiling for each of their values would take a second, and `Relaunch` does not look at them.
CHANGING = ["inputs", "width", "outputs", "entries"]


@triton.jit(do_not_specialize=CHANGING)  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x,
    out,
    nodes,
    coefficients,
    table,
    scales,
    inputs,
    width,
    outputs,
    entries,
    FACTOR: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,  # rows of x begin at multiples of 16 numbers
    WHOLE_OUT: tl.constexpr,  # and rows of out
    PRECISION: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FIELDS: tl.constexpr,
    EARLY: tl.constexpr,
):
    # This shows the compiler that they are multiples of 16: a hint on an argument is lost.
    if WHOLE:
        width = width // 16 * 16
    if WHOLE_OUT:
        outputs = outputs // 16 * 16
    lane = tl.arange(0, ENTRIES * RANK)
    of, r = lane // RANK, lane % RANK
    i = tl.arange(0, INPUTS)
    c = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    owes = (i < inputs)[:, None]
    source = x + i.to(tl.int64) * width
    to = out + i.to(tl.int64)[:, None] * outputs + c[None, :]
    stored = owes & (c < outputs)[None, :]
    total = tl.full((INPUTS, OUTPUTS), 0.0, tl.float32)
    wait_for_last(EARLY)  # the kernel before this one writes x and out
    before = tl.load(to, mask=stored, other=0.0)
    for begin in range(0, entries, ENTRIES):
        node = tl.load(nodes + begin + of)
        # As in `shrink`: loads under a mask, as `expand` has them, would take 60 registers more.
        node_or_zero = tl.where(node < 0, 0, node)
        fields = table + node_or_zero * FIELDS
        rank = tl.where(node < 0, 0, tl.load(fields + 6))
        used = r < rank
        if ALIGNED:
            used = tl.max_constancy(used, [8])  # ranks are multiples of 8: 8 lanes are one load
        if tl.reduce(used.to(tl.int32), 0, larger) > 0:
            # Loaded first, so that it arrives while the narrow sum is computed.
            y = factor_of(
                tl.load(fields + 3), tl.load(fields + 4), rank, r, c, outputs,
                1, FACTOR, ALIGNED, RANK,
            )  # fmt: skip
            stride = tl.load(fields + 1)
            lanes = tl.load(fields).to(tl.pointer_type(FACTOR)) + r * stride
            if ALIGNED:
                lanes = tl.multiple_of(lanes, [16])
            low = of_few_inputs(
                source, owes, lanes, stride, used, 0, width, width,
                0, COMPUTE, ALIGNED, PRECISION, INPUTS, RANK, ENTRIES * RANK, WIDTH, SHARES,
            )  # fmt: skip
            coefficient = tl.load(coefficients + begin + of)
            low *= (coefficient * tl.load(scales + node_or_zero))[None, :]
            # Masked, not multiplied by 0: an input may have made a number infinite.
            low = tl.where((used & (coefficient != 0.0))[None, :], low, 0.0)
            narrow, factor = low.to(COMPUTE), y.to(COMPUTE)
            total = tl.dot(narrow, factor, total, input_precision=PRECISION)
            if COMPUTE == tl.bfloat16:
                # `shrink` and `expand` keep the narrow sum of one input in fp32. Here two bf16
                # numbers hold it.
                rest = (low - narrow.to(tl.float32)).to(COMPUTE)
                total = tl.dot(rest, factor, total)
    store_sum(to, before, total, i < inputs, stored, False)


_launch = Relaunch(_kernel)


def is_direct(segments: Segments, table: FactorTable, tiling: Tiling) -> bool:
    """Return whether one launch adds up a batch's sum: it is one row of few inputs, and has so few
    factors that the device takes less time than the host.
    """
    if segments.sizes.rows > 1 or tiling.inputs > INPUTS:
        return False
    lanes = segments.sizes.entries * table.rank
    return lanes * table.wide[0] * table.dtype.itemsize <= MOST_BYTES


def bound_direct(
    x: Tensor, out: Tensor, segments: Segments, table: FactorTable, tiling: Tiling
) -> BoundLaunch:
    """Return the launch that adds the sum to outputs in place, for tensors like these and tables of
    one kind; it takes `FactorTable.to_shrink`, an input and an output.

    Args:
        x: (inputs, in), row by row.
        out: (inputs, out), row by row.
        segments: of the batch, for which `is_direct` is true.
        table: the factors.
        tiling: of the batch.
    """
    key = "direct", x.dtype, out.dtype, tiling, table.kind
    plan = segments.plans.get(key)
    if plan is None:
        plan = segments.plans[key] = _plan(x, out, segments, table, tiling)
    lists = Pointers.to(segments.nodes, segments.coefficients)
    return _launch.bind(plan, lists)


def _plan(
    x: Tensor, out: Tensor, segments: Segments, table: FactorTable, tiling: Tiling
) -> LaunchPlan:
    width, outputs = table.wide
    together = entries_at_once(table.rank)
    lanes = together * table.rank
    widest = max(x.dtype, table.dtype, key=lambda dtype: dtype.itemsize)
    step = outputs_of(128 if outputs >= WIDE else 64, lanes, table.dtype)
    compute, precision = products(x.device, tiling.compute)
    constants = (
        TYPES[table.dtype],
        compute,
        table.aligned,
        width % 16 == 0,
        outputs % 16 == 0,
        precision,
        INPUTS,
        table.rank,
        together,
        width_at_once(INPUTS, lanes, widest),
        shares_of(INPUTS),
        step,
        FIELDS,
        begins_early(x.device),
    )
    numbers = tiling.inputs, width, outputs, segments.sizes.entries
    options = options_for(x.device, warps_of(INPUTS), STAGES)
    kind = x.dtype, out.dtype, *constants
    return LaunchPlan((-(-outputs // step), 1, 1), numbers, constants, kind, options)
