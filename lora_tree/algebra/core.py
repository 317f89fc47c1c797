"""Joint: several increments of one weight in one pair of orthonormal bases.

    ΔW_i = Q_B · M_i · Q_Aᵀ        Q_B: (out, k)    M_i: (k, l)    Q_A: (in, l)    k, l ≤ Σ r_i

Everything about the increments alone (norms, angles, means, the best approximation of a rank) is
computed from the small cores M_i, because orthonormal bases change neither norms nor angles. Nor
does it depend on the gauge: (B R) (R⁻¹ A) has the same product as B A.

Law: nothing here builds an (out, in) matrix, and all sums are taken in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SpecError
from ..lowrank import LowRank, same_place
from ..lowrank.qr_core import MOST_NORM

__all__ = [
    "Joint",
    "angles",
    "check_readable",
    "effective_rank",
    "energy",
    "joint",
    "scaled_bias",
    "spectrum",
]

_NEGLIGIBLE = 1e-6
"""Singular values below this fraction of the largest count as zero: fp32 rounds by as much."""


@dataclass(frozen=True, eq=False)
class Joint:
    """Increments of one weight, as cores between two bases that they share.

    Args:
        Q_B: (\\*batch, out, k), orthonormal columns.
        Q_A: (\\*batch, in, l), orthonormal columns.
        cores: one (\\*batch, k, l) for each increment, multiplied by its scale.
        biases: one (out,) or None for each increment, multiplied by its scale.
        like: the first increment; results get its layout, its device and at least its dtype.
    """

    Q_B: Tensor
    Q_A: Tensor
    cores: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    like: LowRank

    def value(self, core: Tensor, bias: Tensor | None = None) -> LowRank:
        """Return the increment that a core stands for, in float64 and with the smaller of k and l
        as its rank.

        Args:
            core: (\\*batch, k, l).
            bias: (out,) or None.
        """
        if core.shape[-2] <= core.shape[-1]:
            A, B = core @ self.Q_A.mT, self.Q_B  # (k, in) (out, k)
        else:
            A, B = self.Q_A.mT, self.Q_B @ core  # (l, in) (out, l)
        return LowRank(A.contiguous(), B.contiguous(), 1.0, bias, self.like.layout)


def joint(values: Sequence[LowRank]) -> Joint:
    """Bring increments of one weight into joint bases.

    Values on other devices are brought to the first one's.

    Raises:
        ShapeMismatch: two are not increments of one weight.
        SpecError: there are none; or one is not finite, is sharded, or is on the meta device.

    >>> x = LowRank(torch.ones(1, 4), torch.ones(2, 1))
    >>> both = joint([x, x.scaled(-1.0)])
    >>> bool((both.cores[0] + both.cores[1]).abs().max() < 1e-12), both.Q_B.shape
    (True, torch.Size([2, 2]))
    """
    if not values:
        raise SpecError("joint bases need at least one increment")
    first = values[0]
    for value in values:
        same_place(first, value)
        check_readable(value)
    B = torch.cat([_wide(value.B, first) for value in values], dim=-1)  # (out, Σr)
    A = torch.cat([_wide(value.A, first) for value in values], dim=-2)  # (Σr, in)
    Q_B, R_B = torch.linalg.qr(B)  # (out, k) (k, Σr)
    Q_A, R_A = torch.linalg.qr(A.mT)  # (in, l) (l, Σr)
    cores: list[Tensor] = []
    start = 0
    for value in values:
        # An increment's core is the product of its own columns of R_B and R_A.
        columns = slice(start, start + value.rank)
        cores.append((R_B[..., columns] @ R_A[..., columns].mT) * value.scale)
        start += value.rank
    for value, core in zip(values, cores, strict=True):
        # Not written with `>`, because a comparison with NaN is false.
        if not float(torch.linalg.vector_norm(core)) <= MOST_NORM:
            value.core()  # raises here if the factors themselves are not finite
            raise SpecError("the product of the factors is too large for float64")
    biases = tuple(scaled_bias(value, first) for value in values)
    return Joint(Q_B, Q_A, tuple(cores), biases, first)


def spectrum(value: LowRank) -> Tensor:
    """Return the singular values of ΔW, (\\*batch, ≤ r) in float64, largest first.

    Raises:
        SpecError: a factor is not finite.

    >>> x = LowRank(torch.eye(2, 4), torch.diag(torch.tensor([3.0, 1.0])))
    >>> spectrum(x).tolist()
    [3.0, 1.0]
    """
    check_readable(value)
    found: Tensor = torch.linalg.svdvals(value.core()[1])
    return found


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of singular values taken as shares (Roy & Vetterli, EUSIPCO 2007).

    It is a soft count of the directions of an increment: r if all singular values are equal, 1 if
    only one is not zero, 0 for a zero increment. The matrices of a batch count together.

    >>> effective_rank(torch.tensor([1.0, 1.0])), effective_rank(torch.tensor([1.0, 0.0]))
    (2.0, 1.0)
    """
    flat = values.double().flatten()
    total = float(flat.sum())
    if total == 0.0:
        return 0.0
    shares = flat[flat > 0] / total
    return round(math.exp(float(-(shares * shares.log()).sum())), 12)


def energy(values: Tensor, rank: int) -> float:
    """Return the fraction of ‖ΔW‖² that the best approximation of a rank keeps; 1 if ΔW is zero.

    Args:
        values: (\\*batch, n) singular values, largest first.
        rank: of every matrix of the batch.

    >>> energy(torch.tensor([2.0, 1.0]), 1)
    0.8
    """
    squares = values.double().square()
    total = float(squares.sum())
    return float(squares[..., :rank].sum()) / total if total else 1.0


def angles(x: LowRank, y: LowRank) -> tuple[Tensor, Tensor]:
    """Return the principal angles between the column spaces of two increments, and between their
    row spaces.

    Angles are in radians, smallest first, as many as the smaller space has dimensions: 0 is a
    shared direction, π/2 one that is orthogonal to the other space. The angles of a batch's
    matrices are concatenated. The spaces are those of the product, not of the factors.

    Returns:
        (between the column spaces, in the output; between the row spaces, in the input).

    Raises:
        ShapeMismatch: they are not increments of one weight.
        SpecError: a factor is not finite.
    """
    same_place(x, y)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for one, other in zip(_directions(x), _directions(y), strict=True):
        for side in (0, 1):
            found[side].append(_between(one[side], other[side].to(one[side].device)))
    columns, rows = (torch.cat(each) for each in found)
    return columns, rows


def check_readable(value: LowRank) -> None:
    """Refuse a value whose numbers are not all in this process.

    Raises:
        SpecError: it is sharded over the ranks of a run, or is on the meta device.
    """
    if value.is_sharded:
        raise SpecError(
            "every rank has a part of its factors", "compute inside with model.gathered() as tree:"
        )
    if value.A.is_meta:
        raise SpecError(
            "the factors have no numbers: they are on the meta device",
            "load the adapter itself first",
        )


def _wide(tensor: Tensor, first: LowRank) -> Tensor:
    return tensor.detach().to(device=first.device, dtype=torch.float64)


def scaled_bias(value: LowRank, first: LowRank) -> Tensor | None:
    """Return a value's bias (out,) times its scale, in float64 and on another value's device.

    Raises:
        SpecError: it is not finite.
    """
    if value.bias is None:
        return None
    bias = _wide(value.bias, first) * value.scale
    if not bool(bias.isfinite().all()):
        raise SpecError("the bias is not finite")
    return bias


def _directions(value: LowRank) -> list[tuple[Tensor, Tensor]]:
    """Return orthonormal bases of the column and the row space of each matrix of the batch."""
    check_readable(value)
    Q_B, M, Q_A = value.core()
    U, S, Vh = torch.linalg.svd(M)
    U = Q_B @ U  # (*batch, out, k)
    V = Q_A @ Vh.mT  # (*batch, in, l)
    found = []
    matrices = (each.reshape(-1, *each.shape[-2:]) for each in (U, V))
    for u, v, s in zip(*matrices, S.reshape(-1, S.shape[-1]), strict=True):
        # The matrices of a batch differ in rank, so their bases can't be one tensor.
        kept = int((s > s.max() * _NEGLIGIBLE).sum()) if s.max() > 0 else 0
        found.append((u[:, :kept], v[:, :kept]))
    return found


def _between(one: Tensor, other: Tensor) -> Tensor:
    if 0 in one.shape or 0 in other.shape:
        return one.new_zeros(0)
    smaller, larger = (one, other) if one.shape[1] <= other.shape[1] else (other, one)
    inside = larger.mT @ smaller  # (larger, smaller)
    cosines = torch.linalg.svdvals(inside).clamp(max=1.0)
    # Near 1 acos loses half of the digits, so small angles are computed from their sine.
    sines = torch.linalg.svdvals(smaller - larger @ inside).flip(0).clamp(max=1.0)
    return torch.where(cosines > 0.7, sines.asin(), cosines.acos())
