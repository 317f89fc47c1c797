"""Overrides in the algebra: what a verb may do with a node that replaces tensors, and what not.

difference of two lineages   the overrides of one may be taken along; none can be taken back,
                             since the base's own tensor is in no node
mean of several nodes        refused: a mean of replacements is none of them
a part of a node             its overrides stay where they are
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..adapter import Adapter
from ..errors import SpecError, listing
from ..lowrank import LowRank
from ..override import Override, counted, tensor_owner

__all__ = ["check_kept", "refuse_overrides", "under", "without_overrides"]


def refuse_overrides(adapters: Iterable[tuple[str, Adapter]], verb: str) -> None:
    """Refuse nodes that replace tensors of the base.

    Args:
        adapters: with their names.
        verb: said in the error: ``merged``, ``hoisted``.

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
    """Return the increments of an adapter alone."""
    return replace(adapter, overrides={}) if adapter.overrides else adapter


def under(overrides: Mapping[str, Override], modules: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Return what counts of increments above a node that has these overrides."""
    stands = {tensor: (("above/node", override),) for tensor, override in overrides.items()}
    found = {}
    for name, value in modules.items():
        own = counted("above", name, value, stands)
        if own is not None:
            found[name] = own
    return found


def check_kept(
    above: Iterable[tuple[str, Adapter]], kept: Mapping[str, Override], what: str
) -> None:
    """Check that no override is lost from a lineage, unless one below stands for it anyway.

    Args:
        above: the nodes that leave the lineage, or whose weight changes in it.
        kept: the overrides of the node below.
        what: said in the error.

    Raises:
        SpecError: one would be; names the node and the tensor.
    """
    for name, adapter in above:
        for tensor in adapter.overrides:
            mine = kept.get(tensor)
            if mine is None or mine.rows is not None:
                raise SpecError(
                    f"{name}: replaces {tensor}, and {what} can't take that back: the base's own "
                    f"{tensor_owner(tensor)[1]} is in no node",
                    f"give the node its own first: modules_to_save=[{tensor_owner(tensor)[0]!r}], "
                    "or move it with the node that replaces it",
                )
