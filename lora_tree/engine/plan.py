"""Plan: what each site gets for a path or a blend: site name → terms in the order of the sum, and
the overrides below them.

Binding comes first: an adapter fits the base or it does not, on any path, so it is checked once.

A plan has a `mark`, a number by which key/value caches and recorded backwards are told apart. Two
plans of the same factors have the same mark, even if one was dropped and made again, or its factors
were read from files anew.
"""

from __future__ import annotations

import itertools
import operator
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..base_names import warn_of_base
from ..errors import BaseMismatch, LoraTreeError, listing
from ..lowrank import LowRank
from ..override import (
    Override,
    OverrideWarning,
    Standing,
    counted_modules,
    standing,
    warn_of_dropped,
)
from ..renaming import Renaming
from ..sites import Site, Ways, find_site, find_tensor_site, with_tied_rows
from ..weights import Weight, check_matched
from .batch import tree_node
from .last_used import LastUsed

__all__ = [
    "EMPTY_PLAN",
    "KEPT_PLANS",
    "Binder",
    "Marks",
    "OverrideTerm",
    "PlacedPlan",
    "Plan",
    "Term",
    "Terms",
    "WeightDtypes",
    "check_override_numbers",
]

KEPT_PLANS = 256
KEPT_MARKS = 1024
KEPT_WEIGHTS = 16
"""Weights per module of one adapter; clients of a server may make up any number of them."""

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
class OverrideTerm:
    """One node's part at one site that replaces: what increments are added to there.

    Args:
        node: the node.
        attribute: the tensor of the site's module: ``weight``, ``bias``, ….
        value: the node's override.
        version: how often it had been written to in place, as training does.
    """

    node: str
    attribute: str
    value: Override
    version: int

    @property
    def trains(self) -> bool:
        """Whether autograd follows it."""
        return self.value.trains


OverrideTerms = tuple[OverrideTerm, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Site name → its terms, and the sites themselves.

    Args:
        terms: site name → its terms; none where the site has an override alone.
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
    overrides: Mapping[str, OverrideTerms] = field(default_factory=dict)
    """Site name → what stands for the base's own tensors there, in the order in which it is
    applied."""

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
        """One factor of each adapter that has any; a cache lays an adapter in one buffer."""
        found: list[Tensor] = []
        for adapter in self.adapters:
            for value in adapter.modules.values():
                found.append(value.A)
                break
        return tuple(found)

    def places(self) -> tuple[int, ...]:
        """Return the addresses of its adapters' buffers now.

        A cache may evict an adapter while the plan is kept, and send it again, to another place:
        then every address that was taken of its factors is wrong. Empty if factors train: such a
        plan is not kept.
        """
        if not self.fixed:
            return ()
        return tuple([tensor.untyped_storage().data_ptr() for tensor in self._anchors])

    @cached_property
    def lies_in_buffers(self) -> bool:
        """Whether all its factors lie in the buffers of its adapters: none was made for this base,
        as factors of modules that the base fuses are.
        """
        buffers = set(self.places())
        return all(tensor.untyped_storage().data_ptr() in buffers for tensor in self.tensors)

    def someone(self, name: str) -> str:
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
        for name, overrides in self.overrides.items():
            for override in overrides:
                if override.version != _override_version(override.value):
                    return False
                if override.trains and (name, override.node) not in self.live:
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
        own_value: returns the base's own numbers of a module's tensor where a path may be merged
            into it; None: they are those that it holds now.
        keeps: whether a plan may be kept, and with it its adapters and what was made of them; None:
            each may.
    """

    def __init__(
        self,
        base: nn.Module,
        base_name: str | None,
        *,
        own_name: str | None = None,
        kept: int = KEPT_PLANS,
        origin: Callable[[Adapter], Hashable] = weakref.ref,
        own_value: Callable[[nn.Module, str], Tensor | None] = lambda module, name: None,
        keeps: Callable[[Plan], bool] | None = None,
    ) -> None:
        self._base = base
        self._own_value = own_value
        self._base_name = base_name
        self._own_name = own_name or base_name
        self._warned: set[str] = set()
        """What a warning told of: bases that adapters named, increments that do not count."""
        self._origin = origin
        self._renaming = Renaming(base)
        self._sites: dict[str, Site] = {}
        # None stands for an adapter that needs no renaming: a value that held its own weak key
        # would keep it alive.
        self._bound: weakref.WeakKeyDictionary[Adapter, tuple[Adapter | None, list[Site]]]
        self._bound = weakref.WeakKeyDictionary()
        self._weighted: weakref.WeakKeyDictionary[Adapter, OrderedDict[Weight, Adapter]]
        self._weighted = weakref.WeakKeyDictionary()
        self._keeps = keeps
        self._plans: LastUsed[Plan] = LastUsed(kept)
        self._marks = Marks()

    def plan(
        self,
        terms: list[tuple[str, Weight, Adapter]],
        lineages: Callable[[], list[list[str]]] | None = None,
    ) -> Plan:
        """Return the plan of (node, coefficient, adapter) terms; the same object for a path that
        was used before.

        Args:
            terms: in the order of the sum.
            lineages: returns the nodes of each path from the root down, which decide whose override
                counts; called only if there is one. None: those of all terms count, row by row.

        Raises:
            BaseMismatch: an adapter does not fit; names the node and the module.
            SpecError: the paths of a blend have different overrides of a tensor; or a pattern of a
                weight matches no module of its adapter.
        """
        return self.placed(terms, lineages).plan

    def placed(
        self,
        terms: list[tuple[str, Weight, Adapter]],
        lineages: Callable[[], list[list[str]]] | None = None,
    ) -> PlacedPlan:
        """Return the same plan with the dtypes that its sites' weights have now.

        Raises:
            BaseMismatch, SpecError: as `plan`.
        """
        if not terms:
            return PlacedPlan(EMPTY_PLAN, (), False)
        # An id names an adapter as long as it lives, and a plan keeps its adapters alive. Two nodes
        # may have one adapter, and a batch finds what a row owes by the names of nodes.
        key: tuple[Hashable, ...]
        key = tuple([(node, id(adapter), coefficient) for node, coefficient, adapter in terms])
        if any(_may_override(adapter) for _, _, adapter in terms):
            # With overrides the paths count, and not the coefficients alone.
            ends = None if lineages is None else tuple(map(tuple, lineages()))
            key = (*key, ends)
        known = self._plans.find(key)
        if known is not None:
            if self._keeps is None or self._keeps(known):
                self._plans.again(key)
            dtypes = known.look(self._base)
            if dtypes is not None:
                return PlacedPlan(known, dtypes, any(map(_requires_grad, known.tensors)))
            # The owner of the base replaced a module. Other plans may have the old one as well.
            self._plans.forget()
        plan = self._made(terms, lineages)
        if plan.fixed:
            keep = self._keeps is None or self._keeps(plan)
            self._plans.get(key, lambda: plan, keep=keep)
        dtypes = tuple([site.dtype for site in plan.sites.values()])
        return PlacedPlan(plan, dtypes, any(map(_requires_grad, plan.tensors)))

    def _made(
        self,
        terms: list[tuple[str, Weight, Adapter]],
        lineages: Callable[[], list[list[str]]] | None,
    ) -> Plan:
        check_matched(
            [(tree_node(node), weight, adapter.module_names) for node, weight, adapter in terms]
        )
        # Site by site in the order in which the lineage first names them; within a site in the
        # order of the sum, which decides the bits.
        found: dict[str, list[Term]] = {}
        live: set[tuple[str, str]] = set()
        bound: list[tuple[str, float, Adapter]] = []
        for node, weight, adapter in terms:
            coefficient, weighed = self._weighed(node, weight, adapter)
            bound.append((node, coefficient, self._with_tied_rows(weighed)))
        overrides = self._overrides(bound, lineages)
        fixed = not any(adapter.is_trainable for _, _, adapter in bound)
        for node, coefficient, adapter in overrides.resolved:
            for name, value in adapter.modules.items():
                term = Term(node, coefficient, value, _version(value))
                found.setdefault(name, []).append(term)
                if term.trains:
                    live.add((name, node))
        for name, at_site in overrides.terms.items():
            found.setdefault(name, [])
            live.update((name, override.node) for override in at_site if override.trains)
        # The mark comes after binding, which begins new marks if it finds that a module was
        # replaced.
        if fixed:
            origins = tuple([(self._origin(adapter), c) for _, c, adapter in terms])
            mark = self._marks.of((origins, overrides.ends))
        else:
            mark = Marks.new()
        return Plan(
            terms={name: tuple(at_site) for name, at_site in found.items()},
            sites={name: self._sites[name] for name in found},
            mark=mark,
            adapters=tuple([adapter for _, _, adapter in terms]),
            live=frozenset() if fixed else frozenset(live),
            fixed=fixed,
            overrides=overrides.terms,
        )

    def _with_tied_rows(self, adapter: Adapter) -> Adapter:
        """Return an adapter whose overridden rows apply to a tied head, too.

        Only for a plan: what the tree holds, and trains, has them once.
        """
        made = with_tied_rows(self._base, adapter)
        for tensor, override in made.overrides.items():
            if tensor not in adapter.overrides:
                site, attribute = self._tensor_site(tensor)
                site.check_override(attribute, override)
        return made

    def _overrides(
        self,
        bound: list[tuple[str, float, Adapter]],
        lineages: Callable[[], list[list[str]]] | None,
    ) -> _Overrides:
        """Return the overrides that count for some bound terms, and the terms without what these
        drop.

        Raises:
            SpecError: the paths of a blend have different overrides of a tensor.
        """
        # A batch may owe one node in several weights; its overrides are the same in all of them.
        held = {tree_node(n): adapter.overrides for n, _, adapter in bound if adapter.overrides}
        if not held:
            return _Overrides({}, bound, None)
        at_site: dict[str, list[OverrideTerm]] = {}
        if lineages is None:
            # Of a batch: which of them counts is decided row by row.
            all_of: dict[str, list[tuple[str, Override]]] = {}
            for node, overrides in held.items():
                for tensor, override in overrides.items():
                    name, term = self._override_term(node, tensor, override)
                    at_site.setdefault(name, []).append(term)
                    all_of.setdefault(tensor, []).append((node, override))
            every = {tensor: tuple(stack) for tensor, stack in all_of.items()}
            self._without_dropped(bound, every)
            return _Overrides(_tuples(at_site), bound, None)
        paths = lineages()
        stands = standing(paths, held)
        for tensor, stack in stands.items():
            for node, override in stack:
                name, term = self._override_term(node, tensor, override)
                at_site.setdefault(name, []).append(term)
        resolved = self._without_dropped(bound, stands)
        return _Overrides(_tuples(at_site), resolved, tuple(map(tuple, paths)))

    def _without_dropped(
        self, bound: list[tuple[str, float, Adapter]], stands: Standing
    ) -> list[tuple[str, float, Adapter]]:
        """Return bound terms without what some overrides drop; a warning says what, once."""
        resolved, dropped = [], []
        for node, coefficient, adapter in bound:
            modules, lines = counted_modules(tree_node(node), adapter.modules, stands)
            dropped += [line for line in lines if line not in self._warned]
            self._warned.update(lines)
            resolved.append((node, coefficient, replace(adapter, modules=modules)))
        warn_of_dropped(dropped, stacklevel=2)
        return resolved

    def _override_term(
        self, node: str, tensor: str, override: Override
    ) -> tuple[str, OverrideTerm]:
        site, attribute = self._tensor_site(tensor)
        return site.name, OverrideTerm(node, attribute, override, _override_version(override))

    def _tensor_site(self, tensor: str) -> tuple[Site, str]:
        """Return the site of an override, and which of the module's tensors it is."""
        module, _, leaf = tensor.rpartition(".")
        for name in (module, tensor):
            known = self._sites.get(name)
            mine = known is not None and leaf in (known.weight_name, known.bias_name)
            if known is not None and mine and known.is_in(self._base):
                return known, leaf
        site, leaf = find_tensor_site(self._base, tensor)
        if site.name in self._sites:
            self._marks = Marks()  # see `site`
        self._sites[site.name] = site
        return site, leaf

    def _weighed(self, node: str, weight: Weight, adapter: Adapter) -> tuple[float, Adapter]:
        """Return a coefficient and the adapter that it is for, under the names of this base.

        A weight per module is in the adapter's scales. It goes in before names are changed, because
        its patterns are meant for the adapter's own; the same adapter and weight give the same
        object while the adapter lives, so that sites see that nothing changed.
        """
        node = tree_node(node)  # for messages
        bound = self.bind(node, adapter)
        if isinstance(weight, float):
            return weight, bound
        known = self._weighted.setdefault(adapter, OrderedDict())
        if weight in known:
            known.move_to_end(weight)
            return 1.0, known[weight]
        try:
            known[weight] = self._in_base(node, adapter.weighed(weight))
        except LoraTreeError as error:
            raise error.within(node) from error
        if len(known) > KEPT_WEIGHTS:
            known.popitem(last=False)
        return 1.0, known[weight]

    def bind(self, node: str, adapter: Adapter) -> Adapter:
        """Return ``adapter`` under the names of this base, checked.

        Raises:
            BaseMismatch: a module is missing, of another kind or shape; or a tensor that the
                adapter replaces is.
        """
        known = self._bound.get(adapter)
        # An adapter is bound once; only that its modules are still there is asked again.
        if known is not None and all(site.is_in(self._base) for site in known[1]):
            return known[0] or adapter
        try:
            bound = self._in_base(node, adapter)
            sites = [self.site(name) for name in bound.modules]
            for site, value in zip(sites, bound.modules.values(), strict=True):
                site.check(value)
            for tensor, override in bound.overrides.items():
                site, attribute = self._tensor_site(tensor)
                site.check_override(attribute, override)
                check_override_numbers(tensor, override, getattr(site.module, attribute))
                sites.append(site)
        except LoraTreeError as error:
            raise self._told(error, node, adapter) from error
        # A warning and no error: people rename and quantise bases. Once for each name.
        if adapter.base and adapter.base not in self._warned:
            self._warned.add(adapter.base)
            warn_of_base(node, adapter.base, self._own_name, stacklevel=2)
        self._bound[adapter] = None if bound is adapter else bound, sites
        self._weighted.pop(adapter, None)  # made for the modules that were there before
        return bound

    def _in_base(self, node: str, adapter: Adapter) -> Adapter:
        """Return an adapter under the names of this base, its overrides told apart."""
        return self._with_told_apart(node, self._renaming.bound(adapter))

    def site(self, name: str) -> Site:
        """Return the site that has this name in the base now; a replaced module is looked up."""
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

    def own_value(self, module: nn.Module, attribute: str) -> Tensor | None:
        """Return the base's own numbers of a module's tensor where a path may be merged into it."""
        return self._own_value(module, attribute)

    def device_of(self, tensor: str, override: Override) -> torch.device:
        """Return where an override computes: where the base's own tensor is."""
        site, attribute = self._tensor_site(tensor)
        own = getattr(site.module, attribute, None)
        return own.device if isinstance(own, Tensor) else override.values.device

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

    def _with_told_apart(self, node: str, adapter: Adapter) -> Adapter:
        """Return the adapter with carried tensors that are not the base's own as overrides.

        The comparison is with the base's own numbers, whatever is merged into them now.
        """
        if not adapter.unchanged:
            return adapter
        own: dict[str, Tensor] = {}
        for name in adapter.unchanged:
            module, _, leaf = name.rpartition(".")
            try:
                holder, now = self._base.get_submodule(module), self._base.get_parameter(name)
            except AttributeError:
                continue  # it is refused by its name below
            kept = self._own_value(holder, leaf)
            own[name] = now.detach() if kept is None else kept
        told = adapter.told_apart(own)
        other = [name for name in told.overrides if name not in adapter.overrides]
        if other:
            what = f"{node}: {listing(other)}: the adapter carries another value than the base's"
            warnings.warn(
                OverrideWarning(
                    f"{what}, and it stands there under this node: an override",
                    "if it was trained over another base, attach that one",
                ),
                stacklevel=2,
            )
        return told


@dataclass(frozen=True, eq=False)
class _Overrides:
    """The overrides of some terms.

    Args:
        terms: site name → those that count there.
        resolved: the terms without the increments that these drop.
        ends: the lineages by which they were chosen; None: there are none, or row by row.
    """

    terms: Mapping[str, OverrideTerms]
    resolved: list[tuple[str, float, Adapter]]
    ends: tuple[tuple[str, ...], ...] | None


def _may_override(adapter: Adapter) -> bool:
    """Return whether an adapter replaces a tensor, as far as is known before it is bound."""
    return bool(adapter.overrides or adapter.unchanged)


def check_override_numbers(tensor: str, override: Override, own: Tensor) -> None:
    """Refuse an override that is not finite in the dtype of the tensor that it stands for.

    Raises:
        BaseMismatch: it is not; names the tensor.
    """
    if override.is_trainable or override.values.is_meta or not override.values.numel():
        return  # what trains changes at every step, and a look at it waits for the device
    least, most = torch.aminmax(override.values)
    size = float(torch.maximum(least.abs(), most.abs()))
    info = torch.finfo(own.dtype)
    if not size <= info.max * (1 + info.eps / 4):
        raise BaseMismatch(
            f"{tensor}: the adapter replaces it by numbers up to {size:.3g}, and "
            f"{str(own.dtype)[6:]} goes up to {info.max:.3g}",
            "train it again, or load the base in a wider dtype",
        )


def _tuples(at_site: Mapping[str, list[OverrideTerm]]) -> dict[str, OverrideTerms]:
    return {name: tuple(terms) for name, terms in at_site.items()}


def _override_version(override: Override) -> int:
    """Return how often an override that trains was written to; 0 for others."""
    return override.values._version if override.is_trainable else 0


def _version(value: LowRank) -> int:
    """Return how often factors that train, or did, were written to; 0 for others, which are never
    written to.
    """
    return value.A._version + value.B._version if value.is_trainable else 0
