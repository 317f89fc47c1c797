"""The (r, r) core of a product B A, and the nearest product of a smaller rank.

    scale · B A = Q_B M Q_Aᵀ      Q_B: (*batch, out, k)  M: (*batch, k, l)  Q_A: (*batch, in, l)

Q_B and Q_A have orthonormal columns, so the norm and the singular values of the product are those
of M. Two QRs and an SVD of (r, r) replace one SVD of (out, in). Everything is computed in float64,
and the caller rounds the result once.

Reference: Eckart and Young, 1936. The matrices of a batch are cut to one rank, and the error is the
root of the sum of their squared errors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SpecError

__all__ = ["MOST_NORM", "Core", "SingularValues", "core_of"]

MOST_NORM = 1e150
"""The largest norm that is computed with: squares of it, summed over many modules, are finite."""


class Core(NamedTuple):
    """A product as Q_B M Q_Aᵀ; see the module's docstring."""

    Qb: Tensor
    M: Tensor
    Qa: Tensor

    def norm(self) -> float:
        """Return the Frobenius norm of the product, over the whole batch."""
        return float(torch.linalg.vector_norm(self.M))


class SingularValues:
    """The singular values of a core, which give the factors and the error of every smaller rank.

    Args:
        core: of the product.
    """

    def __init__(self, core: Core) -> None:
        self._Qb, self._Qa = core.Qb, core.Qa
        self._U, self._S, self._Vh = torch.linalg.svd(core.M)  # (k, k) (m,) (l, l), m = min(k, l)
        # Squared in units of the largest, because squares of tiny values would be zero.
        largest = float(self._S.max())
        unit = largest if largest > 0.0 else 1.0
        squares = (self._S / unit).square().reshape(-1, self._S.shape[-1]).sum(0)  # over the batch
        # Summed from the smallest up, so that adding small values to large ones does not lose them.
        tails = squares.flip(0).cumsum(0).flip(0)
        # [k]: the error of rank k
        self._errors = torch.cat([tails, tails.new_zeros(1)]).sqrt() * unit

    @property
    def norm(self) -> float:
        """‖ΔW‖: the error of rank 0."""
        return float(self._errors[0])

    def error(self, rank: int) -> float:
        """Return ‖ΔW − ΔW'‖ for the nearest ΔW' of that rank; 0.0 if nothing is cut."""
        return float(self._errors[min(rank, self._S.shape[-1])])

    def least_rank(self, max_error: float) -> int:
        """Return the smallest rank with a relative error of at most ``max_error``; 0 for ΔW = 0."""
        if self.norm == 0.0:
            return 0
        small_enough = self._errors <= max_error * self.norm
        return int(small_enough.nonzero()[0].item())

    def rank_to_keep(self, most: int, max_error: float | None) -> int:
        """Return the rank that a truncation keeps, at least 1.

        Args:
            most: the largest rank to keep.
            max_error: the largest relative error allowed: the smallest rank within it is kept.
                None: ``most`` is kept.

        Raises:
            SpecError: both bounds can't be met.
        """
        if max_error is None:
            return most
        least = self.least_rank(max_error)
        if least > most:
            raise SpecError(
                f"rank {most} leaves a relative error of {self.error(most) / self.norm:.3g}, "
                f"max_error={max_error:g} needs rank {least}"
            )
        # A zero product needs rank 0, but no value has rank 0.
        return max(least, 1)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return B (*batch, out, rank) and A (*batch, rank, in) of the nearest such product.

        Each gets the square roots of the singular values, so that neither overflows a narrow dtype
        before the other.
        """
        rank = min(rank, self._S.shape[-1])
        root = self._S[..., :rank].sqrt()
        B = self._Qb @ (self._U[..., :, :rank] * root[..., None, :])  # (out, rank)
        A = (root[..., :, None] * self._Vh[..., :rank, :]) @ self._Qa.mT  # (rank, in)
        return B, A


def core_of(B: Tensor, A: Tensor, scale: float) -> Core | None:
    """Return the core of scale · B A in float64, outside of autograd.

    None if it is not finite, or its norm exceeds `MOST_NORM`.

    Args:
        B: (*batch, out, r).
        A: (*batch, r, in).
    """
    Qb, Rb = torch.linalg.qr(B.detach().double())  # (out, k) (k, r)
    Qa, Ra = torch.linalg.qr(A.detach().double().mT)  # (in, l) (l, r)
    M = (Rb @ Ra.mT) * scale
    # A NaN or an infinity in a factor propagates to its R and to M, so checking M is enough; and a
    # comparison with NaN is false.
    return Core(Qb, M, Qa) if float(torch.linalg.vector_norm(M)) <= MOST_NORM else None
