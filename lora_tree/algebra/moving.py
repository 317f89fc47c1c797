"""Pick, graft and rebase: put nodes under another parent, or keep them over a changed parent.

pick      copies the increments, so the effective weight differs at the new place
graft     copies all nodes of another tree below a path
rebase    keeps the effective weight:  child' = child + (Σ old lineage − Σ new one) / weight
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from ..adapter import Adapter
from ..base_names import other_base
from ..errors import BaseMismatch, SpecError, listing
from ..node_names import check_path
from ..nonfinite import refuse_broken
from ..override import Override, tensor_owner
from ..tree import AdapterTree
from ..weights import (
    GivenWeight,
    Weight,
    as_weight,
    inverse_weight,
    scaled_weight,
    weight_at,
)
from .arguments import check_adapter, check_tree
from .deviation import Deviation, Shortening
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
from .replacing import increments_under, refuse_overrides, without_overrides
from .sums import Term, added_up, as_term, difference_terms, read_finite, read_terms

__all__ = ["graft", "pick", "rebase", "rebase_all"]


def pick(tree: AdapterTree, path: str, *, to: str) -> Edited:
    """Add a node with the increments and the weight of another one.

    Under another lineage its effective weight differs. A trained node is stale at its new place, as
    after `AdapterTree.move`, because it was trained on other ancestors.

    Args:
        tree: changed in memory.
        path: the node to copy; it does not change.
        to: the new node.

    Raises:
        PathError: ``path``, or the node above ``to``, does not exist.
        TreeError: ``to`` exists, or ``path`` is a group.
        SpecError: ``path`` is fresh.
    """
    check_tree(tree)
    check_has_adapter(tree, path)
    # `tree.replace` below checks nothing, so refuse a path that is taken here.
    check_path_free(tree, to)
    node = tree[path]
    # Not `add`: the copy keeps its source, and with it the lock's record of its training lineage.
    tree.replace(replace(node, path=to, stale=None, home=None))
    notes = stale_notes(tree, [path])
    if _above(tree, path) != _above(tree, to):
        notes = (*notes, f"{to}: trained on the ancestors of {path}, and has other ancestors here")
    return Edited(added=(to,), notes=notes)


def graft(tree: AdapterTree, path: str, other: AdapterTree) -> Edited:
    """Add all nodes of another tree below a path, with their weights; the other tree keeps them.

    Args:
        tree: changed in memory.
        path: a node, or a new path, which becomes a group.
        other: a tree over the same base. Its fresh nodes keep that tree's defaults.

    Raises:
        PathError: the node above ``path`` does not exist, or a path gets too deep.
        TreeError: one of the new nodes exists, or one that differs only by case does.
        BaseMismatch: the two trees name different bases.
    """
    check_tree(tree)
    check_tree(other, "other")
    if tree.base is not None and other.base is not None and other_base(tree.base, other.base):
        raise BaseMismatch(
            f"{path}: a tree over {other.base!r} can't be a part of one over {tree.base!r}",
            "if they are one model, give both trees one name for it",
        )
    is_new = path not in tree
    renamed = {old: f"{path}/{old}" for old in other.paths()}
    if is_new:
        check_path_free(tree, path)
    for new in renamed.values():
        check_path(new)
    # `tree.replace` below checks nothing. Deeper paths are free if the children's paths are.
    for name in () if is_new else other.children(""):
        check_path_free(tree, renamed[name])
    if is_new:
        tree.add(path, group=True)
    for old, new in renamed.items():
        node = other[old]
        fresh = None if node.fresh is None else node.fresh.over(other.defaults)
        # As in `pick`, the copies keep their sources: a save copies the files, and their records
        # in the lock.
        tree.replace(replace(node, path=new, fresh=fresh, home=None))
    added = [path] * is_new + list(renamed.values())
    return Edited(added=tuple(added), notes=stale_notes(tree, renamed.values()))


def rebase(
    tree: AdapterTree,
    path: str,
    *,
    to: str,
    rank: int | None = None,
    max_error: float | None = None,
    dtype: torch.dtype | None = None,
    base: nn.Module | None = None,
) -> Edited:
    """Move a node with all nodes below it, and keep all their effective weights.

    The node's increments absorb the difference between the old and the new lineage. Ancestors that
    are on both, with the same coefficient, cancel: they are not read and cost no rank.

    Args:
        tree: changed in memory.
        path: the node. A group gets an adapter if the lineages differ.
        to: its new path.
        rank: the largest rank in any module; None keeps the sum exact.
        max_error: the largest relative error in any module.
        dtype: round the factors to it.
        base: a model, if nodes name one module in two ways.

    Returns:
        the paths that moved; ``errors`` has the distance of the node's increments from the exact
        ones. All effective weights below it change by the node's weight times that.

    Raises:
        PathError: ``path``, or the node above ``to``, does not exist.
        TreeError: ``to`` exists or lies below ``path``; or a model is using a node.
        SpecError: the node is fresh; or its weight is 0, so that its increments have no effect.
        ShapeMismatch, BaseMismatch: two nodes do not add up; names them.
        FormatError: the node's new increments can't be saved as one adapter; names the module.
    """
    check_tree(tree)
    refuse_fresh(tree, path)
    check_path(to)
    below = tree.paths(path)
    # Refuse a bad name before the adapters are read. If the new path differs only in case, or lies
    # below the node itself, `tree.move` decides.
    if not (to + "/").casefold().startswith((path + "/").casefold()):
        check_path_free(tree, to)
    check_changeable(tree, [path, *below])
    # Compute the difference before the move: afterwards the tree no longer has the old lineage.
    kept = _overrides_of(tree, path)
    gap = difference_terms(tree, tree.parent(path), to.rpartition("/")[0], base=base, kept=kept)
    notes = stale_notes(tree, [path])
    renamed = {old: to + old[len(path) :] for old in (path, *below)}
    adapter, error = _add_gap(tree, path, gap, Shortening(rank, max_error, dtype), base)
    if adapter is not None:
        check_savable(tree, {to: adapter}, [path, *(node for node, _, _ in gap)])
    tree.move(path, to)
    if adapter is None:
        mark_fitting(tree, renamed.values())
        return Edited(moved=renamed, notes=notes)
    put_adapter(tree, to, adapter)
    mark_fitting(tree, list(renamed.values())[1:])
    return Edited(changed=(to,), moved=renamed, errors={to: error}, notes=notes)


def rebase_all(
    tree: AdapterTree,
    path: str,
    *,
    adapter: Adapter | str | os.PathLike[str] | None = None,
    was: Adapter | None = None,
    weight: GivenWeight | None = None,
    was_weight: GivenWeight | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    dtype: torch.dtype | None = None,
    base: nn.Module | None = None,
) -> Edited:
    """Give a node another adapter or weight, and keep the effective weights of all nodes below it.

    Call it instead of `AdapterTree.update`. If the node has already changed (it was retrained),
    pass its former adapter and weight as ``was=`` and ``was_weight=``.

    Args:
        tree: changed in memory.
        path: the node that changes, or has changed.
        adapter, weight: the new ones; None: the node's present ones.
        was, was_weight: the old ones; None: the node's present ones.
        rank: the largest rank in any module of a child; None keeps the sums exact.
        max_error: the largest relative error in any module.
        dtype: round the factors to it.
        base: a model, if nodes name one module in two ways.

    Raises:
        PathError: the node does not exist.
        TreeError: a model is using one of the nodes.
        SpecError: nothing has changed; or a child's weight is 0.
        ShapeMismatch, BaseMismatch: two adapters do not add up; names them.
        FormatError: a child's new increments can't be saved as one adapter; names the child and the
            module.
    """
    check_tree(tree)
    if was is not None:
        check_adapter(was, "was")
    below = tree.paths(path)
    check_changeable(tree, [path, *below])
    before = _given_or_own(tree, path, was, was_weight)
    after = _given_or_own(tree, path, _read_if_path(adapter), weight)
    if before == after:
        raise SpecError(
            f"{path}: neither its adapter nor its weight differs from before",
            "give the new ones, adapter= or weight=, or the former ones, was= or was_weight=",
        )
    if not _have_same_overrides(_effective_overrides(*before), _effective_overrides(*after)):
        refuse_overrides([(path, before[1]), (path, after[1])], "changed while its children stay")
    gap = [
        as_term(path, before[0], without_overrides(before[1])),
        as_term(f"{path} (new)", scaled_weight(after[0], -1.0), without_overrides(after[1])),
    ]
    children, notes = _nearest(tree, path)
    adapters: dict[str, Adapter] = {}
    errors: dict[str, Deviation] = {}
    short = Shortening(rank, max_error, dtype)
    for child in children:
        made_up, errors[child] = _add_gap(tree, child, gap, short, base)
        adapters[child] = made_up or Adapter({})
    check_savable(tree, adapters, [path, *adapters])
    # Everything is computed. Now change the tree: the node, its children, the records below them.
    changed = list(adapters)
    if adapter is not None or weight is not None:
        tree.update(path, adapter=adapter, weight=weight)
        changed.insert(0, path)
    for child, made_up in adapters.items():
        put_adapter(tree, child, made_up)
    deeper = [node for node in below if node not in adapters]
    mark_fitting(tree, deeper)
    notes += stale_notes(tree, deeper)
    return Edited(changed=tuple(changed), errors=errors, notes=notes)


def _above(tree: AdapterTree, path: str) -> list[tuple[str, Weight]]:
    """Return the ancestors that have an adapter, with their weights."""
    above = tree.lineage(path)[:-1]
    return [(node, tree[node].weight) for node in above if tree[node].has_adapter]


def _add_gap(
    tree: AdapterTree,
    path: str,
    gap: list[Term],
    short: Shortening,
    base: nn.Module | None,
) -> tuple[Adapter | None, Deviation]:
    """Return a node's increments plus the difference ``gap`` of two lineages; None if unchanged.

    Raises:
        SpecError: the node's weight is 0, as a whole or at a module of the difference.
    """
    weight = tree[path].weight
    kept = read_terms(tree, {path: 1.0}, base=base)
    if not gap and short.is_noop:
        return None, Deviation()
    current = read_finite(tree, path)
    terms = list(kept)
    # An override that the weight switches off hides no increments above it (`own` lacks it), but it
    # stays in the node (`replaced` has it).
    own = _effective_overrides(weight, current)
    replaced = dict(current.overrides)
    for node, coefficient, adapter in gap:
        # The node's own override wins over one of the old lineage, which fills in missing rows.
        for name, above in adapter.overrides.items():
            replaced[name] = replaced[name].over(above) if name in replaced else above
        owners = [tensor_owner(tensor)[0] for tensor in adapter.overrides]
        adapter = replace(adapter, modules=increments_under(own, adapter.modules), overrides={})
        needed = dict.fromkeys([*adapter.modules, *owners])
        lost = [name for name in needed if weight_at(weight, name) == 0.0]
        if lost:
            at = "" if weight == 0.0 else f" at {listing(lost, most=2)}"
            raise SpecError(
                f"{path}: its weight is 0{at}, so its increments can't make up for other ancestors",
                f"give it a weight first: tree.update({path!r}, weight=1.0), or "
                f"lora-tree set FOLDER {path} --weight 1",
            )
        # The node's weight multiplies its increments, so the difference is divided by it.
        if not needed:
            continue
        if isinstance(weight, float):
            terms.append((node, coefficient / weight, adapter))
        else:
            terms.append((node, coefficient, adapter.weighed(inverse_weight(weight))))
    if not terms:
        return None, Deviation()
    adapter, error = short.of(added_up(terms, base=base))
    return replace(adapter, errors={}, overrides=replaced), error


def _overrides_of(tree: AdapterTree, path: str) -> Mapping[str, Override]:
    """Return the overrides of a node that its weight does not switch off."""
    adapter = tree.adapter(path)
    return {} if adapter is None else _effective_overrides(tree[path].weight, adapter)


def _effective_overrides(weight: Weight, adapter: Adapter) -> dict[str, Override]:
    """Return the overrides that a weight does not switch off.

    A weight of 0 at the override's module switches it off. Any other weight leaves it whole.
    """
    found = {}
    for tensor, override in adapter.overrides.items():
        if weight_at(weight, tensor_owner(tensor)[0]) != 0.0:
            found[tensor] = override
    return found


def _have_same_overrides(one: Mapping[str, Override], other: Mapping[str, Override]) -> bool:
    if one.keys() != other.keys():
        return False
    for name, override in one.items():
        counterpart = other[name]
        same_rows = override.rows == counterpart.rows
        if not (same_rows and torch.equal(override.values, counterpart.values)):
            return False
    return True


def _read_if_path(adapter: Adapter | str | os.PathLike[str] | None) -> Adapter | None:
    """Return the adapter, read from its folder if a path was given."""
    if adapter is None or isinstance(adapter, Adapter):
        return adapter
    return Adapter.load(adapter)


def _given_or_own(
    tree: AdapterTree, path: str, adapter: Adapter | None, weight: GivenWeight | None
) -> tuple[Weight, Adapter]:
    """Return a weight and an adapter as given, or the node's own where None."""
    if adapter is None:
        adapter = read_finite(tree, path)
    else:
        refuse_broken(path, adapter)
    own_weight = tree[path].weight if weight is None else as_weight(weight, f"{path}: weight")
    return own_weight, adapter


def _nearest(tree: AdapterTree, path: str) -> tuple[list[str], tuple[str, ...]]:
    """Return the nearest nodes below that have an adapter, and a note on each fresh one."""
    found: list[str] = []
    notes: list[str] = []
    waiting = tree.children(path)
    # All lineages below such a node pass through it, so changing it is enough for them.
    while waiting:
        child = waiting.pop(0)
        if tree[child].has_adapter:
            found.append(child)
            continue
        if tree[child].fresh is not None:
            notes.append(f"{child}: fresh, so it starts from {path} as it is now")
        # A group has no adapter to change, so the nodes below it are changed instead.
        waiting += tree.children(child)
    return found, tuple(notes)
