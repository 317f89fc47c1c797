"""Check that a plan can be written into the weights, before anything is written.

    training    factors that autograd follows can't be merged: their gradient would be lost
    shards      a weight that is sharded over several ranks can't take a whole sum
    sites       a weight can be written, has one name, and shares its memory with no other module
    numbers     every number of a weight stays finite

The answer for a plan holds as long as no tensor of the base has moved and no weight was cast, so a
path that was merged before costs one walk over the base's addresses.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...errors import StateError, TiedWeights, UnmergedOnly, listing
from ...lowrank import is_sharded
from ...sites import Site
from ..arithmetic import Scratch, exact_mode
from ..finite import check_sum, suspects
from ..plan import OverrideTerm, PlacedPlan, Plan, WeightDtypes
from .pristine import Pristine

__all__ = ["Mergeable"]


class _Owner(Protocol):
    @property
    def paths(self) -> Sequence[str]:
        """The nodes whose factors the model has made parameters."""


class Mergeable:
    """The plans that were found to be mergeable into a base.

    Args:
        base: the model.
        pristine: the copies of the base's own weights.
        scratch: buffers for sums that are computed and dropped.
    """

    def __init__(self, base: nn.Module, pristine: Pristine, scratch: Scratch) -> None:
        self._base, self._pristine, self._scratch = base, pristine, scratch
        self._untied: set[tuple[str, str]] = set()
        """(site, tensor) that shares its memory with no other module."""
        self._writable: weakref.WeakSet[Plan] = weakref.WeakSet()
        self._finite: weakref.WeakKeyDictionary[Plan, WeightDtypes] = weakref.WeakKeyDictionary()
        """Plan → the dtypes of weights for which a bound proved that every finite one stays finite.
        """
        # The address of every tensor of the base, when the two answers above were found.
        self._addresses: list[int] = []

    def check(self, placed: PlacedPlan, owner: _Owner | None = None) -> None:
        """Check that every site of the plan can be written to.

        Args:
            placed: the plan.
            owner: knows the nodes whose factors the model has made parameters.

        Raises:
            UnmergedOnly, TiedWeights: one can't; says which, why and what to do.
            BaseMismatch: a weight would get a number that is not finite; names the node and the
                module.
            StateError: a node trains, or the base is sharded; names the node or the site.
        """
        plan = placed.plan
        if not plan.terms:
            return
        if placed.trains:
            # Shards first: with a sharded base it would not help to freeze the node.
            _refuse_sharded(plan)
            _refuse_training(plan, () if owner is None else owner.paths)
        # A weight at another address was replaced or moved. It may be tied now, or of another kind.
        addresses = _addresses(self._base)
        if addresses != self._addresses:
            self._untied.clear()
            self._writable.clear()
            self._addresses = addresses
        if plan not in self._writable:
            self._check_sites(plan)
            self._writable.add(plan)
        if self._finite.get(plan) != placed.dtypes:
            self._check_finite(placed)

    # ------------------------------------------------------------------ numbers
    def _check_finite(self, placed: PlacedPlan) -> None:
        """Check that every number of a weight stays finite; the sum is computed only where a bound
        can't tell.
        """
        plan = placed.plan
        names = suspects(plan)
        for name in names:
            site, terms = plan.sites[name], plan.terms[name]
            # An override without increments was found to be finite when it was bound.
            if not terms:
                continue
            parts = [(term.node, term.value, term.coefficient) for term in terms]
            for attribute in _added_to(plan, name):
                target: Tensor = getattr(site.module, attribute)
                is_bias = attribute == site.bias_name
                with exact_mode(target.device):
                    own = self._ground(plan, name, attribute).to(target.device)
                    check_sum(site, name, own, parts, self._scratch, is_bias=is_bias)
        # A bound holds for any weight of these dtypes; a sum that was computed holds for this
        # weight alone. And factors that are parameters may be written to.
        if not names and plan.fixed:
            self._finite[plan] = placed.dtypes

    def _ground(self, plan: Plan, name: str, attribute: str) -> Tensor:
        """Return what increments are added to: the base's own numbers, or what overrides them."""
        ground = self._own_value(plan.sites[name], attribute)
        for override in plan.overrides.get(name, ()):
            if override.attribute == attribute:
                ground = override.value.applied(ground)
        return ground

    def _own_value(self, site: Site, attribute: str) -> Tensor:
        """Return the base's own numbers: the copy; or the weight itself, if there is no copy."""
        kept = self._pristine.known(site.module, attribute)
        if kept is not None:
            return kept
        own: Tensor = getattr(site.module, attribute)
        return own.detach()

    # ------------------------------------------------------------------ sites
    def _check_sites(self, plan: Plan) -> None:
        """Check that each site can be written, has one name, and shares its memory with no other
        module.
        """
        _refuse_sharded(plan)
        names: dict[tuple[int, str], str] = {}
        unknown: list[tuple[Site, str, str]] = []
        for name, terms in plan.terms.items():
            site, node = plan.sites[name], plan.first_node(name)
            for term in terms:
                site.check_mode(term.value, merged=True, node=term.node)
            replacing = plan.overrides.get(name)
            if replacing and not self._pristine.keeps:
                raise UnmergedOnly(
                    f"{replacing[0].node}: {name}: an override can't be taken back without a copy "
                    'of the base\'s own weight, and pristine="none" keeps none',
                    'attach with pristine="auto", or use activate(…, mode="unmerged")',
                )
            # torch finds one module under two names if it is registered twice.
            other = names.setdefault((id(site.module), site.weight_name), name)
            if other != name:
                raise TiedWeights(
                    f"{node}: {other} and {name} are two names of one weight: "
                    "merging both would lose one of the increments",
                    "call it by the same name in every adapter on the path",
                )
            for attribute in _written(plan, name):
                if (name, attribute) not in self._untied:
                    unknown.append((site, attribute, node))
        if unknown:
            self._check_ties(unknown, plan)

    def _check_ties(self, written: Sequence[tuple[Site, str, str]], plan: Plan) -> None:
        """Check that no other module uses a tensor that is about to be written.

        Modules that share a tensor may all replace it by the same numbers: it is written twice.

        Args:
            written: (site, tensor, a node that writes it).
            plan: the plan.
        """
        # Memory is compared, not names: a tied weight may be a view of a part of another one.
        spans = list(_spans(self._base))
        for site, attribute, node in written:
            start, end = _span(getattr(site.module, attribute))
            own = id(site.module), attribute
            shared = []
            replaced = _equally_replaced(plan, site, attribute)
            for first, last, module, (name, leaf) in spans:
                is_other = (module, leaf) != own and (module, leaf) not in replaced
                if first < end and last > start and is_other:
                    shared.append(f"{name}.{leaf}")
            if shared:
                raise TiedWeights(
                    f"{node}: {site.name}: its {attribute} is tied to {listing(sorted(shared))}: "
                    "merging would change both",
                    'use activate(…, mode="unmerged"), which changes this module alone',
                    f"or untie the base: module.{attribute} = "
                    f"nn.Parameter(module.{attribute}.detach().clone())",
                    "or leave the module out of the adapter",
                )
            # The next plan is checked again: its overrides of the other modules may differ.
            if not replaced:
                self._untied.add((site.name, attribute))


def _added_to(plan: Plan, name: str) -> list[str]:
    """Return the names of the tensors to which a plan adds at a site: weight, and bias if any."""
    site = plan.sites[name]
    if not plan.terms[name]:
        return []
    return [site.weight_name, site.bias_name] if name in plan.biased else [site.weight_name]


def _written(plan: Plan, name: str) -> list[str]:
    """Return the names of all tensors that a plan writes at a site."""
    found = _added_to(plan, name)
    for override in plan.overrides.get(name, ()):
        if override.attribute not in found:
            found.append(override.attribute)
    return found


def _equally_replaced(plan: Plan, site: Site, attribute: str) -> set[tuple[int, str]]:
    """Return the tensors, (id of module, name), that a plan replaces as it does this one.

    Nothing is added to any of them. PEFT gives the trained rows of an embedding to a tied head too.
    """
    if plan.terms[site.name]:
        return set()
    own_terms = _replacing(plan, site.name, attribute)
    replaced: set[tuple[int, str]] = set()
    for name, overrides in plan.overrides.items():
        for override in overrides:
            other_terms = _replacing(plan, name, override.attribute)
            if name != site.name and not plan.terms[name] and _are_equal(own_terms, other_terms):
                replaced.add((id(plan.sites[name].module), override.attribute))
    return replaced


def _replacing(plan: Plan, name: str, attribute: str) -> list[OverrideTerm]:
    return [
        override for override in plan.overrides.get(name, ()) if override.attribute == attribute
    ]


def _are_equal(own_terms: Sequence[OverrideTerm], other_terms: Sequence[OverrideTerm]) -> bool:
    if len(own_terms) != len(other_terms) or not own_terms:
        return False
    for one, other in zip(own_terms, other_terms, strict=True):
        x, y = one.value, other.value
        if x.rows != y.rows or x.values.shape != y.values.shape:
            return False
        if x.values is not y.values and not torch.equal(x.values, y.values):
            return False
    return True


def _refuse_sharded(plan: Plan) -> None:
    """Raise for the first site of a plan whose weight is sharded over several ranks."""
    for name, site in plan.sites.items():
        weight = site.weight
        if weight is not None and is_sharded(weight):
            raise StateError(
                f"{name}: the base is sharded, and a path can't be merged into parts of its "
                "weights",
                'activate(…, mode="unmerged")',
            )


def _refuse_training(plan: Plan, owned: Sequence[str]) -> None:
    """Raise for the first node of a plan that trains."""
    for name, terms in plan.terms.items():
        training = [term.node for term in terms if term.trains]
        training += [override.node for override in plan.overrides.get(name, ()) if override.trains]
        for node in training:
            freeze = "adapter.with_tensors(torch.Tensor.detach)"
            if node in owned:
                freeze = "model.trainable()"
            raise StateError(
                f"{node}: {name}: trains, and can't be merged while it does",
                f'activate(…, mode="unmerged"), or {freeze} first',
            )


# ---------------------------------------------------------------------- where tensors lie
def _addresses(base: nn.Module) -> list[int]:
    """Return the address of every tensor of every module; a shared tensor's once for each use."""
    # By hand, because this runs at every switch, and `modules()` takes several times as long.
    tensors: list[Tensor | None] = []
    modules: list[nn.Module | None] = [base]
    around: set[nn.Module] = set()
    for module in modules:  # the list grows while it is walked
        if module is None:
            continue
        tensors += module._parameters.values()
        if module._buffers:
            tensors += module._buffers.values()
        # A module may have a second name, and a child may refer to its parent.
        if module._modules and module not in around:
            around.add(module)
            modules += module._modules.values()
    addresses: list[int] = []
    for tensor in tensors:
        if tensor is None:
            continue
        try:
            address = tensor.data_ptr()
        except (RuntimeError, ValueError):
            continue  # it has no memory yet, or several pieces of it
        addresses.append(address)
    return addresses


def _spans(base: nn.Module) -> Iterator[tuple[int, int, int, tuple[str, str]]]:
    """Yield (start, end, id of module, (module, name)) for every tensor of every module; a shared
    tensor once for each use.
    """
    for name, module in base.named_modules():
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                if tensor is None or is_lazy(tensor) or tensor.layout is not torch.strided:
                    continue  # it has no memory yet, or several pieces of it
                if not tensor.is_meta:
                    yield (*_span(tensor), id(module), (name, leaf))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of a tensor and the one behind its last number."""
    reach = 0
    if tensor.numel():
        reach = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            reach += (size - 1) * stride
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()
