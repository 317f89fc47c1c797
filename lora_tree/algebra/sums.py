"""Sums over the nodes of a tree: a lineage or a blend, less another one, with each node taken once.

    path − parent of its new place  =  Σ (c_n − c'_n) · adapter_n      equal coefficients cancel

Nodes that cancel are not read and cost no rank. Squashing, rebasing and comparing paths are such
sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..adapter import Adapter
from ..blend import Blend, depth_first
from ..combining import combine
from ..errors import BaseMismatch, listing
from ..lowrank import LowRank
from ..spelling import spelled_twice
from ..storage import names_of
from ..tree import AdapterTree
from .deviation import named

__all__ = ["Term", "added_up", "aligned", "less"]

Term = tuple[str, float, Adapter]
"""(node, coefficient, its adapter)."""


def less(
    tree: AdapterTree, plus: Blend, minus: Blend = "", *, base: nn.Module | None = None
) -> list[Term]:
    """Return the terms of one path or blend less those of another, in the order of the sum.

    Args:
        tree: both are its paths.
        plus, minus: a path or a blend each; ``""`` is the bare base.
        base: give every adapter the names that its modules have in this model today.

    Raises:
        PathError: a node is not there.
        SpecError: a weight is not finite.
        FolderError, FormatError: a node's files are gone or broken; names the node.
    """
    coefficients = tree.coefficients(plus)
    for node, coefficient in tree.coefficients(minus).items():
        coefficients[node] = coefficients.get(node, 0.0) - coefficient
    terms: list[Term] = []
    for node in sorted(coefficients, key=depth_first):
        coefficient = coefficients[node]
        if coefficient == 0.0:
            continue
        adapter = tree.adapter(node)
        if adapter is None:  # a group adds nothing, and neither does a fresh node: its B is zero
            continue
        if base is not None:
            adapter = named(node, names_of(base).bound, adapter)
        terms.append((node, coefficient, adapter))
    return terms


def added_up(terms: list[Term], *, base: nn.Module | None = None) -> Adapter:
    """Return the sum of some terms as one adapter, exact and of rank Σr.

    Raises:
        ShapeMismatch: two nodes change one module in different shapes; names both and the module.
        BaseMismatch: two nodes were made for bases that differ, or name one module in two ways.
    """
    check_spelling(terms, base)
    flat = combine([(adapter, c) for _, c, adapter in terms], names=[node for node, _, _ in terms])
    # A negative lora_alpha is legal and surprises every reader of the files; the sign belongs into
    # B.
    return replace(flat, modules={name: _upright(v) for name, v in flat.modules.items()})


def aligned(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters with raw parameters named as those that are certain of the order do."""
    certain: dict[str, tuple[str, ...]] = {}
    for adapter in adapters:
        sure = {m: order for m, order in adapter.nesting.items() if m not in adapter.assumed}
        certain.update(sure)
    return [adapter.renested(certain) for adapter in adapters]


def check_spelling(terms: list[Term], base: nn.Module | None = None) -> None:
    """Refuse terms that name one module in two ways, of which an engine would lose one.

    Raises:
        BaseMismatch: two names look like one module's; names the nodes and the modules.
    """
    whose = {name: node for node, _, adapter in reversed(terms) for name in adapter.modules}
    has = names_of(base).has if base is not None else None
    twice = spelled_twice(whose) if has is None else spelled_twice(whose, has)
    if twice is None:
        return
    nodes = listing(dict.fromkeys(whose[name] for name in twice))
    raise BaseMismatch(
        f"{nodes}: {twice[0]} and {twice[1]} look like two names of one module, which an earlier "
        "transformers named otherwise",
        "say which model's names count: pass base=model",
    )


def _upright(value: LowRank) -> LowRank:
    return value.folded() if value.scale < 0.0 else value
