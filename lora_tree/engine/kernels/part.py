"""MergePart: one weight of a merged switch, as a kernel sees it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MergePart", "MergeTerm", "can_merge", "on"]

DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))

LARGEST = 1 << 31
"""Numbers in one matrix: a kernel counts within it in 32 bits."""

RATIO = 2.0**40
"""How far the scales of one weight's terms may lie apart: a kernel carries the sum from one to the next."""


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
        terms: in the order of the sum, on weight's device, alike in dtype and in how they lie; not empty.
    """

    weight: Tensor
    pristine: Tensor
    terms: Sequence[MergeTerm]

    @property
    def turned(self) -> bool:
        """The factors lie transposed: a column of left, and of right, lies in one piece."""
        return _is_turned(self.terms)

    @staticmethod
    def of(weight: Tensor, pristine: Tensor, terms: Sequence[MergeTerm]) -> MergePart:
        """A part of any terms: copies are made of factors that are not like the others.

        Where dtypes differ all become fp32, which holds each of them exactly.
        """
        dtypes = {t.left.dtype for t in terms} | {t.right.dtype for t in terms}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        turned = _is_turned(terms)
        alike = [
            MergeTerm(_laid(t.left, dtype, turned), _laid(t.right, dtype, turned), t.scale)
            for t in terms
        ]
        return MergePart(weight, pristine, alike)


def _is_turned(terms: Sequence[MergeTerm]) -> bool:
    return terms[0].left.stride(-1) != 1 or terms[0].right.stride(-1) != 1


def _laid(factor: Tensor, dtype: torch.dtype, turned: bool) -> Tensor:
    """A factor in ``dtype``, with its rows, or where it is turned its columns, in one piece."""
    if factor.dtype != dtype:
        factor = factor.to(dtype)
    if turned:
        return factor if factor.stride(-2) == 1 else factor.mT.contiguous().mT
    return factor if factor.stride(-1) == 1 else factor.contiguous()


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches inside go to ``device``; in the interpreter there is none."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def can_merge(weight: Tensor, pristine: Tensor, terms: Sequence[MergeTerm]) -> bool:
    """Whether a kernel covers such a part; asked of values, shapes and dtypes, so that history does not decide."""
    _, rows, cols = weight.shape
    if weight.dtype not in DTYPES or not weight.is_contiguous() or not pristine.is_contiguous():
        return False
    if weight.numel() == 0 or rows * cols >= LARGEST:
        return False
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
