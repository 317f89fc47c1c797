"""Diff: compare two adapters, paths or trees, module by module.

    moved        ‖ΔW_b − ΔW_a‖
    cosine       ⟨ΔW_a, ΔW_b⟩ / ‖ΔW_a‖ ‖ΔW_b‖
    share        the part of Σ moved² over all modules that lies in this one
    angles       between the column spaces (what they write to) and the row spaces (what they read)
    rank         the effective rank of each, see `lora_tree.algebra.core.effective_rank`

Law: the diff of a value with itself is nothing, in any gauge of its factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..blend import Blend, depth_first, spelled
from ..carried import is_same_tensor
from ..errors import SpecError
from ..given import unchecked
from ..lowrank import LowRank
from ..tree import AdapterTree
from ..weights import Weight, plain_weight
from .aligning import aligned
from .arguments import check_tree
from .core import angles, effective_rank, joint, spectrum
from .deviation import call_named, length, minus
from .sums import Term, added_up, check_spelling, has_overrides, read_terms

__all__ = ["Diff", "ModuleDiff", "TreeDiff", "diff", "diff_paths", "diff_trees"]

_ROUNDING = 1e-12
"""A `moved` below this fraction of the two norms is rounding in float64, and counts as 0."""


@dataclass(frozen=True)
class ModuleDiff:
    """One module of two adapters.

    Args:
        norm_a, norm_b: ‖ΔW‖, biases included; 0 where an adapter lacks the module.
        moved: ‖ΔW_b − ΔW_a‖.
        cosine: of the angle between the two as vectors; None where one of them is zero.
        rank_a, rank_b: the effective ranks.
        angles_out, angles_in: principal angles in degrees between the column spaces and between the
            row spaces, smallest first; empty where one of the two is zero.
        share: the part of the whole moved² that is this module's.
    """

    norm_a: float
    norm_b: float
    moved: float
    cosine: float | None
    rank_a: float
    rank_b: float
    angles_out: tuple[float, ...]
    angles_in: tuple[float, ...]
    share: float = 0.0


@dataclass(frozen=True)
class Diff:
    """The comparison of two adapters; differences are b − a.

    Args:
        a, b: the names of the two, for messages and tables.
        modules: module → its figures, by name.
        carried: tensors of the base that both adapters carry, with different values.
        overrides: tensors of the base that one of the two replaces, or both by different values.
        fresh: nodes of either side that have no factors yet, and so add nothing.
    """

    a: str
    b: str
    modules: Mapping[str, ModuleDiff]
    carried: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    @property
    def norm_a(self) -> float:
        return self._whole("norm_a")

    @property
    def norm_b(self) -> float:
        return self._whole("norm_b")

    @property
    def moved(self) -> float:
        """‖ΔW_b − ΔW_a‖ over all modules."""
        return self._whole("moved")

    @property
    def cosine(self) -> float | None:
        """The cosine between the two over all modules; None where one of them is zero."""
        lengths = self.norm_a * self.norm_b
        if lengths == 0.0:
            return None
        inner = 0.0
        for module in self.modules.values():
            # A module that one of the two lacks adds nothing to their inner product.
            if module.cosine is not None:
                inner += module.cosine * module.norm_a * module.norm_b
        # Rounding may push it past ±1.
        return max(-1.0, min(1.0, inner / lengths))

    def _whole(self, figure: str) -> float:
        """√ Σ x² of a figure over all modules."""
        return math.hypot(*(getattr(module, figure) for module in self.modules.values()))

    @property
    def is_nothing(self) -> bool:
        """Return whether the two are equal in every module and every carried or replaced tensor."""
        return self.moved == 0.0 and not self.carried and not self.overrides

    @property
    def add_nothing(self) -> bool:
        """Return whether both sides have factors, or fresh nodes, that add zero: untrained ones."""
        return bool(self.fresh or self.modules) and self.norm_a == self.norm_b == 0.0

    def as_dict(self) -> dict[str, object]:
        """The figures as plain data, for JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "norm_a": self.norm_a,
            "norm_b": self.norm_b,
            "moved": self.moved,
            "cosine": self.cosine,
            "carried": list(self.carried),
            "overrides": list(self.overrides),
            "fresh": list(self.fresh),
            "modules": {name: vars(module) for name, module in self.modules.items()},
        }


@dataclass(frozen=True)
class TreeDiff:
    """The comparison of two trees: the nodes that only one has, and the diffs of those of both.

    Args:
        only_a, only_b: paths of one tree alone.
        weights: path → its weights in the two trees, where these differ.
        nodes: path → the diff of the node's own increments, for every path of both with an adapter
            in one of them at least.
        base: the names of the two bases, where these differ.
    """

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    weights: Mapping[str, tuple[Weight, Weight]]
    nodes: Mapping[str, Diff]
    base: tuple[str | None, str | None] | None = None

    @property
    def is_nothing(self) -> bool:
        """Return whether the two trees have the same nodes, weights, increments and base."""
        are_equal = all(node.is_nothing for node in self.nodes.values())
        return are_equal and not (self.only_a or self.only_b or self.weights or self.base)

    def as_dict(self) -> dict[str, object]:
        """The figures as plain data, for JSON."""
        return {
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "weights": {path: list(map(plain_weight, two)) for path, two in self.weights.items()},
            "base": None if self.base is None else list(self.base),
            "nodes": {path: node.as_dict() for path, node in self.nodes.items()},
        }


def diff(a: Adapter, b: Adapter, *, names: tuple[str, str] = ("a", "b")) -> Diff:
    """Compare two adapters module by module, from their factors.

    Args:
        a, b: of one base. A module that one of them lacks is zero there.
        names: what to call them in the result and in errors.

    Raises:
        ShapeMismatch: they change one module in different shapes; names it.
        BaseMismatch: they name one module in two ways.
        SpecError: a factor is not finite; names the module.

    >>> x = LowRank(torch.eye(1, 4), torch.eye(3, 1))
    >>> found = diff(Adapter({"q": x}), Adapter({"q": x.scaled(2.0)}))
    >>> found.moved, found.cosine, found.modules["q"].angles_in
    (1.0, 1.0, (0.0,))
    """
    for adapter in (a, b):
        if not isinstance(unchecked(adapter), Adapter):
            raise SpecError(
                f"diff compares two adapters, got {type(adapter).__name__}",
                "diff_paths compares paths of a tree, diff_trees two trees",
            )
    if not isinstance(unchecked(names), tuple) or len(names) != 2:
        raise SpecError(f"names: expected the names of the two adapters, got {names!r:.80}")
    a, b = aligned([a, b])
    check_spelling([(names[0], 1.0, a), (names[1], 1.0, b)])
    found: dict[str, ModuleDiff] = {}
    for name in sorted({*a.modules, *b.modules}):
        found[name] = call_named(name, _module, a.modules.get(name), b.modules.get(name))
    whole = math.fsum(module.moved**2 for module in found.values())
    if whole:
        # Shares need the sum over all modules, so they are filled in afterwards.
        for name, module in found.items():
            found[name] = replace(module, share=module.moved**2 / whole)
    carried = []
    for name in sorted(a.unchanged.keys() & b.unchanged.keys()):
        # Not by bits: one stored tensor that was loaded in two dtypes is still the same tensor.
        if not is_same_tensor(a.unchanged[name], b.unchanged[name]):
            carried.append(name)
    return Diff(*names, found, tuple(carried), _replaced_otherwise(a, b))


def _replaced_otherwise(a: Adapter, b: Adapter) -> tuple[str, ...]:
    found = []
    for name in sorted({*a.overrides, *b.overrides}):
        one, other = a.overrides.get(name), b.overrides.get(name)
        same_rows = one is not None and other is not None and one.rows == other.rows
        if not (same_rows and is_same_tensor(one.values, other.values)):  # type: ignore[union-attr]
            found.append(name)
    return tuple(found)


def diff_paths(tree: AdapterTree, a: Blend, b: Blend, *, base: nn.Module | None = None) -> Diff:
    """Compare the increments that two paths or blends of a tree add to the base.

    `Diff.moved` is the difference of the effective weights. Nodes with the same coefficient on both
    sides cancel: they are not read, and norms, cosines and angles are of the two sums without them.
    With them, a large shared part would hide the difference.

    Args:
        tree: both are its paths.
        a, b: a path or a blend each; ``""`` is the bare base.
        base: a model, if nodes name one module in two ways.

    Raises:
        PathError: a node does not exist.
        ShapeMismatch, BaseMismatch: two nodes do not add up.
        FolderError, FormatError: a node's files are gone or broken; names the node.
    """
    check_tree(tree)
    coefficients_a, coefficients_b = tree.coefficients(a), tree.coefficients(b)
    # Nodes with the same coefficient on both sides cancel, so they need not be read.
    shared = {node for node, c in coefficients_a.items() if coefficients_b.get(node) == c}
    own_terms = (_terms_without(tree, blend, shared, base) for blend in (a, b))
    if any(has_overrides(tree, node) for node in {*coefficients_a, *coefficients_b}):
        # An override may drop some increments of a shared node on one side only. Such a node does
        # not cancel; only shared nodes with the same modules left on both sides do.
        both = tree.terms(a, base=base), tree.terms(b, base=base)
        own_terms = (_less_shared(both[i], both[1 - i], shared) for i in (0, 1))
    sides = [added_up(terms, base=base) for terms in own_terms]
    found = diff(sides[0], sides[1], names=(spelled(a) or "the base", spelled(b) or "the base"))
    differing = (coefficients_a.keys() | coefficients_b.keys()) - shared
    fresh = [node for node in sorted(differing, key=depth_first) if tree[node].fresh is not None]
    return replace(found, fresh=tuple(fresh))


def _terms_without(
    tree: AdapterTree, blend: Blend, shared: Set[str], base: nn.Module | None
) -> list[Term]:
    own = tree.coefficients(blend)
    for node in shared:
        del own[node]
    return read_terms(tree, own, base=base)


def _less_shared(terms: list[Term], others: list[Term], shared: Set[str]) -> list[Term]:
    """Return the terms without the shared nodes that have the same coefficient on both sides."""
    other_adapters = {node: adapter for node, _, adapter in others}
    found = []
    for node, coefficient, adapter in terms:
        if node not in shared or not _have_same_names(adapter, other_adapters[node]):
            found.append((node, coefficient, adapter))
    return found


def _have_same_names(one: Adapter, other: Adapter) -> bool:
    # Names suffice: the terms of one node on two paths differ only by what an override drops.
    same_modules = one.modules.keys() == other.modules.keys()
    return same_modules and one.overrides.keys() == other.overrides.keys()


def diff_trees(a: AdapterTree, b: AdapterTree) -> TreeDiff:
    """Compare two trees node by node: which nodes exist, their weights and their own increments.

    Raises:
        ShapeMismatch, BaseMismatch, SpecError: as `diff`; names the node.
        FolderError, FormatError: a node's files are gone or broken; names the node.
    """
    check_tree(a, "a")
    check_tree(b, "b")
    weights, nodes = {}, {}
    for path in a.paths():
        if path not in b:
            continue
        if a[path].weight != b[path].weight:
            weights[path] = (a[path].weight, b[path].weight)
        if a[path].has_adapter or b[path].has_adapter:
            # A group has no increments, so a group compared with an adapter is a difference.
            adapter_a = a.adapter(path) or Adapter({})
            adapter_b = b.adapter(path) or Adapter({})
            nodes[path] = call_named(path, diff, adapter_a, adapter_b)
    paths_a, paths_b = a.paths(), b.paths()
    only_a = tuple(sorted(set(paths_a) - set(paths_b), key=depth_first))
    only_b = tuple(sorted(set(paths_b) - set(paths_a), key=depth_first))
    bases = (a.base, b.base) if a.base != b.base else None
    return TreeDiff(only_a, only_b, weights, nodes, bases)


def _module(a: LowRank | None, b: LowRank | None) -> ModuleDiff:
    present = [value for value in (a, b) if value is not None]
    # The difference is taken in joint bases, which avoids two dense matrices and cancellation.
    both = joint(present)
    one = (both.cores[0], both.biases[0])
    other = (both.cores[-1], both.biases[-1])
    norm_a, norm_b = length(one), length(other)
    rank_a, rank_b = effective_rank(spectrum(present[0])), effective_rank(spectrum(present[-1]))
    if a is None:
        return ModuleDiff(0.0, norm_b, norm_b, None, 0.0, rank_b, (), ())
    if b is None:
        return ModuleDiff(norm_a, 0.0, norm_a, None, rank_a, 0.0, (), ())
    moved = length([one[0] - other[0], minus(one[1], other[1])])
    if moved <= _ROUNDING * (norm_a + norm_b):
        moved = 0.0
    cosine = None
    if norm_a and norm_b:
        inner = float((one[0] * other[0]).sum()) + _inner(one[1], other[1])
        cosine = max(-1.0, min(1.0, inner / norm_a / norm_b))
    out, into = angles(a, b)
    sides = _degrees(out), _degrees(into)
    return ModuleDiff(norm_a, norm_b, moved, cosine, rank_a, rank_b, *sides)


def _inner(one: Tensor | None, other: Tensor | None) -> float:
    return 0.0 if one is None or other is None else float(one @ other)


def _degrees(radians: Tensor) -> tuple[float, ...]:
    return tuple(torch.rad2deg(radians).round(decimals=9).tolist())
