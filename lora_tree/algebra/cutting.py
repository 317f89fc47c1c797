"""Squash and split: a lineage becomes one node, one node becomes a lineage.

squash   new = Σ lineage of a path − Σ lineage of the new node's parent
split    node = part + rest: the rest becomes its child, and the children move below that
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from ..adapter import Adapter
from ..blend import Blend, spelled
from ..errors import PathError, SpecError
from ..given import check_iterable, check_rank, unchecked
from ..lowrank import LowRank
from ..lowrank.cast import cast
from ..lowrank.promoting import promoted
from ..node_names import check_path
from ..patterns import glob_matches
from ..tree import AdapterTree
from ..weights import weight_within
from .arguments import check_tree
from .core import joint
from .deviation import Shortening, call_named, deviation
from .edit import (
    Edited,
    check_changeable,
    check_has_adapter,
    check_path_free,
    check_savable,
    mark_fitting,
    put_adapter,
    stale_notes,
)
from .sums import added_up, difference_terms, read_finite

__all__ = ["split", "squash"]


def squash(
    tree: AdapterTree,
    blend: Blend,
    *,
    to: str,
    rank: int | None = None,
    max_error: float | None = None,
    dtype: torch.dtype | None = None,
    base: nn.Module | None = None,
) -> Edited:
    """Add one node with the effective weight of a whole lineage, or of a blend.

    Args:
        tree: changed in memory.
        blend: a path or a blend; its nodes do not change.
        to: the new node. It inherits its parent's lineage, so that lineage is subtracted.
        rank: the largest rank in any module; None keeps the sum exact, at rank Σr.
        max_error: the largest relative error in any module.
        dtype: round the factors to it.
        base: a model, if nodes name one module in two ways.

    Raises:
        PathError: a node, or the one above ``to``, does not exist.
        TreeError: ``to`` exists.
        SpecError: the blend adds nothing to the parent of ``to``; or a bound is not valid.
        ShapeMismatch, BaseMismatch: two nodes do not add up; names them.
        FormatError: the sum can't be saved as one adapter; names the module.

    >>> x = LowRank(torch.ones(1, 4), torch.ones(2, 1))
    >>> tree = AdapterTree()
    >>> for path in ("fr", "fr/legal"): _ = tree.add(path, adapter=Adapter({"q": x}), weight=0.5)
    >>> squash(tree, "fr/legal", to="legal", rank=1).added
    ('legal',)
    >>> tree.adapter("legal").modules["q"].dense()[0, 0].item()
    1.0
    """
    check_tree(tree)
    # Refuse a name that is taken before any adapter is read.
    check_path_free(tree, to)
    terms = difference_terms(tree, blend, to.rpartition("/")[0], base=base)
    # Weights per module may switch off every module of a node, and leave an empty adapter.
    if not any(adapter for _, _, adapter in terms):
        raise SpecError(
            f"{spelled(blend) or 'the base'}: it adds nothing to the nodes above {to}",
            "add a group instead: tree.add(path, group=True), or lora-tree add FOLDER PATH --group",
        )
    flat, error = Shortening(rank, max_error, dtype).of(added_up(terms, base=base))
    check_savable(tree, {to: flat}, [node for node, _, _ in terms])
    tree.add(to, adapter=flat)
    notes = stale_notes(tree, (node for node, _, _ in terms))
    return Edited(added=(to,), errors={to: error}, notes=notes)


def split(
    tree: AdapterTree,
    path: str,
    *,
    to: str,
    rank: int | None = None,
    modules: Iterable[str] | None = None,
) -> Edited:
    """Move a part of a node into a new child, and the node's children below that child.

    All these children keep their effective weights, and the new child has the node's former one.
    The node itself keeps only the part that stays.

    Args:
        tree: changed in memory.
        path: the node.
        to: the new child.
        rank: keep the best approximation of this rank in the node, in every module; the rest moves.
        modules: move these modules: full names, ends of names as PEFT's target_modules, or patterns
            like ``"*.mlp.*"``.

    Raises:
        PathError: the node does not exist, or ``to`` is not a child of it.
        TreeError: ``to`` exists; or the node is a group; or a model is using one of the nodes.
        SpecError: not one of ``rank`` and ``modules`` was given; or nothing would move, or all.
    """
    check_tree(tree)
    check_has_adapter(tree, path)
    check_path(to)
    if to.rpartition("/")[0] != path:
        raise PathError(f"{to} is no child of {path}", f"name it {path}/NAME")
    check_path_free(tree, to)
    if (rank is None) == (modules is None):
        raise SpecError("split by rank= (--rank) or by modules= (--module), one of the two")
    below = tree.paths(path)
    renamed = {old: to + old[len(path) :] for old in below}
    for new in renamed.values():
        check_path(new)  # the tree may grow too deep
    check_changeable(tree, [path, *below])
    whole = read_finite(tree, path)
    stays, moves = _by_rank(whole, rank) if rank is not None else _by_name(whole, modules or ())
    if not moves.modules:
        raise SpecError(
            f"{path}: nothing would move: all of it stays",
            "name modules, or split at a smaller rank",
        )
    if not stays.modules:
        raise SpecError(f"{path}: all of it would move: nothing stays", "name fewer modules")
    weight = tree[path].weight
    notes = stale_notes(tree, [path])
    error = deviation(whole, added_up([("", 1.0, stays), ("", 1.0, moves)]))
    children = tree.children(path)
    # The new child comes first: only this step can fail, and nothing has changed before it.
    tree.add(to, adapter=moves, weight=weight_within(weight, moves.module_names))
    for child in children:
        tree.move(child, to + child[len(path) :])
    put_adapter(tree, path, stays)
    mark_fitting(tree, renamed.values())
    return Edited((to,), (path,), renamed, {to: error}, notes)


def _by_rank(whole: Adapter, rank: int) -> tuple[Adapter, Adapter]:
    check_rank(rank)
    stays: dict[str, LowRank] = {}
    moves: dict[str, LowRank] = {}
    for name, value in whole.modules.items():
        if rank >= value.rank:
            # The rank is not cut, so the value stays bit for bit.
            stays[name] = value
        else:
            stays[name], moves[name] = call_named(name, _parts, value, rank)
    return replace(whole, modules=stays, errors={}), _take_modules(whole, moves)


def _parts(value: LowRank, rank: int) -> tuple[LowRank, LowRank]:
    """Return the best approximation of a rank, with the bias, and the rest, from one SVD."""
    alone = joint([value])
    U, S, Vh = torch.linalg.svd(alone.cores[0], full_matrices=False)
    dtype = promoted(value.dtype, torch.float32)
    found = []
    for some in (slice(None, rank), slice(rank, value.rank)):
        # Each factor gets the root of every singular value, so both have the same magnitude and
        # round alike.
        root = S[..., some].sqrt()
        B = alone.Q_B @ (U[..., some] * root[..., None, :])
        A = (root[..., :, None] * Vh[..., some, :]) @ alone.Q_A.mT
        bias = alone.biases[0] if some.start is None else None
        factors = LowRank(A.contiguous(), B.contiguous(), 1.0, bias, value.layout)
        found.append(cast(factors, None, dtype))
    return found[0], found[1]


def _by_name(whole: Adapter, modules: Iterable[str]) -> tuple[Adapter, Adapter]:
    check_iterable(modules, "modules: expected a list of modules")
    patterns = [modules] if isinstance(modules, str) else list(modules)
    moves: dict[str, LowRank] = {}
    for pattern in patterns:
        if not isinstance(unchecked(pattern), str):
            raise SpecError(f"modules: expected names or patterns, got {pattern!r:.80}")
        hits = {n: v for n, v in whole.modules.items() if glob_matches(pattern, n)}
        # A pattern that matches no module is a typo, not a request to move nothing.
        if not hits:
            raise SpecError(
                f"{pattern!r} names no module of the node",
                f"its modules are {', '.join(whole.modules)}",
            )
        moves |= hits
    stays = {name: value for name, value in whole.modules.items() if name not in moves}
    return replace(whole, modules=stays, errors={}), _take_modules(whole, moves)


def _take_modules(whole: Adapter, modules: dict[str, LowRank]) -> Adapter:
    """Return an adapter of these modules alone; the part that stays keeps the carried tensors."""
    # Overrides stay in the node. The new child lies below it, so its increments still add to them.
    return replace(whole, modules=modules, unchanged={}, errors={}, overrides={})
