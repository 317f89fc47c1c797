"""Overrides in the algebra: the rules for verbs on nodes that replace tensors of the base.

difference of two lineages   may add an override, but can't undo one: no node holds the base's own
                             tensor
mean of several nodes        refused: replacements don't average
a part of a node             the overrides stay in the node
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..adapter import Adapter
from ..errors import SpecError, listing
from ..lowrank import LowRank
from ..override import Override, counted, tensor_owner

__all__ = ["check_kept", "increments_under", "refuse_overrides", "without_overrides"]


def refuse_overrides(adapters: Iterable[tuple[str, Adapter]], verb: str) -> None:
    """Refuse nodes that replace tensors of the base.

    Args:
        adapters: with their names.
        verb: a participle for the error: ``merged``, ``hoisted``.

    Raises:
        SpecError: one does; names it and the tensors.
    """
    for name, adapter in adapters:
        if adapter.overrides:
            raise SpecError(
                f"{name}: replaces {listing(adapter.overrides, most=3)}, and can't be {verb}: "
                "replacements do not add up",
                "leave the node out; or split its increments off first, which leaves the overrides "
                "in it: lora-tree split, lora_tree.split(tree, path, to=…, modules=…)",
            )


def without_overrides(adapter: Adapter) -> Adapter:
    """Return the adapter with its increments only."""
    return replace(adapter, overrides={}) if adapter.overrides else adapter


def increments_under(
    overrides: Mapping[str, Override], modules: Mapping[str, LowRank]
) -> dict[str, LowRank]:
    """Return the parts of increments above a node that its overrides don't drop."""
    replacing = {tensor: (("above/node", override),) for tensor, override in overrides.items()}
    found = {}
    for name, value in modules.items():
        own = counted("above", name, value, replacing)
        if own is not None:
            found[name] = own
    return found


def check_kept(
    above: Iterable[tuple[str, Adapter]], kept: Mapping[str, Override], what: str
) -> None:
    """Refuse a change that takes an override from a lineage, unless the node below has its own.

    Args:
        above: the nodes that leave the lineage, or whose weight changes in it.
        kept: the overrides of the node below.
        what: the subject of the error's sentence.

    Raises:
        SpecError: an override would be lost; names the node and the tensor.
    """
    for name, adapter in above:
        for tensor in adapter.overrides:
            own = kept.get(tensor)
            if own is None or own.rows is not None:
                raise SpecError(
                    f"{name}: replaces {tensor}, and {what} can't undo that: no node holds the "
                    f"base's own {tensor_owner(tensor)[1]}",
                    f"give the node its own first: modules_to_save=[{tensor_owner(tensor)[0]!r}], "
                    "or move it with the node that replaces it",
                )
