"""Sums and inner products of several increments of one weight, from their factors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import ShapeMismatch, SpecError
from ..given import unchecked
from .layout import Layout
from .magnitude import check_has_numbers
from .promoting import promoted
from .value import LowRank

__all__ = ["concat", "inner", "same_place", "stacked"]


def concat(terms: Sequence[LowRank]) -> LowRank:
    """Return Σ of the terms as one value: A's rows stacked, B's columns side by side, rank Σr.

    A common scale is kept; otherwise every scale is folded into its B. Apart from the rounding of
    that product (see `LowRank.folded`) the sum is exact. The result has the widest dtype of its
    terms.

    Raises:
        SpecError: no terms, or one is no `LowRank`, or they are on several devices.
        ShapeMismatch: the terms differ in (\\*batch, out, in) or in layout.

    >>> import torch
    >>> x = LowRank(torch.ones(1, 4), torch.ones(2, 1))
    >>> both = concat([x, x.scaled(2.0)])
    >>> both.rank, both.dense()[0, 0].item()
    (2, 3.0)
    """
    if isinstance(terms, LowRank) or not isinstance(unchecked(terms), Iterable):
        raise SpecError(f"concat takes several terms, got {terms!r:.80}", "concat([x, y])")
    terms = list(terms)
    if not terms:
        raise SpecError("concat needs at least one term")
    first = terms[0]
    for other in terms:
        same_place(first, other)
    if len(terms) == 1:
        return first
    _check_same_device(terms)
    # A common scale is kept, so that a sum of nodes trained alike rounds nothing.
    if len({t.scale for t in terms}) > 1:
        terms = [t.folded() for t in terms]
    dtype = first.dtype
    for t in terms:
        # Folding may have widened a term, so the dtypes are compared after it.
        dtype = promoted(dtype, t.dtype)
    bias = _sum_of([t.bias.to(dtype) for t in terms if t.bias is not None])
    A = torch.cat([t.A.to(dtype) for t in terms], dim=-2)
    B = torch.cat([t.B.to(dtype) for t in terms], dim=-1)
    return LowRank(A, B, terms[0].scale, bias, first.layout)


def stacked(
    terms: Sequence[LowRank],
    *,
    dtype: torch.dtype,
    device: torch.device,
    into: tuple[Tensor, Tensor] | None = None,
) -> LowRank:
    """Return `concat` of the terms for one device and dtype, with every scale folded into B.

    Args:
        terms: of one (\\*batch, out, in) and layout; not empty, and not checked.
        dtype: of the result, fp32 or wider unless a rounded scale · B is wanted.
        device: of the result.
        into: tensors to write A and B into, in their shapes; None: new memory, and autograd may
            record the operation.

    >>> import torch
    >>> x = LowRank(torch.ones(1, 4), torch.ones(2, 1), scale=0.1)
    >>> both = stacked([x, x], dtype=torch.float64, device=torch.device("cpu"))
    >>> both.scale, both.dense()[0, 0].item()
    (1.0, 0.2)
    """

    def folded(tensor: Tensor, scale: float) -> Tensor:
        there = tensor.to(device=device, dtype=dtype)
        # A product with 1.0 would copy the tensor needlessly.
        return there if scale == 1.0 else there * scale

    into_a, into_b = into or (None, None)
    A = torch.cat([folded(t.A, 1.0) for t in terms], dim=-2, out=into_a)
    B = torch.cat([folded(t.B, t.scale) for t in terms], dim=-1, out=into_b)
    bias = _sum_of([folded(t.bias, t.scale) for t in terms if t.bias is not None])
    return _of_checked(A, B, bias, terms[0].layout)


def _of_checked(A: Tensor, B: Tensor, bias: Tensor | None, layout: Layout) -> LowRank:
    """Return a `LowRank` without checks, for parts of values that were checked already.

    Every switch makes hundreds of them.
    """
    value = LowRank.__new__(LowRank)
    # `object.__setattr__`, because a frozen class refuses its own; and not `vars`, which would
    # materialise a dictionary in every value.
    for name, part in (("A", A), ("B", B), ("scale", 1.0), ("bias", bias), ("layout", layout)):
        object.__setattr__(value, name, part)
    return value


def inner(x: LowRank, y: LowRank) -> float:
    """Return the Frobenius inner product ⟨ΔW_x, ΔW_y⟩, from the factors, in float64.

    tr(ΔW_xᵀ ΔW_y) = Σ (B_xᵀ B_y) ∘ (A_x A_yᵀ): two (r_x, r_y) products, never an (out, in) matrix.

    Raises:
        ShapeMismatch: the two do not have the same (out, in) or layout.
        SpecError: they are no `LowRank`, or on different devices, or on the meta device.

    >>> import torch
    >>> x = LowRank(torch.ones(1, 4), torch.ones(2, 1))
    >>> inner(x, x)
    8.0
    """
    same_place(x, y)
    _check_same_device([x, y])
    check_has_numbers(x.A)
    left = x.B.detach().double().mT @ y.B.detach().double()  # (r_x, r_y)
    right = x.A.detach().double() @ y.A.detach().double().mT  # (r_x, r_y)
    return float((left * right).sum()) * x.scale * y.scale


def same_place(x: LowRank, y: LowRank) -> None:
    """Check, by shapes and layouts alone, that the two change the same weight.

    Raises:
        ShapeMismatch: they do not have the same (\\*batch, out, in) or layout.
        SpecError: one is no `LowRank`.
    """
    for value in (x, y):
        if not isinstance(unchecked(value), LowRank):
            raise SpecError(f"expected a LowRank, got {type(value).__name__}")
    if x.shape != y.shape or x.layout != y.layout:
        raise ShapeMismatch(
            f"{x.shape} ({x.layout}) and {y.shape} ({y.layout}) are not increments of one weight"
        )


def _check_same_device(terms: Sequence[LowRank]) -> None:
    devices = {str(term.device) for term in terms}
    # torch would raise too, but without the advice how to move a value.
    if len(devices) > 1:
        raise SpecError(
            f"the terms are on {' and '.join(sorted(devices))}: expected one device",
            "x.to(device=…) moves one",
        )


def _sum_of(biases: Sequence[Tensor]) -> Tensor | None:
    """Return the sum of the terms' biases; None if no term has one."""
    if not biases:
        return None
    return torch.stack(list(biases)).sum(0)
