"""Routed: every row of a batch by its own path, each site's sum in the form that costs least.

    paths ─→ Batch: what each row owes to each node           once for a batch
             Route: what is owed at each site                 once for a batch, when a site first runs
                    in one form for the whole batch           once for a batch and a number of tokens a row

The last routes are kept, so that the same paths in the same order cost nothing again. A site where all rows owe the
same is one product, whatever lies on its first axis.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import SpecError, listing, suggest
from ..sites import Site
from .arithmetic import exact_mode
from .batch import Batch
from .batch_axis import BatchAxis
from .cost import Cost, machine
from .forms import FORMS, SumForm
from .last_used import LastUsed
from .ledger import Ledger, Unbounded
from .owed import Owed
from .plan import Marks, Plan, Terms
from .side import Draft, Manner, PathSide, Side, Sides, side_dtype, widened

__all__ = ["Route", "Router", "Strategy"]

Strategy: TypeAlias = Literal["auto", "nodes", "paths", "grouped", "matrix"]

KEPT_ROUTES = 2


class Router:
    """The routes of the last batches.

    Args:
        manner: how side paths compute.
        ledger: who bounds what is laid out.
    """

    def __init__(self, manner: Manner, *, ledger: Ledger | None = None) -> None:
        self._manner = manner
        self._ledger = ledger or Unbounded()
        self._kept: LastUsed[Route] = LastUsed(KEPT_ROUTES)
        self._marks = Marks()
        self._ledger.spare(self._kept)

    def route(self, batch: Batch, plan: Plan, strategy: Strategy) -> Route:
        """The route of a batch; the same object where it was used before.

        Raises:
            SpecError: no such strategy.
        """
        if strategy not in get_args(Strategy):
            known = get_args(Strategy)
            raise SpecError(
                f"no strategy {strategy!r}{suggest(str(strategy), known)}",
                f"there are {listing(known)}",
            )
        owed = (
            batch.nodes,
            batch.kinds,
            batch.of_row,
            strategy,
            *[site.dtype for site in plan.sites.values()],
        )
        mark = self._marks.of((plan.mark, *owed))
        return self._kept.get(
            (plan, *owed), lambda: Route(batch, plan, strategy, self._manner, mark, self._ledger)
        )

    def forget(self) -> None:
        """Drop the routes kept."""
        self._kept.forget()


class Route:
    """One batch on one plan.

    Args:
        batch: what the rows owe.
        plan: the terms of all the batch's nodes, with coefficient 1.
        strategy: one form for all, or ``auto``.
        manner: how side paths compute.
        mark: what it is known by: see `Plan`.
        ledger: who bounds what is laid out.
    """

    def __init__(
        self,
        batch: Batch,
        plan: Plan,
        strategy: Strategy,
        manner: Manner,
        mark: int,
        ledger: Ledger,
    ) -> None:
        self.batch, self.plan, self.strategy, self.manner, self.mark = (
            batch,
            plan,
            strategy,
            manner,
            mark,
        )
        self._charge = partial(
            ledger.charge, _LifetimeToken()
        )  # not self: what is laid out must not hold its route
        self._seen: dict[Hashable, Batch] = {}
        self._owed: dict[Hashable, list[Owed]] = {}
        self._forms: dict[Hashable, SumForm] = {}
        self._whole: dict[str, Side] = {}
        self._picked: dict[Hashable, str] = {}

    def sides(self, axis: BatchAxis) -> Sides:
        """The side path of every site, for rows that lie as ``axis`` says."""
        sides = Sides()
        for name, site in self.plan.sites.items():
            alike = self._alike(site)
            sides[name] = _RoutedSide(self, site, axis) if alike is None else alike
        return sides

    def forms(
        self, site: Site, spread: tuple[int, int], tokens: int, device: torch.device
    ) -> list[SumForm]:
        """How a site's sum is added up: what is frozen, and then what trains.

        Args:
            site: of the plan.
            spread: how often each row stands in place, and the batch as a whole.
            tokens: inputs a row.
            device: of the site's output.
        """
        if self.strategy != "auto":
            strategy: str = self.strategy
        else:
            key = spread, tokens, device
            strategy = self._picked.get(key) or self._picked.setdefault(key, self._cheapest(*key))
        return [self._form(owed, strategy, tokens) for owed in self.owed(site, spread, device)]

    def owed(self, site: Site, spread: tuple[int, int], device: torch.device) -> list[Owed]:
        """What the rows owe at a site to nodes that are frozen, and to nodes that train."""
        key = site.name, spread, device
        found = self._owed.get(key)
        if found is None:
            terms = self.plan.terms[site.name]
            parts = [tuple(t for t in terms if t.trains == trains) for trains in (False, True)]
            found = self._owed[key] = [
                self._part(site, part, spread, device) for part in parts if part
            ]
        return found

    @property
    def mixed(self) -> list[Site]:
        """The sites where the rows do not all owe the same."""
        return [site for site in self.plan.sites.values() if self._alike(site) is None]

    # ------------------------------------------------------------------ private
    def _alike(self, site: Site) -> Side | None:
        """The one side path of a site where all rows owe the same."""
        terms = self.plan.terms[site.name]
        batch = self._batch(tuple(term.node for term in terms), (1, 1))
        if not batch.is_uniform:
            return None
        found = self._whole.get(site.name)
        if found is None:
            owed = tuple(
                replace(t, coefficient=c) for t, c in zip(terms, batch.kinds[0], strict=True)
            )
            draft = Draft(site, owed, self.manner.dtype)
            self._charge(draft.nbytes)
            with exact_mode(draft.device):
                found = self._whole[site.name] = PathSide(draft, self.manner)
        return found

    def _part(
        self, site: Site, terms: Terms, spread: tuple[int, int], device: torch.device
    ) -> Owed:
        values = [term.value for term in terms]
        batch = self._batch(tuple(term.node for term in terms), spread)
        return Owed(
            site, values, batch, side_dtype(site, values, self.manner.dtype), device, self._charge
        )

    def _batch(self, nodes: tuple[str, ...], spread: tuple[int, int]) -> Batch:
        """The batch as these nodes see it; sites with the same nodes share it."""
        key = nodes, spread
        found = self._seen.get(key)
        if found is None:
            found = self._seen[key] = self.batch.at(nodes).spread(*spread)
        return found

    def _form(self, owed: Owed, strategy: str, tokens: int) -> SumForm:
        way = _way(owed, strategy, tokens)
        key = id(owed), way
        found = self._forms.get(key)
        if found is None:
            with exact_mode(owed.device):
                found = self._forms[key] = way(owed)
        return found

    def _cheapest(self, spread: tuple[int, int], tokens: int, device: torch.device) -> str:
        """The form with the least estimated time over all sites."""
        owed = [each for site in self.mixed for each in self.owed(site, spread, device)]
        alike: dict[Hashable, list[Owed]] = {}
        for each in owed:
            shapes = tuple((v.shape, v.rank) for v in each.values)
            alike.setdefault((each.batch.nodes, shapes, each.dtype, type(each.site)), []).append(
                each
            )

        def seconds(strategy: str) -> float:
            total = Cost()
            for same in alike.values():
                work = _way(same[0], strategy, tokens).work(same[0], tokens)
                total += Cost(
                    work.calls * len(same), work.bytes * len(same), work.flops * len(same)
                )
            return total.seconds(machine(device))

        return min(FORMS, key=seconds)


def _way(owed: Owed, strategy: str, tokens: int) -> type[SumForm]:
    return next(way for way in FORMS[strategy] if way.suits(owed, tokens))


class _LifetimeToken:
    """What is there as long as anything that was laid out for a route."""


class _RoutedSide:
    """One site's side path in a batch whose rows differ there."""

    def __init__(self, route: Route, site: Site, axis: BatchAxis) -> None:
        self._route, self._site, self._axis = route, site, axis

    def __call__(self, out: Tensor, x: Tensor, spare: bool) -> Tensor:
        if self._axis.probing:
            self._axis.note(self._site, x)
            return out
        dtype, spread = out.dtype, self._axis.spread(self._site, x, out)
        tokens = out.numel() // (out.shape[0] * out.shape[self._site.channels])
        for form in self._route.forms(self._site, spread, tokens, out.device):
            if form.owed.live:
                x = self._route.manner.dropped(x, self._site)
            out, taken, spare = widened(out, x, form.owed.dtype, spare)
            out, spare = form.add(out, taken, spare=spare), True
        return out.to(dtype)
