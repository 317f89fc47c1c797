"""Grow: a folder of flat adapters becomes a tree that takes fewer bytes.

    similar ──▶ families ──▶ fit, module by module, at a price per byte ──▶ nodes, each leaf's error
                                 ▲                    │
                                 └── another price ◀──┘    until the bytes or the error are met

The adapters are clustered by the cosines of their increments, so nothing depends on the gauge of
their factors. Each shared node holds what is best held once for all leaves below it; one price per
byte decides every rank in every node and module (see `shared_fit`), which is the rule of `compress`
with shared nodes in it. Every adapter counts alike, whatever its norm:

    relative error = √ mean_i ‖ΔW_i − ΔW'_i‖² / ‖ΔW_i‖²

Law: each leaf's error is measured on the factors that the tree holds in the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter import Adapter
from ..budget import parse_bytes
from ..errors import BudgetError, PathError, SpecError, TreeError, listing
from ..given import check_dtype, check_whole_number
from ..lowrank import LowRank, concat
from ..node_names import check_path
from ..override import tensor_owner
from ..tree import AdapterTree
from .deviation import Deviation, call_named, measured
from .edit import Edited, changeable, own, stale_notes
from .families import Families, families_of
from .likeness import similar
from .shared_fit import Pair, SharedFit, Stack, fit, triplets_of
from .sums import aligned, read_apart

__all__ = ["Grown", "grow"]

Progress = Callable[[int, int], None]

_ROUNDING = 1e-6
"""An error that is asked for below this one is met by a fit that is exact but for rounding."""

_CLOSE = 0.97  # of the bytes or the error that are asked for: the search ends there
_FALL = 2.0  # from one price to the next; see `_Search.found`
_MOST_FALLS = 60
_MOST_HALVES = 5


@dataclass(frozen=True)
class Grown:
    """The outcome of `grow`.

    Args:
        edited: the shared nodes, where the leaves went, and each leaf's error: the certificate.
        bytes_before, bytes_after: of the flat adapters, and of all nodes that stand for them.
        relative_error: the root mean square of the leaves' relative errors.
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
    working_bytes: int | str = "2GiB",
    progress: Progress | None = None,
) -> Grown:
    """Find what flat adapters share, and put it into shared nodes above them.

    Args:
        tree: changed in memory. Its chosen nodes move below the shared ones, get the weight 1 and
            hold what is left of them.
        paths: nodes right below the root and without children, as paths or patterns; all such nodes
            with an adapter where None.
        max_error: the largest relative error, over all adapters together; as few bytes as that
            takes.
        budget_bytes: of all nodes that come of these adapters: a number, or ``"512MiB"``; as
            little error as that allows.
        depth: the most shared nodes above a leaf.
        dtype: of the factors; None keeps the widest of the adapters' own.
        working_bytes: for the numbers of some modules in float64. Adapters that take more are read
            again for every price that is tried, a few modules at a time.
        progress: called with (modules fitted, modules there are) for every price that is tried.

    Raises:
        PathError: a path or pattern matches no node, or names one that is not right below the root;
            or a new path is too long.
        TreeError: a node has children, is a group, or is used by a model.
        SpecError: there are fewer than two adapters; or one is fresh or not finite; or not one of
            ``max_error`` and ``budget_bytes`` was given, or it makes no sense.
        BudgetError: the budget has no room for one rank in one module of every adapter.
        ShapeMismatch, BaseMismatch: the adapters are not of one base; names them and the module.

    >>> def part(seed, rank):
    ...     g = torch.Generator().manual_seed(seed)
    ...     return torch.randn(rank, 32, generator=g), torch.randn(24, rank, generator=g)
    >>> flat = AdapterTree()
    >>> (A, B), own = part(0, 2), [part(seed, 1) for seed in (1, 2, 3, 4)]
    >>> for i, (C, D) in enumerate(own):
    ...     q = LowRank(torch.cat([A, C]), torch.cat([B, D], dim=1))
    ...     _ = flat.add(f"n{i}", adapter=Adapter({"q": q}))
    >>> grown = grow(flat, max_error=1e-4)
    >>> list(flat), flat.adapter("n").ranks, flat.adapter("n/n3").ranks
    (['n', 'n/n0', 'n/n1', 'n/n2', 'n/n3'], {'q': 2}, {'q': 1})
    >>> grown.bytes_after / grown.bytes_before, grown.relative_error < 1e-4
    (0.5, True)
    """
    goal = _goal(max_error, budget_bytes)
    check_whole_number(depth, "depth")
    check_dtype(dtype)
    names = _chosen(tree, paths)
    alike = similar(tree, names, of="lineage")
    families = families_of(alike.joins, len(names), depth)
    names = [names[i] for i in families.order]
    norms = alike.norms[list(families.order)]
    # An adapter that is zero is as good as any other at being so.
    weights = torch.where(norms > 0, 1.0 / norms.square().clamp(min=1e-300), 1.0)
    flat = _Flat(tree, names, parse_bytes(working_bytes), dtype)
    found = _Search(flat, families, weights, goal, progress).found()
    made = _nodes(flat, families, weights, found)
    _check_room(made, goal)
    edited = _installed(tree, names, families, made)
    relative = (weights.sqrt() * torch.tensor([each.error for each in made.errors])).square()
    return Grown(edited, flat.nbytes, made.nbytes, math.sqrt(float(relative.mean())))


@dataclass(frozen=True)
class _Goal:
    """A bound: on the bytes, or on the error where there is none on the bytes."""

    max_error: float
    budget_bytes: int | None

    def met(self, tried: _Tried) -> bool:
        """Whether a fit is within the bound."""
        if self.budget_bytes is not None:
            return tried.nbytes <= self.budget_bytes
        return tried.error <= self.max_error

    def close(self, tried: _Tried) -> bool:
        """Whether a fit within the bound uses nearly all of it."""
        if self.budget_bytes is not None:
            return tried.nbytes >= _CLOSE * self.budget_bytes
        return tried.error >= _CLOSE * self.max_error


@dataclass(frozen=True, eq=False)
class _Tried:
    """The outcome of one price.

    Args:
        price: for one byte, in units of the weighted squared error.
        nbytes: of all nodes.
        error: the relative error.
        ranks: the sum of all ranks, 0 where nothing is left.
        shared: module → the shared parts, with which another price begins.
    """

    price: float
    nbytes: int
    error: float
    ranks: int
    shared: Mapping[str, tuple[Pair, ...]]


def _goal(max_error: float | None, budget_bytes: int | str | None) -> _Goal:
    if (max_error is None) == (budget_bytes is None):
        raise SpecError("grow to max_error= or budget_bytes=, one of the two")
    if max_error is not None and not 0.0 <= max_error < 1.0:
        raise SpecError(
            f"max_error: expected a part of the whole, 0 ≤ max_error < 1, got {max_error}"
        )
    budget = None if budget_bytes is None else parse_bytes(budget_bytes)
    return _Goal(max(max_error or 0.0, _ROUNDING), budget)


def _chosen(tree: AdapterTree, paths: Iterable[str] | None) -> list[str]:
    """The flat nodes that take part.

    Raises:
        PathError, TreeError, SpecError: as `grow`.
    """
    top = tree.children("")
    if paths is None:
        chosen = [p for p in top if tree[p].has_adapter and not tree.children(p)]
    else:
        chosen = tree.matching(paths)
    deeper = sorted(set(chosen) - set(top))
    if deeper:
        raise PathError(
            f"{listing(deeper)}: not right below the root",
            "grow takes flat adapters: squash a lineage to a node there first",
        )
    for path in chosen:
        own(tree, path)
        if tree.children(path):
            raise TreeError(f"{path}: has children, so it is no flat adapter", "leave it out")
    if len(chosen) < 2:
        raise SpecError(f"grow needs two flat adapters at least, got {chosen}")
    changeable(tree, chosen)
    return chosen


# ---------------------------------------------------------------------- the numbers
class _Flat:
    """The flat adapters of some nodes, read as often as the memory for them demands.

    Args:
        tree: has them.
        names: the nodes, depth first.
        working_bytes: for stacks of modules.
        dtype: of the factors that are made; None: the widest of the adapters' own.
    """

    def __init__(
        self, tree: AdapterTree, names: Sequence[str], working_bytes: int, dtype: torch.dtype | None
    ) -> None:
        self.tree, self.names = tree, names
        outlines = [tree.outline(name) or Adapter({}) for name in names]
        self.nbytes = sum(outline.nbytes for outline in outlines)
        self.outlines = aligned(outlines)
        self.numbers: dict[str, int] = {}  # module → its numbers, over all leaves and in any rank
        widest: torch.dtype | None = None
        for outline in self.outlines:
            for module, value in outline.modules.items():
                self.numbers[module] = self.numbers.get(module, 0) + value.numel
                mine = value.dtype
                widest = mine if widest is None else torch.promote_types(widest, mine)
        self.dtype = dtype or widest or torch.float32
        self._refuse_replaced()
        self._groups = list(self._grouped(working_bytes))
        self._kept: dict[str, tuple[list[LowRank | None], Stack]] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def _refuse_replaced(self) -> None:
        """Refuse an override of a module that would get a shared part: the part would not count.

        Raises:
            SpecError: an adapter replaces such a tensor; names both.
        """
        for name, outline in zip(self.names, self.outlines, strict=True):
            for tensor in outline.overrides:
                if tensor_owner(tensor)[0] in self.numbers:
                    raise SpecError(
                        f"{name}: replaces {tensor}, so nothing above it counts there",
                        "name the other adapters, and leave this one out",
                    )

    def modules(self) -> Iterator[tuple[str, list[LowRank | None], Stack]]:
        """Each module with the leaves' values and their stack; a few are in memory at once."""
        for group in self._groups:
            if not self._kept.keys() >= set(group):
                self._kept = self._read(group)
            for module in group:
                yield module, *self._kept[module]

    def price(self, module: str) -> int:
        """How many bytes one rank of a module takes."""
        for outline in self.outlines:
            if module in outline.modules:
                value = outline.modules[module]
                size = math.prod(value.shape[:-2]) * (value.shape[-2] + value.shape[-1])
                return size * self.dtype.itemsize
        raise KeyError(module)

    def _grouped(self, working_bytes: int) -> Iterator[list[str]]:
        group: list[str] = []
        size = 0
        for module, numbers in sorted(self.numbers.items()):
            # The values as they are read, and their triplets in float64.
            mine = numbers * (8 + self.dtype.itemsize)
            if group and size + mine > working_bytes:
                yield group
                group, size = [], 0
            group.append(module)
            size += mine
        if group:
            yield group

    def _read(self, group: Sequence[str]) -> dict[str, tuple[list[LowRank | None], Stack]]:
        values: dict[str, list[LowRank | None]] = {module: [] for module in group}
        self._kept = {}  # before the next ones are read, so that both are never in memory
        for name, outline in zip(self.names, self.outlines, strict=True):
            adapter = read_apart(self.tree, name).weighed(self.tree[name].weight)
            adapter = adapter.renested(outline.nesting)
            for module in group:
                value = adapter.modules.get(module)
                # A copy: a view would keep all of the adapter's other modules in memory.
                values[module].append(None if value is None else value.with_tensors(torch.clone))
        return {module: (each, triplets_of(each)) for module, each in values.items()}


# ---------------------------------------------------------------------- the price
class _Search:
    """The search for the price at which the bound is just met."""

    def __init__(
        self,
        flat: _Flat,
        families: Families,
        weights: Tensor,
        goal: _Goal,
        progress: Progress | None,
    ) -> None:
        self.flat, self.families, self.weights = flat, families, weights
        self.goal, self.progress = goal, progress

    def found(self) -> _Tried:
        """The best fit within the bound.

        The price begins where nothing is worth it and falls. At no price does a leaf then find
        something worth it alone that was worth it for two leaves together at the price before:
        that has its shared node already. A first fit at a low price would put parts of single
        leaves into shared nodes.

        Raises:
            BudgetError: there is none within the bound.
        """
        by_bytes = self.goal.budget_bytes is not None
        high = self._try(self._first_price(), None)
        low: _Tried | None = None
        for _ in range(_MOST_FALLS):
            # Bytes rise while the price falls, and errors fall.
            if self.goal.met(high) != by_bytes or self._is_done(high):
                break
            low = self._try(high.price / _FALL, high)
            if self.goal.met(low) != by_bytes:
                break
            high = low
        if low is None or low is high:
            within = high if self.goal.met(high) else None
        else:
            within = self._between(high, low)
        if within is None:
            raise BudgetError(
                f"no tree of these adapters takes {self.goal.budget_bytes:,} bytes",
                "give more bytes, or fewer adapters",
            )
        return within

    def _between(self, high: _Tried, low: _Tried) -> _Tried:
        """The best fit at a price between one that is within the bound and one that is not."""
        within = high if self.goal.met(high) else low
        for _ in range(_MOST_HALVES):
            # Where both have the same ranks, prices between them have these too.
            if self.goal.close(within) or high.nbytes == low.nbytes:
                break
            # From the higher price again, so that the price only falls.
            tried = self._try(math.sqrt(high.price * low.price), high)
            if self.goal.met(tried):
                within = tried
            if self.goal.met(tried) == self.goal.met(high):
                high = tried
            else:
                low = tried
        return within

    def _is_done(self, tried: _Tried) -> bool:
        """Whether a lower price has nothing left to buy."""
        return tried.error < _ROUNDING

    def _first_price(self) -> float:
        """A price above what any rank of any module is worth."""
        most = 0.0
        for module, _, stack in self.flat.modules():
            # All leaves together can have no larger singular value than their lengths allow.
            gains = (self.weights * stack.energies).sum()
            most = max(most, float(gains) / self.flat.price(module))
        return max(most, 1e-300)

    def _try(self, price: float, like: _Tried | None) -> _Tried:
        squares = torch.zeros(len(self.weights), dtype=torch.float64)
        shared: dict[str, tuple[Pair, ...]] = {}
        nbytes = ranks = 0
        for done, (module, _, stack) in enumerate(self.flat.modules(), 1):
            start = None if like is None else like.shared[module]
            got = self.fit(module, stack, price, start)
            shared[module] = got.shared
            squares += got.squares
            ranks += got.ranks
            nbytes += got.ranks * self.flat.price(module)
            if self.progress is not None:
                self.progress(done, len(self.flat))
        error = math.sqrt(float((self.weights * squares).mean()))
        return _Tried(price, nbytes, error, ranks, shared)

    def fit(
        self, module: str, stack: Stack, price: float, start: Sequence[Pair] | None
    ) -> SharedFit:
        """One module at a price per byte."""
        per_rank = price * self.flat.price(module)
        return call_named(
            module,
            lambda: fit(stack, self.families, self.weights, per_rank, name=module, start=start),
        )


# ---------------------------------------------------------------------- the nodes
@dataclass(frozen=True, eq=False)
class _Nodes:
    """The nodes' adapters, computed and not yet in a tree.

    Args:
        shared: for each shared node; None where it has nothing.
        leaves: for each leaf.
        errors: of each leaf.
    """

    shared: tuple[Adapter | None, ...]
    leaves: tuple[Adapter, ...]
    errors: tuple[Deviation, ...]

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        there = [adapter for adapter in (*self.shared, *self.leaves) if adapter is not None]
        return sum(adapter.nbytes for adapter in there)


def _nodes(flat: _Flat, families: Families, weights: Tensor, found: _Tried) -> _Nodes:
    """Fit every module once more, and measure what comes of it in the dtype of the factors."""
    search = _Search(flat, families, weights, _Goal(0.0, None), None)
    shared: list[dict[str, LowRank]] = [{} for _ in families.above]
    leaves: list[dict[str, LowRank]] = [{} for _ in flat.names]
    errors: list[dict[str, float]] = [{} for _ in flat.names]
    norms: list[dict[str, float]] = [{} for _ in flat.names]
    for module, values, stack in flat.modules():
        got = search.fit(module, stack, found.price, found.shared[module])
        for modules, pair in zip(shared, got.shared, strict=True):
            _put(modules, module, pair, stack.like, None, flat.dtype)
        for i, (value, pair) in enumerate(zip(values, got.leaves, strict=True)):
            _put(leaves[i], module, pair, stack.like, value, flat.dtype)
            above = [shared[n].get(module) for n in families.lineage(families.homes[i])]
            parts = [part for part in (*above, leaves[i].get(module)) if part is not None]
            total = concat(parts) if parts else None
            if value is not None or total is not None:
                errors[i][module], norms[i][module] = call_named(module, measured, value, total)
    nesting = _nesting(flat.outlines)
    tops: list[Adapter | None] = []
    for modules in shared:
        mine = {name: nesting[name] for name in modules if name in nesting}
        base = flat.outlines[0].base
        tops.append(Adapter(modules, base=base, nesting=mine) if modules else None)
    bottoms: list[Adapter] = []
    for outline, modules, name in zip(flat.outlines, leaves, flat.names, strict=True):
        if not modules:
            modules = _nothing(flat.tree, name, flat.dtype)
        mine = {module: nesting[module] for module in modules if module in nesting}
        # Tensors that an adapter carries or replaces stay in it; an outline has none of them.
        carries = outline.unchanged or outline.overrides
        whole = (flat.tree.adapter(name) if carries else None) or outline
        bottoms.append(
            replace(whole, modules=modules, nesting=mine, errors={}, rounded=frozenset())
        )
    told = [Deviation(far, norm) for far, norm in zip(errors, norms, strict=True)]
    return _Nodes(tuple(tops), tuple(bottoms), tuple(told))


def _put(
    modules: dict[str, LowRank],
    name: str,
    pair: Pair,
    like: LowRank,
    own: LowRank | None,
    dtype: torch.dtype,
) -> None:
    """Add a pair to a node's modules; a leaf keeps its bias, which shared nodes have no part of."""
    left, right = pair
    bias = None if own is None or own.bias is None else own.bias.detach().double() * own.scale
    if left.shape[-1] == 0:
        if bias is None:
            return
        left, right = left.new_zeros(*left.shape[:-1], 1), right.new_zeros(*right.shape[:-1], 1)
    # Factors of like size lose least when they are rounded.
    sizes = left.norm(dim=-2, keepdim=True).sqrt()  # (b, 1, k)
    safe = torch.where(sizes > 0, sizes, 1.0)
    batch = like.shape[:-2]
    A = (right * sizes).mT.reshape(*batch, -1, like.shape[-1])
    B = (left / safe).reshape(*batch, like.shape[-2], -1)
    value = LowRank(A.contiguous(), B.contiguous(), 1.0, bias, like.layout)
    modules[name] = value.to(dtype=dtype)


def _nothing(tree: AdapterTree, name: str, dtype: torch.dtype) -> dict[str, LowRank]:
    """One module of zeros: files without a module can't be written, and the node has to stay."""
    adapter = tree.adapter(name) or Adapter({})
    smallest = min(adapter.modules, key=lambda module: (adapter.modules[module].numel, module))
    value = adapter.modules[smallest]
    A, B = torch.zeros_like(value.A[..., :1, :]), torch.zeros_like(value.B[..., :1])
    return {smallest: LowRank(A, B, 1.0, None, value.layout).to(dtype=dtype)}


def _nesting(outlines: Sequence[Adapter]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for outline in outlines:
        found.update(outline.nesting)
    return found


def _check_room(made: _Nodes, goal: _Goal) -> None:
    """Refuse what no longer fits the budget, because empty leaves keep one module of zeros.

    Raises:
        BudgetError: as `grow`.
    """
    if goal.budget_bytes is not None and made.nbytes > goal.budget_bytes:
        raise BudgetError(
            f"the smallest tree of these adapters takes {made.nbytes:,} bytes, the budget is "
            f"{goal.budget_bytes:,}",
            "give more bytes, or fewer adapters",
        )


# ---------------------------------------------------------------------- the tree
def _installed(tree: AdapterTree, names: Sequence[str], families: Families, made: _Nodes) -> Edited:
    """Change the tree: nothing here can fail any more but the names, which are tried first."""
    places = _places(tree, names, families, made)
    moved: dict[str, str] = {}
    for leaf, name in enumerate(names):
        home = next((n for n in families.lineage(families.homes[leaf])[::-1] if places[n]), None)
        if home is not None:
            moved[name] = f"{places[home]}/{name}"
    for path in (*filter(None, places), *moved.values()):
        check_path(path)
    notes = stale_notes(tree, names)
    for place, adapter in zip(places, made.shared, strict=True):
        if place is not None:
            tree.add(place, adapter=adapter)
    told: dict[str, Deviation] = {}
    for name, adapter, error in zip(names, made.leaves, made.errors, strict=True):
        path = moved.get(name, name)
        if path != name:
            tree.move(name, path)
        tree.update(path, adapter=adapter, weight=1.0)
        told[path] = error
    added = tuple(place for place in places if place is not None)
    return Edited(added, tuple(told), moved, told, notes)


def _places(
    tree: AdapterTree, names: Sequence[str], families: Families, made: _Nodes
) -> list[str | None]:
    """The paths of the shared nodes; None for one that holds nothing."""
    taken = {name.lower() for name in tree.children("")}
    places: list[str | None] = []
    for shared, adapter in enumerate(made.shared):
        if adapter is None:
            places.append(None)
            continue
        above = [n for n in families.lineage(shared)[:-1] if places[n] is not None]
        first, last = families.spans[shared]
        parent = f"{places[above[-1]]}/" if above else ""
        of_all = last - first == len(names)
        label = _label(names[first:last]) or ("shared" if of_all else "group")
        path, number = f"{parent}{label}", 1
        # Leaves get names below a shared node too, and files tell no capitals apart everywhere.
        inside = {f"{parent}{name}".lower() for name in names}
        while path.lower() in taken or path.lower() in inside:
            number += 1
            path = f"{parent}{label}-{number}"
        taken.add(path.lower())
        places.append(path)
    return places


def _label(names: Sequence[str]) -> str:
    """What the names begin with, up to a separator or a number: ``fr`` of fr-legal and fr-tax."""
    least, most = min(names), max(names)
    same = 0
    while same < min(len(least), len(most)) and least[same] == most[same]:
        same += 1
    begin = least[:same]
    rest = [name[same : same + 1] for name in names]
    if any(each.isalpha() for each in rest) and begin[-1:].isalpha():
        # The names part within a word, which says nothing: fr-legal and fr-loan share "fr".
        begin = re.sub(r"[A-Za-z]+\Z", "", begin)
    label = begin.rstrip("-_.0123456789")
    return label if len(label) > 1 else ""  # one letter says nothing
