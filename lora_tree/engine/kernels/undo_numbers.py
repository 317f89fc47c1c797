"""The numbers of a tile in an undo log's kernel: bits, pairs of them, guesses and exceptions.

Two 16-bit numbers side by side in a row are one int32, so that an integer operation serves both.
fp32 numbers are not paired.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["guess_bits", "patched", "written_bits"]

TWO_BF16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
TWO_FP16 = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")


@triton.jit  # type: ignore[untyped-decorator]
def _low(pair, WEIGHT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first numbers of pairs, in fp32."""
    if WEIGHT == tl.bfloat16:
        return (pair << 16).to(tl.float32, bitcast=True)
    else:
        return pair.to(tl.int16).to(WEIGHT, bitcast=True).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _high(pair, WEIGHT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The second numbers of pairs, in fp32."""
    if WEIGHT == tl.bfloat16:
        return (pair & -65536).to(tl.float32, bitcast=True)
    else:
        return (pair >> 16).to(tl.int16).to(WEIGHT, bitcast=True).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _pair(low, high, WEIGHT: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs of fp32 numbers, rounded to the weight's dtype."""
    # Triton itself rounds them one by one, which takes more than twice as long. The interpreter
    # knows no assembly.
    if WIDEN:
        first = low.to(WEIGHT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        second = high.to(WEIGHT).to(tl.int16, bitcast=True).to(tl.int32) << 16
        return first | second
    elif WEIGHT == tl.bfloat16:
        return tl.inline_asm_elementwise(
            TWO_BF16, "=r,r,r", [low, high], tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            TWO_FP16, "=r,r,r", [low, high], tl.int32, is_pure=True, pack=1
        )


@triton.jit  # type: ignore[untyped-decorator]
def _halves(total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of a tile in even and in odd columns."""
    return tl.split(tl.reshape(total, (ROWS, COLUMNS // 2, 2)))


@triton.jit  # type: ignore[untyped-decorator]
def _wide(bits, WEIGHT: tl.constexpr, INTEGER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of some bits, in fp32."""
    return bits.to(INTEGER).to(WEIGHT, bitcast=True).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(x, WEIGHT: tl.constexpr, INTEGER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits, in int32, of fp32 numbers that are rounded to the weight's dtype."""
    return x.to(WEIGHT).to(INTEGER, bitcast=True).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def written_bits(  # type: ignore[no-untyped-def]
    own,
    total,
    scale,
    WEIGHT: tl.constexpr,
    INTEGER: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the bits of round(W0 + total · scale)."""
    if PAIRS:
        even, odd = _halves(total, ROWS, COLUMNS)
        low = _low(own, WEIGHT) + even * scale
        return _pair(low, _high(own, WEIGHT) + odd * scale, WEIGHT, WIDEN)
    else:
        return _rounded(_wide(own, WEIGHT, INTEGER) + total * scale, WEIGHT, INTEGER)


@triton.jit  # type: ignore[untyped-decorator]
def guess_bits(  # type: ignore[no-untyped-def]
    after,
    total,
    scale,
    WEIGHT: tl.constexpr,
    INTEGER: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the bits of round(after − total · scale)."""
    # An explicit fma: a compiler that fuses the operation in one place and not in another would
    # change the bits.
    if PAIRS:
        minus = tl.full((ROWS, COLUMNS // 2), 0.0, tl.float32) - scale
        even, odd = _halves(total, ROWS, COLUMNS)
        low = tl.fma(even, minus, _low(after, WEIGHT))
        return _pair(low, tl.fma(odd, minus, _high(after, WEIGHT)), WEIGHT, WIDEN)
    else:
        minus = tl.full((ROWS, COLUMNS), 0.0, tl.float32) - scale
        return _rounded(tl.fma(total, minus, _wide(after, WEIGHT, INTEGER)), WEIGHT, INTEGER)


@triton.jit  # type: ignore[untyped-decorator]
def patched(  # type: ignore[no-untyped-def]
    own, column, known, PAIRS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """Put one exception of every row into its column; a column outside of the tile means that the
    row has none.
    """
    within = tl.arange(0, LANES)[None, :]
    column = column.to(tl.int32)
    known = known.to(tl.int32)
    if PAIRS:
        is_high = column % 2 == 1
        kept = tl.where(is_high, 0xFFFF, -65536)
        known = tl.where(is_high, known << 16, known & 0xFFFF)
        changed = (own & kept[:, None]) | known[:, None]
        return tl.where(within == (column // 2)[:, None], changed, own)
    else:
        return tl.where(within == column[:, None], known[:, None], own)
