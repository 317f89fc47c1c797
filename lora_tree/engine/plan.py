"""Plan: what each site gets for a path or a blend: site name → terms in the order of the sum.

Binding comes first: an adapter fits the base or it does not, on any path, so it is checked once.

A plan has a `mark`, a number by which key/value caches and recorded backwards are told apart. Two
plans of the same factors have the same mark, even if one was dropped and made again, or its factors
were read from files anew.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..base_names import warn_of_base
from ..carried import check_carried
from ..errors import BaseMismatch, LoraTreeError
from ..lowrank import LowRank
from ..renaming import Renaming
from ..sites import Site, find_site
from .last_used import LastUsed

__all__ = ["EMPTY_PLAN", "Binder", "Marks", "PlacedPlan", "Plan", "Term", "Terms", "WeightDtypes"]

KEPT_PLANS = 256
KEPT_MARKS = 1024

_requires_grad = operator.attrgetter("requires_grad")

_MARKS = itertools.count(1)

WeightDtypes = tuple[torch.dtype | None, ...]
"""The dtypes of the weights of a plan's sites now. They change if the base is cast, and the sites
stay.
"""


@dataclass(frozen=True, eq=False)
class Term:
    """One node's part at one site: ``coefficient`` · ΔW.

    Args:
        node: the node.
        coefficient: its coefficient in the blend.
        value: the node's increment here.
        version: how often its factors had been written to in place, as training does.
    """

    node: str
    coefficient: float
    value: LowRank
    version: int

    @property
    def trains(self) -> bool:
        """Whether autograd follows its factors."""
        return self.value.trains

    # Kept, because merging and side paths ask for it at every switch; it holds no tensor of its
    # own.
    @cached_property
    def scaled(self) -> LowRank:
        """The increment with the coefficient in its scale; it shares its factors with `value`."""
        return self.value.scaled(self.coefficient)


Terms = tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Site name → its terms, and the sites themselves.

    Args:
        terms: site name → its terms.
        sites: site name → the site.
        mark: the same number for plans that behave the same.
        adapters: the adapters it was made of. They live as long as the plan, so that it can be
            known by their ids.
        live: the (site name, node) whose factors trained when it was made.
        fixed: no factor is a parameter, so none is ever written to, and the plan can be used again.
    """

    terms: Mapping[str, Terms]
    sites: Mapping[str, Site]
    mark: int = 0
    adapters: tuple[Adapter, ...] = ()
    live: frozenset[tuple[str, str]] = frozenset()
    fixed: bool = True

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every factor and bias of it."""
        found: list[Tensor] = []
        for terms in self.terms.values():
            for term in terms:
                found += term.value.tensors
        return tuple(found)

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
        found = []
        for site in self.sites.values():
            if not site.is_in(base):
                return None
            found.append(site.dtype)
        return tuple(found)

    def is_as_it_was(self) -> bool:
        """Whether its factors have the numbers that they had, and those train that did."""
        if self.fixed:
            return True
        # Versions count writes in place, as an optimiser's; the flags are set by `trainable`.
        for name, terms in self.terms.items():
            for term in terms:
                if term.version != _version(term.value):
                    return False
                if term.trains != ((name, term.node) in self.live):
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


class Marks:
    """Key → mark, for the last keys used."""

    def __init__(self) -> None:
        self._of: OrderedDict[Hashable, int] = OrderedDict()

    def of(self, key: Hashable) -> int:
        """Return the mark of ``key``, a new one if it is not known."""
        # Taken out and put back at the end, where the last used are.
        mark = self._of.pop(key, None) or next(_MARKS)
        self._of[key] = mark
        if len(self._of) > KEPT_MARKS:
            self._of.popitem(last=False)
        return mark

    @staticmethod
    def new() -> int:
        """Return a mark that nothing else has."""
        return next(_MARKS)


class Binder:
    """Adapters checked against one base, the sites they use, and the plans of the last paths.

    Args:
        base: the model.
        base_name: the tree's name for it.
        own_name: the model's own name, if it has one.
        kept: how many plans stay, with their adapters, while nothing uses them.
        origin: returns a key for an adapter: itself, held weakly, or a key that outlives it and
            stands for the same numbers.
    """

    def __init__(
        self,
        base: nn.Module,
        base_name: str | None,
        *,
        own_name: str | None = None,
        kept: int = KEPT_PLANS,
        origin: Callable[[Adapter], Hashable] = weakref.ref,
    ) -> None:
        self._base = base
        self._base_name = base_name
        self._own_name = own_name or base_name
        self._warned: set[str] = set()
        """The bases that adapters named and a warning told of."""
        self._origin = origin
        self._renaming = Renaming(base)
        self._sites: dict[str, Site] = {}
        # None stands for an adapter that needs no renaming: a value that held its own weak key
        # would keep it alive.
        self._bound: weakref.WeakKeyDictionary[Adapter, tuple[Adapter | None, list[Site]]]
        self._bound = weakref.WeakKeyDictionary()
        self._plans: LastUsed[Plan] = LastUsed(kept)
        self._marks = Marks()

    def plan(self, terms: list[tuple[str, float, Adapter]]) -> Plan:
        """Return the plan of (node, coefficient, adapter) terms; the same object for a path that
        was used before.

        Raises:
            BaseMismatch: an adapter does not fit; names the node and the module.
        """
        return self.placed(terms).plan

    def placed(self, terms: list[tuple[str, float, Adapter]]) -> PlacedPlan:
        """Return the same plan, with the dtypes of its sites' weights in the base as it is now.

        Raises:
            BaseMismatch: an adapter does not fit; names the node and the module.
        """
        if not terms:
            return PlacedPlan(EMPTY_PLAN, (), False)
        # An id names an adapter as long as it lives, and a plan keeps its adapters alive.
        key = tuple([(id(adapter), coefficient) for _, coefficient, adapter in terms])
        known = self._plans.again(key)
        if known is not None:
            dtypes = known.look(self._base)
            if dtypes is not None:
                return PlacedPlan(known, dtypes, any(map(_requires_grad, known.tensors)))
            # The owner of the base replaced a module. Other plans may have the old one as well.
            self._plans.forget()
        plan = self._made(terms)
        if plan.fixed:
            self._plans.keep(key, plan)
        dtypes = tuple([site.dtype for site in plan.sites.values()])
        return PlacedPlan(plan, dtypes, any(map(_requires_grad, plan.tensors)))

    def _made(self, terms: list[tuple[str, float, Adapter]]) -> Plan:
        # Site by site in the order in which the lineage first names them; within a site in the
        # order of the sum, which decides the bits.
        found: dict[str, list[Term]] = {}
        live: set[tuple[str, str]] = set()
        fixed = True
        for node, coefficient, adapter in terms:
            for name, value in self.bind(node, adapter).modules.items():
                term = Term(node, coefficient, value, _version(value))
                found.setdefault(name, []).append(term)
                if value.is_trainable:
                    fixed = False
                if term.trains:
                    live.add((name, node))
        # The mark comes after binding, which begins new marks if it finds that a module was
        # replaced.
        if fixed:
            origins = tuple([(self._origin(adapter), c) for _, c, adapter in terms])
            mark = self._marks.of(origins)
        else:
            mark = Marks.new()
        return Plan(
            terms={name: tuple(at_site) for name, at_site in found.items()},
            sites={name: self.site(name) for name in found},
            mark=mark,
            adapters=tuple([adapter for _, _, adapter in terms]),
            live=frozenset() if fixed else frozenset(live),
            fixed=fixed,
        )

    def bind(self, node: str, adapter: Adapter) -> Adapter:
        """Return ``adapter`` under the names of this base, checked.

        Raises:
            BaseMismatch: a module is missing, of another kind or shape, or carries a base tensor
                that differs.
        """
        known = self._bound.get(adapter)
        # An adapter is bound once; only that its modules are still there is asked again.
        if known is not None and all(site.is_in(self._base) for site in known[1]):
            return known[0] or adapter
        try:
            bound = self._renaming.bound(adapter)
            sites = [self.site(name) for name in bound.modules]
            for site, value in zip(sites, bound.modules.values(), strict=True):
                site.check(value)
            for name, tensor in bound.unchanged.items():
                self._check_unchanged(name, tensor)
        except LoraTreeError as error:
            raise self._told(error, node, adapter) from error
        # A warning and no error: people rename and quantise bases. Once for each name.
        if adapter.base and adapter.base not in self._warned:
            self._warned.add(adapter.base)
            warn_of_base(node, adapter.base, self._own_name, stacklevel=2)
        self._bound[adapter] = None if bound is adapter else bound, sites
        return bound

    def site(self, name: str) -> Site:
        """Return the site of that name in the base as it is now; a replaced module is looked up."""
        known = self._sites.get(name)
        if known is not None and known.is_in(self._base):
            return known
        if known is not None:
            self._marks = Marks()  # with another module the same factors behave otherwise
        known = self._sites[name] = find_site(self._base, name)
        return known

    def site_for(self, node: str, name: str, value: LowRank) -> Site:
        """Return the site of that name, which ``value`` fits.

        Raises:
            BaseMismatch: there is none, or the value does not fit; names the node.
        """
        try:
            site = self.site(name)
            site.check(value)
        except LoraTreeError as error:
            raise error.within(node) from error
        return site

    def forget(self) -> None:
        """Drop the plans kept for paths used before."""
        self._plans.forget()

    # ------------------------------------------------------------------ private
    def _told(self, error: LoraTreeError, node: str, adapter: Adapter) -> LoraTreeError:
        """Return an error with the node's name, and with the base that the adapter names if it is
        another one.
        """
        where = error.within(node)
        todo = list(where.todo)
        if adapter.base and self._base_name and adapter.base != self._base_name:
            todo.append(
                f"the adapter names base {adapter.base!r}, the model attached is "
                f"{self._base_name!r}"
            )
        return type(error)(where.what, *todo)

    def _check_unchanged(self, name: str, tensor: Tensor) -> None:
        try:
            own = self._base.get_parameter(name)
        except AttributeError:
            raise BaseMismatch(
                f"{name}: the adapter carries this tensor of its base, this base has none"
            ) from None
        todo = (
            "train without bias= and without resizing embeddings, "
            "or attach the base it was trained on"
        )
        check_carried(name, tensor, own, todo)


def _version(value: LowRank) -> int:
    """Return how often factors that train, or did, were written to; 0 for others, which are never
    written to.
    """
    return value.A._version + value.B._version if value.is_trainable else 0
