"""Grow: turn flat adapters into a tree with shared nodes, which takes fewer bytes.

    similar ──▶ families ──▶ fit, module by module, at a price per byte ──▶ nodes, each leaf's error
                                 ▲                    │
                                 └── another price ◀──┘    until the bytes or the error are met

The adapters are clustered by the cosines of their increments, so nothing depends on the gauge of
their factors. Each shared node holds the part that costs fewer bytes once than in every leaf below.
One price per byte decides every rank in every node and module (see `shared_fit`): the rule of
`compress`, extended to shared nodes. Every adapter counts the same (w_i = 1 / ‖ΔW_i‖²), or by its
norm (w_i = 1):

    relative error = √ Σ_i w_i ‖ΔW_i − ΔW'_i‖² / Σ_i w_i ‖ΔW_i‖²

Law: each leaf's error is measured on the factors that the tree finally holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter import Adapter
from ..budget import parse_bytes
from ..errors import BudgetError, LoraTreeError
from ..given import check_whole_number
from ..lowrank import LowRank, concat
from ..lowrank.cast import cast
from ..node_names import check_path
from ..tree import AdapterTree
from .arguments import check_factor_dtype, check_tree
from .deviation import Deviation, call_named, gap_of
from .edit import Edited, check_savable, is_savable, savable_error, stale_notes
from .families import families_of
from .flat_adapters import FlatAdapters, smallest_module
from .flat_choice import choose_flat
from .likeness import similar
from .moments import weighted_square
from .price_search import Goal, PricedFit, PriceSearch, Progress, goal_of, relative_error
from .shared_fit import Pair
from .shared_places import shared_places
from .stack import Stack
from .sums import read_uncached

__all__ = ["Grown", "grow"]


@dataclass(frozen=True)
class Grown:
    """The outcome of `grow`.

    Args:
        edited: the shared nodes, the leaves' new paths, and each leaf's measured error.
        bytes_before, bytes_after: of the flat adapters, and of all nodes that replace them.
        relative_error: the root mean square of the leaves' relative errors; by norm, the error of
            all leaves as a part of the norm of all; weighted by moments if given.
    """

    edited: Edited
    bytes_before: int
    bytes_after: int
    relative_error: float

    def as_dict(self) -> dict[str, object]:
        """The figures as plain data, for JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "relative_error": self.relative_error,
            **self.edited.as_dict(),
        }


def grow(
    tree: AdapterTree,
    paths: Iterable[str] | None = None,
    *,
    max_error: float | None = None,
    budget_bytes: int | str | None = None,
    depth: int = 3,
    dtype: torch.dtype | None = None,
    by_norm: bool = False,
    moments: Mapping[str, Tensor] | None = None,
    working_bytes: int | str = "2GiB",
    progress: Progress | None = None,
) -> Grown:
    """Find what flat adapters share, and put it into shared nodes above them.

    Args:
        tree: changed in memory. Its chosen nodes move below the shared ones, get the weight 1 and
            keep the remainder.
        paths: children of the root without children of their own, as paths or patterns; None: all
            of these that have an adapter and a weight other than 0. Without paths, an adapter that
            can't take part stays as it is, and a note says why.
        max_error: the largest relative error over all adapters together; the tree has as few bytes
            as it allows. Rounding to a narrow dtype comes on top; the error that is returned
            includes it.
        budget_bytes: the size of all nodes that replace these adapters: a number, or ``"512MiB"``;
            the tree has as little error as it allows.
        depth: the most shared nodes above a leaf.
        dtype: of the factors; None keeps the widest of the adapters' own.
        by_norm: weight errors absolutely, as `compress` does: an adapter of twice the norm counts
            four times. That suits adapters that were trained alike. Without it their relative
            errors count the same, so that no adapter is given up because it is small.
        moments: module → second moments of its inputs, as `compress` takes them: an error is then
            measured by its effect on the outputs.
        working_bytes: memory for modules in float64. If the adapters need more, their files are
            read again for every few prices, a group of modules at a time. Other prices are tried
            then, so the result differs; it keeps the bound as well.
        progress: called with (modules fitted, all modules) for every price that is tried.

    Raises:
        PathError: a path or pattern matches no node, or names one that is not right below the root;
            or a new path is too long.
        TreeError: a node has children, is a group, or is used by a model.
        SpecError: there are fewer than two adapters; or one is fresh or not finite, or was named
            and has no modules or the weight 0; or not one of ``max_error`` and ``budget_bytes`` was
            given, or it makes no sense.
        BudgetError: the budget has no room for one rank in one module of every adapter.
        ShapeMismatch, BaseMismatch: the adapters are not of one base; names them and the module.
            Or a moment does not have the size of its module's input.
        FormatError: the part of a named node, or a shared part, can't be saved as one adapter;
            names the node and the module.

    >>> def part(seed, rank):
    ...     g = torch.Generator().manual_seed(seed)
    ...     return torch.randn(rank, 32, generator=g), torch.randn(24, rank, generator=g)
    >>> flat = AdapterTree()
    >>> (A, B), own = part(0, 2), [part(seed, 1) for seed in (1, 2, 3, 4)]
    >>> for i, (C, D) in enumerate(own):
    ...     q = LowRank(torch.cat([A, C]), torch.cat([B, D], dim=1))
    ...     _ = flat.add(f"n{i}", adapter=Adapter({"q": q}))
    >>> grown = grow(flat, max_error=1e-4)
    >>> list(flat)
    ['shared', 'shared/n0', 'shared/n1', 'shared/n2', 'shared/n3']
    >>> flat.adapter("shared").ranks, flat.adapter("shared/n3").ranks
    ({'q': 2}, {'q': 1})
    >>> grown.bytes_after / grown.bytes_before, grown.relative_error < 1e-4
    (0.5, True)
    """
    check_tree(tree)
    goal = goal_of(max_error, budget_bytes)
    check_whole_number(depth, "depth")
    check_factor_dtype(dtype)
    choice = choose_flat(tree, paths)
    while True:
        growth = _fit(
            tree,
            choice.names,
            depth,
            goal,
            progress,
            by_norm=by_norm,
            moments=moments,
            working_bytes=parse_bytes(working_bytes),
            dtype=dtype,
        )
        # One that no save takes leaves the sums of the others, so these are fitted again.
        unfit = growth.unsavable_leaves(tree)
        if not unfit:
            break
        choice = choice.without(unfit)
    _check_room(growth.made, goal)
    edited = _install(tree, growth, choice.notes)
    return Grown(edited, growth.flat.nbytes, growth.made.nbytes, growth.relative_error)


# ---------------------------------------------------------------------- the nodes
@dataclass(frozen=True, eq=False)
class _Nodes:
    """The nodes' adapters, computed but not yet in the tree.

    Args:
        shared: for each shared node; None where it is empty.
        leaves: for each leaf.
        errors: of each leaf.
        lost, energies: (n,) each leaf's squared error and squared norm, weighted by moments.
    """

    shared: tuple[Adapter | None, ...]
    leaves: tuple[Adapter, ...]
    errors: tuple[Deviation, ...]
    lost: Tensor
    energies: Tensor

    @property
    def nbytes(self) -> int:
        """The bytes of all of them."""
        adapters = [adapter for adapter in (*self.shared, *self.leaves) if adapter is not None]
        return sum(adapter.nbytes for adapter in adapters)


def _make_nodes(flat: FlatAdapters, priced: PricedFit) -> _Nodes:
    """Make the nodes' adapters from the fits, and measure the errors in the factors' dtype."""
    families = flat.families
    shared: list[dict[str, LowRank]] = [{} for _ in families.above]
    leaves: list[dict[str, LowRank]] = [{} for _ in flat.names]
    errors: list[dict[str, float]] = [{} for _ in flat.names]
    norms: list[dict[str, float]] = [{} for _ in flat.names]
    lost = torch.zeros(len(flat.names), dtype=torch.float64)
    energies = torch.zeros_like(lost)
    for module in flat.modules():
        name, stack = module.name, module.problem.stack
        fit = module.problem.with_leaves(priced.fits[name])
        energies += stack.energies
        moment = flat.moments.get(name)
        assert fit.leaves is not None
        for modules, pair in zip(shared, fit.shared, strict=True):
            _add_module(modules, name, pair, stack, None, flat.dtype)
        for i, (value, pair) in enumerate(zip(module.values, fit.leaves, strict=True)):
            _add_module(leaves[i], name, pair, stack, value, flat.dtype)
            above = [shared[n].get(name) for n in families.lineage(families.homes[i])]
            parts = [part for part in (*above, leaves[i].get(name)) if part is not None]
            total = concat(parts) if parts else None
            if value is not None or total is not None:
                gap = call_named(name, gap_of, value, total)
                errors[i][name], norms[i][name] = gap.error, gap.norm
                if flat.moments:
                    lost[i] += call_named(name, weighted_square, gap, moment)
    nesting = _nesting(flat.outlines)
    tops: list[Adapter | None] = []
    for modules in shared:
        own_nesting = {name: nesting[name] for name in modules if name in nesting}
        base = flat.outlines[0].base
        tops.append(Adapter(modules, base=base, nesting=own_nesting) if modules else None)
    bottoms: list[Adapter] = []
    for outline, modules, name in zip(flat.outlines, leaves, flat.names, strict=True):
        # Carried tensors and overrides stay in their adapter, which has to be read: an outline has
        # no numbers. `weighed` drops overrides that the old weight switched off, because the new
        # weight of 1 would switch them on.
        carries = outline.unchanged or outline.overrides
        source = outline
        if carries:
            source = read_uncached(flat.tree, name).weighed(flat.tree[name].weight)
        modules = modules or _zero_module(outline, flat.dtype)
        own_nesting = {module: nesting[module] for module in modules if module in nesting}
        bottoms.append(
            replace(source, modules=modules, nesting=own_nesting, errors={}, rounded=frozenset())
        )
    deviations = [Deviation(distances, norm) for distances, norm in zip(errors, norms, strict=True)]
    return _Nodes(tuple(tops), tuple(bottoms), tuple(deviations), lost, energies)


def _add_module(
    modules: dict[str, LowRank],
    name: str,
    pair: Pair,
    stack: Stack,
    own: LowRank | None,
    dtype: torch.dtype,
) -> None:
    """Add a pair to a node's modules. A leaf keeps its whole bias; shared nodes get none.

    Raises:
        SpecError: a factor or the bias is too large for the dtype; names the module.
    """
    left, right = pair
    bias = None if own is None or own.bias is None else own.bias.detach().double() * own.scale
    if left.shape[-1] == 0:
        if bias is None:
            return
        left, right = left.new_zeros(*left.shape[:-1], 1), right.new_zeros(*right.shape[:-1], 1)
    value = replace(stack.value(left, right), bias=bias)
    modules[name] = call_named(name, cast, value, None, dtype)


def _zero_module(outline: Adapter, dtype: torch.dtype) -> dict[str, LowRank]:
    """Return one module of zeros, for a leaf that would be empty: PEFT's files need a module."""
    name = smallest_module(outline)
    value = outline.modules[name]
    *batch, out, into = value.shape
    A, B = torch.zeros(*batch, 1, into, dtype=dtype), torch.zeros(*batch, out, 1, dtype=dtype)
    return {name: LowRank(A, B, 1.0, None, value.layout)}


def _nesting(outlines: Sequence[Adapter]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for outline in outlines:
        found.update(outline.nesting)
    return found


def _check_room(made: _Nodes, goal: Goal) -> None:
    """Refuse nodes that exceed the budget, because every empty leaf keeps one module of zeros.

    Raises:
        BudgetError: as `grow`.
    """
    if goal.budget_bytes is not None and made.nbytes > goal.budget_bytes:
        raise BudgetError(
            f"the smallest tree of these adapters takes {made.nbytes:,} bytes, the budget is "
            f"{goal.budget_bytes:,}",
            "give more bytes, or fewer adapters",
        )


# ---------------------------------------------------------------------- one fit
@dataclass(frozen=True, eq=False)
class _Growth:
    """The nodes of some flat adapters, and their places; nothing of it is in the tree yet.

    Args:
        flat: the adapters.
        made: the nodes.
        places: of the shared nodes; None for one that holds nothing.
        moved: leaf → its new path, if it moves.
        relative_error: over all of the adapters.
    """

    flat: FlatAdapters
    made: _Nodes
    places: list[str | None]
    moved: dict[str, str]
    relative_error: float

    def unsavable_leaves(self, tree: AdapterTree) -> dict[str, LoraTreeError]:
        """Return the leaves that a save of the tree would refuse, each with its error."""
        errors: dict[str, LoraTreeError] = {}
        for name, adapter in zip(self.flat.names, self.made.leaves, strict=True):
            above, _, _ = self.moved.get(name, name).rpartition("/")
            where = f"{name}, below {above}" if above else name
            error = savable_error(where, adapter, f"leave {name} out, and name the others")
            if error is not None:
                errors[name] = error
        # A tree that can't be saved as it is now is used in memory alone.
        return errors if errors and is_savable(tree) else {}


def _fit(
    tree: AdapterTree,
    chosen: Sequence[str],
    depth: int,
    goal: Goal,
    progress: Progress | None,
    *,
    by_norm: bool,
    moments: Mapping[str, Tensor] | None,
    working_bytes: int,
    dtype: torch.dtype | None,
) -> _Growth:
    """Fit the shared parts of some flat adapters; the arguments and errors are those of `grow`."""
    likeness = similar(tree, chosen, of="lineage")
    families = families_of(likeness.joins, len(chosen), depth)
    names = [chosen[i] for i in families.order]
    squares = likeness.norms[list(families.order)].double().square()
    # An adapter that is zero gets the weight 1: its norm can't be divided by.
    divisor = squares.mean().clamp(min=1e-300) if by_norm else squares.clamp(min=1e-300)
    weights = torch.where(squares > 0, 1.0 / divisor, 1.0)
    flat = FlatAdapters(
        tree,
        names,
        families,
        weights,
        moments=moments,
        working_bytes=working_bytes,
        dtype=dtype,
    )
    priced = PriceSearch(flat, goal, progress).search()
    made = _make_nodes(flat, priced)
    # Computed from the measured errors, which include the rounding of the factors.
    lost = torch.tensor(
        [deviation.error for deviation in made.errors], dtype=torch.float64
    ).square()
    if moments:
        lost, squares = made.lost, made.energies
    places = shared_places(tree, names, families, made.shared)
    moved: dict[str, str] = {}
    for leaf, name in enumerate(names):
        home = next((n for n in families.lineage(families.homes[leaf])[::-1] if places[n]), None)
        if home is not None:
            moved[name] = f"{places[home]}/{name}"
    return _Growth(flat, made, places, moved, relative_error(weights, lost, squares))


# ---------------------------------------------------------------------- the tree
def _install(tree: AdapterTree, growth: _Growth, alone: Sequence[str]) -> Edited:
    """Change the tree. Only the names and the shared nodes can still be refused, so these are
    checked first.

    Args:
        growth: the nodes.
        alone: notes on the adapters that stay as they are.
    """
    names, made = growth.flat.names, growth.made
    places, moved = growth.places, growth.moved
    for path in (*filter(None, places), *moved.values()):
        check_path(path)
    results: dict[str, Adapter] = {}
    for place, adapter in zip(places, made.shared, strict=True):
        if place is not None and adapter is not None:
            results[place] = adapter
    check_savable(tree, results, names)
    notes = (*stale_notes(tree, names), *alone)
    for place, adapter in zip(places, made.shared, strict=True):
        if place is not None:
            tree.add(place, adapter=adapter)
    errors: dict[str, Deviation] = {}
    for name, adapter, error in zip(names, made.leaves, made.errors, strict=True):
        path = moved.get(name, name)
        if path != name:
            tree.move(name, path)
        tree.update(path, adapter=adapter, weight=1.0)
        errors[path] = error
    added = tuple(place for place in places if place is not None)
    return Edited(added, tuple(errors), moved, errors, notes)
