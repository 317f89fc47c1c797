"""Hoist: move what siblings share into their parent, and keep their effective weights.

    parent' = parent + S / w            child_i' = L_i / w_i         with  S + L_i ≈ w_i · child_i

At full rank S is the mean of the weighted children, and S + L_i is exact. With a rank for S alone,
S is the best approximation of that rank to the mean, and the L_i hold the rest, so S + L_i is still
exact. With ranks for both, S and the L_i are fitted in turn, each with the others fixed
(alternating least squares):

    minimise  Σ_i ‖ w_i · child_i − S − L_i ‖²      rank S ≤ k,  rank L_i ≤ l

The error falls in every round, to a local minimum. All of it runs on the cores in joint bases.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import PathError, SpecError, TreeError, listing
from ..given import check_rank
from ..lowrank import LowRank
from ..lowrank.cast import cast
from ..node_names import check_path
from ..nonfinite import refuse_broken
from ..override import tensor_owner
from ..tree import AdapterTree
from ..weights import Weight, inverse_weight, weight_at
from .aligning import aligned
from .arguments import check_tree
from .core import Joint, joint
from .deviation import Deviation, call_named, deviation
from .edit import (
    Edited,
    check_changeable,
    check_has_adapter,
    check_path_free,
    check_savable,
    mark_fitting,
    put_adapter,
    refuse_fresh,
    stale_notes,
)
from .elementwise import Method
from .merging import Recipe, Space, cores_and_biases, widest_dtype
from .replacing import without_overrides
from .sums import Term, added_up, as_term, read_terms

__all__ = ["hoist"]

Pair = tuple[Tensor, Tensor]
"""A core L Rᵀ as its two factors, L (\\*batch, k, p) and R (\\*batch, l, p)."""

_MOST_ROUNDS = 50
_SMALL = 64  # up to this size an SVD of the whole core is cheap
_SETTLED = 1e-6
"""A round that lowers the error by less than this fraction is the last one."""


def hoist(
    tree: AdapterTree,
    parent: str,
    siblings: Sequence[str] | None = None,
    *,
    into: str | None = None,
    rank: int | None = None,
    leaf_rank: int | None = None,
    method: Method | None = None,
    density: float = 1.0,
    space: Space = "core",
    seed: int = 0,
) -> Edited:
    """Move what siblings share into their parent, or into a new node between.

    Args:
        tree: changed in memory.
        parent: the node above the siblings.
        siblings: its children that take part; None: all.
        into: a new child of the parent that gets the shared part; the siblings move below it, and
            nothing else changes. Without it the parent gets the shared part. All its children must
            then take part, and the parent's own effective weight changes.
        rank: the largest rank of the shared part in any module; None: full.
        leaf_rank: the largest rank of a sibling's rest in any module; None: as large as needed to
            be exact.
        method: share the result of this merge method (see `lora_tree.merge`) instead of the mean.
        density, space, seed: for ``method``.

    Returns:
        what changed; ``errors`` has for each sibling the change of its effective weight, relative
        to the norm of its own increments. Apart from rounding it is 0 unless ``leaf_rank`` cuts.

    Raises:
        PathError: a node does not exist, or ``siblings`` are not the parent's children.
        TreeError: ``into`` exists; or a sibling is a group; or other children would change; or a
            model is using a node.
        SpecError: a node is fresh, or has the weight 0; or a rank is not valid; or ``leaf_rank``
            and ``method`` are mixed.
        ShapeMismatch, BaseMismatch: the siblings are not of one base; names them and the module.
        FormatError: a node's new increments can't be saved as one adapter; names both.
    """
    check_tree(tree)
    names = _siblings(tree, parent, siblings, into)
    if rank is not None:
        check_rank(rank)
    if leaf_rank is not None:
        check_rank(leaf_rank)
    if method is not None and leaf_rank is not None:
        raise SpecError(
            "leaf_rank: only the mean is fitted together with what is left; leave method out"
        )
    recipe = None if method is None else Recipe(method, density, space, seed)
    terms = read_terms(tree, dict.fromkeys(names, 1.0))
    for path, _, adapter in terms:
        refuse_broken(path, adapter)
    weights = [tree[path].weight for path, _, _ in terms]
    # The plain sum refuses siblings that don't fit together, and has all that a new adapter needs
    # besides its modules (base, config, …).
    _refuse_replaced(terms)
    plain_sum = added_up([(path, c, without_overrides(adapter)) for path, c, adapter in terms])
    dtype = widest_dtype(plain_sum)
    adapters = aligned([adapter for _, _, adapter in terms])
    weighted = [a.weighed(weight) for a, weight in zip(adapters, weights, strict=True)]
    for path, weight in (*zip(names, weights, strict=True), *_weight_of(tree, parent, into)):
        _refuse_zero(path, weight, plain_sum.modules)
    shared: dict[str, LowRank] = {}
    rests: dict[str, dict[str, LowRank]] = {path: {} for path in names}
    for module in plain_sum.modules:
        parts = [adapter.modules.get(module) for adapter in weighted]
        S, module_rests = call_named(
            module, _Fitting(module, parts, rank, leaf_rank, recipe).fitted
        )
        shared[module] = call_named(module, cast, S, None, dtype)
        for path, value in zip(names, module_rests, strict=True):
            if value is not None:
                rests[path][module] = call_named(module, cast, value, None, dtype)
    top = replace(plain_sum, modules=shared, errors={})
    children: dict[str, Adapter] = {}
    errors: dict[str, Deviation] = {}
    for path, weight, adapter, expected in zip(names, weights, adapters, weighted, strict=True):
        children[path] = _child(weight, adapter, rests[path])
        # Measured on the factors to be saved, so that their rounding is a part of the error.
        got = added_up([("shared", 1.0, top), as_term(path, weight, children[path])])
        errors[path] = deviation(expected, got)
    return _install(tree, parent, into, top, children, errors)


@dataclass(frozen=True)
class _Fitting:
    """One module of the siblings, to be divided into a shared part and the rests.

    Args:
        module: its name.
        parts: each sibling's increment times its weight; None is zero.
        rank, leaf_rank: as `hoist`.
        recipe: the merge that gives the shared part; None: the mean.
    """

    module: str
    parts: Sequence[LowRank | None]
    rank: int | None
    leaf_rank: int | None
    recipe: Recipe | None

    def fitted(self) -> tuple[LowRank, list[LowRank | None]]:
        """Return the shared part and the rest of each sibling, None if it is zero; in float64."""
        both = joint([part for part in self.parts if part is not None])
        cores, biases = cores_and_biases(both, self.parts)
        bias: Tensor | None = biases.mean(0)
        if all(own is None for own in both.biases):
            bias = None  # zeros would be written as a lora_bias that no sibling has
        pairs = [_pair(both, part) for part in self.parts]
        if self.leaf_rank is not None:
            S, rests = _alternate(cores.mean(0), pairs, self.rank, self.leaf_rank)
        else:
            core = cores.mean(0) if self.recipe is None else _by_recipe(self, both)
            S = _svd(core, self.rank)
            # Without a bound on its rank, a rest is exactly the sibling less the shared part.
            rests = [_subtract(own, S) for own in pairs]
        scale = float(cores.abs().max())
        left: list[LowRank | None] = []
        for rest, own_bias in zip(rests, biases, strict=True):
            own = None if bias is None else own_bias - bias
            left.append(_value(both, rest, own, scale))
        shared = _value(both, S, bias, scale)
        return shared or both.value(torch.zeros_like(cores[0]), bias), left


def _by_recipe(fitting: _Fitting, both: Joint) -> Tensor:
    """Return the core of the siblings' merge, with weights that add up to 1."""
    assert fitting.recipe is not None
    share = [1.0 / len(fitting.parts)] * len(fitting.parts)
    merged = fitting.recipe.module(fitting.module, fitting.parts, share)
    # A merge in another space may leave the joint bases; project it back onto them.
    return (both.Q_B.mT @ merged.B.double()) @ (merged.A.double() @ both.Q_A) * merged.scale


def _pair(both: Joint, part: LowRank | None) -> Pair:
    """Return an increment's core as two thin factors; without columns for None."""
    if part is None:
        return both.cores[0][..., :0], both.cores[0].mT[..., :0]
    left = both.Q_B.mT @ part.B.detach().to(both.Q_B) * part.scale  # (k, r)
    return left, both.Q_A.mT @ part.A.detach().to(both.Q_A).mT  # (k, r) (l, r)


def _subtract(one: Pair, other: Pair) -> Pair:
    """Return the difference of two cores, as their concatenated factors."""
    return torch.cat([one[0], -other[0]], dim=-1), torch.cat([one[1], other[1]], dim=-1)


def _svd(core: Tensor, rank: int | None) -> Pair:
    """Return the best approximation of a rank, as thin factors."""
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return U[..., :rank] * S[..., None, :rank], Vh[..., :rank, :].mT


def _spectral(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V of a product of thin factors, by two QRs and an SVD of the small core."""
    Q_left, R_left = torch.linalg.qr(pair[0])
    Q_right, R_right = torch.linalg.qr(pair[1])
    U, S, Vh = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    return Q_left @ U, S, Q_right @ Vh.mT


def _alternate(
    mean: Tensor, pairs: Sequence[Pair], rank: int | None, leaf_rank: int
) -> tuple[Pair, list[Pair]]:
    """Return the shared core and the rests, fitted in turn, each with the others fixed.

    Args:
        mean: (\\*batch, k, l) of all siblings.
        pairs: each sibling's core, as thin factors.
        rank, leaf_rank: of the shared part and of a rest.
    """
    S = _svd(mean, rank)
    rests: list[Pair] = []
    before = torch.inf
    for _ in range(_MOST_ROUNDS):
        if rests:
            left = torch.cat([rest[0] for rest in rests], dim=-1)
            right = torch.cat([rest[1] for rest in rests], dim=-1)
            S = _nearest(mean - left @ right.mT / len(pairs), rank, S)
        rests = []
        error = 0.0
        for core in pairs:
            U, values, V = _spectral(_subtract(core, S))
            rests.append((U[..., :leaf_rank] * values[..., None, :leaf_rank], V[..., :leaf_rank]))
            # The squares of the dropped singular values are the error: no residual is formed.
            error += float(values[..., leaf_rank:].square().sum())
        if error >= before * (1.0 - _SETTLED):
            break
        before = error
    return S, rests


def _nearest(core: Tensor, rank: int | None, start: Pair) -> Pair:
    """Return (nearly) the best approximation of a rank, by subspace iteration from ``start``.

    It takes a few products with the core instead of a whole SVD. The core changes little from one
    round to the next, so the last round's result is a good start, and the next round corrects what
    this one misses.
    """
    if rank is None or min(core.shape[-2:]) <= _SMALL:
        return _svd(core, rank)
    right = start[1]
    for _ in range(2):
        left = torch.linalg.qr(core @ right)[0]  # (k, rank)
        right = torch.linalg.qr(core.mT @ left)[0]  # (l, rank)
    return core @ right, right


def _value(both: Joint, pair: Pair, bias: Tensor | None, scale: float) -> LowRank | None:
    """Return a core as an increment of its numerical rank; None if it is zero.

    Args:
        both: the joint bases.
        pair: the core, as two factors.
        bias: (out,) or None.
        scale: the magnitude of the siblings' cores. Singular values are compared with it, not with
            the core's own largest: a rest that should be zero consists of rounding alone.
    """
    U, S, V = _spectral(pair)
    there = int((S > scale * 1e-13).reshape(-1, S.shape[-1]).any(0).sum())
    if there == 0 and (bias is None or not bool(bias.any())):
        return None
    keep = max(there, 1)
    root = S[..., :keep].sqrt()
    B = both.Q_B @ (U[..., :keep] * root[..., None, :])
    A = (V[..., :keep] * root[..., None, :]).mT @ both.Q_A.mT
    return LowRank(A.contiguous(), B.contiguous(), 1.0, bias, both.like.layout)


# ---------------------------------------------------------------------- the tree
def _siblings(
    tree: AdapterTree, parent: str, siblings: Sequence[str] | None, into: str | None
) -> list[str]:
    """Return the nodes that take part, in the tree's order.

    Raises:
        PathError, TreeError, SpecError: as `hoist`.
    """
    if into is None:
        _check_parent(tree, parent)
    children = tree.children(parent)
    chosen = children if siblings is None else tree.matching(siblings)
    strangers = sorted(set(chosen) - set(children))
    if strangers:
        raise PathError(f"{listing(strangers)}: not children of {parent or 'the root'}")
    if len(chosen) < 2:
        raise SpecError(
            f"{parent or 'the root'}: hoist needs at least two siblings, got "
            f"{listing(chosen) or 'none'}"
        )
    for path in chosen:
        check_has_adapter(tree, path)
        if tree[path].weight == 0.0:
            raise SpecError(f"{path}: its weight is 0, so it shares nothing", "name the others")
    check_changeable(tree, tree.paths(parent))
    if parent:
        check_changeable(tree, [parent])
    if into is not None:
        check_path(into)
        if into.rpartition("/")[0] != parent:
            raise PathError(f"{into} is no child of {parent or 'the root'}")
        check_path_free(tree, into)
        return chosen
    others = sorted(set(children) - set(chosen))
    if others:
        raise TreeError(
            f"{listing(others)}: also below {parent}, and would change with it",
            "name all children, or give into= (--into): a new node for the shared part",
        )
    return chosen


def _check_parent(tree: AdapterTree, parent: str) -> None:
    """Refuse a parent that can't hold what its children share."""
    if not parent:
        raise TreeError("the root is the bare base and holds no adapter", "give into=: a new node")
    refuse_fresh(tree, parent)
    if tree[parent].weight == 0.0:
        raise SpecError(f"{parent}: its weight is 0, so nothing in it has an effect")


def _weight_of(tree: AdapterTree, parent: str, into: str | None) -> list[tuple[str, Weight]]:
    """Return the node that gets the shared part with its weight, if it exists already."""
    return [(parent, tree[parent].weight)] if into is None else []


def _refuse_replaced(terms: Sequence[Term]) -> None:
    """Refuse siblings if one has an override of a module that another changes.

    The override would drop the shared part of that module, which would lie above it.

    Raises:
        SpecError: names the sibling and the module.
    """
    modules: set[str] = set()
    for _, _, adapter in terms:
        modules.update(adapter.modules)
    for path, _, adapter in terms:
        for tensor in adapter.overrides:
            module = tensor_owner(tensor)[0]
            if module in modules:
                raise SpecError(
                    f"{path}: replaces {tensor}, and increments of {module} would move above that, "
                    "where they do not count",
                    f"split {module} off first: lora-tree split, or hoist the other siblings alone",
                )


def _refuse_zero(path: str, weight: Weight, modules: Iterable[str]) -> None:
    """Refuse a weight of 0 at a module that a hoist changes.

    Raises:
        SpecError: it is 0 at one.
    """
    lost = [name for name in modules if weight_at(weight, name) == 0.0]
    if lost:
        raise SpecError(
            f"{path}: its weight is 0 at {listing(lost, most=2)}, so its increments can't make up "
            "for what moves",
            "give it a weight there, or split those modules off first",
        )


def _child(weight: Weight, adapter: Adapter, rest: dict[str, LowRank]) -> Adapter:
    """Return a sibling's new adapter: the rest divided by its weight, or one module of zeros."""
    modules = {}
    for name, value in rest.items():
        modules[name] = value.scaled(1.0 / weight_at(weight, name)).folded()
    if not modules and not adapter.overrides:
        # The node has to stay, and PEFT's files need at least one module.
        name, value = next(iter(adapter.modules.items()))
        A = value.A[..., :1, :]
        modules = {name: LowRank(A, torch.zeros_like(value.B[..., :1]), 1.0, None, value.layout)}
    return replace(adapter, modules=modules, errors={}, rounded=frozenset())


def _install(
    tree: AdapterTree,
    parent: str,
    into: str | None,
    top: Adapter,
    children: dict[str, Adapter],
    errors: dict[str, Deviation],
) -> Edited:
    """Change the tree. Only the names can still be refused, so they are checked first."""
    below = {path: tree.paths(path) for path in children}
    renamed: dict[str, str] = {}
    if into is not None:
        for path, nodes in below.items():
            for old in (path, *nodes):
                renamed[old] = f"{into}/{old.removeprefix(parent).removeprefix('/')}"
                check_path(renamed[old])  # the tree may grow too deep
    notes = stale_notes(tree, children)
    if into is None:
        own_terms = read_terms(tree, {parent: 1.0})
        shared = as_term("shared", inverse_weight(tree[parent].weight), top)
        top = added_up([*own_terms, shared])
    check_savable(tree, {into or parent: top, **children}, [parent, *children])
    if into is not None:
        tree.add(into, adapter=top)
        for path in children:
            tree.move(path, renamed[path])
    else:
        put_adapter(tree, parent, top)
        notes = (f"{parent}: its own model has changed: it holds what its children share", *notes)
    for path, adapter in children.items():
        put_adapter(tree, renamed.get(path, path), adapter)
        mark_fitting(tree, [renamed.get(node, node) for node in below[path]])
    renamed_errors = {renamed.get(path, path): error for path, error in errors.items()}
    if into is not None:
        return Edited((into,), tuple(renamed_errors), renamed, renamed_errors, notes)
    return Edited((), (parent, *renamed_errors), renamed, renamed_errors, notes)
