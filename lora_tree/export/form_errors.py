"""FormErrors: the distance of an exported adapter from the exact sum of its lineage.

    module         ‖ΔW − ΔW'‖ / ‖ΔW‖                          in the Frobenius norm
    all of them    √(Σ ‖ΔW − ΔW'‖²) / √(Σ ‖ΔW‖²)

Law: the error of every export form is measured. The exact sum and the QR cores behind the norms are
in float64, so the errors include truncation, the folding of scales and the rounding to a dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..combining import combine
from ..errors import SpecError
from ..flattening import NodeTerms
from ..lowrank import LowRank, concat

__all__ = ["ROUNDING", "FormErrors", "exact_sum"]

ROUNDING = 1e-6
"""The tolerance added to ``max_error``: fp32 rounds by that much, at any rank."""


def exact_sum(terms: NodeTerms) -> Mapping[str, LowRank]:
    """Return the lineage's sum in float64, the reference for all errors."""
    nodes = [node for node, _, _ in terms]
    wide = [(adapter.to(dtype=torch.float64), by) for _, by, adapter in terms]
    return combine(wide, names=nodes).modules


@dataclass(frozen=True)
class FormErrors:
    """The relative errors of an adapter's modules.

    Args:
        by_module: module → its error; 0.0 if nothing was cut or rounded.
        overall: the error over all modules together.
    """

    by_module: Mapping[str, float]
    overall: float

    @classmethod
    def between(cls, exact: Mapping[str, LowRank], made: Mapping[str, LowRank]) -> FormErrors:
        """Return the errors of the modules in ``made``, for every module of the exact sum."""
        errors: dict[str, float] = {}
        all_off, all_norm = 0.0, 0.0
        for name, wanted in exact.items():
            norm = wanted.norm()
            off = _distance(wanted, made[name])
            errors[name] = _relative(off, norm)
            # hypot: the squares of norms could overflow
            all_off = math.hypot(all_off, off)
            all_norm = math.hypot(all_norm, norm)
        return cls(errors, _relative(all_off, all_norm))

    def check_within(self, max_error: float | None, dtype: torch.dtype | None) -> None:
        """Check that no module's error exceeds ``max_error`` once its factors are rounded.

        Args:
            max_error: the largest error allowed; None: any.
            dtype: of the factors; None: fp32.

        Raises:
            SpecError: one is; names it.
        """
        if max_error is None:
            return
        for name, error in self.by_module.items():
            if error > max_error + ROUNDING:
                kind = str(dtype or torch.float32).removeprefix("torch.")
                raise SpecError(
                    f"{name}: relative error {error:.3g} once the factors are rounded to {kind}, "
                    f"max_error={max_error:g}",
                    "keep a wider dtype, or allow more",
                )


def _distance(wanted: LowRank, made: LowRank) -> float:
    """Return ‖ΔW − ΔW'‖."""
    got = made.to(dtype=torch.float64)
    folded = wanted.folded()
    # Equal factors have no error, but the norm of their difference would not be exactly zero.
    has_same_rank = folded.A.shape == got.A.shape
    if has_same_rank and torch.equal(folded.A, got.A) and torch.equal(folded.B, got.B):
        return 0.0
    return concat([got.folded(), folded.scaled(-1.0)]).norm()


def _relative(off: float, norm: float) -> float:
    if norm:
        return off / norm
    # For a zero sum the relative error is 0, or infinite if the export is not zero.
    return 0.0 if off == 0.0 else math.inf
