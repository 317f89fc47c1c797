"""LowRank: one increment of one weight as a frozen value, and all operations on one value.

The increment is a matrix, or a batch of matrices: the experts of a fused parameter, the groups of a
convolution. No operation here depends on the `Layout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SpecError
from ..given import (
    check_device,
    check_dtype,
    check_max_error,
    check_rank,
    check_whole_number,
    finite_number,
    unchecked,
)
from .fitting import check_one_device, check_shapes, check_tensors
from .layout import LINEAR, Layout
from .magnitude import all_finite, check_has_numbers, increment_fits
from .promoting import promoted
from .qr_core import Core, SingularValues, core_of

__all__ = ["LowRank", "Truncated", "is_sharded"]


class Truncated(NamedTuple):
    """The result of `LowRank.truncate`: the value and ‖ΔW − ΔW'‖, absolute and relative to ‖ΔW‖."""

    value: LowRank
    error: float
    relative_error: float


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = scale · B A, as a frozen value.

    Args:
        A: (\\*batch, r, in), floating point.
        B: (\\*batch, out, r), on A's device.
        scale: a finite factor, ``lora_alpha / r`` or ``lora_alpha / sqrt(r)``.
        bias: (out,) or None, on A's device: an addition to the output (`lora_bias`), before
            ``scale``. For a batch, (batch · out,).
        layout: how the matrix lies in the weight that it changes.

    Raises:
        ShapeMismatch: A, B and bias do not fit together, or are empty.
        SpecError: a factor is not a floating point tensor, or they are on several devices; or the
            scale is not a finite number, or ``layout`` not a `Layout`.

    >>> import torch
    >>> x = LowRank(torch.ones(2, 5), torch.ones(3, 2), scale=0.5)
    >>> x.shape, x.rank, x.dense().sum().item()
    ((3, 5), 2, 15.0)
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    layout: Layout = LINEAR

    def __post_init__(self) -> None:
        # Check types first: only tensors have a shape and a device to compare.
        check_tensors(self.A, self.B, self.bias)
        if type(self.scale) is not float or not math.isfinite(self.scale):
            object.__setattr__(self, "scale", finite_number(self.scale, "scale"))
        if not isinstance(unchecked(self.layout), Layout):
            raise SpecError(
                f"layout must be a Layout, got {self.layout!r:.80}",
                "LINEAR, EMBEDDING and PARAMETER are the plain ones: layout=LINEAR",
            )
        check_shapes(self.A.shape, self.B.shape, self.bias)
        check_one_device(self.A, self.B, self.bias)

    # ------------------------------------------------------------------ what it is
    @property
    def shape(self) -> tuple[int, ...]:
        """(\\*batch, out, in): the shape of ΔW."""
        return (*self.A.shape[:-2], self.B.shape[-2], self.A.shape[-1])

    @property
    def rank(self) -> int:
        """r, of each matrix of the batch."""
        return self.A.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """The wider of the factors' dtypes."""
        a, b = self.A.dtype, self.B.dtype
        if a == b:  # nearly always true, and cheaper than promote_types
            return a
        return promoted(a, b)

    @property
    def _product_dtype(self) -> torch.dtype:
        return self.dtype if self.dtype.itemsize > 1 else torch.float32

    @property
    def device(self) -> torch.device:
        """The device of all its tensors."""
        return self.A.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """A, B and, if there is one, the bias."""
        if self.bias is None:
            return (self.A, self.B)
        return (self.A, self.B, self.bias)

    @property
    def numel(self) -> int:
        """The size of A, B and the bias: r · (in + out) for each matrix, plus the bias."""
        return sum(t.numel() for t in self.tensors)

    @property
    def nbytes(self) -> int:
        """The bytes of A, B and the bias."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def is_sharded(self) -> bool:
        """Return whether the factors are sharded over the ranks of a run (FSDP2)."""
        return any(is_sharded(t) for t in self.tensors)

    @property
    def trains(self) -> bool:
        """Return whether a factor requires a gradient, so that an optimiser may change it."""
        # Called for every term at every switch, so written without a generator.
        if self.A.requires_grad or self.B.requires_grad:
            return True
        return self.bias is not None and self.bias.requires_grad

    @property
    def is_trainable(self) -> bool:
        """Return whether a factor is an nn.Parameter, which an optimiser may have changed."""
        return any(isinstance(t, torch.nn.Parameter) for t in self.tensors)

    @property
    def is_finite(self) -> bool:
        """Return whether A, B and the bias are free of NaN and infinities.

        Raises:
            SpecError: the factors have no numbers (the meta device).
        """
        check_has_numbers(self.A)
        return all_finite(self.tensors)

    def fits(self, dtype: torch.dtype | None = None) -> bool:
        """Return whether ΔW, and scale · B on the way to it, are finite in a dtype.

        Args:
            dtype: None: fp32, or the factors' own if that is wider.

        Raises:
            SpecError: ``dtype`` is not a floating dtype, or the factors have no numbers (the meta
                device).

        >>> import torch
        >>> LowRank(torch.ones(1, 2), torch.ones(2, 1), scale=1e5).fits(torch.float16)
        False
        """
        check_dtype(dtype)
        check_has_numbers(self.A)
        most = torch.finfo(dtype or promoted(self.dtype, torch.float32)).max
        blocks = self.dense_blocks(dtype=torch.float64)
        return increment_fits(most, self.scale, self.A, self.B, self.bias, blocks=blocks)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"LowRank({shape}, r={self.rank}, scale={self.scale:g}, {self.layout}, {dtype})"

    # ------------------------------------------------------------------ the same ΔW otherwise
    def scaled(self, by: float) -> LowRank:
        """Return ``by`` · ΔW; the factors are shared, and nothing is rounded.

        Raises:
            SpecError: ``by`` is not a finite number, or the new scale is not.

        >>> import torch
        >>> x = LowRank(torch.ones(1, 4), torch.ones(2, 1))
        >>> x.scaled(0.5).dense()[0, 0].item(), x.scaled(0.5).A is x.A
        (0.5, True)
        """
        if type(by) is not float:
            by = finite_number(by, "the factor")
        return self if by == 1.0 else replace(self, scale=self.scale * by)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> LowRank:
        """Return the value with ``change`` applied to A, B and the bias; shapes must stay."""
        bias = None if self.bias is None else change(self.bias)
        return LowRank(change(self.A), change(self.B), self.scale, bias, self.layout)

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LowRank:
        """Return the value on another device, or rounded to another dtype, if these are given.

        Raises:
            SpecError: torch does not know the device, or ``dtype`` is not a floating one.
        """
        check_dtype(dtype)
        check_device(device)
        moved = [t.to(device=device, dtype=dtype) for t in self.tensors]
        # Return the same object if nothing changes: cached plans and side paths are looked up by
        # the identity of values.
        if all(new is old for new, old in zip(moved, self.tensors, strict=True)):
            return self
        bias = moved[2] if len(moved) > 2 else None
        return replace(self, A=moved[0], B=moved[1], bias=bias)

    def folded(self) -> LowRank:
        """Return the value with scale 1, folded into B.

        The new B is in fp32 or wider, unless the product is exact in B's own dtype.

        >>> import torch
        >>> x = LowRank(torch.ones(1, 4).bfloat16(), torch.ones(2, 1).bfloat16(), scale=0.5)
        >>> x.folded().B.dtype, x.scaled(0.2).folded().B.dtype
        (torch.bfloat16, torch.float32)
        """
        if self.scale == 1.0:
            return self
        return replace(self, B=_times(self.B, self.scale), scale=1.0, bias=self._folded_bias())

    def padded(self, rank: int) -> LowRank:
        """Return the value with zero rows and columns up to ``rank``.

        Some engines require one rank for all modules.

        Raises:
            SpecError: ``rank`` is not a whole number, or is smaller than the value's own.

        >>> import torch
        >>> LowRank(torch.ones(1, 4), torch.ones(2, 1)).padded(8).rank
        8
        """
        check_rank(rank)
        extra = rank - self.rank
        if extra < 0:
            raise SpecError(f"can't pad rank {self.rank} down to {rank}; truncate it")
        if extra == 0:
            return self
        A = torch.nn.functional.pad(self.A, (0, 0, 0, extra))
        B = torch.nn.functional.pad(self.B, (0, extra))
        return replace(self, A=A, B=B)

    # ------------------------------------------------------------------ ΔW itself
    def dense(self, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return ΔW itself, (\\*batch, out, in); `dense_blocks` takes less memory.

        Args:
            dtype: of the product and the result; None: the factors' own, and fp32 for 8-bit floats,
                which torch can't multiply.
        """
        check_dtype(dtype)
        dtype = dtype or self._product_dtype
        return (self.B.to(dtype) @ self.A.to(dtype)) * self.scale

    def dense_blocks(
        self, rows: int = 256, *, dtype: torch.dtype | None = None
    ) -> Iterator[Tensor]:
        """Yield ΔW in blocks of its rows, (\\*batch, ≤ rows, in), top to bottom.

        Raises:
            SpecError: ``rows`` is not a whole number from 1, or ``dtype`` not a floating dtype.
        """
        check_whole_number(rows, "rows")
        check_dtype(dtype)
        dtype = dtype or self._product_dtype
        A = self.A.to(dtype)
        # Cast A once, because every block needs it; cast B one block at a time.
        for start in range(0, self.B.shape[-2], rows):
            B = self.B[..., start : start + rows, :].to(dtype)  # (*batch, ≤ rows, r)
            yield (B @ A) * self.scale

    # ------------------------------------------------------------------ its core
    def core(self) -> Core:
        """Return Q_B, M, Q_A with ΔW = Q_B M Q_Aᵀ, in float64; M is (\\*batch, ≤ r, ≤ r).

        Q_B and Q_A have orthonormal columns.

        Raises:
            SpecError: a factor, or the product, is not finite.
        """
        check_has_numbers(self.A)
        core = core_of(self.B, self.A, self.scale)
        if core is None:
            why = "the factors are not finite"
            if self.is_finite:
                why = "their product is too large for float64"
            raise SpecError(f"{why}, so there is no norm, and no nearest value of a smaller rank")
        return core

    def norm(self) -> float:
        """Return ‖ΔW‖ in the Frobenius norm, over the whole batch.

        Raises:
            SpecError: a factor, or the product, is not finite.

        >>> import torch
        >>> LowRank(torch.ones(1, 4), torch.ones(4, 1), scale=0.5).norm()
        2.0
        """
        return self.core().norm()

    def truncate(self, rank: int | None = None, *, max_error: float | None = None) -> Truncated:
        """Return the nearest value of a smaller rank (Eckart–Young), and its error.

        Args:
            rank: the rank to keep; or the most to keep, if ``max_error`` is given too.
            max_error: the largest ‖ΔW − ΔW'‖ / ‖ΔW‖ allowed; the smallest rank within it is taken.

        Returns:
            The value (scale 1, in fp32 or wider), and its error in the Frobenius norm. If the rank
            is small enough already, the same value is returned, with error 0. ``bias`` is kept,
            multiplied by the scale.

        Raises:
            SpecError: neither bound is given, or one is not valid, or both can't be met; or a
                factor of this value, or of the result, is not finite.

        >>> import torch
        >>> x = LowRank(torch.eye(3, 4), torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        >>> short = x.truncate(2)
        >>> short.value.rank, round(short.error, 6)
        (2, 1.0)
        """
        if rank is None and max_error is None:
            raise SpecError("truncate needs rank= or max_error=")
        if rank is not None:
            check_rank(rank)
            if max_error is None and rank >= self.rank:
                return Truncated(self, 0.0, 0.0)
        if max_error is not None:
            check_max_error(max_error)
        # One decomposition serves both bounds: it gives the error of every rank.
        cut = SingularValues(self.core())
        most = self.rank if rank is None else min(rank, self.rank)
        keep = cut.rank_to_keep(most, max_error)
        if keep >= self.rank:
            return Truncated(self, 0.0, 0.0)
        B, A = cut.factors(keep)
        # Round once, from float64; and copy, because a view would keep the whole product alive.
        dtype = promoted(self.dtype, torch.float32)
        value = LowRank(
            A.to(dtype).contiguous(),
            B.to(dtype).contiguous(),
            bias=self._folded_bias(),
            layout=self.layout,
        )
        if self.bias is not None and not all_finite([self.bias]):
            raise SpecError("the bias is not finite")
        if not value.is_finite:
            narrow = str(dtype).removeprefix("torch.")
            raise SpecError(
                f"the factors of the nearest value of rank {value.rank} are too large for {narrow}"
            )
        error = cut.error(keep)
        # ΔW may be zero although its factors have a rank.
        relative_error = error / cut.norm if cut.norm else 0.0
        return Truncated(value, error, relative_error)

    def _folded_bias(self) -> Tensor | None:
        return None if self.bias is None else _times(self.bias, self.scale)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is sharded over the ranks of a run, as FSDP2 does it."""
    return hasattr(tensor, "full_tensor")


def _times(t: Tensor, scale: float) -> Tensor:
    """Return ``t · scale``, in fp32 or wider unless it is exact in t's own dtype."""
    wide = t.to(promoted(t.dtype, torch.float32)) * scale
    is_power_of_two = abs(math.frexp(scale)[0]) == 0.5
    if wide.dtype == t.dtype or not is_power_of_two:
        return wide
    # A power of two changes only the exponent: exact unless a number leaves the dtype's range.
    narrow = wide.to(t.dtype)
    if t.is_meta:
        return narrow  # without numbers to compare, they are taken to stay within the range
    return narrow if torch.equal(narrow.to(wide.dtype), wide) else wide
