"""Part: one weight of a merged switch, as a kernel sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Part", "Term", "can_merge"]

DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))

LARGEST = 1 << 31
"""Numbers in one matrix: a kernel counts within it in 32 bits."""

RATIO = 2.0**40
"""How far the scales of one weight's terms may lie apart: a kernel carries the sum from one to the next."""


@dataclass(frozen=True, eq=False)
class Term:
    """scale · left @ right; left (batch, rows, r), right (batch, r, cols), views of the factors."""

    left: Tensor
    right: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Part:
    """``weight ← round_once(pristine + Σ terms)``.

    Args:
        weight: (batch, rows, cols), a view of the weight itself.
        pristine: of the same shape and dtype, on any device; may be ``weight`` itself.
        terms: in the order of the sum, on weight's device; not empty.
    """

    weight: Tensor
    pristine: Tensor
    terms: Sequence[Term]

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype of all factors; fp32 where they differ, which holds each exactly."""
        dtypes = {t.left.dtype for t in self.terms} | {t.right.dtype for t in self.terms}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def turned(self) -> bool:
        """The factors lie transposed: a column of left, and of right, lies in one piece."""
        return self.terms[0].left.stride(-1) != 1 or self.terms[0].right.stride(-1) != 1


def can_merge(part: Part) -> bool:
    """Whether a kernel covers a part; asked of values, shapes and dtypes, so that history does not decide."""
    weight, pristine = part.weight, part.pristine
    _, rows, cols = weight.shape
    if weight.dtype not in DTYPES or not weight.is_contiguous() or not pristine.is_contiguous():
        return False
    if weight.numel() == 0 or rows * cols >= LARGEST:
        return False
    before = part.terms[0].scale
    for term in part.terms:
        if term.left.dtype not in DTYPES or term.right.dtype not in DTYPES or not math.isfinite(term.scale):
            return False
        if term.scale == 0.0 or not 1 / RATIO <= abs(before / term.scale) <= RATIO:
            return False
        before = term.scale
    return True
