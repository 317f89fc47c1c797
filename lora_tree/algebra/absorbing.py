"""Absorb: add a flat adapter to a tree as a child that holds only what its parent lacks.

    child = ΔW − Σ lineage of the parent        for the parent that leaves the smallest remainder
                                                that can be saved

Inner products of factors alone give the norm of this remainder for every node p, with W_p the sum
over its lineage:

    ‖ΔW − W_p‖² = ‖ΔW‖² − 2 ⟨ΔW, W_p⟩ + ‖W_p‖²
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..adapter import Adapter
from ..errors import FormatError, PathError, SpecError, plural
from ..lowrank import inner
from ..node_names import check_path
from ..nonfinite import refuse_broken
from ..tree import AdapterTree
from .aligning import aligned
from .arguments import check_adapter, check_tree
from .deviation import Deviation, Shortening, call_named, norm
from .edit import (
    Edited,
    check_path_free,
    check_savable,
    is_savable,
    savable_error,
    together_advice,
)
from .sums import added_up, difference_terms, read_uncached

__all__ = ["Absorbed", "absorb"]

_TRIED = 5
"""The number of nearest nodes that are tried as parents: after the cut to a rank, a node that was
not the nearest may leave the smaller error."""

_MOST_REASONS = 5
"""The number of unsuitable parents that a message names."""


@dataclass(frozen=True)
class Absorbed:
    """The outcome of `absorb`.

    Args:
        edited: the new node, and how far its effective weight is from the adapter.
        parent: the parent that was chosen; "" is the root.
        left: node → ‖ΔW − W_p‖ / ‖ΔW‖, nearest first; "" is the root, whose value is 1.
    """

    edited: Edited
    parent: str
    left: Mapping[str, float]

    def as_dict(self) -> dict[str, object]:
        """The figures as plain data, for JSON."""
        return {"parent": self.parent, "left": dict(self.left), **self.edited.as_dict()}


def absorb(
    tree: AdapterTree,
    name: str,
    adapter: Adapter,
    *,
    under: str = "",
    rank: int | None = None,
    max_error: float | None = None,
    dtype: torch.dtype | None = None,
) -> Absorbed:
    """Add a flat adapter below the node whose lineage is nearest to it, as the remainder.

    Args:
        tree: changed in memory: one node more.
        name: of the new node, without the path above it.
        adapter: a flat one, of the tree's base.
        under: only this node and those below it are considered.
        rank: the largest rank in any module; None keeps the sum exact.
        max_error: the largest error in any module, relative to the norm of the remainder there.
        dtype: round the factors to it.

    Returns:
        the new node's place and its error: how far the effective weight is from the adapter,
        relative to the adapter's norm.

    Raises:
        PathError: ``under`` does not exist, or ``name`` is not a valid name of one node.
        TreeError: the path exists.
        SpecError: the adapter adds nothing, or is not finite; or a bound is not valid.
        ShapeMismatch, BaseMismatch: the adapter is of another base than the tree's nodes.
        FormatError: no node's remainder can be saved as one adapter; says why, for each of them.

    >>> from lora_tree import LowRank
    >>> tree = AdapterTree()
    >>> q = LowRank(torch.eye(2, 6), torch.eye(5, 2))
    >>> _ = tree.add("a", adapter=Adapter({"q": q}))
    >>> more = LowRank(torch.eye(3, 6), torch.eye(5, 3))
    >>> done = absorb(tree, "new", Adapter({"q": more}), rank=1)
    >>> done.parent, tree.adapter("a/new").ranks, done.edited.relative_error < 1e-6
    ('a', {'q': 1}, True)
    """
    check_tree(tree)
    check_adapter(adapter)
    check_path(name)
    if "/" in name:
        raise PathError(
            f"{name}: expected one name, not a path: absorb chooses the parent itself",
            "under=PATH (--under PATH) limits where it looks",
        )
    if under and under not in tree:
        raise PathError(f"under: no node {under!r} in the tree")
    refuse_broken(name, adapter)
    left = _measure_remainders(tree, name, adapter, under)
    shortening = Shortening(rank, max_error, dtype)
    # Below a lineage with an override that the adapter lacks, no increments restore the base's
    # tensor. Such parents are tried only if there is no other.
    able = [parent for parent in left if _restores_overrides(tree, parent, adapter)]
    found, refused = _cheapest(tree, name, adapter, able or list(left), shortening)
    parent, short = found.parent, found.adapter
    path = _below(parent, name)
    check_path_free(tree, path)
    check_savable(tree, {path: short}, [name, *tree.lineage(parent)])
    tree.add(path, adapter=short)
    norms = {module: norm(value) for module, value in adapter.modules.items()}
    error = Deviation(found.lost.errors, norms)
    nearer = [error for place, error in refused.items() if left[place] < left[parent]]
    notes = tuple(
        f"a closer parent was passed over, for it can't be saved there: {e.what}"
        for e in nearer[:_MOST_REASONS]
    )
    return Absorbed(Edited(added=(path,), errors={path: error}, notes=notes), parent, left)


@dataclass(frozen=True)
class _Candidate:
    """A possible parent, with the adapter as it would be below it.

    Args:
        parent: the node.
        adapter: the remainder of the adapter there, cut.
        lost: the error of the cut.
    """

    parent: str
    adapter: Adapter
    lost: Deviation

    def key(self, by_size: bool) -> tuple[float, float, int]:
        """Return what candidates are compared by; the least is taken."""
        depth = self.parent.count("/") if self.parent else -1
        error, nbytes = self.lost.error, self.adapter.nbytes
        return (nbytes, error, depth) if by_size else (error, nbytes, depth)


def _cheapest(
    tree: AdapterTree, name: str, adapter: Adapter, parents: Sequence[str], shortening: Shortening
) -> tuple[_Candidate, Mapping[str, FormatError]]:
    """Find the best of the nearest nodes below which the remainder of an adapter can be saved.

    Args:
        parents: nearest first.

    Returns:
        it, and the nodes that were passed over → why the remainder can't be saved there.

    Raises:
        FormatError: there is none; says why, for each.
    """
    best: _Candidate | None = None
    refused: dict[str, FormatError] = {}
    is_strict: bool | None = None
    tried = 0
    for parent in parents:
        # The remainder: the terms of the parent's lineage with a minus sign, plus the adapter.
        above = difference_terms(tree, "", parent, kept=adapter.overrides)
        remainder = added_up([*above, (name, 1.0, adapter)])
        error = savable_error(
            _below(parent, name),
            _outline(remainder, shortening.dtype),
            *together_advice([name, *tree.lineage(parent)]),
        )
        if error is not None:
            if is_strict is None:
                # If the tree itself can't be saved, it is used in memory alone, and the remainder
                # need not be savable either. This reads all headers, so it is asked once.
                is_strict = is_savable(tree)
            if is_strict:
                refused[parent] = error
                continue
        short, lost = call_named(name, shortening.of, remainder)
        candidate = _Candidate(parent, short, lost)
        # With max_error=, every candidate is within it, so the one with the fewest bytes wins.
        by_size = shortening.max_error is not None
        if best is None or candidate.key(by_size) < best.key(by_size):
            best = candidate
        tried += 1
        if tried == _TRIED:
            break
    if best is None:
        raise _no_parent_error(name, list(refused.values()))
    return best, refused


def _outline(remainder: Adapter, dtype: torch.dtype | None) -> Adapter:
    """Return an adapter without its numbers, in the dtype to which its factors will be rounded.

    The cut that comes before the rounding takes long, and changes nothing about whether the result
    can be saved. The numbers themselves may be too large for the dtype until they were cut.
    """
    outline = remainder.with_tensors(lambda tensor: tensor.detach().to("meta"))
    if dtype is None:
        return outline
    return outline.map(lambda value: value.with_tensors(lambda factor: factor.to(dtype)))


def _no_parent_error(name: str, refused: Sequence[FormatError]) -> FormatError:
    """Return the error for an adapter that no node can take, from the error of each."""
    if len(refused) == 1:
        return refused[0]
    why = [error.what for error in refused[:_MOST_REASONS]]
    if len(refused) > _MOST_REASONS:
        why.append(f"and {len(refused) - _MOST_REASONS} more")
    return FormatError(
        f"{name}: what remains of it can't be saved below any of {plural(len(refused), 'node')}",
        *why,
        "absorb it below another node, or move modules to a node of their own first: lora-tree "
        "split, lora_tree.split(tree, path, to=…, modules=…)",
    )


def _below(parent: str, name: str) -> str:
    return f"{parent}/{name}" if parent else name


def _restores_overrides(tree: AdapterTree, parent: str, adapter: Adapter) -> bool:
    """Return whether the adapter replaces, as a whole, every tensor that the lineage replaces."""
    for node in tree.lineage(parent):
        outline = tree.outline(node)
        for tensor in outline.overrides if outline is not None else ():
            override = adapter.overrides.get(tensor)
            if override is None or override.rows is not None:
                return False
    return True


def _measure_remainders(
    tree: AdapterTree, name: str, adapter: Adapter, under: str
) -> dict[str, float]:
    """Return node → ‖remainder‖ / ‖ΔW‖ if the node were the parent, nearest first."""
    own_squares: list[float] = []
    for module, value in adapter.modules.items():
        own_squares.append(call_named(f"{name}: {module}", norm, value) ** 2)
    norm_square = math.fsum(own_squares)
    if norm_square == 0.0:
        raise SpecError(
            f"{name}: the adapter adds nothing, so no parent is better than another",
            "add it by hand: tree.add(path, adapter=…), or lora-tree add FOLDER PATH ADAPTER",
        )
    squares: dict[str, float] = {}
    # For each lineage, its inner product with the adapter and its own squared norm.
    sums: dict[str, tuple[float, float]] = {"": (0.0, 0.0)}
    held: dict[str, Adapter] = {}  # only the adapters of the current lineage stay in memory
    for path in ["", *tree.paths()]:
        if path:
            *above, _ = tree.lineage(path)
            held = {node: held[node] for node in above}
            node_adapter = read_uncached(tree, path).weighed(tree[path].weight)
            above_sums = sums[tree.parent(path)]
            sums[path] = call_named(
                name, _add_own_products, path, node_adapter, adapter, held, above_sums
            )
            held[path] = node_adapter
        if path == under or not under or path.startswith(f"{under}/"):
            product, square = sums[path]
            squares[path] = max(norm_square - 2.0 * product + square, 0.0)
    order = sorted(squares, key=lambda path: (squares[path], path))
    return {path: math.sqrt(squares[path] / norm_square) for path in order}


def _add_own_products(
    path: str,
    node_adapter: Adapter,
    adapter: Adapter,
    above: Mapping[str, Adapter],
    sums: tuple[float, float],
) -> tuple[float, float]:
    """Return the two sums of a node's lineage, from its parent's sums and its own increments."""
    product, square = sums
    own, new = aligned([node_adapter, adapter])
    product += _product(path, own, new)
    square += _product(path, own, own)
    for ancestor in above.values():
        own, higher = aligned([node_adapter, ancestor])
        square += 2.0 * _product(path, own, higher)
    return product, square


def _product(path: str, one: Adapter, other: Adapter) -> float:
    """⟨ΔW, ΔW'⟩ over all modules that both have, each with its bias as one more column."""
    products: list[float] = []
    for module, value in one.modules.items():
        other_value = other.modules.get(module)
        if other_value is None:
            continue
        products.append(call_named(f"{path}: {module}", inner, value, other_value))
        if value.bias is not None and other_value.bias is not None:
            product = value.bias.detach().double() @ other_value.bias.detach().double().to(
                value.device
            )
            products.append(float(product) * value.scale * other_value.scale)
    return math.fsum(products)
