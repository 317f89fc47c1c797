"""Keep the routes of the last batches, so that the same rows again cost nothing."""

from __future__ import annotations

from collections.abc import Callable

from ..last_used import LastUsed
from ..ledger import Ledger, Unbounded
from ..marks import Marks
from ..plan import PlacedPlan
from ..rows.batch import Batch
from ..sidepaths.side import Manner
from .factor_tables import FactorTables
from .forms import Strategy, check_strategy
from .routed import Route

__all__ = ["Router"]

KEPT_ROUTES = 2


class Router:
    """The routes of the last batches.

    Args:
        manner: how side paths compute.
        ledger: bounds the memory that is laid out.
    """

    def __init__(self, manner: Manner, *, ledger: Ledger | None = None) -> None:
        self._manner = manner
        self._ledger = ledger or Unbounded()
        self._kept: LastUsed[Route] = LastUsed(KEPT_ROUTES)
        self._marks = Marks()
        self._tables = FactorTables()
        self._ledger.spare(self._kept)

    def route(
        self,
        placed: PlacedPlan,
        batch: Batch,
        strategy: Strategy,
        *,
        check: Callable[[], None],
    ) -> Route:
        """Return the route of a batch; the same object if it was used before.

        Args:
            placed: the terms of all the batch's nodes, with coefficient 1.
            batch: what the rows owe.
            strategy: one form for all sites, or ``auto``.
            check: is called before a route is made; a kept route has passed it.

        Raises:
            SpecError: no such strategy.
        """
        # By value: each request makes a batch of its own. The plan is known by identity, and holds
        # the factors. A plan with factors that train is never met again, and neither is its route.
        lineages = batch.lineages if placed.plan.overrides else ()
        owed = batch.debts, lineages, strategy, placed.dtypes
        key = placed.plan, owed
        route = self._kept.again(key)
        if route is None:
            check_strategy(strategy)
            check()
            mark = self._marks.of((placed.plan.mark, owed))
            tables = self._tables.of(placed.plan)
            route = Route(batch, placed, strategy, self._manner, mark, self._ledger, tables)
            self._kept.keep(key, route)
        return route

    def forget(self) -> None:
        """Drop the routes kept."""
        self._kept.forget()
        self._tables.forget()
