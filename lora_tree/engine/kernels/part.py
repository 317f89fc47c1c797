"""MergePart: one weight of a merged switch, laid out as a kernel reads it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DTYPES", "MergePart", "MergeTerm", "can_merge", "on"]

DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))

LARGEST = 1 << 31
"""A matrix has fewer numbers than this, because a kernel counts within it in 32 bits."""

RATIO = 2.0**40
"""The largest ratio of the scales of successive terms: a kernel multiplies its sum by that ratio.
"""


@dataclass(frozen=True, eq=False)
class MergeTerm:
    """scale · left @ right; left (batch, rows, r), right (batch, r, cols), views of the factors."""

    left: Tensor
    right: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class MergePart:
    """``weight ← round_once(pristine + Σ terms)``.

    Args:
        weight: (batch, rows, cols), a view of the weight itself.
        pristine: of the same shape and dtype, on any device; may be ``weight`` itself.
        terms: in the order of the sum, on weight's device, of one dtype and layout; not empty.
    """

    weight: Tensor
    pristine: Tensor
    terms: Sequence[MergeTerm]

    @property
    def turned(self) -> bool:
        """True: the factors lie transposed: a column of left, and of right, is contiguous."""
        return _is_turned(self.terms)

    @staticmethod
    def of(weight: Tensor, pristine: Tensor, terms: Sequence[MergeTerm]) -> MergePart:
        """Return a part of any terms; factors that are not like the others are copied.

        If dtypes differ, all factors become fp32, which holds each of them exactly.
        """
        # A kernel is compiled for one dtype and one layout, so the factors have to be alike.
        dtypes: set[torch.dtype] = set()
        for term in terms:
            dtypes |= {term.left.dtype, term.right.dtype}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        turned = _is_turned(terms)
        converted = []
        for term in terms:
            left, right = _laid(term.left, dtype, turned), _laid(term.right, dtype, turned)
            converted.append(MergeTerm(left, right, term.scale))
        return MergePart(weight, pristine, converted)


def _is_turned(terms: Sequence[MergeTerm]) -> bool:
    return terms[0].left.stride(-1) != 1 or terms[0].right.stride(-1) != 1


def _laid(factor: Tensor, dtype: torch.dtype, turned: bool) -> Tensor:
    """Return a factor in ``dtype`` with contiguous rows, or if it is turned contiguous columns."""
    if factor.dtype != dtype:
        factor = factor.to(dtype)
    if turned and factor.stride(-2) != 1:
        return factor.mT.contiguous().mT
    if not turned and factor.stride(-1) != 1:
        return factor.contiguous()
    return factor


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context whose launches go to ``device``; in the interpreter there is no device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def can_merge(weight: Tensor, pristine: Tensor, terms: Sequence[MergeTerm]) -> bool:
    """Return whether a kernel covers such a part.

    Only values, shapes and dtypes decide: if history did, the same path could get other bits.
    """
    _, rows, cols = weight.shape
    if weight.dtype not in DTYPES or not weight.is_contiguous() or not pristine.is_contiguous():
        return False
    if weight.numel() == 0 or rows * cols >= LARGEST:
        return False
    # A kernel multiplies its sum by the ratio of two scales from one term to the next, so that it
    # needs one accumulator. A ratio that is too large would lose digits, and a zero has none.
    before = terms[0].scale
    for term in terms:
        if (
            term.left.dtype not in DTYPES
            or term.right.dtype not in DTYPES
            or not math.isfinite(term.scale)
        ):
            return False
        if term.scale == 0.0 or not 1 / RATIO <= abs(before / term.scale) <= RATIO:
            return False
        before = term.scale
    return True
