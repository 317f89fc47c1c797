"""Stack: the increments of one weight by many adapters, as singular triplets in joint bases.

    ΔW_i = Q_B · U_i diag(s_i) V_iᵀ · Q_Aᵀ        Q_B: (out, k)    U_i: (k, r)
                                                  Q_A: (in, l)     V_i: (l, r)

If all factors together have fewer columns than the weight has rows, k is their number, and all
later sums run over k numbers instead of out. Otherwise there is no Q_B, and k = out. The same holds
for l and in.

With the second moment C = E[x xᵀ] of the inputs, an error is measured by its effect on the outputs.
The triplets are then those of ΔW_i Q_A K with K Kᵀ = Q_Aᵀ C Q_A (Cholesky), since

    ‖(ΔW − ΔW') C^½‖ = ‖(M − M') K‖        for  ΔW = Q_B M Q_Aᵀ,  ΔW' = Q_B M' Q_Aᵀ

and Q_A K⁻ᵀ takes the place of Q_A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ..errors import SpecError
from ..lowrank import LowRank
from .core import check_readable
from .moments import Moment

__all__ = ["Stack", "stack_of"]

_CHUNK = 128  # leaves whose factors are decomposed at once
_RIDGE = 1e-6
"""This fraction of a second moment's mean diagonal is added to its diagonal, so that errors count a
little even in directions that no input has."""


@dataclass(frozen=True, eq=False)
class Stack:
    """One module of n leaves; ranks are padded with zeros to the largest.

    Args:
        Ut: (b, n, r, k), the U_iᵀ: the numbers of one leaf are contiguous.
        s: (b, n, r) singular values.
        Vt: (b, n, r, l), the V_iᵀ.
        Q_B: (b, out, k); None: k is out, and U is in the weight's own coordinates.
        Q_A: (b, in, l), which with moments is not orthonormal; None as above.
        like: one of the values, for shape and layout.
    """

    Ut: Tensor
    s: Tensor
    Vt: Tensor
    Q_B: Tensor | None
    Q_A: Tensor | None
    like: LowRank

    @property
    def leaves(self) -> int:
        """n."""
        return self.s.shape[1]

    @property
    def rank(self) -> int:
        """r, the largest of the leaves'."""
        return self.s.shape[2]

    @property
    def energies(self) -> Tensor:
        """(n,) the squared norm of each leaf's increment."""
        return self.s.square().sum((0, 2))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(b, k, l)."""
        return self.Ut.shape[0], self.Ut.shape[-1], self.Vt.shape[-1]

    def value(self, left: Tensor, right: Tensor) -> LowRank:
        """Return the increment L Rᵀ of the weight, with factors of equal magnitude.

        Args:
            left: (b, k, q).
            right: (b, l, q).
        """
        if self.Q_B is not None:
            left = self.Q_B @ left
        if self.Q_A is not None:
            right = self.Q_A @ right
        # Factors of equal magnitude lose least when they are rounded.
        lengths, widths = left.norm(dim=-2, keepdim=True), right.norm(dim=-2, keepdim=True)
        there = (lengths > 0) & (widths > 0)
        ratio = torch.where(there, (lengths / widths.clamp(min=1e-300)).sqrt(), 1.0)  # (b, 1, q)
        batch, out, into = self.like.shape[:-2], self.like.shape[-2], self.like.shape[-1]
        A = (right * ratio).mT.reshape(*batch, -1, into)
        B = (left / ratio).reshape(*batch, out, -1)
        return LowRank(A.contiguous(), B.contiguous(), 1.0, None, self.like.layout)


def stack_of(values: Sequence[LowRank | None], moment: Moment | None = None) -> Stack:
    """Return the values of one module as a stack; None is zero.

    Args:
        values: one for each leaf; at least one is a value.
        moment: E[x xᵀ] of the module's inputs.

    Raises:
        SpecError: a factor or the moment has numbers that are not finite; or it is not a moment.
        ShapeMismatch: the moment does not have the size of the input.
    """
    present = [value for value in values if value is not None]
    like, rank = present[0], max(value.rank for value in present)
    batch, out, into = math.prod(like.shape[:-2]), like.shape[-2], like.shape[-1]
    B = torch.zeros(batch, out, len(values), rank, dtype=torch.float64)
    A = torch.zeros(batch, into, len(values), rank, dtype=torch.float64)
    for i, value in enumerate(values):
        if value is None:
            continue
        check_readable(value)
        r = value.rank
        # Converted to float64 before it is scaled: in its own dtype the product would be rounded.
        B[:, :, i, :r] = value.B.detach().reshape(batch, out, r)
        B[:, :, i, :r] *= value.scale
        A[:, :, i, :r] = value.A.detach().reshape(batch, r, into).mT
    Q_B, B = _in_basis(B)
    Q_A, A = _in_basis(A)
    if moment is not None:
        Q_A, A = _weighed(Q_A, A, moment)
    count = len(values)
    s = torch.zeros(batch, count, rank, dtype=torch.float64)
    Ut = torch.zeros(batch, count, rank, B.shape[1], dtype=torch.float64)
    Vt = torch.zeros(batch, count, rank, A.shape[1], dtype=torch.float64)
    for first in range(0, count, _CHUNK):
        chunk = slice(first, first + _CHUNK)
        left, R_B = torch.linalg.qr(B[:, :, chunk].transpose(1, 2))  # (b, m, k, ≤ r)
        right, R_A = torch.linalg.qr(A[:, :, chunk].transpose(1, 2))
        cores = R_B @ R_A.mT
        if not bool(cores.isfinite().all()):
            _refuse_infinite(present)
        u, sizes, vh = torch.linalg.svd(cores, full_matrices=False)
        width = sizes.shape[-1]
        s[:, chunk, :width] = sizes
        Ut[:, chunk, :width] = u.mT @ left.mT
        Vt[:, chunk, :width] = vh @ right.mT
    return Stack(Ut, s, Vt, Q_B, Q_A, like)


def _in_basis(factors: Tensor) -> tuple[Tensor | None, Tensor]:
    """Express (b, size, n, r) columns in an orthonormal basis, if they are fewer than size."""
    batch, size, count, rank = factors.shape
    if count * rank >= size:
        return None, factors
    Q, R = torch.linalg.qr(factors.flatten(2))
    return Q, R.view(batch, count * rank, count, rank)


def _weighed(Q_A: Tensor | None, A: Tensor, moment: Moment) -> tuple[Tensor, Tensor]:
    """Return Q_A K⁻ᵀ and Kᵀ A: in these coordinates a norm is the norm of the outputs."""
    into = A.shape[1] if Q_A is None else Q_A.shape[-2]
    inside = moment.inside(Q_A, into)  # (b, l, l), or (l, l) for all
    mean = inside.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = (_RIDGE * mean).clamp(min=1e-300) * torch.eye(inside.shape[-1], dtype=inside.dtype)
    K, failed = torch.linalg.cholesky_ex(inside + ridge)
    if bool(failed.any()):
        raise SpecError(
            "moments: the matrix has no Cholesky factor: its numbers differ too much in size",
            "give moments of more rows of inputs, or the mean squares alone",
        )
    batch, size, count, rank = A.shape
    moved = (K.mT @ A.flatten(2)).view(batch, size, count, rank)
    # Q_A K⁻ᵀ, since a row of M in these coordinates is m K.
    eye = torch.eye(size, dtype=A.dtype).expand(batch, size, size)
    wanted = eye if Q_A is None else Q_A
    back = torch.linalg.solve_triangular(K.mT, wanted, upper=True, left=False)
    return back, moved


def _refuse_infinite(values: Sequence[LowRank]) -> NoReturn:
    """Raise for the first value that is not finite, or else because a product is too large."""
    for value in values:
        value.core()
    raise SpecError("the product of the factors is too large for float64")
