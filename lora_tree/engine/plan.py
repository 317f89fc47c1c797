"""Plan: what each site gets for a path or a blend: site name → terms in the order of the sum.

Binding comes first: an adapter fits the base or it does not, whatever the path, so it is checked once.

What a plan means is known by its `mark`, a number: key/value caches and recorded backwards are told apart by it. It is
the same for a plan that was dropped and made again from the same factors, also where these were read anew meanwhile.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from ..adapter import Adapter
from ..base_names import warn_of_base
from ..carried import check_carried
from ..errors import BaseMismatch, LoraTreeError
from ..lowrank import LowRank
from ..renaming import Renaming
from ..sites import Site, find_site
from .last_used import LastUsed

__all__ = ["EMPTY_PLAN", "Binder", "Marks", "Plan", "Term", "Terms", "same_terms"]

KEPT_PLANS = 256
KEPT_MARKS = 1024

_requires_grad = operator.attrgetter("requires_grad")

_MARKS = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Term:
    """One node's part at one site: ``coefficient`` · ΔW. ``version`` moves when a factor was trained in place."""

    node: str
    coefficient: float
    value: LowRank
    version: int

    @property
    def trains(self) -> bool:
        """Autograd follows its factors."""
        A, B, bias = self.value.A, self.value.B, self.value.bias
        return A.requires_grad or B.requires_grad or (bias is not None and bias.requires_grad)


Terms = tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Site name → its terms, and the sites themselves; ``mark`` is the same for what behaves the same.

    ``adapters`` are those it was made of. They live as long as the plan, so that it can be known by them. ``live`` are
    the sites and nodes whose factors trained when it was made; where none ever did, it is ``fixed``, to be used again.
    """

    terms: Mapping[str, Terms]
    sites: Mapping[str, Site]
    mark: int = 0
    adapters: tuple[Adapter, ...] = ()
    live: frozenset[tuple[str, str]] = frozenset()
    fixed: bool = True

    @property
    def trains(self) -> bool:
        """Autograd follows a factor or a bias of it now."""
        return any(map(_requires_grad, self._tensors))

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(
            t for terms in self.terms.values() for term in terms for t in term.value.tensors
        )

    def is_as_it_was(self) -> bool:
        """Whether its factors have the numbers that they had, and those train that did."""
        if self.fixed:
            return True
        for name, terms in self.terms.items():
            for term in terms:
                if term.version != _version(term.value):
                    return False
                if term.trains != ((name, term.node) in self.live):
                    return False
        return True


EMPTY_PLAN = Plan({}, {})


class Marks:
    """Key → mark, for the last keys used."""

    def __init__(self) -> None:
        self._of: OrderedDict[Hashable, int] = OrderedDict()

    def of(self, key: Hashable) -> int:
        """The mark of what is known by ``key``."""
        mark = self._of.pop(key, None) or next(_MARKS)
        self._of[key] = mark
        if len(self._of) > KEPT_MARKS:
            self._of.popitem(last=False)
        return mark

    @staticmethod
    def new() -> int:
        """The mark of what nothing else behaves like."""
        return next(_MARKS)


def same_terms(x: Terms, y: Terms) -> bool:
    """Whether two sites' plans write the same bits: the same values, as they are, with the same coefficients."""
    if len(x) != len(y):
        return False
    for a, b in zip(x, y, strict=True):  # a loop: this is asked of every site at every switch
        if a.value is not b.value or a.coefficient != b.coefficient or a.version != b.version:
            return False
    return True


class Binder:
    """Adapters checked against one base, the sites they use, and the plans of the last paths.

    Args:
        base: the model.
        base_name: what the tree calls it.
        own_name: what the model calls itself, where it does.
        kept: how many plans stay, with their adapters, though nobody uses them.
        origin: what an adapter is known by: itself, held weakly, or something that outlives it and stands for the same
            numbers.
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
        self._said: set[str] = set()  # the bases that adapters named and a warning told of
        self._origin = origin
        self._renaming = Renaming(base)
        self._sites: dict[str, Site] = {}
        # an adapter that needs no change stands for itself: a value here must not hold its own key
        self._bound: weakref.WeakKeyDictionary[Adapter, tuple[Adapter | None, list[Site]]]
        self._bound = weakref.WeakKeyDictionary()
        self._plans: LastUsed[Plan] = LastUsed(kept)
        self._marks = Marks()

    def plan(self, terms: list[tuple[str, float, Adapter]]) -> Plan:
        """The plan of (node, coefficient, adapter) terms; the same object for a path that was used before.

        Raises:
            BaseMismatch: an adapter does not fit; names the node and the module.
        """
        if not terms:
            return EMPTY_PLAN
        key = tuple((id(adapter), coefficient) for _, coefficient, adapter in terms)
        known = self._plans.find(
            key
        )  # a plan holds its adapters, so that no id in its key is used again
        if known is not None:
            if all(site.is_in(self._base) for site in known.sites.values()):
                return self._plans.get(key, lambda: known)
            self._plans.forget()
        found: dict[str, list[Term]] = {}
        fixed = True
        for node, coefficient, adapter in terms:
            for name, value in self.bind(node, adapter).modules.items():
                trained = _trains(value)
                fixed = fixed and not trained
                found.setdefault(name, []).append(Term(node, coefficient, value, _version(value)))
        origins = tuple((self._origin(adapter), coefficient) for _, coefficient, adapter in terms)
        plan = Plan(
            {name: tuple(ts) for name, ts in found.items()},
            {name: self.site(name) for name in found},
            self._marks.of(origins) if fixed else Marks.new(),
            tuple(adapter for _, _, adapter in terms),
            frozenset()
            if fixed
            else frozenset((n, t.node) for n, ts in found.items() for t in ts if t.trains),
            fixed,
        )
        if fixed:
            return self._plans.get(key, lambda: plan)
        return plan

    def bind(self, node: str, adapter: Adapter) -> Adapter:
        """``adapter`` with its names as this base has them, checked.

        Raises:
            BaseMismatch: a module is missing, of another kind or shape, or carries a base tensor that differs.
        """
        known = self._bound.get(adapter)
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
            where = error.within(node)
            made_for = adapter.base and self._base_name and adapter.base != self._base_name
            hint = (
                f"the adapter names base {adapter.base!r}, the model attached is {self._base_name!r}",
            )
            raise type(error)(where.what, *where.todo, *(hint if made_for else ())) from error
        if adapter.base and adapter.base not in self._said:
            self._said.add(adapter.base)
            warn_of_base(node, adapter.base, self._own_name, stacklevel=2)
        self._bound[adapter] = None if bound is adapter else bound, sites
        return bound

    def site(self, name: str) -> Site:
        """The site of that name in the base as it is now: a replaced module is found again."""
        known = self._sites.get(name)
        if known is None or not known.is_in(self._base):
            self._marks = (
                self._marks if known is None else Marks()
            )  # another module behaves otherwise
            known = self._sites[name] = find_site(self._base, name)
        return known

    def site_for(self, node: str, name: str, value: LowRank) -> Site:
        """The site of that name, which ``value`` fits.

        Raises:
            BaseMismatch: there is none, or it does not; names the node.
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

    def _check_unchanged(self, name: str, tensor: Tensor) -> None:
        try:
            own = self._base.get_parameter(name)
        except AttributeError:
            raise BaseMismatch(
                f"{name}: the adapter carries this tensor of its base, this base has none"
            ) from None
        todo = "train without bias= and without resizing embeddings, or attach the base it was trained on"
        check_carried(name, tensor, own, todo)


def _trains(value: LowRank) -> bool:
    """Whether its factors are parameters, which training may write to in place."""
    return isinstance(value.A, nn.Parameter) or isinstance(value.B, nn.Parameter)


def _version(value: LowRank) -> int:
    """Return how often factors that train, or did, were written to; 0 for the others, which are never written to."""
    return value.A._version + value.B._version if _trains(value) else 0
