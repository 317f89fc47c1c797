"""Joint: several increments of one weight in one pair of orthonormal bases.

    ΔW_i = Q_B · M_i · Q_Aᵀ        Q_B: (out, k)    M_i: (k, l)    Q_A: (in, l)    k, l ≤ Σ r_i

Every question about the increments alone (norms, angles, means, the best value of a rank) is asked
of the small cores M_i, because orthonormal bases change neither norms nor angles. A core does not
change either when the factors of an increment are written otherwise, (B R) (R⁻¹ A).

Law: nothing here builds an (out, in) matrix, and all sums run in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SpecError
from ..lowrank import LowRank, same_place

__all__ = ["Joint", "angles", "check_readable", "effective_rank", "energy", "joint", "spectrum"]

_NEGLIGIBLE = 1e-6
"""Singular values below this part of the largest count as zero: fp32 rounds by as much."""


@dataclass(frozen=True, eq=False)
class Joint:
    """Increments of one weight, as cores between two bases that they share.

    Args:
        Q_B: (\\*batch, out, k), orthonormal columns.
        Q_A: (\\*batch, in, l), orthonormal columns.
        cores: one (\\*batch, k, l) for each increment, with its scale in it.
        biases: one (out,) or None for each increment, with its scale in it.
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
        SpecError: there are none, or one has no finite numbers, or only a part of them.

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
        # The columns of R that belong to one increment multiply to its core; the others' don't
        # touch it.
        mine = slice(start, start + value.rank)
        cores.append((R_B[..., mine] @ R_A[..., mine].mT) * value.scale)
        start += value.rank
    for value, core in zip(values, cores, strict=True):
        if not core.isfinite().all():
            value.core()  # says which of the two it is: the factors, or their product
            raise SpecError("the product of the factors is too large for float64")
    biases = tuple(_scaled_bias(value, first) for value in values)
    return Joint(Q_B, Q_A, tuple(cores), biases, first)


def spectrum(value: LowRank) -> Tensor:
    """Return the singular values of ΔW, (\\*batch, ≤ r) in float64, largest first.

    Raises:
        SpecError: the factors have no finite numbers.

    >>> x = LowRank(torch.eye(2, 4), torch.diag(torch.tensor([3.0, 1.0])))
    >>> spectrum(x).tolist()
    [3.0, 1.0]
    """
    check_readable(value)
    found: Tensor = torch.linalg.svdvals(value.core()[1])
    return found


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of singular values taken as shares (Roy & Vetterli, EUSIPCO 2007).

    It is the number of directions that carry an increment: r where all are alike, 1 where one
    carries everything, 0 for no increment at all. The matrices of a batch count together.

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
    """Return the part of ‖ΔW‖² that the best value of a rank keeps, 1 where there is nothing to
    keep.

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

    Angles are in radians, smallest first, one for each direction that the smaller of the two has: 0
    is a shared direction, π/2 one that the other does not touch. Those of a batch follow one
    another. Directions that an increment has in its factors but not in its product do not count.

    Returns:
        (between the column spaces, in the output; between the row spaces, in the input).

    Raises:
        ShapeMismatch: they are not increments of one weight.
        SpecError: the factors have no finite numbers.
    """
    same_place(x, y)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for one, other in zip(_directions(x), _directions(y), strict=True):
        for side in (0, 1):
            found[side].append(_between(one[side], other[side].to(one[side].device)))
    columns, rows = (torch.cat(each) for each in found)
    return columns, rows


def check_readable(value: LowRank) -> None:
    """Refuse a value whose numbers are not all here.

    Raises:
        SpecError: every rank of a run holds a part of it, or it is on the meta device.
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


def _scaled_bias(value: LowRank, first: LowRank) -> Tensor | None:
    return None if value.bias is None else _wide(value.bias, first) * value.scale


def _directions(value: LowRank) -> list[tuple[Tensor, Tensor]]:
    """For each matrix of the batch, orthonormal bases of its column space and of its row space."""
    check_readable(value)
    Q_B, M, Q_A = value.core()
    U, S, Vh = torch.linalg.svd(M)
    U = Q_B @ U  # (*batch, out, k)
    V = Q_A @ Vh.mT  # (*batch, in, l)
    found = []
    matrices = (each.reshape(-1, *each.shape[-2:]) for each in (U, V))
    for u, v, s in zip(*matrices, S.reshape(-1, S.shape[-1]), strict=True):
        # Each matrix of a batch has a rank of its own, so the batch can't be done in one product.
        kept = int((s > s.max() * _NEGLIGIBLE).sum()) if s.max() > 0 else 0
        found.append((u[:, :kept], v[:, :kept]))
    return found


def _between(one: Tensor, other: Tensor) -> Tensor:
    if 0 in one.shape or 0 in other.shape:
        return one.new_zeros(0)
    smaller, larger = (one, other) if one.shape[1] <= other.shape[1] else (other, one)
    inside = larger.mT @ smaller  # (larger, smaller)
    cosines = torch.linalg.svdvals(inside).clamp(max=1.0)
    # acos is blind near 1, where it loses half of the digits; there the sine tells the angle.
    sines = torch.linalg.svdvals(smaller - larger @ inside).flip(0).clamp(max=1.0)
    return torch.where(cosines > 0.7, sines.asin(), cosines.acos())
