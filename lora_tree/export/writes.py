"""The changes of a path in a base: parameter → the increments to add, checked by shapes alone.

Nothing is read of the base but its skeleton; only where a bound on the factors can't tell whether
a sum stays finite, the parameter itself is read (`Write.check_finite`).

Law: each parameter is written once, under one name, and is no other module's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..blend import Blend
from ..carried import check_carried
from ..engine.arithmetic import Scratch
from ..engine.finite import check_sum, harmless
from ..errors import BaseMismatch, LoraTreeError, TiedWeights, UnmergedOnly, listing
from ..lowrank import LowRank
from ..renaming import Renaming
from ..sites import Site, find_site
from ..tree import AdapterTree
from .names import CheckpointNames
from .shards import Stored
from .unloaded_base import NOTHING_CARRIED

__all__ = ["Write", "writes"]


@dataclass(frozen=True, eq=False)
class Write:
    """One parameter and what is added to it.

    Args:
        node, module: the first node that changes it, and the module's name, for messages.
        values: the increments in the order of the sum, with their coefficients.
        nodes: the node of each of them.
        is_bias: their biases go into it, not their products.
    """

    node: str
    module: str
    parameter: str
    site: Site
    values: Sequence[LowRank]
    nodes: Sequence[str]
    is_bias: bool = False

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Check that a tensor of the checkpoint has the shape of the parameter.

        Raises:
            BaseMismatch: it has another one.
        """
        own = self.site.bias if self.is_bias else self.site.weight
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
            own: reads the parameter; called only where a bound on the factors can't tell.

        Raises:
            BaseMismatch: one would not; names the node that adds the most.
        """
        # A bound on the factors shows it for nearly every parameter, without a read of the weight.
        if harmless([(value, 1.0) for value in self.values], dtype):
            return
        parts = [(node, value, 1.0) for node, value in zip(self.nodes, self.values, strict=True)]
        check_sum(self.site, self.module, own(), parts, Scratch(), is_bias=self.is_bias)

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
        model: on the meta device, or anywhere.
        names: the tensors that its parameters are made of, for those that adapters carry.

    Raises:
        BaseMismatch: a module is not there, or of another kind or shape, or carries a tensor that
            is not the base's.
        TiedWeights: a parameter is another module's too, or has two names in the adapters.
        UnmergedOnly: a delta can't be written into its weight.
    """
    found: dict[str, list[tuple[str, LowRank]]] = {}
    sites: dict[str, Site] = {}
    renaming = Renaming(model)
    for node, coefficient, adapter in tree.terms(blend):
        try:
            bound = renaming.bound(adapter)
            for name, value in bound.modules.items():
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
                        "train it again, or remove the node: a diverged training left an infinity "
                        "or a NaN",
                    )
                # As a switch does it: the coefficient goes into the scale, and the factors keep
                # their bits.
                found.setdefault(name, []).append((node, value.scaled(coefficient)))
            for name, tensor in bound.unchanged.items():
                _check_same(name, tensor, names)
        except LoraTreeError as error:
            raise error.within(node) from error
    made: list[Write] = []
    for name, values in found.items():
        made += _writes_of_module(name, sites[name], values)
    _check_one_owner(made, model)
    return made


def _writes_of_module(name: str, site: Site, values: list[tuple[str, LowRank]]) -> list[Write]:
    prefix = f"{site.module_name}." if site.module_name else ""
    nodes = [node for node, _ in values]
    own = [value for _, value in values]
    made = [Write(nodes[0], name, f"{prefix}{site.weight_name}", site, own, nodes)]
    # The bias of the base is a parameter of its own, often in another file of the checkpoint.
    if any(value.bias is not None for value in own):
        bias_name = f"{prefix}{site.bias_name}"
        made.append(Write(nodes[0], name, bias_name, site, own, nodes, is_bias=True))
    return made


def _check_one_owner(made: Sequence[Write], model: Any) -> None:
    """Check that a parameter is written under one name, and is no other module's.

    Raises:
        TiedWeights: two modules have it, or two names in the adapters mean it.
    """
    # A skeleton made on the meta device has its tied weights apart until it is told to tie them.
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
        if others:
            raise TiedWeights(
                f"{write.node}: {write.module}: its weight is tied to {listing(others)}: merging "
                "would change both",
                "leave the module out of the adapter, or untie the base and save it again",
            )


def _check_same(name: str, tensor: torch.Tensor, names: CheckpointNames) -> None:
    """Check that a tensor which an adapter carries is the checkpoint's own."""
    group = names.group(name)
    # One that transformers fuses from several is not compared: no adapter of PEFT carries such one.
    stored = group.stored[0] if group.converter is None else None
    if stored is None or stored.dtype is None or math.prod(stored.shape) != tensor.numel():
        raise BaseMismatch(
            f"{name}: the adapter carries this tensor of its base, the checkpoint has no such one",
            NOTHING_CARRIED,
        )
    check_carried(name, tensor, stored.read().reshape(tensor.shape), NOTHING_CARRIED)
