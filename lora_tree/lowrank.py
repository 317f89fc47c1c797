"""LowRank: one increment of one weight, kept as its factors, and the algebra on them.

    ΔW = scale · B A            A: (*batch, r, in)    B: (*batch, out, r)

The increment is a matrix, or a batch of them: the experts of a fused parameter, the groups of a convolution. How the
matrix lies in the weight of a module (transposed, as a kernel, per expert) is its `Layout`; nothing here depends on it.

Law: no operation builds an (out, in) matrix except `dense`, and that one can be had in blocks of rows. Norms, inner
products and truncation work on QR cores of (r, r).

References: LoRA, https://arxiv.org/abs/2106.09685 §4.1 (ΔW = α/r · B A);
rsLoRA, https://arxiv.org/abs/2312.03732 (α/√r).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import ShapeMismatch, SpecError, suggest
from .given import unchecked

__all__ = [
    "EMBEDDING",
    "LINEAR",
    "PARAMETER",
    "Layout",
    "LowRank",
    "Truncated",
    "concat",
    "inner",
    "is_sharded",
]


LAYOUT_KINDS = ("linear", "embedding", "conv", "parameter")


@dataclass(frozen=True)
class Layout:
    """How the (out, in) matrix of a `LowRank` lies in the weight that it changes.

    kind: ``linear`` (the matrix, or its transpose in a Conv1D), ``embedding`` (the transpose), ``conv`` (a kernel:
        ``in`` counts channels × kernel positions, the batch the groups) or ``parameter`` (the batch counts experts).
    kernel: the kernel's size, for ``conv`` only.
    """

    kind: Literal["linear", "embedding", "conv", "parameter"]
    kernel: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        kind, kernel = unchecked(self.kind), unchecked(self.kernel)
        if kind not in LAYOUT_KINDS:
            hint = suggest(str(kind), LAYOUT_KINDS)
            raise SpecError(
                f"a layout's kind is one of {', '.join(LAYOUT_KINDS)}, got {kind!r:.80}{hint}"
            )
        whole = isinstance(kernel, tuple) and all(type(size) is int and size > 0 for size in kernel)
        if not whole or bool(kernel) != (kind == "conv"):
            raise SpecError(
                f"a {kind}'s kernel: got {kernel!r:.80}, expected "
                + ("a tuple of whole numbers, (3, 3)" if kind == "conv" else "none"),
            )

    def __str__(self) -> str:
        return self.kind + (
            "×".join(map(str, self.kernel)) and f" {'×'.join(map(str, self.kernel))}"
        )


LINEAR, EMBEDDING, PARAMETER = Layout("linear"), Layout("embedding"), Layout("parameter")


class Truncated(NamedTuple):
    """What `LowRank.truncate` returns: the value and ‖ΔW − ΔW'‖, absolute and as a part of ‖ΔW‖."""

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
        bias: (out,) or None, on A's device: what `lora_bias` adds to the output, before ``scale``. For a batch,
            (batch · out,).
        layout: how the matrix lies in the weight it changes.

    Raises:
        ShapeMismatch: A, B and bias do not fit together, or are empty.
        SpecError: a factor is not a floating point tensor, or they are on several devices; or the scale is no finite
            number, or ``layout`` no `Layout`.

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
        A, B, bias = self.A, self.B, self.bias
        if not (
            isinstance(A, Tensor)
            and isinstance(B, Tensor)
            and (bias is None or isinstance(bias, Tensor))
        ):
            raise SpecError(
                f"factors must be torch tensors, got A {type(A).__name__}, B {type(B).__name__}"
                f", bias {type(bias).__name__}",
                "torch.from_numpy makes one of a numpy array",
            )
        if not (A.is_floating_point() and B.is_floating_point()):
            raise SpecError(f"factors must be floating point, got A {A.dtype}, B {B.dtype}")
        if bias is not None and not bias.is_floating_point():
            raise SpecError(f"factors must be floating point, got a bias of {bias.dtype}")
        if type(self.scale) is not float or not math.isfinite(self.scale):
            object.__setattr__(self, "scale", _finite_number(self.scale, "scale"))
        layout = unchecked(self.layout)
        if not isinstance(layout, Layout):
            hint = ("LINEAR, EMBEDDING and PARAMETER are the plain ones: layout=LINEAR",)
            raise SpecError(f"layout must be a Layout, got {layout!r:.80}", *hint)
        a, b = A.shape, B.shape
        if len(a) < 2 or len(a) != len(b) or a[-2] != b[-1] or (len(a) > 2 and a[:-2] != b[:-2]):
            raise ShapeMismatch(
                f"A is {tuple(a)}, B is {tuple(b)}: they do not multiply to an (out, in)",
                "A is (*batch, r, in) and B is (*batch, out, r)",
            )
        if 0 in a or 0 in b:
            raise ShapeMismatch(
                f"A is {tuple(a)}, B is {tuple(b)}: there is nothing in them, expected every size to be at least 1",
                "leave the module out of the adapter",
            )
        if bias is not None and bias.shape != (math.prod(b[:-1]),):
            raise ShapeMismatch(f"bias is {tuple(bias.shape)}, expected ({math.prod(b[:-1])},)")
        if A.device != B.device or (bias is not None and bias.device != A.device):
            where = f"A is on {A.device}, B on {B.device}" + (
                "" if bias is None else f", the bias on {bias.device}"
            )
            raise SpecError(
                f"{where}: expected one device for all", "move them first: B.to(A.device)"
            )

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
        return a if a == b else torch.promote_types(a, b)

    @property
    def device(self) -> torch.device:
        return self.A.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """A, B and, where there is one, the bias."""
        return (self.A, self.B) if self.bias is None else (self.A, self.B, self.bias)

    @property
    def numel(self) -> int:
        """Numbers stored: r · (in + out) for each matrix of the batch."""
        return sum(t.numel() for t in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def is_sharded(self) -> bool:
        """Every rank of a run holds a part of the factors (FSDP2); reading them would wait for all ranks."""
        return any(is_sharded(t) for t in self.tensors)

    @property
    def is_finite(self) -> bool:
        """No number in A, B or the bias is NaN or infinite.

        Raises:
            SpecError: the factors have no numbers (the meta device).
        """
        self._has_numbers()
        return all(
            bool((t if t.element_size() > 1 else t.float()).isfinite().all()) for t in self.tensors
        )

    def fits(self, dtype: torch.dtype | None = None) -> bool:
        """Whether ΔW, and scale · B on the way to it, are finite in ``dtype``; fp32 or the factors' own, if wider.

        >>> LowRank(torch.ones(1, 2), torch.ones(2, 1), scale=1e5).fits(torch.float16)
        False
        """
        check_dtype(dtype)
        self._has_numbers()
        most = torch.finfo(dtype or torch.promote_types(self.dtype, torch.float32)).max
        a, b, *bias = (_largest(t) for t in self.tensors)
        scale = abs(self.scale)
        if not all(scale * size <= most for size in (b, *bias)) or not math.isfinite(a):
            return False
        if scale * self.rank * a * b <= most:
            return True
        # the bound is coarse: the product itself decides
        return all(
            bool((block.abs() <= most).all()) for block in self.dense_blocks(dtype=torch.float64)
        )

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.shape))
        return f"LowRank({shape}, r={self.rank}, scale={self.scale:g}, {self.layout}, {str(self.dtype)[6:]})"

    # ------------------------------------------------------------------ the algebra
    def scaled(self, by: float) -> LowRank:
        """``by`` · ΔW; the factors are shared, nothing is rounded.

        Raises:
            SpecError: ``by`` is no finite number, or makes the scale one that is not finite.
        """
        if type(by) is not float:
            by = _finite_number(by, "the factor")
        return self if by == 1.0 else replace(self, scale=self.scale * by)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> LowRank:
        """The same value with other tensors, of the same shapes, in the place of its own."""
        bias = None if self.bias is None else change(self.bias)
        return LowRank(change(self.A), change(self.B), self.scale, bias, self.layout)

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LowRank:
        """The same value elsewhere, or rounded to another dtype (only where ``dtype`` says so).

        Raises:
            SpecError: ``device`` or ``dtype`` is none, or not a floating one.
        """
        check_dtype(dtype)
        _check_device(device)
        moved = [t.to(device=device, dtype=dtype) for t in self.tensors]
        if all(new is old for new, old in zip(moved, self.tensors, strict=True)):
            return self
        return replace(self, A=moved[0], B=moved[1], bias=moved[2] if len(moved) > 2 else None)

    def folded(self) -> LowRank:
        """The same value with scale 1: folded into B, in fp32 or wider unless the product is exact in B's dtype."""
        if self.scale == 1.0:
            return self
        bias = None if self.bias is None else _times(self.bias, self.scale)
        return replace(self, B=_times(self.B, self.scale), scale=1.0, bias=bias)

    def dense(self, *, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW itself, (\\*batch, out, in). For answers and tests; in blocks of rows see `dense_blocks`."""
        check_dtype(dtype)
        dtype = dtype or self.dtype
        return (self.B.to(dtype) @ self.A.to(dtype)) * self.scale

    def dense_blocks(
        self, rows: int = 256, *, dtype: torch.dtype | None = None
    ) -> Iterator[Tensor]:
        """ΔW in blocks of at most ``rows`` of its rows, (\\*batch, ≤ rows, in), top to bottom."""
        check_whole_number(rows, "rows")
        check_dtype(dtype)
        dtype = dtype or self.dtype
        A = self.A.to(dtype)
        for start in range(0, self.B.shape[-2], rows):
            yield (self.B[..., start : start + rows, :].to(dtype) @ A) * self.scale

    def core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q_B, M, Q_A with ΔW = Q_B M Q_Aᵀ and orthonormal columns: M is (\\*batch, ≤ r, ≤ r), in float64.

        Raises:
            SpecError: a factor, or the product, is not finite.
        """
        self._has_numbers()
        Qb, Rb = torch.linalg.qr(self.B.detach().double())  # (out, k) (k, r)
        Qa, Ra = torch.linalg.qr(self.A.detach().double().mT)  # (in, l) (l, r)
        M = (Rb @ Ra.mT) * self.scale
        if (
            not M.isfinite().all()
        ):  # a NaN or inf in a factor is in its R, and so in M: no pass over the factors
            what = (
                "their product is too large for float64"
                if self.is_finite
                else "the factors are not finite"
            )
            raise SpecError(f"{what}: it has no norm, and no nearest value of a smaller rank")
        return Qb, M, Qa

    def norm(self) -> float:
        """‖ΔW‖ in the Frobenius norm, over the whole batch, from the (r, r) core.

        Raises:
            SpecError: a factor, or the product, is not finite.
        """
        return float(torch.linalg.vector_norm(self.core()[1]))

    def truncate(self, rank: int | None = None, *, max_error: float | None = None) -> Truncated:
        """The nearest value of a smaller rank (Eckart–Young, by two QRs and an SVD of (r, r)).

        Args:
            rank: the rank to keep; or the most to keep, where ``max_error`` is given too.
            max_error: the largest ‖ΔW − ΔW'‖ / ‖ΔW‖ allowed; the smallest rank that reaches it is taken.

        Returns:
            the value (scale 1, in fp32 or wider), and its error in the Frobenius norm. A value that is small enough
            already comes back as it is, with error 0. ``bias`` is kept as it is.

        Raises:
            SpecError: neither bound was given, or one of them makes no sense, or both can't be met, or a factor of this
                value, or of the one to return, is not finite.

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
        if max_error is not None:
            _check_error(max_error)
        if max_error is None and rank is not None and rank >= self.rank:
            return Truncated(self, 0.0, 0.0)
        Qb, M, Qa = self.core()
        U, S, Vh = torch.linalg.svd(M)  # (k, k) (min,) (l, l)
        squares = S.square().reshape(-1, S.shape[-1]).sum(0)  # (min,): over the batch
        tails = torch.cat(
            [squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]
        ).sqrt()  # tails[k]: error of rank k
        total = float(tails[0])
        keep = min(rank, self.rank) if rank is not None else self.rank
        if max_error is not None:
            least = int((tails <= max_error * total).nonzero()[0].item())
            if least > keep:
                raise SpecError(
                    f"rank {keep} leaves a relative error of {float(tails[keep]) / total:.3g}, "
                    f"max_error={max_error:g} needs rank {least}"
                )
            keep = max(least, 1)
        if keep >= self.rank:
            return Truncated(self, 0.0, 0.0)
        keep = min(keep, S.shape[-1])
        root = S[..., :keep].sqrt()
        B = Qb @ (U[..., :, :keep] * root[..., None, :])  # (out, keep)
        A = (root[..., :, None] * Vh[..., :keep, :]) @ Qa.mT  # (keep, in)
        dtype = torch.promote_types(self.dtype, torch.float32)
        bias = None if self.bias is None else _times(self.bias, self.scale)
        value = LowRank(A.to(dtype).contiguous(), B.to(dtype).contiguous(), 1.0, bias, self.layout)
        if not value.is_finite:
            raise SpecError(
                f"the factors of the nearest value of rank {keep} are too large for {str(dtype)[6:]}"
            )
        error = float(tails[keep])
        return Truncated(value, error, error / total if total else 0.0)

    def padded(self, rank: int) -> LowRank:
        """The same value with zero rows and columns up to ``rank``, for engines that want one rank everywhere.

        Raises:
            SpecError: ``rank`` is no whole number, or smaller than the value's own.
        """
        check_rank(rank)
        extra = rank - self.rank
        if extra < 0:
            raise SpecError(f"can't pad rank {self.rank} down to {rank}; truncate it")
        if extra == 0:
            return self
        A = torch.nn.functional.pad(self.A, (0, 0, 0, extra))
        return replace(self, A=A, B=torch.nn.functional.pad(self.B, (0, extra)))

    def _has_numbers(self) -> None:
        if self.A.is_meta:
            raise SpecError(
                "the factors have no numbers: they are on the meta device",
                "load the adapter itself first",
            )


def concat(terms: Sequence[LowRank]) -> LowRank:
    """Σ of the terms as one value: A's rows stacked, B's columns side by side, rank Σr.

    A common scale is kept; otherwise every scale is folded into its B. The sum is exact but for that rounding (see
    `LowRank.folded`), and the result has the widest dtype of its terms.

    Raises:
        SpecError: no terms, or one is no `LowRank`, or they are on several devices.
        ShapeMismatch: the terms differ in (\\*batch, out, in) or in layout.

    >>> import torch
    >>> x = LowRank(torch.ones(1, 4), torch.ones(2, 1))
    >>> both = concat([x, x.scaled(2.0)])
    >>> both.rank, both.dense()[0, 0].item()
    (2, 3.0)
    """
    if isinstance(terms, LowRank) or not isinstance(terms, Iterable):
        raise SpecError(f"concat takes several terms, got {terms!r:.80}", "concat([x, y])")
    terms = list(terms)
    if not terms:
        raise SpecError("concat needs at least one term")
    first = terms[0]
    for other in terms:
        same_place(first, other)
    if len(terms) == 1:
        return first
    _one_device(terms)
    if any(t.scale != first.scale for t in terms):
        terms = [t.folded() for t in terms]
    scale = terms[0].scale
    dtype = first.dtype
    for t in terms:
        dtype = torch.promote_types(dtype, t.dtype)
    biases = [t.bias for t in terms if t.bias is not None]
    bias = torch.stack([b.to(dtype) for b in biases]).sum(0) if biases else None
    A = torch.cat([t.A.to(dtype) for t in terms], dim=-2)
    B = torch.cat([t.B.to(dtype) for t in terms], dim=-1)
    return LowRank(A, B, scale, bias, first.layout)


def stacked(
    terms: Sequence[LowRank],
    *,
    dtype: torch.dtype,
    device: torch.device,
    into: Callable[[tuple[int, ...]], Tensor] | None = None,
) -> LowRank:
    """`concat` for one use on one device, with every scale folded into B in the dtype asked for.

    Args:
        terms: of one (\\*batch, out, in) and layout; not empty.
        dtype: of the result, fp32 or wider unless a rounded scale · B is wanted.
        device: of the result.
        into: makes the memory of A, and then of B, by their shapes; None: ordinary memory, and autograd may watch.

    >>> import torch
    >>> x = LowRank(torch.ones(1, 4), torch.ones(2, 1), scale=0.1)
    >>> both = stacked([x, x], dtype=torch.float64, device=torch.device("cpu"))
    >>> both.scale, both.dense()[0, 0].item()
    (1.0, 0.2)
    """

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype)

    A = _beside([there(t.A) for t in terms], -2, into)
    B = _beside([there(t.B) if t.scale == 1.0 else there(t.B) * t.scale for t in terms], -1, into)
    biases = [there(t.bias) * t.scale for t in terms if t.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    return LowRank(A, B, 1.0, bias, terms[0].layout)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether every rank of a run holds only a part of a tensor, as FSDP2 leaves it."""
    return hasattr(tensor, "full_tensor")


def inner(x: LowRank, y: LowRank) -> float:
    """Frobenius inner product ⟨ΔW_x, ΔW_y⟩, from the factors, in float64.

    tr(ΔW_xᵀ ΔW_y) = Σ (B_xᵀ B_y) ∘ (A_x A_yᵀ): two (r_x, r_y) products, never (out, in).

    Raises:
        ShapeMismatch: the two do not have the same (out, in) or layout.
        SpecError: they are no `LowRank`, or on different devices.

    >>> import torch
    >>> x = LowRank(torch.ones(1, 4), torch.ones(2, 1))
    >>> inner(x, x)
    8.0
    """
    same_place(x, y)
    _one_device([x, y])
    x._has_numbers()
    left = x.B.detach().double().mT @ y.B.detach().double()  # (r_x, r_y)
    right = x.A.detach().double() @ y.A.detach().double().mT  # (r_x, r_y)
    return float((left * right).sum()) * x.scale * y.scale


def check_rank(rank: object) -> None:
    """Refuse a rank that is no whole number, or less than 1.

    Raises:
        SpecError: it is not.
    """
    check_whole_number(rank, "rank")


def check_whole_number(number: object, what: str) -> None:
    """Refuse what is no whole number, or less than 1, or too large for any size.

    Raises:
        SpecError: it is; says ``what`` it should have been.
    """
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise SpecError(f"{what} must be a whole number, got {number!r:.80}")
    whole = int(number)
    if whole < 1:
        raise SpecError(
            f"{what} must be at least 1, got {whole if whole > -(2**63) else 'a huge negative one'}"
        )
    if whole >= 2**31:
        raise SpecError(f"{what} must be less than 2^31, got a larger number")


def same_place(x: LowRank, y: LowRank) -> None:
    """Whether the two can be added up, asked of shapes alone.

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


def _one_device(terms: Sequence[LowRank]) -> None:
    devices = {str(term.device) for term in terms}
    if len(devices) > 1:
        raise SpecError(
            f"the terms are on {' and '.join(sorted(devices))}: expected one device",
            "x.to(device=…) moves one",
        )


def check_dtype(dtype: object, what: str = "dtype") -> None:
    """Check that an argument is a floating dtype of torch, or None.

    Raises:
        SpecError: it is something else; says ``what`` it was given for.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SpecError(
            f"{what} must be one of torch's floating dtypes, got {dtype!r:.80}",
            f"{what}=torch.bfloat16",
        )


def _check_device(device: object) -> None:
    if device is None or isinstance(device, torch.device):
        return
    try:
        torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise SpecError(
            f"device must be one that torch knows, got {device!r:.80}", 'device="cpu", "cuda:0"'
        ) from error


def _finite_number(value: object, what: str) -> float:
    """A number of any kind as a float.

    Raises:
        SpecError: it is none, or not finite; says ``what`` it should have been.
    """
    is_number = isinstance(value, Real)
    number = math.nan
    if is_number and value is not True and value is not False:
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError:
            number = math.inf
    if not math.isfinite(number):
        huge = (
            isinstance(value, int) and value.bit_length() > 1024
        )  # Python may refuse to write it out
        raise SpecError(
            f"{what} must be finite, got {'an integer too large for a float' if huge else f'{value!r:.80}'}"
        )
    return number


def _check_error(bound: object) -> None:
    if isinstance(bound, bool) or not isinstance(bound, Real) or not float(bound) >= 0:
        raise SpecError(f"max_error must be 0 or more (a part of the norm), got {bound!r}")


def _largest(t: Tensor) -> float:
    """max |x|; NaN where there is one."""
    plain = t.detach() if t.element_size() > 1 else t.detach().float()
    least, most = torch.aminmax(plain)
    return float(torch.maximum(least.abs(), most.abs()))


def _beside(
    parts: Sequence[Tensor], dim: int, into: Callable[[tuple[int, ...]], Tensor] | None
) -> Tensor:
    """The parts one beside the other, where ``into`` says."""
    if into is None:
        return torch.cat(parts, dim=dim)  # type: ignore[arg-type]
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return torch.cat(parts, dim=dim, out=into(tuple(shape)))  # type: ignore[arg-type]


def _times(t: Tensor, scale: float) -> Tensor:
    """``t · scale``, in fp32 or wider unless it is exact in t's own dtype (a power of two, nothing lost)."""
    wide = t.to(torch.promote_types(t.dtype, torch.float32)) * scale
    if wide.dtype != t.dtype and abs(math.frexp(scale)[0]) == 0.5:
        narrow = wide.to(t.dtype)
        if torch.equal(narrow.to(wide.dtype), wide):
            return narrow
    return wide
