"""Compute the changes of a path to a base: parameter → the increments to add.

Everything is checked against the shapes of the base's skeleton. A parameter itself is read only if
a bound on the factors can't show that the sum stays finite (`Write.check_finite`).

Law: each parameter is written once, under one name, and belongs to one module only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..adapter import Adapter
from ..blend import Blend
from ..engine.arithmetic import Scratch
from ..engine.finite import check_override_numbers, check_sum, harmless
from ..errors import BaseMismatch, LoraTreeError, TiedWeights, UnmergedOnly, listing
from ..lowrank import LowRank
from ..override import Override
from ..renaming import Renaming
from ..sites import Site, find_site, find_tensor_site
from ..tree import AdapterTree
from .names import CheckpointNames
from .shards import Stored
from .unloaded_base import NOTHING_CARRIED

__all__ = ["Write", "writes"]


@dataclass(frozen=True, eq=False)
class Write:
    """One parameter and its increments.

    Args:
        node, module: the first node that changes it, and the module's name, for messages.
        values: the increments in the order of the sum, with their coefficients.
        nodes: the node of each of them.
        is_bias: the parameter is a bias: it gets their biases, not their products.
        attribute: the parameter's name in its module.
        overrides: the overrides of the base's own tensor, in the order in which they are applied.
    """

    node: str
    module: str
    parameter: str
    site: Site
    values: Sequence[LowRank]
    nodes: Sequence[str]
    is_bias: bool = False
    attribute: str = "weight"
    overrides: Sequence[Override] = ()

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Check that a tensor of the checkpoint has the shape of the parameter.

        Raises:
            BaseMismatch: it has another one.
        """
        own = getattr(self.site.module, self.attribute, None)
        if own is None or tuple(own.shape) != tuple(shape):
            expected = None if own is None else tuple(own.shape)
            raise BaseMismatch(
                f"{self.node}: {self.module}: the checkpoint's tensor is {tuple(shape)}, its "
                f"config says {expected}",
                "config.json and the weights are not of one model: download the base again",
            )

    def check_finite(self, dtype: torch.dtype, own: Callable[[], torch.Tensor]) -> None:
        """Check that every number of the parameter stays finite.

        Args:
            dtype: of the tensors in the checkpoint.
            own: reads the parameter; called only if a bound on the factors is not enough.

        Raises:
            BaseMismatch: one would not; names the node that adds the most.
        """
        # For nearly every parameter a bound on the factors is enough, without reading the weight.
        if harmless([(value, 1.0) for value in self.values], dtype):
            return
        parts = [(node, value, 1.0) for node, value in zip(self.nodes, self.values, strict=True)]
        ground = own()
        for override in self.overrides:
            ground = override.applied(ground)
        check_sum(self.site, self.module, ground, parts, Scratch(), is_bias=self.is_bias)

    def check_dtype(self, stored: Stored) -> None:
        """Check that something can be added to a tensor of the checkpoint.

        Raises:
            UnmergedOnly: it is quantised.
        """
        if stored.dtype is None:
            raise UnmergedOnly(
                f"{self.node}: {self.module}: {stored.name} is stored as {stored.spelled}, nothing "
                "can be added to it",
                "name the folder of the base in bf16, fp16 or fp32; or serve the adapter beside it",
            )


def writes(tree: AdapterTree, blend: Blend, model: Any, names: CheckpointNames) -> list[Write]:
    """Return everything that a path writes into a model of these shapes.

    Args:
        model: on any device; meta is enough.
        names: the tensors that its parameters are made of, to compare carried tensors with.

    Raises:
        BaseMismatch: a module is missing, or has another kind or shape; or a tensor that an adapter
            replaces or carries is missing or has another shape.
        TiedWeights: a parameter is another module's too, or has two names in the adapters.
        UnmergedOnly: a delta can't be written into its weight.
    """
    increments: dict[str, list[tuple[str, LowRank]]] = {}
    replaced: dict[str, list[tuple[str, str, Override]]] = {}
    sites: dict[str, Site] = {}
    renaming = Renaming(model)

    def bound(node: str, adapter: Adapter) -> Adapter:
        try:
            resolved = _resolve_carried(renaming.bound(adapter), names)
            _check_fits(resolved, model, sites)
        except LoraTreeError as error:
            raise error.within(node) from error
        return resolved

    for node, coefficient, adapter in tree.terms(blend, bound=bound):
        for name, value in adapter.modules.items():
            # As in a switch, the coefficient goes into the scale, and the factors keep their bits.
            increments.setdefault(name, []).append((node, value.scaled(coefficient)))
        for tensor, override in adapter.overrides.items():
            site, attribute = find_tensor_site(model, tensor)
            sites.setdefault(site.name, site)
            replaced.setdefault(site.name, []).append((node, attribute, override))
    made: list[Write] = []
    for name in dict.fromkeys([*increments, *replaced]):
        made += _writes_of_module(
            name, sites[name], increments.get(name, []), replaced.get(name, [])
        )
    _check_one_owner(made, model)
    return made


def _check_fits(adapter: Adapter, model: Any, sites: dict[str, Site]) -> None:
    """Check an adapter against the model's shapes, and add its sites to ``sites``."""
    for name, value in adapter.modules.items():
        site = sites.setdefault(name, find_site(model, name))
        site.check_shape(value)
        # e.g. a quantised weight, or a bias where the module has none
        reason = site.why_unmerged_only(value)
        if reason:
            raise UnmergedOnly(
                f"{name}: can't be merged: {reason}", "leave the module out of the adapter"
            )
        if not value.is_finite:
            raise BaseMismatch(
                f"{name}: the factors are not finite, and would leave no finite weight",
                "train it again, or remove the node: a diverged training left an infinity or a NaN",
            )
    for tensor, override in adapter.overrides.items():
        site, attribute = find_tensor_site(model, tensor)
        site.check_override_shape(attribute, override)
        check_override_numbers(tensor, override, getattr(site.module, attribute))


def _resolve_carried(adapter: Adapter, names: CheckpointNames) -> Adapter:
    """Return the adapter with carried tensors that differ from the checkpoint's as overrides."""
    own: dict[str, torch.Tensor] = {}
    for name, tensor in adapter.unchanged.items():
        group = names.group(name)
        # A parameter that transformers fuses from several tensors is refused: no PEFT adapter
        # carries one.
        stored = group.stored[0] if group.converter is None else None
        if stored is None or stored.dtype is None or math.prod(stored.shape) != tensor.numel():
            raise BaseMismatch(
                f"{name}: the adapter carries this tensor of its base, the checkpoint has no such "
                "one",
                NOTHING_CARRIED,
            )
        own[name] = stored.read().reshape(tensor.shape)
    return adapter.split_unchanged(own)


def _writes_of_module(
    name: str,
    site: Site,
    values: list[tuple[str, LowRank]],
    replaced: list[tuple[str, str, Override]],
) -> list[Write]:
    nodes = [node for node, _ in values]
    increments = [value for _, value in values]
    # A module's weight and bias are written if something is added to them, and every tensor that is
    # replaced. A bias is a parameter of its own, often in another file of the checkpoint.
    attributes: dict[str, None] = {}
    if increments:
        attributes[site.weight_name] = None
    if any(value.bias is not None for value in increments):
        attributes[site.bias_name] = None
    attributes |= dict.fromkeys([attribute for _, attribute, _ in replaced])
    prefix = f"{site.module_name}." if site.module_name else ""
    made = []
    for attribute in attributes:
        own_overrides = [
            (node, override) for node, other, override in replaced if other == attribute
        ]
        is_bias = attribute == site.bias_name
        adds = increments if attribute in (site.weight_name, site.bias_name) else []
        made.append(
            Write(
                nodes[0] if nodes else own_overrides[0][0],
                name,
                f"{prefix}{attribute}",
                site,
                adds,
                nodes if adds else [],
                is_bias=is_bias,
                attribute=attribute,
                overrides=[override for _, override in own_overrides],
            )
        )
    return made


def _check_one_owner(made: Sequence[Write], model: Any) -> None:
    """Check that each parameter is written under one name and belongs to one module.

    Raises:
        TiedWeights: two modules have it, or two names in the adapters mean it.
    """
    # On the meta device tied weights are separate parameters until tie_weights is called.
    model.tie_weights()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    owners: dict[str, list[str]] = {}
    for shared in names.values():
        for name in shared:
            owners[name] = shared
    written: dict[str, str] = {}
    for write in made:
        # One adapter may name the module (lin), another one its raw parameter (lin.weight).
        other = written.setdefault(write.parameter, write.module)
        if other != write.module:
            raise TiedWeights(
                f"{write.node}: {other} and {write.module} are two names of one weight: one would "
                "be lost",
                "call it by the same name in every adapter on the path",
            )
        others = [name for name in owners.get(write.parameter, []) if name != write.parameter]
        # Trained rows of an embedding are meant for its tied head, too.
        are_rows = all(override.rows is not None for override in write.overrides)
        is_rows_alone = bool(write.overrides) and are_rows and not write.values
        if is_rows_alone and not any(name in written for name in others):
            continue
        if others:
            raise TiedWeights(
                f"{write.node}: {write.module}: its weight is tied to {listing(others)}: merging "
                "would change both",
                "leave the module out of the adapter, or untie the base and save it again",
            )
