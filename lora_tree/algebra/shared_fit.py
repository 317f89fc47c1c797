"""Fit the shared parts of one module: what each shared node of a family holds, and what is left.

    minimise  Σ_i w_i ‖ΔW_i − Σ_{n above i} X_n − L_i‖²  +  price · Σ bytes of X_n and L_i

One X_n or L_i at a time, with all others as they are, this has an exact answer: the singular values
of the mean residual (of the leaf's own residual) whose gain is above the price of one rank,

    (Σ w below n) · σ²  >  price · (out + in) · bytes of a number

so the objective falls with every step, to a local minimum, and the ranks come of the price alone.
Directions that many leaves share gain most in the highest node above all of these: there one rank
is paid for once.

The mean of the increments below a node never changes, so it is formed once, as a (k, l) core (see
`stack`). The other parts subtract a low-rank term from it. Its singular vectors are found by
subspace iteration, from those of the last fit (Halko, Martinsson & Tropp, 2011,
https://arxiv.org/abs/0909.4061). A leaf's residual is decomposed as a core of the size of its
ranks, and only if its norm is worth the price of a rank at all.
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

_MORE = 8  # vectors beyond those that are expected, so that a rank can grow
_CHUNK = 64  # leaves whose cores are in memory at once
_MOST_ROUNDS = 12
_SETTLED = 1e-4
"""A round that lowers the objective by a smaller part than this is the last one."""

_NOTHING = 1e-12
"""A squared length below this part of the whole is rounding."""


@dataclass(frozen=True, eq=False)
class SharedFit:
    """The parts of one module that the nodes hold.

    Args:
        price: of a rank, that they were fitted at.
        shared: for each shared node.
        ranks: of each leaf.
        squares: (n,) the squared error of each leaf.
        leaves: for each leaf; None: left out, to save memory.
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
        """Itself without the leaves' parts, which `SharedProblem.whole` finds again."""
        return replace(self, leaves=None)


class SharedProblem:
    """One module of all leaves, to be fitted at one price or at several.

    Args:
        stack: the leaves' increments, in the order of the families.
        families: the shape of the tree.
        weights: (n,) how much each leaf's squared error counts.
        name: of the module; random starts are drawn from it, so that a run can be repeated.
    """

    def __init__(self, stack: Stack, families: Families, weights: Tensor, name: str) -> None:
        self.stack, self.families, self.name = stack, families, name
        self.weights = weights.double()
        self.at_home = [families.at_home(home) for home in range(len(families.above))]
        self.below = [float(self.weights[first:last].sum()) for first, last in families.spans]
        self.means = self._means()

    @property
    def largest_gain(self) -> float:
        """No part of a node gains more than this."""
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
            start: a fit at a higher price; without one all parts are zero at first.
            most_rounds: over all parts; fewer are made where the objective no longer falls.
        """
        work = _Fitter(self, price, start)
        before = math.inf
        for _ in range(most_rounds):
            # Shared parts come first, so that no leaf takes a direction that several leaves share.
            for shared in range(len(self.families.above)):
                work.shared[shared] = work.best_shared(shared)
            work.fit_leaves()
            now = work.objective()
            if now >= before * (1.0 - _SETTLED):
                break
            before = now
        return work.result()

    def whole(self, found: SharedFit) -> SharedFit:
        """Return a fit with its leaves' parts."""
        return found if found.leaves is not None else _Fitter(self, found.price, found).result()

    def _means(self) -> list[Tensor]:
        """For each shared node, the (b, k, l) weighted mean of the increments below it."""
        stack = self.stack
        sums: list[Tensor] = []
        for leaves in self.at_home:
            total = stack.Ut.new_zeros(stack.sizes)
            for first in range(0, len(leaves), _CHUNK):
                some = leaves[first : first + _CHUNK]
                sizes = stack.s[:, some] * self.weights[some, None]  # (b, m, r)
                left = (stack.Ut[:, some] * sizes[..., None]).flatten(1, 2)  # (b, m · r, k)
                total += left.mT @ stack.Vt[:, some].flatten(1, 2)
            sums.append(total)
        # Nodes above come first, so that a node's sum is whole before it goes to the one above.
        for shared in range(len(sums) - 1, 0, -1):
            sums[self.families.above[shared]] += sums[shared]
        return [mean / weight for mean, weight in zip(sums, self.below, strict=True)]


class _Fitter:
    """One module's fit while it is being made.

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
        """The weighted squared error, and the price of all ranks."""
        ranks = self.starts[-1] + sum(left.shape[-1] for left, _ in self.shared)
        return float((self.weights * self.squares).sum()) + self.price * ranks

    def result(self) -> SharedFit:
        """The parts as they are."""
        ranks = tuple(left.shape[-1] for left, _ in self.leaves)
        return SharedFit(self.price, tuple(self.shared), ranks, self.squares, tuple(self.leaves))

    def _keep(self, leaves: Sequence[Pair], squares: Tensor) -> None:
        """Take the leaves' parts and errors, and put the parts side by side for the means."""
        self.leaves, self.squares = leaves, squares
        ranks = [left.shape[-1] for left, _ in leaves]
        self.starts = [0, *accumulate(ranks)]
        self.left = torch.cat([left for left, _ in leaves], dim=-1)  # (b, k, Σ ranks)
        self.right = torch.cat([right for _, right in leaves], dim=-1)
        self.column_weights = self.weights.repeat_interleave(torch.tensor(ranks))

    # ------------------------------------------------------------------ shared parts
    def best_shared(self, shared: int) -> Pair:
        """The best part of a shared node, with all other parts as they are."""
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
            # While the last vector is still worth its price, there may be more of its kind.
            if keep < wanted or wanted == limit:
                break
            vectors, wanted = right, min(limit, 2 * wanted)
        return left[..., :keep] * sizes[:, None, :keep], right[..., :keep]

    def _mean(self, shared: int) -> _Mean:
        """The mean, over the leaves below a node, of what all other parts leave over."""
        first, last = self.families.spans[shared]
        mine = slice(self.starts[first], self.starts[last])
        whole = self.problem.below[shared]
        lefts = [self.left[..., mine] * (self.column_weights[mine] / whole)]
        rights = [self.right[..., mine]]
        for other, (begin, end) in enumerate(self.families.spans):
            both = self.weights[max(first, begin) : min(last, end)]
            P, Q = self.shared[other]
            if other != shared and len(both) and P.shape[-1]:
                # Only a part of the leaves below this node may have the other one above them.
                lefts.append(P * (float(both.sum()) / whole))
                rights.append(Q)
        return _Mean(self.problem.means[shared], torch.cat(lefts, -1), torch.cat(rights, -1))

    # ------------------------------------------------------------------ leaves
    def fit_leaves(self) -> None:
        """Give every leaf the best part of its own residual."""
        found = [self.nothing] * self.stack.leaves
        squares = torch.zeros(self.stack.leaves, dtype=torch.float64)
        for home, leaves in enumerate(self.problem.at_home):
            P, Q = self._above(home)
            inside = (P.mT @ P) * (Q.mT @ Q)
            for first in range(0, len(leaves), _CHUNK):
                some = leaves[first : first + _CHUNK]
                C, D = self._against(some, P, Q)
                # ‖ΔW − P Qᵀ‖²: no rank of a residual gains more than all of it.
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
        """All that the shared nodes of a lineage add, as one pair."""
        pairs = [self.shared[shared] for shared in self.families.lineage(home)]
        left = torch.cat([pair[0] for pair in pairs], -1)
        return left, torch.cat([pair[1] for pair in pairs], -1)

    def _against(self, leaves: list[int], P: Tensor, Q: Tensor) -> Pair:
        """Uᵀ P and Vᵀ Q of some leaves, (b, m, r, q) each."""
        found: list[Tensor] = []
        for rows, other in ((self.stack.Ut[:, leaves], P), (self.stack.Vt[:, leaves], Q)):
            # One product for all of these leaves: their rows lie one below the other.
            product = rows.flatten(1, 2) @ other
            found.append(product.view(*rows.shape[:3], other.shape[-1]))
        return found[0], found[1]

    def _parts(
        self, leaves: list[int], P: Tensor, Q: Tensor, C: Tensor, D: Tensor
    ) -> tuple[list[Pair], Tensor]:
        """The best parts of ΔW_i − P Qᵀ of some leaves, and the squared errors that are left."""
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
            # Nothing is above these leaves, so their own triplets are those of the residuals.
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
        # The parts outside of U and of V, as combinations of P's and of Q's columns.
        outside, across = self.back @ u[:, :, r:], self.forth @ v[:, :, r:]
        left = self.U @ (u[:, :, :r] - self.C @ outside) + self.P @ outside
        right = self.V @ (v[:, :, :r] - self.D @ across) + self.Q @ across
        return left, right


def _outside(C: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """R with Rᵀ R = Pᵀ P − Cᵀ C, and the pseudo-inverse of R.

    Args:
        C: (b, m, r, q), Uᵀ P for orthonormal columns U, or zeros.
        P: (b, k, q).

    Returns:
        (b, m, q, q), twice.
    """
    inside = P.mT @ P  # (b, q, q)
    values, vectors = torch.linalg.eigh(inside[:, None] - C.mT @ C)
    # What is shorter than rounding can't be normed; it is left out on both sides.
    most = inside.diagonal(dim1=-2, dim2=-1).amax(-1)
    there = values > _NOTHING * most[:, None, None]
    roots = torch.where(there, values, 0.0).sqrt()
    inverse = torch.where(there, 1.0 / roots.clamp(min=1e-300), 0.0)
    return roots[..., None] * vectors.mT, vectors * inverse[..., None, :]


@dataclass(frozen=True, eq=False)
class _Mean:
    """core − left rightᵀ.

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
        """The largest singular triplets: (b, k, q), (b, q) largest first, (b, l, q).

        Args:
            start: (b, l, ≤ q) vectors to begin with.
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
