"""Flatten a lineage or blend into one adapter, and refuse the sums that can't be one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from .adapter import Adapter
from .combining import combine
from .errors import BaseMismatch, SpecError, listing
from .lowrank import all_finite, is_sharded
from .nonfinite import refuse_broken
from .override import Override, counted_modules, standing, warn_of_dropped
from .spelling import spelled_twice
from .storage import names_of

__all__ = ["NodeTerms", "flattened", "resolved"]

NodeTerms = list[tuple[str, float, Adapter]]
"""(node, coefficient, adapter), in the order of the sum."""


def flattened(
    terms: NodeTerms,
    *,
    rank: int | None,
    max_error: float | None,
    dtype: torch.dtype | None,
    base: nn.Module | None,
) -> Adapter:
    """Return the sum of some terms as one adapter; the arguments are `AdapterTree.flatten`'s.

    Raises:
        ShapeMismatch, BaseMismatch, SpecError: as `AdapterTree.flatten`.
    """
    _spelled_once(terms, base)
    for node, _, adapter in terms:
        if any(is_sharded(tensor) for _, tensor in adapter.named_tensors()):
            raise SpecError(
                f"{node}: every rank has a part of its factors",
                "flatten inside with model.gathered() as tree:",
            )
    nodes = [node for node, _, _ in terms]
    flat = combine([(adapter, coefficient) for _, coefficient, adapter in terms], names=nodes)
    # Before the truncation: it fails on such numbers too, but its error would name every node.
    _refuse_not_finite(flat, terms)
    try:
        if rank is not None or max_error is not None:
            flat = flat.truncate(rank, max_error=max_error)
        return flat if dtype is None else flat.to(dtype=dtype)
    except SpecError as error:
        raise error.within(listing(nodes)) from error


def resolved(terms: NodeTerms, lineages: list[list[str]]) -> NodeTerms:
    """Return the terms without the overrides and increments that a deeper override replaces.

    Args:
        terms: those of a path or a blend.
        lineages: for each of its paths, the nodes from the root down.

    Raises:
        SpecError: two paths have different overrides of a tensor.
    """
    effective = standing(lineages, {node: adapter.overrides for node, _, adapter in terms})
    counted_overrides: dict[str, dict[str, Override]] = {}
    for tensor, stack in effective.items():
        for node, override in stack:
            counted_overrides.setdefault(node, {})[tensor] = override
    counting = []
    dropped: list[str] = []
    for node, coefficient, adapter in terms:
        modules, lines = counted_modules(node, adapter.modules, effective)
        dropped += lines
        # A carried tensor of the base is dropped if an override replaces that tensor.
        unchanged = {name: t for name, t in adapter.unchanged.items() if name not in effective}
        own = counted_overrides.get(node, {})
        made = replace(adapter, modules=modules, unchanged=unchanged, overrides=own)
        counting.append((node, coefficient, made))
    warn_of_dropped(dropped, stacklevel=3)
    return counting


def _spelled_once(terms: NodeTerms, base: nn.Module | None) -> None:
    """Refuse a sum that would hold one module under two names."""
    whose: dict[str, str] = {}
    for node, _, adapter in terms:
        for name in adapter.modules:
            whose.setdefault(name, node)  # the error names the topmost node that has it
    twice = spelled_twice(whose) if base is None else spelled_twice(whose, names_of(base).has)
    if twice is None:
        return
    one, other = twice
    nodes = listing(dict.fromkeys((whose[one], whose[other])))
    raise BaseMismatch(
        f"{nodes}: {one} and {other} look like two names of one module, which an earlier "
        "transformers named otherwise; written side by side, one of them would be lost"
        + ("" if base is None else f"; the {type(base).__name__} given does not have both"),
        "say which model's names count: tree.flatten(…, base=model), "
        "lora-tree export --base FOLDER_OR_ID",
    )


def _refuse_not_finite(flat: Adapter, terms: NodeTerms) -> None:
    """Refuse a sum that is not finite: a number of a node, or scale · B, or the product with A.

    Raises:
        SpecError: names the node and the module; of a node's number, the tensor too.
    """
    broken = [name for name, value in flat.modules.items() if not (value.A.is_meta or value.fits())]
    replaced = [override.values for override in flat.overrides.values()]
    if broken or not all_finite(tensor for tensor in replaced if not tensor.is_meta):
        for node, _, adapter in terms:
            refuse_broken(node, adapter)
    if broken:
        nodes = [node for node, _, adapter in terms if broken[0] in adapter.modules]
        raise SpecError(
            f"{listing(nodes)}: {broken[0]}: the factors are finite, but not their scales times B, "
            "or the product with A, in fp32",
            f"coefficients: {', '.join(f'{node} {c:g}' for node, c, _ in terms)}",
        )
