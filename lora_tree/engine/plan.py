"""Plan: what each site gets for a path or a blend: site name → terms in the order of the sum, and
the overrides below them.

A plan has a `mark`, a number by which key/value caches and recorded backwards are told apart. Two
plans of the same factors have the same mark, even if one was dropped and made again, or its factors
were read from their files again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..lowrank import LowRank
from ..override import Override
from ..sites import Site, Ways

__all__ = [
    "EMPTY_PLAN",
    "OverrideTerm",
    "OverrideTerms",
    "PlacedPlan",
    "Plan",
    "Term",
    "Terms",
    "WeightDtypes",
]

WeightDtypes = tuple[torch.dtype | None, ...]
"""The present dtypes of the weights of a plan's sites. A cast of the base changes them, though the
sites stay the same.
"""


# Slots, because a path has one of these for each node and site, and the plans of hundreds of paths
# are kept: a dictionary in each would be as many objects again for the garbage collector.
@dataclass(frozen=True, eq=False, slots=True)
class Term:
    """One node's part at one site: ``coefficient`` · ΔW.

    Args:
        node: the node.
        coefficient: its coefficient in the blend.
        value: the node's increment here.
        version: how often its factors had been written to in place, as training does.
        trained: autograd followed its factors when the term was made.
    """

    node: str
    coefficient: float
    value: LowRank
    version: int
    trained: bool
    _scaled: LowRank | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, node: str, coefficient: float, value: LowRank) -> Term:
        """Return the term of factors as they are now."""
        return cls(node, coefficient, value, _version(value), value.trains)

    @property
    def trains(self) -> bool:
        """True: autograd follows its factors."""
        return self.value.trains

    @property
    def is_unchanged(self) -> bool:
        """True: its factors hold the same numbers, and train or don't, as when it was made."""
        return self.version == _version(self.value) and self.trained == self.value.trains

    @property
    def scaled(self) -> LowRank:
        """The increment with the coefficient in its scale; it shares its factors with `value`."""
        # Kept, because side paths ask for it at every switch; it holds no tensor of its own.
        found = self._scaled
        if found is None:
            found = self.value.scaled(self.coefficient)
            object.__setattr__(self, "_scaled", found)
        return found


Terms = tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class OverrideTerm:
    """One node's override of a tensor at one site; increments are added to it.

    Args:
        node: the node.
        attribute: the tensor of the site's module: ``weight``, ``bias``, ….
        value: the node's override.
        version: how often it had been written to in place, as training does.
        trained: autograd followed it when the term was made.
    """

    node: str
    attribute: str
    value: Override
    version: int
    trained: bool

    @classmethod
    def of(cls, node: str, attribute: str, value: Override) -> OverrideTerm:
        """Return the term of an override as it is now."""
        return cls(node, attribute, value, _override_version(value), value.trains)

    @property
    def trains(self) -> bool:
        """True: autograd follows it."""
        return self.value.trains

    @property
    def is_unchanged(self) -> bool:
        """True: it holds the same numbers, and trains or doesn't, as when the term was made."""
        return self.version == _override_version(self.value) and self.trained == self.value.trains


OverrideTerms = tuple[OverrideTerm, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Site name → its terms, and the sites themselves.

    Args:
        terms: site name → its terms; none where the site has an override alone.
        sites: site name → the site.
        mark: the same number for plans that behave the same.
        adapters: the adapters it was made of. They live as long as the plan, so that their ids can
            be a key for it.
        fixed: no factor is a parameter, so none is ever written to, and the plan can be used again.
    """

    terms: Mapping[str, Terms]
    sites: Mapping[str, Site]
    mark: int = 0
    adapters: tuple[Adapter, ...] = ()
    fixed: bool = True
    overrides: Mapping[str, OverrideTerms] = field(default_factory=dict)
    """Site name → the overrides of its tensors, in the order in which they are applied."""

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every factor, bias and override of it."""
        found: list[Tensor] = []
        for terms in self.terms.values():
            for term in terms:
                found += term.value.tensors
        for overrides in self.overrides.values():
            found += [override.value.values for override in overrides]
        return tuple(found)

    @cached_property
    def _anchors(self) -> tuple[Tensor, ...]:
        """One factor of each adapter that has any; the cache puts an adapter into one buffer."""
        found: list[Tensor] = []
        for adapter in self.adapters:
            for value in adapter.modules.values():
                found.append(value.A)
                break
        return tuple(found)

    def places(self) -> tuple[int, ...]:
        """Return the addresses of its adapters' buffers now.

        The cache may evict an adapter while the plan is kept, and send it to another address later.
        Then every address of its factors that was noted before is stale. The result is empty if
        factors train, because such a plan is not kept.
        """
        if not self.fixed:
            return ()
        return tuple([tensor.untyped_storage().data_ptr() for tensor in self._anchors])

    @cached_property
    def is_in_buffers(self) -> bool:
        """True: all its factors lie in the buffers of its adapters. Factors of modules that the
        base fuses do not; they are made for this base.
        """
        buffers = set(self.places())
        return all(tensor.untyped_storage().data_ptr() in buffers for tensor in self.tensors)

    def first_node(self, name: str) -> str:
        """Return the first node of a site, for a message."""
        terms = self.terms[name]
        return terms[0].node if terms else self.overrides[name][0].node

    @cached_property
    def biased(self) -> frozenset[str]:
        """The sites at which a term has a bias."""
        found = []
        for name, terms in self.terms.items():
            if any(term.value.bias is not None for term in terms):
                found.append(name)
        return frozenset(found)

    def look(self, base: nn.Module) -> WeightDtypes | None:
        """Return the dtypes of the sites' weights now; None if the base does not have every site
        any more.
        """
        return self.ways.dtypes(base) if self.sites else ()

    @cached_property
    def ways(self) -> Ways:
        """The ways to its sites' modules."""
        return Ways(self.sites.values())

    def is_unchanged(self) -> bool:
        """Return whether its factors hold the same numbers as before, and the same ones train."""
        if self.fixed:
            return True
        # Versions count writes in place, as an optimiser's; the flags are set by `trainable`, and
        # those of two tensors of one node and site may differ.
        for terms in self.terms.values():
            for term in terms:
                if not term.is_unchanged:
                    return False
        for overrides in self.overrides.values():
            for override in overrides:
                if not override.is_unchanged:
                    return False
        return True


EMPTY_PLAN = Plan({}, {})


@dataclass(frozen=True, eq=False)
class PlacedPlan:
    """A plan whose sites were found in the base just now.

    Args:
        plan: the plan.
        dtypes: of the sites' weights.
        trains: autograd follows one of its factors.
    """

    plan: Plan
    dtypes: WeightDtypes
    trains: bool


def _override_version(override: Override) -> int:
    """Return how often an override that trains was written to; 0 for others."""
    return override.values._version if override.is_trainable else 0


def _version(value: LowRank) -> int:
    """Return how often factors that train, or did, were written to; 0 for others, which are never
    written to.
    """
    if not value.is_trainable:
        return 0
    written = value.A._version + value.B._version
    return written if value.bias is None else written + value.bias._version
