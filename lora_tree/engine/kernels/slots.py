"""Slots: the increments of a tile, sixteen ranks of a term at a time, for all kernels that merge.

    left (rows, 16)  ─┐
    right (16, cols) ─┴─▶ acc (rows, columns) ← acc · ratio + left @ right     in fp32

Law: all kernels add in the same order, so that the increment that one of them takes out has the
same bits as the one that another has put in.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["increment_tile", "left_tiles"]


@triton.jit  # type: ignore[untyped-decorator]
def left_tile(  # type: ignore[no-untyped-def]
    fields,
    batch,
    r,
    rows,
    FACTOR: tl.constexpr,
    TURNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Return a slot's left tile (rows, ranks), zeros outside; and the address, stride and ranks of
    its right factor.
    """
    left = tl.load(fields).to(tl.pointer_type(FACTOR)) + batch * tl.load(fields + 5)
    right = tl.load(fields + 1).to(tl.pointer_type(FACTOR)) + batch * tl.load(fields + 6)
    ranks = tl.load(fields + 2).to(tl.int32)
    stride = tl.load(fields + 3).to(tl.int32)
    right_stride = tl.load(fields + 4).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
        right = tl.multiple_of(right, 16)
        stride = tl.multiple_of(stride, 8)
        right_stride = tl.multiple_of(right_stride, 8)
    k = tl.arange(0, RANKS)
    # A turned factor has contiguous columns.
    at = r[:, None] + k[None, :] * stride if TURNED else r[:, None] * stride + k[None, :]
    x = tl.load(left + at, mask=(r[:, None] < rows) & (k[None, :] < ranks), other=0.0)
    return x, right, right_stride, ranks


@triton.jit  # type: ignore[untyped-decorator]
def right_tile(  # type: ignore[no-untyped-def]
    right,
    stride,
    ranks,
    c,
    cols,
    TURNED: tl.constexpr,
    FULL: tl.constexpr,  # no column lies outside
    RANKS: tl.constexpr,
):
    """Return a slot's right tile (ranks, columns), zeros outside."""
    k = tl.arange(0, RANKS)
    at = k[:, None] + c[None, :] * stride if TURNED else k[:, None] * stride + c[None, :]
    inside = k[:, None] < ranks
    if not FULL:
        inside = inside & (c[None, :] < cols)
    return tl.load(right + at, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def summed_slots(  # type: ignore[no-untyped-def]
    slot_table,
    ratios,
    slots,
    batch,
    r,
    rows,
    c,
    cols,
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
    """Return a tile (rows, columns) of an increment in fp32, without its last slot's scale."""
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for slot in range(slots):
        slot_fields = slot_table + slot * SLOT_FIELDS
        x, right, stride, count = left_tile(
            slot_fields, batch, r, rows, FACTOR, TURNED, ALIGNED, RANKS
        )
        y = right_tile(right, stride, count, c, cols, TURNED, False, RANKS)
        if WIDEN:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        total *= tl.load(ratios + slot)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def left_tiles(  # type: ignore[no-untyped-def]
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
    """Return what all tiles of a program share: the left tiles, and the right factors' places."""
    xs = ()
    rights = ()
    strides = ()
    counts = ()
    factors = ()
    for i in tl.static_range(SLOTS):
        slot_fields = slot_table + i * SLOT_FIELDS
        x, right, stride, count = left_tile(
            slot_fields, batch, r, rows, FACTOR, TURNED, ALIGNED, RANKS
        )
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
def increment_tile(  # type: ignore[no-untyped-def]
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
    """Return a tile of an increment in fp32, without its last slot's scale.

    Few slots (``SLOTS`` > 0) use ``lefts``, as `left_tiles` returns them; more slots are read one
    after the other.
    """
    if SLOTS > 0:
        xs, rights, strides, counts, factors = lefts
        total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
        # All are loaded before the first is multiplied, so that their latencies overlap.
        ys = ()
        for i in tl.static_range(SLOTS):
            y = right_tile(rights[i], strides[i], counts[i], c, cols, TURNED, FULL, RANKS)
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
