"""Fit one module: the part X_n that each shared node holds, and each leaf's remainder L_i.

    minimise  Σ_i w_i ‖ΔW_i − Σ_{n above i} X_n − L_i‖²  +  price · Σ bytes of X_n and L_i

With all other parts fixed, the best X_n (or L_i) is exact: of the mean residual below n (or the
leaf's own residual), keep the singular values whose gain exceeds the price of one rank,

    (Σ w below n) · σ²  >  price · (out + in) · bytes of a number

So the objective falls with every step, to a local minimum, and the price alone decides the ranks.
A direction that many leaves share gains most in the highest node above all of these, where its rank
is paid for only once.

The mean of the increments below a node never changes, so it is formed once, as a (k, l) core (see
`stack`). The other parts subtract a low-rank term from it. The singular vectors of the difference
are found by subspace iteration that starts from those of the last fit (Halko, Martinsson & Tropp,
2011, https://arxiv.org/abs/0909.4061). A leaf's residual is decomposed as a core whose size is its
rank, and only if its whole norm exceeds the price of one rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from .families import Families
from .stack import Stack

__all__ = ["Pair", "SharedFit", "SharedProblem"]

Pair = tuple[Tensor, Tensor]
"""L Rᵀ as its factors: L (b, k, q) and R (b, l, q); R of a shared part is orthonormal."""

_MORE = 8  # vectors beyond the last fit's rank, so that the rank can grow
_CHUNK = 64  # leaves whose cores are in memory at once
_MOST_ROUNDS = 12
_SETTLED = 1e-4
"""A round that lowers the objective by less than this fraction is the last one."""

_NOTHING = 1e-12
"""A squared length below this fraction of the whole is rounding."""


@dataclass(frozen=True, eq=False)
class SharedFit:
    """The parts of one module that the nodes hold.

    Args:
        price: the price of a rank at which they were fitted.
        shared: the part of each shared node.
        ranks: of each leaf.
        squares: (n,) the squared error of each leaf.
        leaves: the part of each leaf; None: dropped to save memory.
    """

    price: float
    shared: tuple[Pair, ...]
    ranks: tuple[int, ...]
    squares: Tensor
    leaves: tuple[Pair, ...] | None

    @property
    def shared_ranks(self) -> int:
        """The sum of the shared nodes' ranks."""
        return sum(left.shape[-1] for left, _ in self.shared)

    def without_leaves(self) -> SharedFit:
        """Return a copy without the leaves' parts, which `with_leaves` computes again."""
        return replace(self, leaves=None)


class SharedProblem:
    """One module of all leaves, to be fitted at one price or at several.

    Args:
        stack: the leaves' increments, in the order of the families.
        families: the shape of the tree.
        weights: (n,) how much each leaf's squared error counts.
        name: of the module; it seeds the random starts, so that runs are reproducible.
    """

    def __init__(self, stack: Stack, families: Families, weights: Tensor, name: str) -> None:
        self.stack, self.families, self.name = stack, families, name
        self.weights = weights.double()
        self.direct_leaves = [families.direct_leaves(home) for home in range(len(families.above))]
        self.below = [float(self.weights[first:last].sum()) for first, last in families.spans]
        self.means = self._means()

    @property
    def largest_gain(self) -> float:
        """An upper bound on the gain of one rank in any node."""
        leaves = self.weights * self.stack.s[..., 0].square().sum(0)
        largest = float(leaves.max())
        for weight, mean in zip(self.below, self.means, strict=True):
            largest = max(largest, weight * float(mean.square().sum()))
        return largest

    def fit(
        self, price: float, start: SharedFit | None = None, most_rounds: int = _MOST_ROUNDS
    ) -> SharedFit:
        """Fit at a price.

        Args:
            price: what one rank of this module costs, in units of the weighted squared error.
            start: a fit at a higher price to start from; without it all parts start at zero.
            most_rounds: the most rounds over all parts; it stops earlier once it has converged.
        """
        work = _Fitter(self, price, start)
        before = math.inf
        for _ in range(most_rounds):
            # Fit shared parts first, so that no leaf takes a direction that several leaves share.
            for shared in range(len(self.families.above)):
                work.shared[shared] = work.best_shared(shared)
            work.fit_leaves()
            now = work.objective()
            if now >= before * (1.0 - _SETTLED):
                break
            before = now
        return work.result()

    def with_leaves(self, found: SharedFit) -> SharedFit:
        """Return a fit with its leaves' parts, computed again if they were dropped."""
        return found if found.leaves is not None else _Fitter(self, found.price, found).result()

    def _means(self) -> list[Tensor]:
        """Return the (b, k, l) weighted mean of the increments below each shared node."""
        stack = self.stack
        sums: list[Tensor] = []
        for leaves in self.direct_leaves:
            total = stack.Ut.new_zeros(stack.sizes)
            for first in range(0, len(leaves), _CHUNK):
                some = leaves[first : first + _CHUNK]
                sizes = stack.s[:, some] * self.weights[some, None]  # (b, m, r)
                left = (stack.Ut[:, some] * sizes[..., None]).flatten(1, 2)  # (b, m · r, k)
                total += left.mT @ stack.Vt[:, some].flatten(1, 2)
            sums.append(total)
        # Parents have smaller numbers, so in reverse order a node's sum is complete before it is
        # added to its parent's.
        for shared in range(len(sums) - 1, 0, -1):
            sums[self.families.above[shared]] += sums[shared]
        return [mean / weight for mean, weight in zip(sums, self.below, strict=True)]


class _Fitter:
    """The state of one module's fit while it runs.

    Args:
        problem: the module.
        price: of a rank.
        start: the fit to begin with.
    """

    def __init__(self, problem: SharedProblem, price: float, start: SharedFit | None) -> None:
        self.problem, self.price = problem, price
        self.stack, self.families = problem.stack, problem.families
        self.weights = problem.weights
        batch, out, into = self.stack.sizes
        Ut, Vt = self.stack.Ut, self.stack.Vt
        self.nothing = (Ut.new_zeros(batch, out, 0), Vt.new_zeros(batch, into, 0))
        if start is None:
            self.shared: list[Pair] = [self.nothing] * len(self.families.above)
            self._keep([self.nothing] * self.stack.leaves, self.stack.energies)
            return
        self.shared = list(start.shared)
        if start.leaves is not None:
            self._keep(start.leaves, start.squares)
        else:
            self.price = start.price
            self.fit_leaves()
            self.price = price

    def objective(self) -> float:
        """Return the weighted squared error plus the price of all ranks."""
        ranks = self.starts[-1] + sum(left.shape[-1] for left, _ in self.shared)
        return float((self.weights * self.squares).sum()) + self.price * ranks

    def result(self) -> SharedFit:
        """Return the present parts."""
        ranks = tuple(left.shape[-1] for left, _ in self.leaves)
        return SharedFit(self.price, tuple(self.shared), ranks, self.squares, tuple(self.leaves))

    def _keep(self, leaves: Sequence[Pair], squares: Tensor) -> None:
        """Set the leaves' parts and errors, and concatenate the parts for the means."""
        self.leaves, self.squares = leaves, squares
        ranks = [left.shape[-1] for left, _ in leaves]
        self.starts = [0, *accumulate(ranks)]
        self.left = torch.cat([left for left, _ in leaves], dim=-1)  # (b, k, Σ ranks)
        self.right = torch.cat([right for _, right in leaves], dim=-1)
        self.column_weights = self.weights.repeat_interleave(torch.tensor(ranks))

    # ------------------------------------------------------------------ shared parts
    def best_shared(self, shared: int) -> Pair:
        """Return the best part of a shared node, with all other parts fixed."""
        mean = self._mean(shared)
        limit = min(self.stack.sizes[1:])
        seed = hashlib.sha256(f"{self.problem.name} {shared}".encode()).digest()[:7]
        draw = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        vectors = self.shared[shared][1]
        wanted = min(limit, vectors.shape[-1] + _MORE)
        while True:
            left, sizes, right = mean.triplets(vectors, wanted, draw)
            gains = self.problem.below[shared] * sizes.square().sum(0)
            keep = int((gains > self.price).sum())
            # If even the smallest singular value pays, there may be more that do: ask for more.
            if keep < wanted or wanted == limit:
                break
            vectors, wanted = right, min(limit, 2 * wanted)
        return left[..., :keep] * sizes[:, None, :keep], right[..., :keep]

    def _mean(self, shared: int) -> _Mean:
        """Return the mean residual of the leaves below a node, given all other parts."""
        first, last = self.families.spans[shared]
        columns = slice(self.starts[first], self.starts[last])
        weight_below = self.problem.below[shared]
        lefts = [self.left[..., columns] * (self.column_weights[columns] / weight_below)]
        rights = [self.right[..., columns]]
        for other, (begin, end) in enumerate(self.families.spans):
            both = self.weights[max(first, begin) : min(last, end)]
            P, Q = self.shared[other]
            if other != shared and len(both) and P.shape[-1]:
                # The other node may be above only some of the leaves below this one.
                lefts.append(P * (float(both.sum()) / weight_below))
                rights.append(Q)
        return _Mean(self.problem.means[shared], torch.cat(lefts, -1), torch.cat(rights, -1))

    # ------------------------------------------------------------------ leaves
    def fit_leaves(self) -> None:
        """Give every leaf the best part of its own residual."""
        found = [self.nothing] * self.stack.leaves
        squares = torch.zeros(self.stack.leaves, dtype=torch.float64)
        for home, leaves in enumerate(self.problem.direct_leaves):
            P, Q = self._above(home)
            inside = (P.mT @ P) * (Q.mT @ Q)
            for first in range(0, len(leaves), _CHUNK):
                some = leaves[first : first + _CHUNK]
                C, D = self._project(some, P, Q)
                # ‖ΔW − P Qᵀ‖²: an upper bound on the gain of any rank of the residual.
                s = self.stack.s[:, some]  # (b, m, r)
                norms = s.square().sum((0, 2)) - 2.0 * (s[..., None] * C * D).sum((0, 2, 3))
                squares[some] = (norms + inside.sum()).clamp(min=0.0)
                worth = (self.weights[some] * squares[some] > self.price).nonzero().flatten()
                if len(worth):
                    chosen = [some[i] for i in worth.tolist()]
                    parts, lost = self._parts(chosen, P, Q, C[:, worth], D[:, worth])
                    squares[chosen] = lost
                    for leaf, part in zip(chosen, parts, strict=True):
                        found[leaf] = part
        self._keep(found, squares)

    def _above(self, home: int) -> Pair:
        """Return the sum of the shared parts above a leaf, as one pair."""
        pairs = [self.shared[shared] for shared in self.families.lineage(home)]
        left = torch.cat([pair[0] for pair in pairs], -1)
        return left, torch.cat([pair[1] for pair in pairs], -1)

    def _project(self, leaves: list[int], P: Tensor, Q: Tensor) -> Pair:
        """Return Uᵀ P and Vᵀ Q of some leaves, (b, m, r, q) each."""
        found: list[Tensor] = []
        for rows, other in ((self.stack.Ut[:, leaves], P), (self.stack.Vt[:, leaves], Q)):
            # One product for all these leaves, with their rows stacked.
            product = rows.flatten(1, 2) @ other
            found.append(product.view(*rows.shape[:3], other.shape[-1]))
        return found[0], found[1]

    def _parts(
        self, leaves: list[int], P: Tensor, Q: Tensor, C: Tensor, D: Tensor
    ) -> tuple[list[Pair], Tensor]:
        """Return the best parts of ΔW_i − P Qᵀ for some leaves, and their squared errors."""
        stack = self.stack
        U, s, V = stack.Ut[:, leaves].mT, stack.s[:, leaves], stack.Vt[:, leaves].mT
        residuals = _Residuals(U, s, V, P, Q, C, D) if P.shape[-1] else None
        squares = s.square() if residuals is None else residuals.squares
        gains = self.weights[leaves, None] * squares.sum(0)  # (m, r + q)
        keep = (gains > self.price).sum(-1)
        dropped = torch.arange(gains.shape[-1]) >= keep[:, None]
        lost = (squares.sum(0) * dropped).sum(-1)
        most = int(keep.max())
        if residuals is None:
            # The shared parts above these leaves are empty, so the residuals' singular triplets are
            # the leaves' own.
            left, right = U[..., :most], V[..., :most] * s[:, :, None, :most]
        else:
            left, right = residuals.parts(most)
        parts: list[Pair] = []
        for i, kept in enumerate(keep.tolist()):
            parts.append((left[:, i, :, :kept], right[:, i, :, :kept]))
        return parts, lost


class _Residuals:
    """The residuals U diag(s) Vᵀ − P Qᵀ of some leaves, by their squared singular values.

    In the basis [U, W], with W an orthonormal basis of the part of P outside of U, a residual is a
    core K of r + q rows and columns. W is not formed: W = (P − U C) R⁺ with C = Uᵀ P and
    Rᵀ R = Pᵀ P − Cᵀ C. The part that is kept is u uᵀ K, with eigenvectors u of K Kᵀ.

    Args:
        U, s, V: (b, m, k, r), (b, m, r) and (b, m, l, r) of the leaves.
        P, Q: (b, k, q) and (b, l, q).
        C, D: Uᵀ P and Vᵀ Q, (b, m, r, q).
    """

    def __init__(
        self, U: Tensor, s: Tensor, V: Tensor, P: Tensor, Q: Tensor, C: Tensor, D: Tensor
    ) -> None:
        self.U, self.V, self.P, self.Q, self.C, self.D = U, V, P[:, None], Q[:, None], C, D
        R, self.back = _outside(C, P)
        T, self.forth = _outside(D, Q)
        top = torch.cat([torch.diag_embed(s) - C @ D.mT, -C @ T.mT], dim=-1)
        low = torch.cat([-R @ D.mT, -R @ T.mT], dim=-1)
        self.core = torch.cat([top, low], dim=-2)  # (b, m, r + q, r + q)
        squares, vectors = torch.linalg.eigh(self.core @ self.core.mT)
        # eigh gives the smallest first, and rounding may put a zero slightly below itself.
        self.squares, self.vectors = squares.flip(-1).clamp(min=0.0), vectors.flip(-1)

    def parts(self, rank: int) -> Pair:
        """The best parts of a rank: (b, m, k, rank) orthonormal, and (b, m, l, rank) with sizes."""
        r = self.U.shape[-1]
        u = self.vectors[..., :rank]
        v = self.core.mT @ u
        # The components outside of U and of V, as combinations of P's and of Q's columns.
        outside, across = self.back @ u[:, :, r:], self.forth @ v[:, :, r:]
        left = self.U @ (u[:, :, :r] - self.C @ outside) + self.P @ outside
        right = self.V @ (v[:, :, :r] - self.D @ across) + self.Q @ across
        return left, right


def _outside(C: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """Return R with Rᵀ R = Pᵀ P − Cᵀ C, and the pseudo-inverse of R.

    Args:
        C: (b, m, r, q), Uᵀ P for orthonormal columns U, or zeros.
        P: (b, k, q).

    Returns:
        (b, m, q, q), twice.
    """
    inside = P.mT @ P  # (b, q, q)
    values, vectors = torch.linalg.eigh(inside[:, None] - C.mT @ C)
    # Directions as short as rounding can't be normalised: they are zero in R and in its inverse.
    most = inside.diagonal(dim1=-2, dim2=-1).amax(-1)
    there = values > _NOTHING * most[:, None, None]
    roots = torch.where(there, values, 0.0).sqrt()
    inverse = torch.where(there, 1.0 / roots.clamp(min=1e-300), 0.0)
    return roots[..., None] * vectors.mT, vectors * inverse[..., None, :]


@dataclass(frozen=True, eq=False)
class _Mean:
    """The matrix core − left rightᵀ, which is never formed.

    Args:
        core: (b, k, l).
        left, right: (b, k, q) and (b, l, q).
    """

    core: Tensor
    left: Tensor
    right: Tensor

    def times(self, X: Tensor) -> Tensor:
        """(b, k, q): the mean times X (b, l, q)."""
        return self.core @ X - self.left @ (self.right.mT @ X)

    def transposed_times(self, Y: Tensor) -> Tensor:
        """(b, l, q): the mean's transpose times Y (b, k, q)."""
        return (Y.mT @ self.core).mT - self.right @ (self.left.mT @ Y)

    def triplets(
        self, start: Tensor, wanted: int, draw: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the largest singular triplets: (b, k, q), (b, q) largest first, (b, l, q).

        Args:
            start: (b, l, ≤ q) vectors to start from.
            wanted: q.
            draw: generates the vectors that ``start`` lacks.
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
