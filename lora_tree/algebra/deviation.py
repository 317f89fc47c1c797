"""Deviation: the distance of an adapter from the one that it replaces, module by module.

    error     √ Σ ‖ΔW − ΔW'‖²      over all modules, in the Frobenius norm
    relative  error / √ Σ ‖ΔW‖²

Every verb of this room that cuts, rounds or merges returns one. Without a cut the error is 0:
adding up factors is exact except for the rounding of scales (see `lora_tree.concat`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import LoraTreeError
from ..lowrank import LowRank
from .aligning import aligned
from .arguments import check_adapter, check_factor_dtype
from .core import joint

__all__ = [
    "Deviation",
    "Gap",
    "Shortening",
    "call_named",
    "deviation",
    "gap_of",
    "length",
    "measure_error",
    "minus",
    "norm",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Deviation:
    """Errors and norms of an adapter's modules, absolute and in the Frobenius norm.

    Args:
        errors: module → ‖ΔW − ΔW'‖; modules without an error may be left out.
        norms: module → ‖ΔW‖ of the wanted adapter.

    >>> error = Deviation({"q": 3.0}, {"q": 5.0, "v": 12.0})
    >>> error.error, error.norm, round(error.relative_error, 4), error.relative
    (3.0, 13.0, 0.2308, {'q': 0.6, 'v': 0.0})
    """

    errors: Mapping[str, float] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """√ Σ ‖ΔW − ΔW'‖² over all modules."""
        return math.hypot(*self.errors.values())

    @property
    def norm(self) -> float:
        """√ Σ ‖ΔW‖² over all modules."""
        return math.hypot(*self.norms.values())

    @property
    def relative_error(self) -> float:
        """`error` / `norm`; infinite if the norm is 0 and the error is not."""
        return _ratio(self.error, self.norm)

    @property
    def relative(self) -> dict[str, float]:
        """Module → its error relative to its own norm."""
        names = sorted({*self.errors, *self.norms})
        return {n: _ratio(self.errors.get(n, 0.0), self.norms.get(n, 0.0)) for n in names}

    @property
    def worst(self) -> float:
        """The largest relative error of a module."""
        return max(self.relative.values(), default=0.0)

    def as_dict(self) -> dict[str, object]:
        """The figures as plain data, for JSON."""
        return {
            "error": self.error,
            "norm": self.norm,
            "relative_error": self.relative_error,
            "worst": self.worst,
        }


def deviation(wanted: Adapter, got: Adapter) -> Deviation:
    """Measure how far ``got`` is from ``wanted``; a module that one of them lacks is zero there.

    Raises:
        ShapeMismatch: they change one module in different shapes; names it.
        SpecError: a factor is not finite; names the module.
    """
    check_adapter(wanted, "wanted")
    check_adapter(got, "got")
    wanted, got = aligned([wanted, got])
    errors: dict[str, float] = {}
    norms: dict[str, float] = {}
    for name in sorted({*wanted.modules, *got.modules}):
        # A module that one side lacks counts with all of its norm.
        pair = (wanted.modules.get(name), got.modules.get(name))
        errors[name], norms[name] = call_named(name, measure_error, *pair)
    return Deviation(errors, norms)


def measure_error(wanted: LowRank | None, got: LowRank | None) -> tuple[float, float]:
    """Return ‖ΔW − ΔW'‖ and ‖ΔW‖ of one module, biases included; None is zero.

    Raises:
        ShapeMismatch, SpecError: as `deviation`.
    """
    gap = gap_of(wanted, got)
    return gap.error, gap.norm


@dataclass(frozen=True, eq=False)
class Gap:
    """The difference ΔW − ΔW' of one module, with the biases in its norms.

    Args:
        error: ‖ΔW − ΔW'‖.
        norm: ‖ΔW‖.
        core: (\\*batch, k, l), the difference without its bias in joint bases; None: it is zero.
        Q_A: (\\*batch, in, l), the basis of its rows; None if there is no core.
    """

    error: float
    norm: float
    core: Tensor | None = None
    Q_A: Tensor | None = None


def gap_of(wanted: LowRank | None, got: LowRank | None) -> Gap:
    """Compute the difference of two values of one weight; None is zero.

    Raises:
        ShapeMismatch, SpecError: as `deviation`.
    """
    if wanted is got:
        return Gap(0.0, 0.0 if wanted is None else norm(wanted))
    # In joint bases the difference is one of two small cores. As a LowRank it would have the sum
    # of the ranks.
    both = joint([value for value in (wanted, got) if value is not None])
    core, bias = both.cores[0], both.biases[0]
    whole = 0.0 if wanted is None else length([core, bias])
    if wanted is not None and got is not None:
        core, bias = core - both.cores[1], minus(*both.biases)
    return Gap(length([core, bias]), whole, core, both.Q_A)


def norm(value: LowRank) -> float:
    """Return ‖ΔW‖ with the bias as one more column.

    Raises:
        SpecError: a factor is not finite.
    """
    # The bias needs no place in the QR: the norm of core and bias together is the same.
    alone = joint([value])
    return length([alone.cores[0], alone.biases[0]])


def length(parts: Iterable[Tensor | None]) -> float:
    """Return √ Σ x² over all numbers of some tensors."""
    # hypot instead of a sum of squares, which can overflow although its root would not.
    return math.hypot(*(float(torch.linalg.vector_norm(p)) for p in parts if p is not None))


def minus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return the difference of two biases; None is zero."""
    if other is None:
        return one
    return -other if one is None else one - other


@dataclass(frozen=True)
class Shortening:
    """The bounds on a result: a rank, an error and a dtype. By default nothing is cut or rounded.

    Args:
        rank, max_error: as `lora_tree.Adapter.truncate`.
        dtype: of the result's factors; None keeps the dtype that truncation returns.

    Raises:
        SpecError: factors can't be saved in the dtype.

    >>> Shortening(rank=8).is_noop, Shortening().is_noop
    (False, True)
    """

    rank: int | None = None
    max_error: float | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_factor_dtype(self.dtype)

    @property
    def is_cut(self) -> bool:
        """Return whether a rank or an error bounds the result."""
        return self.rank is not None or self.max_error is not None

    @property
    def is_noop(self) -> bool:
        """Return whether `of` is a no-op."""
        return not self.is_cut and self.dtype is None

    def of(self, adapter: Adapter) -> tuple[Adapter, Deviation]:
        """Return an adapter cut and rounded, and the error of both.

        Raises:
            SpecError: a bound is not valid, or both can't be met; names the module.
        """
        got = adapter
        if self.is_cut:
            got = got.truncate(self.rank, max_error=self.max_error)
        if self.dtype is not None:
            got = got.to(dtype=self.dtype)
        norms = {name: call_named(name, norm, v) for name, v in adapter.modules.items()}
        errors = {}
        for name, value in adapter.modules.items():
            # Measured on the final factors, so that their rounding is a part of the error.
            if value is not got.modules[name]:
                errors[name] = call_named(name, measure_error, value, got.modules[name])[0]
        return got, Deviation(errors, norms)


def call_named(name: str, call: Callable[..., T], *arguments: object) -> T:
    """Call a function; prefix an error that it raises with a module's or a node's name."""
    try:
        return call(*arguments)
    except LoraTreeError as error:
        raise error.within(name) from error


def _ratio(error: float, whole: float) -> float:
    if whole == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / whole
