"""Second moments of a module's inputs, which weight an error by its effect on the outputs.

    E ‖(ΔW − ΔW') x‖² = ‖(ΔW − ΔW') C^½‖²        C = E[x xᵀ], (in, in)

The caller gives C itself, its diagonal, or rows of inputs. Only Qᵀ C Q is ever needed, with a basis
Q of the increments' row spaces; the last two forms yield it without an (in, in) matrix.

Law: the shape alone says which form it is, and a square tensor is C. As many rows of inputs as the
input is wide look like C, but C is symmetric and has no negative eigenvalue, so they are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..errors import ShapeMismatch, SpecError, listing, plural
from ..given import unchecked
from .deviation import Gap

__all__ = ["Moment", "moments_of", "weighted_square"]

_ROUNDING = 0.01
"""C may be this far from symmetric and positive, in parts of its largest number: bf16 rounds by
0.4 %, and twice in a sum."""

_AS_ROWS = "rows x of inputs give C = x.T @ x / len(x)"


class Moment:
    """The second moments of one module's inputs.

    C is checked at the first use and not again: a verb uses it for every adapter with the module,
    and the checks take longer than the products. It stays in the caller's dtype, because an
    (in, in) matrix in float64 for each module would not fit into memory.

    Args:
        given: C (in, in); or its diagonal (in,); or rows of inputs, (rows, in) with two rows or
            more, but not just ``in``. The caller's own tensor.
    """

    def __init__(self, given: Tensor) -> None:
        self._given = given
        self._is_checked = False

    def inside(self, Q: Tensor | None, size: int) -> Tensor:
        """Return Qᵀ C Q in float64, symmetric and without negative eigenvalues.

        Args:
            Q: (\\*batch, in, l); None is the identity, on the CPU.
            size: in.

        Returns:
            (\\*batch, l, l).

        Raises:
            ShapeMismatch: the moment does not have the size of the input.
            SpecError: it is not a real tensor, or has infinities, NaN, a negative mean square or a
                negative eigenvalue; or it is square and not symmetric; or it is a single row.
        """
        C = _as_numbers(self._given, torch.device("cpu") if Q is None else Q.device)
        if not self._is_checked:
            _check(C, size)
            self._is_checked = True
        if C.shape == (size,):
            inside = torch.diag(C) if Q is None else Q.mT @ (C[:, None] * Q)
        elif C.shape == (size, size):
            inside = C if Q is None else Q.mT @ C @ Q
        elif C.ndim == 2 and C.shape[1] == size:
            seen = C if Q is None else C @ Q  # (rows, l)
            inside = seen.mT @ seen / len(C)
        else:
            raise ShapeMismatch(
                f"moments: got {tuple(C.shape)}, expected ({size},), ({size}, {size}) or "
                f"(rows, {size})"
            )
        if not bool(inside.isfinite().all()):
            raise SpecError("moments: their products are too large for float64")
        return _without_negative(inside) if C.shape == (size, size) else inside


def moments_of(given: Mapping[str, Tensor] | None, modules: Collection[str]) -> dict[str, Moment]:
    """Return the moments that a caller gave, by module.

    Those of further modules are allowed: a caller may have the moments of a whole model.

    Raises:
        SpecError: they are not a mapping, or none is of these modules.
    """
    if given is None:
        return {}
    if not isinstance(unchecked(given), Mapping):
        raise SpecError(
            f"moments: expected module → tensor, got {type(given).__name__}",
            f"moments={{{min(modules, default='MODULE')!r}: rows}}",
        )
    if given and not any(name in modules for name in given):
        raise SpecError(
            f"moments: no adapter here has the modules that they name: {listing(map(str, given))}",
            f"the modules are {listing(sorted(modules))}",
        )
    return {name: Moment(moment) for name, moment in given.items()}


def weighted_square(gap: Gap, moment: Moment | None) -> float:
    """Return E ‖(ΔW − ΔW') x‖² of one module, biases left out.

    Args:
        gap: the difference.
        moment: None is the identity: then it is ‖ΔW − ΔW'‖².

    Raises:
        ShapeMismatch, SpecError: as `Moment.inside`.
    """
    if gap.core is None or gap.Q_A is None:
        return 0.0
    if moment is None:
        return float(gap.core.square().sum())
    inside = moment.inside(gap.Q_A, gap.Q_A.shape[-2])
    return max(float(((gap.core @ inside) * gap.core).sum()), 0.0)


def _as_numbers(moment: object, device: torch.device) -> Tensor:
    """Return a moment in float64 on a device.

    Raises:
        SpecError: it is not a tensor, or not real, or has no numbers.
    """
    if not isinstance(moment, Tensor):
        raise SpecError(f"moments: expected a tensor, got {type(moment).__name__}")
    if moment.is_complex() or moment.is_meta:
        kind = moment.dtype if moment.is_complex() else "a tensor on the meta device"
        raise SpecError(f"moments: expected a tensor of real numbers, got {kind}")
    return moment.detach().to(device=device, dtype=torch.float64)


def _check(C: Tensor, size: int) -> None:
    """Refuse a tensor that is no second moment of inputs of this size; its shape is not checked.

    Raises:
        SpecError: it is refused.
    """
    if not bool(C.isfinite().all()):
        raise SpecError("moments: they hold numbers that are not finite")
    if C.shape == (size,):
        _check_squares(C)
    elif C.shape == (size, size):
        _check_squares(C.diagonal())
        _check_symmetric(C)
    elif C.ndim == 2 and C.shape[1] == size and len(C) < 2:
        raise SpecError(
            f"moments: got {plural(len(C), 'row')} of inputs, expected 2 or more: their mean is "
            "taken",
            f"give more rows; or the mean squares themselves, as ({size},)",
        )


def _check_squares(squares: Tensor) -> None:
    """Refuse a negative mean square, which would make errors negative."""
    if bool((squares < 0).any()):
        raise SpecError(
            "moments: they hold a negative mean square",
            f"means of squares, and C's diagonal, are never negative; {_AS_ROWS}",
        )


def _check_symmetric(C: Tensor) -> None:
    """Refuse a square tensor that is not symmetric up to rounding: it holds rows of inputs."""
    if bool(((C - C.mT).abs() > _ROUNDING * C.abs().max()).any()):
        raise SpecError(
            f"moments: a tensor of {tuple(C.shape)} is taken for C = E[x xᵀ], and it is not "
            "symmetric",
            _AS_ROWS,
        )


def _without_negative(inside: Tensor) -> Tensor:
    """Return a symmetric matrix without the negative eigenvalues that rounding leaves.

    Raises:
        SpecError: one is too large for rounding.
    """
    inside = (inside + inside.mT) / 2
    values, vectors = torch.linalg.eigh(inside)
    least, largest = float(values.min()), float(values.abs().max())
    if least < -_ROUNDING * largest:
        raise SpecError(
            "moments: the matrix has negative eigenvalues, so it is no C = E[x xᵀ]", _AS_ROWS
        )
    if least >= 0.0:
        return inside
    clamped: Tensor = vectors @ (values.clamp(min=0.0)[..., None] * vectors.mT)
    return clamped
