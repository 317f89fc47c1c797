"""Sums over the nodes of a tree: a lineage or a blend less another one, with one term per node.

    path − parent of its new place  =  Σ (c_n − c'_n) · adapter_n      equal coefficients cancel

Nodes that cancel are not read and cost no rank. `squash`, `rebase`, `absorb` and `merge_paths`
compute such sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..adapter import Adapter
from ..blend import Blend, depth_first
from ..combining import combine, weighed_terms
from ..errors import BaseMismatch, SpecError, listing
from ..lowrank import LowRank
from ..nonfinite import refuse_broken
from ..override import Override
from ..spelling import spelled_twice
from ..storage import names_of
from ..tree import AdapterTree
from ..weights import Weight, weight_difference
from .deviation import call_named
from .replacing import check_kept, increments_under

__all__ = [
    "Term",
    "added_up",
    "as_term",
    "check_spelling",
    "difference_terms",
    "has_overrides",
    "read_finite",
    "read_terms",
    "read_uncached",
]

Term = tuple[str, float, Adapter]
"""(node, coefficient, its adapter). Weights per module are folded into the adapter's scales."""


def difference_terms(
    tree: AdapterTree,
    plus: Blend,
    minus: Blend = "",
    *,
    base: nn.Module | None = None,
    kept: Mapping[str, Override] | None = None,
) -> list[Term]:
    """Return the terms of one path or blend less those of another, in the order of the sum.

    Args:
        tree: both are its paths.
        plus, minus: a path or a blend each; ``""`` is the bare base.
        base: rename every adapter's modules to their names in this model.
        kept: the overrides of the node below, to which the difference is added.

    Raises:
        PathError: a node does not exist.
        SpecError: a weight is not finite; or an override would be subtracted, which no increment
            can undo.
        SpecError: a node holds NaN or an infinity; names it, the module and the tensor.
        FolderError, FormatError: a node's files are gone or broken; names the node.
    """
    terms = _difference(tree, plus, minus, base, kept)
    for node, _, adapter in terms:
        refuse_broken(node, adapter)
    return terms


def _difference(
    tree: AdapterTree,
    plus: Blend,
    minus: Blend,
    base: nn.Module | None,
    kept: Mapping[str, Override] | None,
) -> list[Term]:
    added, taken = tree.coefficients(plus), tree.coefficients(minus)
    coefficients: dict[str, Weight] = dict(added)
    # Equal coefficients cancel exactly: both come from the same weights by the same sums.
    for node, coefficient in taken.items():
        coefficients[node] = weight_difference(coefficients.get(node, 0.0), coefficient)
    if not kept and not any(has_overrides(tree, node) for node in {*added, *taken}):
        return read_terms(tree, coefficients, base=base)
    changed = [node for node in taken if coefficients[node] != 0.0]
    _refuse_parts(added, changed)
    leaving = [(node, tree.outline(node) or Adapter({})) for node in changed]
    check_kept(leaving, kept or {}, "another lineage")
    # An override drops the same increments on both sides: either both lineages have it, or it is in
    # the difference, below all nodes that are subtracted.
    terms = [term for term in tree.terms(plus, base=base) if coefficients[term[0]] != 0.0]
    replaced: dict[str, Override] = dict(kept or {})
    for _, _, adapter in terms:
        replaced |= adapter.overrides
    for node, coefficient, adapter in read_terms(
        tree, {node: coefficients[node] for node in changed}, base=base
    ):
        counts = replace(adapter, modules=increments_under(replaced, adapter.modules), overrides={})
        terms.append((node, coefficient, counts))
    return terms


def _refuse_parts(added: Mapping[str, Weight], changed: Sequence[str]) -> None:
    """Refuse a difference with overrides in which a node stays with another coefficient.

    Raises:
        SpecError: a node does; names it.
    """
    for node in changed:
        if node in added:
            raise SpecError(
                f"{node}: it would stay with another coefficient, and overrides are on these "
                "lineages, which have none",
                "name a path instead of a blend, or give the nodes one weight",
            )


def has_overrides(tree: AdapterTree, node: str) -> bool:
    """Return whether a node replaces tensors of the base; reads only the header of its file."""
    outline = tree.outline(node)
    return outline is not None and bool(outline.overrides)


def read_terms(
    tree: AdapterTree, coefficients: Mapping[str, Weight], *, base: nn.Module | None = None
) -> list[Term]:
    """Return the terms of node → coefficient, in the order of the sum; skip coefficients of 0.

    Raises:
        FolderError, FormatError: a node's files are gone or broken; names the node.
        BaseMismatch: an adapter's modules can't be renamed to the base's names; names the node.
        SpecError: a pattern of a weight matches no module; names the node.
    """
    found: list[tuple[str, Weight, Adapter]] = []
    for node in sorted(coefficients, key=depth_first):
        coefficient = coefficients[node]
        if coefficient == 0.0:
            continue
        adapter = tree.adapter(node)
        if adapter is None:  # a group adds nothing, and neither does a fresh node: its B is zero
            continue
        found.append((node, coefficient, adapter))
    terms = weighed_terms(found)
    if base is None:
        return terms
    named = []
    for node, number, adapter in terms:
        named.append((node, number, call_named(node, names_of(base).bound, adapter)))
    return named


def as_term(node: str, weight: Weight, adapter: Adapter) -> Term:
    """Return the term of a node; weights per module are folded into the adapter."""
    if isinstance(weight, float):
        return node, weight, adapter
    return node, 1.0, call_named(node, adapter.weighed, weight)


def read_uncached(tree: AdapterTree, path: str) -> Adapter:
    """Read a node's adapter, an empty one for a group, without keeping it in the tree.

    `AdapterTree.adapter` would keep every adapter of a large tree in memory.

    Raises:
        SpecError: it holds NaN or an infinity; names the node, the module and the tensor.
        FolderError, FormatError: the node's files are gone or broken; names the node.
    """
    node = tree[path]
    if node.loaded is None and node.source is not None:
        adapter = call_named(path, node.source.load)
        refuse_broken(path, adapter)
        return adapter
    return read_finite(tree, path)


def read_finite(tree: AdapterTree, path: str) -> Adapter:
    """Return a node's adapter, an empty one for a group; raises like `read_uncached`."""
    adapter = tree.adapter(path) or Adapter({})
    refuse_broken(path, adapter)
    return adapter


def added_up(terms: list[Term], *, base: nn.Module | None = None) -> Adapter:
    """Return the sum of some terms as one adapter, exact and of rank Σr.

    Raises:
        ShapeMismatch: two nodes change one module in different shapes; names both and the module.
        BaseMismatch: two nodes were made for bases that differ, or name one module in two ways.
    """
    check_spelling(terms, base)
    pairs, nodes = [], []
    for node, coefficient, adapter in terms:
        pairs.append((adapter, coefficient))
        nodes.append(node)
    flat = combine(pairs, names=nodes)
    # A negative lora_alpha is legal but surprises readers of the files, so the sign goes into B.
    return flat.map(_with_positive_scale)


def check_spelling(terms: list[Term], base: nn.Module | None = None) -> None:
    """Refuse terms that name one module in two ways, because an engine would use only one of them.

    Raises:
        BaseMismatch: two names look like one module's; names the nodes and the modules.
    """
    whose: dict[str, str] = {}
    for node, _, adapter in terms:
        for name in adapter.modules:
            whose.setdefault(name, node)
    # Without a base, two spellings of one module can't be told from two modules: refuse both.
    twice = spelled_twice(whose) if base is None else spelled_twice(whose, names_of(base).has)
    if twice is None:
        return
    nodes = listing(dict.fromkeys(whose[name] for name in twice))
    raise BaseMismatch(
        f"{nodes}: {twice[0]} and {twice[1]} look like two names of one module, which an earlier "
        "transformers named otherwise",
        "say which model's names count: pass base=model",
    )


def _with_positive_scale(value: LowRank) -> LowRank:
    return value.folded() if value.scale < 0.0 else value
