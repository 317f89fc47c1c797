"""Planner: the plans of paths, blends and batches, made of bound adapters and kept for the last
ones used.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace

from ..adapter import Adapter
from ..override import Override, Standing, counted_modules, standing, warn_of_dropped
from ..sites import with_tied_rows
from ..weights import Weight, check_matched
from .binder import Binder
from .last_used import LastUsed
from .marks import Marks
from .plan import EMPTY_PLAN, OverrideTerm, OverrideTerms, PlacedPlan, Plan, Term
from .rows.batch import tree_node

__all__ = ["KEPT_PLANS", "Planner"]

KEPT_PLANS = 256

_requires_grad = operator.attrgetter("requires_grad")


class Planner:
    """The plans of the last paths, over one base.

    Args:
        binder: binds the adapters to the base.
        kept: how many plans stay, with their adapters, while nothing uses them.
        origin: returns a key for an adapter: itself, held weakly, or a key that outlives it and
            stands for the same numbers.
        keeps: returns whether a plan may be kept, which keeps its adapters and everything made of
            them alive; None: every plan may.

    Attributes:
        binder: the binder.
    """

    def __init__(
        self,
        binder: Binder,
        *,
        kept: int = KEPT_PLANS,
        origin: Callable[[Adapter], Hashable] = weakref.ref,
        keeps: Callable[[Plan], bool] | None = None,
    ) -> None:
        self.binder = binder
        self._warned: set[str] = set()  # lines about dropped increments that were warned of
        self._origin = origin
        self._keeps = keeps
        self._plans: LastUsed[Plan] = LastUsed(kept)
        self._marks = Marks()
        self._replaced = binder.replaced  # when the marks were begun

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
                counts; called only if there is one. None: each row's path decides, later.

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
        # An id names an adapter as long as it lives, and a plan keeps its adapters alive. The node
        # is in the key because two nodes may have one adapter, and a batch finds what a row owes by
        # the names of nodes.
        key: tuple[Hashable, ...]
        key = tuple([(node, id(adapter), coefficient) for node, coefficient, adapter in terms])
        if any(_may_override(adapter) for _, _, adapter in terms):
            # With overrides the plan depends on the paths, and not on the coefficients alone.
            ends = None if lineages is None else tuple(map(tuple, lineages()))
            key = (*key, ends)
        known = self._plans.find(key)
        if known is not None:
            if self._keeps is None or self._keeps(known):
                self._plans.again(key)
            dtypes = known.look(self.binder.base)
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

    def forget(self) -> None:
        """Drop the plans kept for paths used before."""
        self._plans.forget()

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
        terms_at: dict[str, list[Term]] = {}
        bound: list[tuple[str, float, Adapter]] = []
        for node, weight, adapter in terms:
            coefficient, weighed = self.binder.weighed(node, weight, adapter)
            bound.append((node, coefficient, self._with_tied_rows(weighed)))
        overrides = self._overrides(bound, lineages)
        fixed = not any(adapter.is_trainable for _, _, adapter in bound)
        for node, coefficient, adapter in overrides.resolved:
            for name, value in adapter.modules.items():
                terms_at.setdefault(name, []).append(Term.of(node, coefficient, value))
        for name in overrides.terms:
            terms_at.setdefault(name, [])
        # After binding, because that finds replaced modules. If one was, the earlier marks belong
        # to other behaviours.
        if self.binder.replaced != self._replaced:
            self._marks, self._replaced = Marks(), self.binder.replaced
        if fixed:
            origins = tuple([(self._origin(adapter), c) for _, c, adapter in terms])
            mark = self._marks.of((origins, overrides.ends))
        else:
            mark = Marks.new()
        return Plan(
            terms={name: tuple(at_site) for name, at_site in terms_at.items()},
            sites={name: self.binder.bound_site(name) for name in terms_at},
            mark=mark,
            adapters=tuple([adapter for _, _, adapter in terms]),
            fixed=fixed,
            overrides=overrides.terms,
        )

    def _with_tied_rows(self, adapter: Adapter) -> Adapter:
        """Return an adapter whose overridden rows apply to a tied head, too.

        This is for the plan alone. The adapter that the tree holds, and trains, has the rows once.
        """
        made = with_tied_rows(self.binder.base, adapter)
        for tensor, override in made.overrides.items():
            if tensor not in adapter.overrides:
                site, attribute = self.binder.tensor_site(tensor)
                site.check_override(attribute, override)
        return made

    def _overrides(
        self,
        bound: list[tuple[str, float, Adapter]],
        lineages: Callable[[], list[list[str]]] | None,
    ) -> _Overrides:
        """Return the overrides that count for some bound terms, and the terms without the
        increments that these overrides drop.

        Raises:
            SpecError: the paths of a blend have different overrides of a tensor.
        """
        # A batch may owe one node in several weights; its overrides are the same in all of them.
        held = {tree_node(n): adapter.overrides for n, _, adapter in bound if adapter.overrides}
        if not held:
            return _Overrides({}, bound, None)
        at_site: dict[str, list[OverrideTerm]] = {}
        if lineages is None:
            # Each row of a batch has a path of its own. All overrides are kept here, and a row's
            # path decides later which of them counts for it.
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
        effective = standing(paths, held)
        for tensor, stack in effective.items():
            for node, override in stack:
                name, term = self._override_term(node, tensor, override)
                at_site.setdefault(name, []).append(term)
        resolved = self._without_dropped(bound, effective)
        return _Overrides(_tuples(at_site), resolved, tuple(map(tuple, paths)))

    def _without_dropped(
        self, bound: list[tuple[str, float, Adapter]], effective: Standing
    ) -> list[tuple[str, float, Adapter]]:
        """Return bound terms without the increments that some overrides drop; warn of each once."""
        resolved, dropped = [], []
        for node, coefficient, adapter in bound:
            modules, lines = counted_modules(tree_node(node), adapter.modules, effective)
            dropped += [line for line in lines if line not in self._warned]
            self._warned.update(lines)
            resolved.append((node, coefficient, replace(adapter, modules=modules)))
        warn_of_dropped(dropped, stacklevel=2)
        return resolved

    def _override_term(
        self, node: str, tensor: str, override: Override
    ) -> tuple[str, OverrideTerm]:
        site, attribute = self.binder.tensor_site(tensor)
        return site.name, OverrideTerm.of(node, attribute, override)


@dataclass(frozen=True, eq=False)
class _Overrides:
    """The overrides of some terms.

    Args:
        terms: site name → the overrides that count there.
        resolved: the terms without the increments that these drop.
        ends: the lineages by which they were chosen; None: no overrides, or each row chooses.
    """

    terms: Mapping[str, OverrideTerms]
    resolved: list[tuple[str, float, Adapter]]
    ends: tuple[tuple[str, ...], ...] | None


def _may_override(adapter: Adapter) -> bool:
    """Return whether an adapter replaces a tensor, as far as is known before it is bound."""
    return bool(adapter.overrides or adapter.unchanged)


def _tuples(at_site: Mapping[str, list[OverrideTerm]]) -> dict[str, OverrideTerms]:
    return {name: tuple(terms) for name, terms in at_site.items()}
