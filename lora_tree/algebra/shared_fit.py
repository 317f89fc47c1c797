"""Fit the shared parts of one module: what each shared node of a family holds, and what is left.

    minimise  Σ_i w_i ‖ΔW_i − Σ_{n above i} X_n − L_i‖²  +  price · Σ bytes of X_n and L_i

One X_n or L_i at a time, with all others as they are, this has an exact answer: the singular values
of the mean residual (of the leaf's own residual) whose gain is above the price of one rank,

    (Σ w below n) · σ²  >  price · (out + in) · bytes of a number

so the objective falls with every step, to a local minimum, and the ranks come of the price alone.
Directions that many leaves share gain most in the highest node above all of these: there one rank
is paid for once.

The means are never formed. Their singular vectors are found by subspace iteration, in which a mean
is applied to a few vectors through the factors (Halko, Martinsson & Tropp, 2011,
https://arxiv.org/abs/0909.4061). A residual's are found from a core of the size of its ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank import LowRank
from .core import check_readable
from .families import Families

__all__ = ["Pair", "SharedFit", "Stack", "fit", "triplets_of"]

Pair = tuple[Tensor, Tensor]
"""L Rᵀ as its factors: L (b, out, k) with the sizes in it, and R (b, in, k), orthonormal."""

_MORE = 8  # vectors beyond those that are expected, so that a rank can grow
_CHUNK = 64  # leaves whose cores are in memory at once
_MOST_ROUNDS = 12
_SETTLED = 1e-4
"""A round that lowers the objective by a smaller part than this is the last one."""

_NOTHING = 1e-12
"""A squared length below this part of the whole is rounding."""


@dataclass(frozen=True, eq=False)
class Stack:
    """One module of n leaves, as singular triplets; ranks are padded with zeros to the largest.

    Args:
        U: (b, out, n · r).
        s: (b, n, r) singular values.
        V: (b, in, n · r).
        like: one of the values, for shape and layout.
    """

    U: Tensor
    s: Tensor
    V: Tensor
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


@dataclass(frozen=True, eq=False)
class SharedFit:
    """The parts of one module that the nodes hold.

    Args:
        shared: for each shared node.
        leaves: for each leaf.
        squares: (n,) the squared error of each leaf.
        ranks: the sum of all ranks.
    """

    shared: tuple[Pair, ...]
    leaves: tuple[Pair, ...]
    squares: Tensor
    ranks: int


def triplets_of(values: Sequence[LowRank | None]) -> Stack:
    """Return the values of one module in their singular bases; None is zero.

    Raises:
        SpecError: a factor has no finite numbers.
    """
    like = next(value for value in values if value is not None)
    batch, out, into = math.prod(like.shape[:-2]), like.shape[-2], like.shape[-1]
    rank = max(value.rank for value in values if value is not None)
    U = torch.zeros(batch, out, len(values), rank, dtype=torch.float64)
    V = torch.zeros(batch, into, len(values), rank, dtype=torch.float64)
    s = torch.zeros(batch, len(values), rank, dtype=torch.float64)
    for i, value in enumerate(values):
        if value is None:
            continue
        check_readable(value)
        Q_B, M, Q_A = value.core()
        left, sizes, right = torch.linalg.svd(M, full_matrices=False)
        k = sizes.shape[-1]
        U[:, :, i, :k] = (Q_B @ left).reshape(batch, out, k).cpu()
        V[:, :, i, :k] = (Q_A @ right.mT).reshape(batch, into, k).cpu()
        s[:, i, :k] = sizes.reshape(batch, k).cpu()
    return Stack(U.flatten(2), s, V.flatten(2), like)


def fit(
    stack: Stack,
    families: Families,
    weights: Tensor,
    price: float,
    *,
    name: str,
    start: Sequence[Pair] | None = None,
) -> SharedFit:
    """Fit one module at a price.

    Args:
        stack: the leaves' increments, in the order of the families.
        families: the shape of the tree.
        weights: (n,) how much each leaf's squared error counts.
        price: what one rank of this module costs, in units of the weighted squared error.
        name: of the module; random starts are drawn from it, so that a run can be repeated.
        start: the shared parts of an earlier fit at another price.
    """
    work = _Fitter(stack, families, weights, price, name)
    if start is not None:
        # The leaves take what the shared parts leave over; without a start they must not come
        # first, for they would take everything.
        work.shared = list(start)
        work.fit_leaves()
    before = math.inf
    for _ in range(_MOST_ROUNDS):
        for shared in range(len(families.above)):
            work.shared[shared] = work.best_shared(shared)
        work.fit_leaves()
        now = work.objective()
        if now >= before * (1.0 - _SETTLED):
            break
        before = now
    return work.result()


class _Fitter:
    """One module's fit while it is being made."""

    def __init__(
        self, stack: Stack, families: Families, weights: Tensor, price: float, name: str
    ) -> None:
        self.stack, self.families, self.price, self.name = stack, families, price, name
        self.weights = weights.double()
        batch, out, _ = stack.U.shape
        into = stack.V.shape[1]
        nothing = (stack.U.new_zeros(batch, out, 0), stack.V.new_zeros(batch, into, 0))
        self.shared: list[Pair] = [nothing] * len(families.above)
        # What the leaves keep, side by side like the stack: (b, out, n · q) and (b, in, n · q).
        self.left, self.right = nothing
        self.squares = stack.energies
        self.ranks = [0] * stack.leaves

    def objective(self) -> float:
        """The weighted squared error, and the price of all ranks."""
        ranks = sum(self.ranks) + sum(pair[0].shape[-1] for pair in self.shared)
        return float((self.weights * self.squares).sum()) + self.price * ranks

    def result(self) -> SharedFit:
        """The parts, each leaf's cut to its own rank."""
        width = self.left.shape[-1] // self.stack.leaves
        leaves: list[Pair] = []
        for i, rank in enumerate(self.ranks):
            mine = slice(i * width, i * width + rank)
            leaves.append((self.left[..., mine].clone(), self.right[..., mine].clone()))
        ranks = sum(self.ranks) + sum(pair[0].shape[-1] for pair in self.shared)
        return SharedFit(tuple(self.shared), tuple(leaves), self.squares, ranks)

    # ------------------------------------------------------------------ shared parts
    def best_shared(self, shared: int) -> Pair:
        """The best part of a shared node, with all other parts as they are."""
        mean = _Mean(self, shared)
        limit = min(self.stack.U.shape[1], self.stack.V.shape[1])
        seed = hashlib.sha256(f"{self.name} {shared}".encode()).digest()[:7]
        draw = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        vectors = self.shared[shared][1]
        wanted = min(limit, vectors.shape[-1] + _MORE)
        while True:
            left, sizes, right = mean.triplets(vectors, wanted, draw)
            gains = mean.weight * sizes.square().sum(0)
            keep = int((gains > self.price).sum())
            # While the last vector is still worth its price, there may be more of its kind.
            if keep < wanted or wanted == limit:
                break
            vectors, wanted = right, min(limit, 2 * wanted)
        return left[..., :keep] * sizes[:, None, :keep], right[..., :keep]

    # ------------------------------------------------------------------ leaves
    def fit_leaves(self) -> None:
        """Give every leaf the best part of its own residual."""
        stack, count = self.stack, self.stack.leaves
        found: dict[int, Pair] = {}
        squares = torch.zeros(count, dtype=torch.float64)
        for home in sorted(set(self.families.homes)):
            P, Q = self._above(home)
            leaves = self.families.at_home(home)
            for first in range(0, len(leaves), _CHUNK):
                some = leaves[first : first + _CHUNK]
                parts, lost = self._residuals(some, P, Q)
                squares[some] = lost
                for leaf, part in zip(some, parts, strict=True):
                    found[leaf] = part
        self.squares = squares
        self.ranks = [found[leaf][0].shape[-1] for leaf in range(count)]
        width = max(self.ranks)
        batch, out, into = stack.U.shape[0], stack.U.shape[1], stack.V.shape[1]
        left = stack.U.new_zeros(batch, out, count, width)
        right = stack.V.new_zeros(batch, into, count, width)
        for leaf, (mine, other) in found.items():
            left[:, :, leaf, : self.ranks[leaf]] = mine
            right[:, :, leaf, : self.ranks[leaf]] = other
        self.left, self.right = left.flatten(2), right.flatten(2)

    def _above(self, home: int) -> Pair:
        """All that the shared nodes of a lineage add, as one pair."""
        pairs = [self.shared[shared] for shared in self.families.lineage(home)]
        return torch.cat([pair[0] for pair in pairs], -1), torch.cat(
            [pair[1] for pair in pairs], -1
        )

    def _residuals(self, leaves: list[int], P: Tensor, Q: Tensor) -> tuple[list[Pair], Tensor]:
        """The best parts of ΔW_i − P Qᵀ, and the squared errors (m,) of the leaves that have them.

        In the basis [U, W], with W an orthonormal basis of the part of P outside of U, the residual
        is a core of r + k rows and columns. W is not formed: W = (P − U C) R⁺ with C = Uᵀ P and
        Rᵀ R = Pᵀ P − Cᵀ C.
        """
        U, V = self._some(self.stack.U, leaves), self._some(self.stack.V, leaves)
        s = self.stack.s[:, leaves]  # (b, m, r)
        C, R, back = _outside(U, P)
        D, T, forth = _outside(V, Q)
        top = torch.cat([torch.diag_embed(s) - C @ D.mT, -C @ T.mT], dim=-1)
        low = torch.cat([-R @ D.mT, -R @ T.mT], dim=-1)
        u, sizes, vh = torch.linalg.svd(torch.cat([top, low], dim=-2))  # (b, m, r + k, r + k)
        gains = self.weights[leaves, None] * sizes.square().sum(0)  # (m, r + k)
        keep = (gains > self.price).sum(-1)
        dropped = torch.arange(sizes.shape[-1]) >= keep[:, None]
        lost = (sizes.square().sum(0) * dropped).sum(-1)
        parts: list[Pair] = []
        rank = s.shape[-1]
        v = vh.mT
        for i, kept in enumerate(keep.tolist()):
            outside = back[:, i] @ u[:, i, rank:, :kept]  # in terms of P's columns
            left = U[:, i] @ (u[:, i, :rank, :kept] - C[:, i] @ outside) + P @ outside
            across = forth[:, i] @ v[:, i, rank:, :kept]
            right = V[:, i] @ (v[:, i, :rank, :kept] - D[:, i] @ across) + Q @ across
            parts.append((left * sizes[:, i, None, :kept], right))
        return parts, lost

    def _some(self, columns: Tensor, leaves: list[int]) -> Tensor:
        """(b, m, size, r): the columns of some leaves."""
        batch, size, _ = columns.shape
        apart = columns.view(batch, size, self.stack.leaves, self.stack.rank)
        return apart[:, :, leaves].transpose(1, 2)


def _outside(U: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """C = Uᵀ P, R with Rᵀ R = Pᵀ P − Cᵀ C, and the pseudo-inverse of R.

    Args:
        U: (b, m, size, r), orthonormal columns, or zeros.
        P: (b, size, k).

    Returns:
        (b, m, r, k), (b, m, k, k) and (b, m, k, k).
    """
    C = U.mT @ P[:, None]
    inside = P.mT @ P  # (b, k, k)
    values, vectors = torch.linalg.eigh(inside[:, None] - C.mT @ C)
    # What is shorter than rounding can't be normed; it is left out on both sides.
    most = inside.diagonal(dim1=-2, dim2=-1).amax(-1) if inside.shape[-1] else inside.new_zeros(1)
    there = values > _NOTHING * most[:, None, None]
    roots = torch.where(there, values, 0.0).sqrt()
    inverse = torch.where(there, 1.0 / roots.clamp(min=1e-300), 0.0)
    return C, roots[..., None] * vectors.mT, vectors * inverse[..., None, :]


class _Mean:
    """The weighted mean, over the leaves below a shared node, of what all other parts leave over.

    Args:
        work: the fit as it is.
        shared: the node.
    """

    def __init__(self, work: _Fitter, shared: int) -> None:
        self.work = work
        first, last = work.families.spans[shared]
        mine = work.weights[first:last]
        self.weight = float(mine.sum())
        parts = mine / self.weight  # (m,)
        stack = work.stack
        # The leaves below a node stand side by side, so these are views and nothing is copied.
        r, q = stack.rank, work.left.shape[-1] // stack.leaves
        self.U, self.V = (each[..., first * r : last * r] for each in (stack.U, stack.V))
        self.L, self.R = (each[..., first * q : last * q] for each in (work.left, work.right))
        self.sizes = (stack.s[:, first:last] * parts[:, None]).flatten(1)[..., None]
        self.parts = parts.repeat_interleave(q)[:, None]
        self.others = list(self._others(shared))

    def _others(self, shared: int) -> list[tuple[float, Pair]]:
        """The other shared parts, each with the part of the leaves below this node that has it."""
        work, found = self.work, []
        first, last = work.families.spans[shared]
        for other, (begin, end) in enumerate(work.families.spans):
            both = work.weights[max(first, begin) : min(last, end)]
            if other != shared and len(both):
                found.append((float(both.sum()) / self.weight, work.shared[other]))
        return found

    def times(self, X: Tensor) -> Tensor:
        """(b, out, q): the mean times X (b, in, q)."""
        found = self.U @ (self.sizes * (self.V.mT @ X))
        found -= self.L @ (self.parts * (self.R.mT @ X))
        for part, (P, Q) in self.others:
            found -= P @ (Q.mT @ X) * part
        return found

    def transposed_times(self, Y: Tensor) -> Tensor:
        """(b, in, q): the mean's transpose times Y (b, out, q)."""
        found = self.V @ (self.sizes * (self.U.mT @ Y))
        found -= self.R @ (self.parts * (self.L.mT @ Y))
        for part, (P, Q) in self.others:
            found -= Q @ (P.mT @ Y) * part
        return found

    def triplets(
        self, start: Tensor, wanted: int, draw: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The largest singular triplets: (b, out, q), (b, q) largest first, (b, in, q).

        Args:
            start: (b, in, ≤ q) vectors to begin with.
            wanted: q.
            draw: for the vectors that are missing.
        """
        more = wanted - start.shape[-1]
        fresh = torch.randn(*start.shape[:-1], more, generator=draw, dtype=start.dtype)
        right = torch.linalg.qr(torch.cat([start, fresh], dim=-1))[0]
        for _ in range(2):
            left = torch.linalg.qr(self.times(right))[0]
            right = torch.linalg.qr(self.transposed_times(left))[0]
        left, core = torch.linalg.qr(self.times(right))
        u, sizes, vh = torch.linalg.svd(core)
        return left @ u, sizes, right @ vh.mT
