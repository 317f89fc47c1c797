"""Compress: cut all nodes of a tree to a rank, an error or a number of bytes.

    minimise  Σ c_n² ‖(ΔW_n − ΔW'_n) C^½‖²     with   Σ bytes ≤ budget

One more rank in a module lowers the error by a singular value squared and costs (out + in) numbers.
The ranks of a module are taken in order of falling singular values. So a greedy choice, always the
rank with the largest gain per byte over all nodes and modules, gives the least error that those
bytes allow. If the next rank in line no longer fits the budget, the bytes left go to smaller ranks
that still do.

C is the second moment E[x xᵀ] of a module's inputs, if the caller gives it: then an error is
measured by its effect on the outputs. The best factors of a rank are then U and Uᵀ ΔW, with U the
leading eigenvectors of ΔW C ΔWᵀ, which are found from its (r, r) core.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter import Adapter
from ..budget import parse_bytes
from ..errors import BudgetError, SpecError
from ..given import check_part, check_rank
from ..lowrank import LowRank
from ..lowrank.cast import cast
from ..tree import AdapterTree
from ..weights import weight_at
from .arguments import check_factor_dtype, check_tree
from .core import check_readable
from .deviation import Deviation, call_named, gap_of
from .edit import Edited, check_changeable, put_adapter
from .moments import Moment, moments_of, weighted_square
from .sums import read_finite

__all__ = ["Compressed", "compress"]

Place = tuple[str, str]
"""(node, module)."""


@dataclass(frozen=True)
class Compressed:
    """The outcome of `compress`.

    Args:
        edited: the nodes, each with its error.
        ranks: node → module → its rank now; modules that were left out have none.
        bytes_before, bytes_after: of all factors of these nodes.
        error, relative_error: √ Σ c_n² ‖ΔW_n − ΔW'_n‖², and as a part of √ Σ c_n² ‖ΔW_n‖²; weighted
            by second moments if given. Biases are kept, and not counted. It is measured on the
            factors to be saved, so their rounding is a part of it.
    """

    edited: Edited
    ranks: Mapping[str, Mapping[str, int]]
    bytes_before: int
    bytes_after: int
    error: float
    relative_error: float

    def as_dict(self) -> dict[str, object]:
        """The figures as plain data, for JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "error": self.error,
            "relative_error": self.relative_error,
            "ranks": {node: dict(ranks) for node, ranks in self.ranks.items()},
            **self.edited.as_dict(),
        }


def compress(
    tree: AdapterTree,
    paths: Iterable[str] | None = None,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    budget_bytes: int | str | None = None,
    dtype: torch.dtype | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> Compressed:
    """Cut the nodes of a tree, and choose the ranks to drop across all of them together.

    A node's error is weighted by the node's weight and counted once for every leaf below it,
    because each of these leaves inherits it. A module may lose all its ranks and is then left out,
    but every node keeps at least one module of rank 1.

    Args:
        tree: changed in memory. Descendants were trained on the nodes as they were before the cut,
            so the next save marks them stale.
        paths: which nodes, as paths or patterns; None: all that have an adapter.
        rank: the largest rank in any module.
        max_error: the largest relative error of the cut, over all of these nodes together; the
            result has as few bytes as it allows. Rounding to a narrow dtype comes on top.
        budget_bytes: of all factors and overrides of these nodes together: a number, or
            ``"512MiB"``. Overrides are kept as they are.
        dtype: of the factors; None keeps each module's own.
        moments: module → E[x xᵀ] of its inputs: (in, in); or its diagonal, (in,); or rows of
            inputs, (rows, in) with two rows or more. A square tensor is C; of as many rows as
            the input is wide pass C itself, ``rows.T @ rows / len(rows)``. A module that is not
            in the mapping counts as if its inputs were white (C = identity).

    Raises:
        PathError: a path or pattern matches no node.
        SpecError: not one of ``rank``, ``max_error`` and ``budget_bytes`` was given, or it makes no
            sense; or a factor is not finite.
        BudgetError: one rank in one module of every node takes more than the budget.
        ShapeMismatch: a moment does not have the size of its module's input; names it.
        TreeError: a model is using a node.
    """
    check_tree(tree)
    if sum(bound is not None for bound in (rank, max_error, budget_bytes)) != 1:
        raise SpecError(
            "compress to rank= (--rank), max_error= (--max-error) or budget_bytes= (--budget), "
            "one of the three"
        )
    check_factor_dtype(dtype)
    if rank is not None:
        check_rank(rank)
    if max_error is not None:
        check_part(max_error, "max_error")
    adapters: dict[str, Adapter] = {}
    for path in tree.paths() if paths is None else tree.matching(paths):
        if tree[path].has_adapter:
            # A model that uses one of them would refuse the change: find out before the work.
            check_changeable(tree, [path])
            adapters[path] = read_finite(tree, path)
    if not adapters:
        raise SpecError("no node with an adapter to compress")
    modules: set[str] = set()
    for adapter in adapters.values():
        modules.update(adapter.modules)
    cuts = _cuts(tree, adapters, dtype, moments_of(moments, modules))
    if rank is not None:
        ranks = {place: min(rank, cut.value.rank) for place, cut in cuts.items()}
    else:
        budget = None
        if budget_bytes is not None:
            # Overrides are not cut, so the factors get what these leave.
            replaced = [
                o.nbytes for adapter in adapters.values() for o in adapter.overrides.values()
            ]
            budget = parse_bytes(budget_bytes) - sum(replaced)
        ranks = _chosen(cuts, budget, max_error)
    return _cut_down(tree, adapters, cuts, ranks)


@dataclass(frozen=True, eq=False)
class Cut:
    """One module, with all that is needed to cut it to any rank.

    Args:
        value: the module before the cut.
        gains: (r,) how much each further rank lowers the squared error, largest first.
        moment: second moments of the inputs, which weight the error; None: the identity.
        share: how much the module's squared error counts.
        unit: bytes of one rank.
        fixed: bytes of the bias, which do not depend on the rank.
        dtype: of the factors afterwards; None keeps their own.
        basis: (\\*batch, out, r): the leading columns become B.
        rows: (\\*batch, r, in): the rows of A for these columns.
    """

    value: LowRank
    gains: Tensor
    unit: int
    fixed: int
    dtype: torch.dtype | None
    basis: Tensor
    rows: Tensor
    moment: Moment | None = None
    share: float = 1.0

    def at(self, rank: int) -> LowRank:
        """Return the module at a rank; the value itself if it is neither cut nor rounded.

        Raises:
            SpecError: a factor or the bias is too large for the dtype.
        """
        if rank >= self.value.rank:
            return cast(self.value, None, self.dtype)
        both = LowRank(
            self.rows[..., :rank, :].contiguous(),
            self.basis[..., :rank].contiguous(),
            layout=self.value.layout,
        )
        # B has orthonormal columns and A all of the magnitude. Balanced, both round less in a
        # narrow dtype.
        short = _balanced(both)
        bias = None if self.value.bias is None else self.value.bias.double() * self.value.scale
        return cast(replace(short, bias=bias), None, self.dtype or self.value.dtype)


def _leaves(tree: AdapterTree, path: str) -> int:
    """Return how many leaves inherit a node's error; 1 for a node without children, itself."""
    leaves = [node for node in tree.paths(path) if not tree.children(node)]
    return max(1, len(leaves))


def _cuts(
    tree: AdapterTree,
    adapters: Mapping[str, Adapter],
    dtype: torch.dtype | None,
    moments: Mapping[str, Moment],
) -> dict[Place, Cut]:
    cuts: dict[Place, Cut] = {}
    for path, adapter in adapters.items():
        weight, leaves = tree[path].weight, _leaves(tree, path)
        for name, value in adapter.modules.items():
            number = weight_at(weight, name)
            share = number * number * leaves
            cut = call_named(f"{path}: {name}", _cut, value, dtype, moments.get(name))
            gains = cut.gains * share
            if not bool(gains.isfinite().all()):
                raise SpecError(
                    f"{path}: {name}: its weighted norm is too large for float64",
                    f"the node's weight is {number:g} there",
                )
            cuts[path, name] = replace(cut, gains=gains, share=share)
    return cuts


def _cut(value: LowRank, dtype: torch.dtype | None, moment: Moment | None) -> Cut:
    check_readable(value)
    Q_B, M, Q_A = value.core()
    if moment is None:
        U, S, _ = torch.linalg.svd(M, full_matrices=False)
        squares = S.square()
    else:
        inner = moment.inside(Q_A, Q_A.shape[-2])
        inside = M @ inner @ M.mT  # (k, k): the core of ΔW C ΔWᵀ
        if not bool(inside.isfinite().all()):
            raise SpecError("the norm weighted by moments is too large for float64")
        squares, U = torch.linalg.eigh(inside)
        # eigh gives the smallest first, and rounding may put a zero slightly below itself.
        squares, U = squares.flip(-1).clamp(min=0.0), U.flip(-1)
    rows = U.mT @ M @ Q_A.mT  # (r, in)
    # All matrices of a batch have one rank, so their gains add up.
    gains = squares.reshape(-1, squares.shape[-1]).sum(0)
    size = (dtype or value.dtype).itemsize
    unit = math.prod(value.shape[:-2]) * (value.shape[-1] + value.shape[-2]) * size
    fixed = 0 if value.bias is None else value.bias.numel() * size
    return Cut(value, gains.cpu(), unit, fixed, dtype, Q_B @ U, rows, moment)


def _chosen(
    cuts: Mapping[Place, Cut], budget: int | None, max_error: float | None
) -> dict[Place, int]:
    """Return the rank of every module, chosen greedily by gain per byte."""
    ranks = dict.fromkeys(cuts, 0)
    spent = 0
    for place in _first_of_each_node(cuts):
        ranks[place] = 1
        spent += cuts[place].unit + cuts[place].fixed
    if budget is not None and spent > budget:
        raise BudgetError(
            f"one rank in one module of every node takes {spent:,} bytes, the budget is {budget:,}",
            "give more bytes, or compress fewer nodes",
        )
    energy = lost = 0.0
    queue: list[tuple[float, Place]] = []
    for place, cut in cuts.items():
        energy += float(cut.gains.sum())
        lost += float(cut.gains[ranks[place] :].sum())
        heapq.heappush(queue, _offer(cut, place, ranks[place]))
    # Without a bound on the error only the budget ends the loop: no error is below −1.
    allowed = -1.0 if max_error is None else energy * max_error**2
    while queue:
        value, place = heapq.heappop(queue)
        cut, rank = cuts[place], ranks[place]
        if rank >= cut.value.rank or value == 0.0:
            continue  # nothing left to gain in this module
        if lost <= allowed:
            break
        if budget is not None and spent + cut.unit > budget:
            continue  # it does not fit any more, and the next ranks of this module cost as much
        ranks[place] = rank + 1
        spent += cut.unit
        lost -= float(cut.gains[rank])
        heapq.heappush(queue, _offer(cut, place, rank + 1))
    return ranks


def _first_of_each_node(cuts: Mapping[Place, Cut]) -> list[Place]:
    """Return the modules that are never left out: in each node the one whose first rank gains most,
    and every module with a bias.
    """
    best: dict[str, Place] = {}
    for place, cut in cuts.items():
        known = best.get(place[0])
        if known is None or float(cut.gains[0]) > float(cuts[known].gains[0]):
            best[place[0]] = place
    # A bias belongs to no rank. Its module stays, because the bias would be lost with it.
    biased = [place for place, cut in cuts.items() if cut.fixed]
    return list(dict.fromkeys([*best.values(), *biased]))


def _offer(cut: Cut, place: Place, rank: int) -> tuple[float, Place]:
    """Return the next rank's gain per byte, negated because heapq pops the smallest first."""
    if rank >= len(cut.gains):
        return 0.0, place
    return -float(cut.gains[rank]) / cut.unit, place


def _balanced(value: LowRank) -> LowRank:
    """Return the same value with factors of equal magnitude, which lose least by rounding."""
    half = value.A.norm(dim=-1, keepdim=True).sqrt()  # (k, 1); the columns of B have length 1
    safe = torch.where(half > 0, half, 1.0)
    return replace(value, A=value.A / safe, B=value.B * safe.mT)


def _cut_down(
    tree: AdapterTree,
    adapters: Mapping[str, Adapter],
    cuts: Mapping[Place, Cut],
    ranks: Mapping[Place, int],
) -> Compressed:
    """Compute every node, then change the tree."""
    made: dict[str, Adapter] = {}
    errors: dict[str, Deviation] = {}
    lost = energy = 0.0
    for path, adapter in adapters.items():
        modules: dict[str, LowRank] = {}
        distances: dict[str, float] = {}
        norms: dict[str, float] = {}
        for name, value in adapter.modules.items():
            cut, rank = cuts[path, name], ranks[path, name]
            # A module of rank 0 is left out: a missing module adds zero.
            if rank:
                modules[name] = call_named(f"{path}: {name}", cut.at, rank)
            gap = call_named(f"{path}: {name}", gap_of, value, modules.get(name))
            distances[name], norms[name] = gap.error, gap.norm
            # Not the gains of the ranks that were dropped: the rest is rounded to its dtype.
            lost += cut.share * weighted_square(gap, cut.moment)
            energy += float(cut.gains.sum())
        made[path] = replace(adapter, modules=modules, errors={}, rounded=frozenset())
        errors[path] = Deviation(distances, norms)
    changed: dict[str, Deviation] = {}
    for path, adapter in made.items():
        # A node that was not cut keeps its files, and with them the record of its training lineage.
        if dict(adapter.modules) != dict(adapters[path].modules):
            put_adapter(tree, path, adapter)
            changed[path] = errors[path]
    return Compressed(
        edited=Edited(changed=tuple(changed), errors=changed),
        ranks={path: adapter.ranks for path, adapter in made.items()},
        bytes_before=sum(adapter.nbytes for adapter in adapters.values()),
        bytes_after=sum(adapter.nbytes for adapter in made.values()),
        error=math.sqrt(lost),
        relative_error=math.sqrt(lost / energy) if energy else 0.0,
    )
