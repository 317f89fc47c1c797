"""Routed: every row of a batch by its own path, each site's sum in one of several forms.

    paths ─→ Batch: what each row owes to each node    once for a batch
             Route: what is owed at each site          once for a batch, when a site first runs
                    in a form that adds it up          once for a batch and a number of tokens a row

A site at which all rows owe the same is one product, and its first axis may be anything.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeAlias

import torch
from torch import Tensor

from ...errors import BudgetError
from ...lowrank import LowRank
from ...sites import Site
from ..arithmetic import exact_mode
from ..kernels import routes
from ..ledger import Ledger
from ..plan import PlacedPlan, Plan, Term, Terms
from ..rows.batch import Batch
from ..sidepaths.ground import grounds_of
from ..sidepaths.shares import Share
from ..sidepaths.side import Draft, GroundedSide, Manner, PathSide, Side, side_device, side_dtype
from .factor_tables import PlanTables
from .forms import Strategy, SumForm, first_suitable_form, form_for
from .owed import Owed
from .path_form import OneRowForm, one_row, one_row_owed
from .row_grounds import RowGrounds
from .row_shares import share_of
from .segmented import SegmentedForm

__all__ = ["Route", "Spread"]

Spread: TypeAlias = tuple[int, int]
"""(repeat, tile): how often each row occurs in succession, and how often the batch is stacked."""


class Route:
    """One batch on one plan.

    Args:
        batch: what the rows owe.
        placed: the terms of all the batch's nodes, with coefficient 1.
        strategy: one form for all sites, or ``auto``.
        manner: how side paths compute.
        mark: the number that key/value caches know it by: see `Plan`.
        ledger: bounds the memory that is laid out.
        tables: where the plan's factors lie.
    """

    def __init__(
        self,
        batch: Batch,
        placed: PlacedPlan,
        strategy: Strategy,
        manner: Manner,
        mark: int,
        ledger: Ledger,
        tables: PlanTables,
    ) -> None:
        self._tables = tables
        plan = placed.plan
        self.batch, self.plan, self.strategy = batch, plan, strategy
        self._trains = placed.trains
        self.manner, self.mark = manner, mark
        # Terms do not depend on the rows, so the first batch of a plan lists them for all.
        requested_dtype = manner.dtype
        key = "terms", placed.dtypes, requested_dtype
        self._known = tables.once(key, partial(_known_terms, plan, requested_dtype))
        # Like the terms, these hold for the dtypes that the base has now: it may be cast later.
        self._forms_of_plan: dict[tuple[str, torch.device], SegmentedForm | None] = tables.once(
            ("forms", placed.dtypes, requested_dtype, strategy), dict
        )
        # The ledger counts the bytes until the token is collected. It is not the route itself,
        # because forms hold the token through `_charge` and may outlive the route. If they held the
        # route, it would never be collected.
        token = _LifetimeToken()
        self._charge = partial(_charged, ledger, token)
        self._lend = partial(_lent, ledger, token)
        self._batches: dict[Hashable, Batch] = {}
        self._owed: dict[Hashable, list[Owed]] = {}
        self._forms: dict[Hashable, SumForm] = {}
        self._shares: dict[Hashable, Callable[[], Share]] = {}
        self.grounds: dict[str, RowGrounds] = {}
        """Site → the overrides under each row, for sites whose tensors a node overrides."""
        self.known_forms: dict[tuple[str, Spread, int, int], list[SumForm]] = {}
        """(site, spread, tokens, device) → what `forms` returned; side paths keep that here."""
        self._rows: dict[tuple[float, ...], Batch] = {}
        """Coefficients that all rows owe at some site → a batch of one row that owes the same."""
        for name, overrides in grounds_of(plan).items():
            site, terms = plan.sites[name], plan.terms[name]
            self.grounds[name] = RowGrounds(site, overrides, terms, batch)
            self._charge(self.grounds[name].nbytes)

    # ------------------------------------------------------------------ before a forward
    @cached_property
    def mixed(self) -> list[Site]:
        """The sites at which the rows do not all owe the same."""
        is_uniform: dict[int, bool] = {}
        """Id of a tuple of nodes → whether all rows owe them the same; for sites without overrides.
        """
        mixed_sites = []
        for name, site in self.plan.sites.items():
            grounds = self.grounds.get(name)
            if grounds is not None:
                if not (grounds.is_uniform and self._grounded_batch(name).is_uniform):
                    mixed_sites.append(site)
                continue
            nodes = self._known[name].nodes
            has_uniform_rows = is_uniform.get(id(nodes))
            if has_uniform_rows is None:
                has_uniform_rows = is_uniform[id(nodes)] = self._batch(nodes).is_uniform
            if not has_uniform_rows:
                mixed_sites.append(site)
        return mixed_sites

    @cached_property
    def uniform(self) -> dict[str, Side]:
        """Site → its one side path, at sites where all rows owe the same."""
        mixed = {site.name for site in self.mixed}
        sides: dict[str, Side] = {}
        for name, site in self.plan.sites.items():
            if name in mixed:
                continue
            terms = self._terms(name)
            if name in self.grounds:
                batch = self._grounded_batch(name)
            else:
                batch = self._batch(self._known[name].nodes)
            (coefficients,) = batch.kinds
            owed = [replace(t, coefficient=c) for t, c in zip(terms, coefficients, strict=True)]
            dtype = side_dtype(site.weight, [t.value for t in owed], self.manner.dtype)
            device = side_device(site.weight, [t.value for t in owed])
            draft = Draft(site, tuple(owed), (dtype, device), trains=True)
            self._read_in_place(draft, coefficients)
            if draft.stacks:
                self._charge(draft.nbytes)  # before it is made: there may be no room
            with exact_mode(draft.device):
                sides[name] = PathSide(draft, self.manner)
            ground = self.grounds[name].only if name in self.grounds else None
            if ground is not None:
                sides[name] = GroundedSide(ground, sides[name])
        return sides

    def _read_in_place(self, draft: Draft, coefficients: tuple[float, ...]) -> None:
        """Let kernels read the factors of a site where all rows owe the same, through the plan's
        table.
        """
        name = draft.site.name
        if not self._may_read_in_place(name, draft.device):
            return
        batch = self._rows.get(coefficients)
        if batch is None:
            batch = self._rows[coefficients] = one_row(coefficients)
        values = self._known[name].values
        owed = one_row_owed(draft.site, values, draft.dtype, draft.device, self._tables, batch)
        if OneRowForm.suits(owed, 1):
            draft.reads_by(OneRowForm(owed))

    def _may_read_in_place(self, name: str, device: torch.device) -> bool:
        """Return whether kernels may read a site's factors through the plan's table."""
        # A site's factors are the plan's only where nothing trains and nothing is overridden.
        if self._trains or name in self.grounds or name in self.plan.biased:
            return False
        return routes(device)

    def _terms(self, name: str) -> Terms:
        """Return the increments at a site, without those that no row owes because of overrides."""
        terms = self.plan.terms[name]
        grounds = self.grounds.get(name)
        if grounds is None:
            return terms
        owing = self.batch.at([term.node for term in terms], grounds.without)
        return tuple([t for t, (rows, _) in zip(terms, owing.by_node, strict=True) if rows])

    # ------------------------------------------------------------------ in a forward
    def forms(self, site: Site, spread: Spread, tokens: int, device: torch.device) -> list[SumForm]:
        """Return the forms that add up a site's sum: the one of frozen terms, then the one of terms
        that train.

        Args:
            site: of the plan.
            spread: how the rows lie.
            tokens: the number of inputs of a row.
            device: of the site's output.
        """
        if self._may_read_in_place(site.name, device):
            form = self._form_of_plan(site, device)
            if form is not None:
                return [form.over(self._batch(self._known[site.name].nodes, spread))]
        return [self._form(owed, tokens) for owed in self._owed_at(site, spread, device)]

    def _form_of_plan(self, site: Site, device: torch.device) -> SegmentedForm | None:
        """Return the form in which kernels add up a site's sum for any batch of the plan; None if
        the form has to be chosen for each batch.
        """
        key = site.name, device
        if key not in self._forms_of_plan:
            known = self._known[site.name]
            owed = one_row_owed(site, known.values, known.dtype, device, self._tables)
            is_segmented = self._form_kind(owed, 1) is SegmentedForm
            self._forms_of_plan[key] = SegmentedForm(owed) if is_segmented else None
        return self._forms_of_plan[key]

    def shares(self, site: Site, spread: Spread, device: torch.device) -> list[Share]:
        """Return the shares that are added at a site to tokens whose rows are known: that of frozen
        terms, then that of terms that train.
        """
        found = []
        for owed in self._owed_at(site, spread, device):
            share = self._shares.get(id(owed))
            if share is None:
                with exact_mode(device):
                    share = self._shares[id(owed)] = share_of(owed)
            found.append(share())
        return found

    def _owed_at(self, site: Site, spread: Spread, device: torch.device) -> list[Owed]:
        """Return what the rows owe at a site to nodes that are frozen, and to nodes that train."""
        key = site.name, spread, device
        found = self._owed.get(key)
        if found is None:
            if self._trains or site.name in self.grounds:
                found = self._owed_in_parts(site, spread, device)
            else:
                known = self._known[site.name]
                batch = self._batch(known.nodes, spread)
                found = [self._owing(site, known, batch, device, self._tables, False)]
            self._owed[key] = found
        return found

    def _owed_in_parts(self, site: Site, spread: Spread, device: torch.device) -> list[Owed]:
        """Return what is owed where some terms train, or where an override may drop some."""
        found = []
        # A plan's tables list all its values, and an override may have dropped some here.
        tables = self._tables if site.name not in self.grounds else PlanTables({})
        # Separately, because only terms that train see dropout, and only frozen ones are laid out.
        every = self._terms(site.name)
        for trains in (False, True):
            terms = [term for term in every if (self._trains and term.trains) == trains]
            if terms:
                known = _KnownTerms.of(site, terms, self.manner.dtype)
                batch = self._batch(known.nodes, spread, self._without(site.name))
                found.append(self._owing(site, known, batch, device, tables, trains))
        return found

    def _owing(
        self,
        site: Site,
        known: _KnownTerms,
        batch: Batch,
        device: torch.device,
        tables: PlanTables,
        trains: bool,
    ) -> Owed:
        return Owed(
            site,
            known.values,
            batch,
            known.dtype,
            device,
            self._charge,
            tables,
            trains,
            self._lend,
        )

    def _grounded_batch(self, name: str) -> Batch:
        """Return the batch with only the nodes whose terms count at a site with overrides."""
        nodes = tuple([term.node for term in self._terms(name)])
        return self._batch(nodes, without=self._without(name))

    def _without(self, name: str) -> tuple[frozenset[str], ...] | None:
        """Return kind → the nodes that overrides leave out at a site; None: there are none."""
        grounds = self.grounds.get(name)
        return None if grounds is None else tuple(grounds.without)

    def _batch(
        self,
        nodes: tuple[str, ...],
        spread: Spread = (1, 1),
        without: tuple[frozenset[str], ...] | None = None,
    ) -> Batch:
        """Return the batch with some nodes only; sites with the same nodes share it."""
        key = nodes, without, spread
        found = self._batches.get(key)
        if found is None:
            found = self._batches[key] = self.batch.at(nodes, without).spread(*spread)
        return found

    def _form(self, owed: Owed, tokens: int) -> SumForm:
        """Return the form that adds up what is owed, laid out when it is first needed."""
        key = id(owed), tokens
        form = self._forms.get(key)
        if form is None:
            form_kind = self._form_kind(owed, tokens)
            laid_out = id(owed), form_kind  # the same for any number of tokens
            form = self._forms.get(laid_out)
            if form is None:
                if form_kind.lays_out:
                    with exact_mode(owed.device):
                        form = form_kind(owed)
                else:  # entering the mode takes longer than making such a form
                    form = form_kind(owed)
                self._forms[laid_out] = form
            self._forms[key] = form
        return form

    def _form_kind(self, owed: Owed, tokens: int) -> type[SumForm]:
        """Return the kind of form that was asked for, or that ``auto`` chooses."""
        if self.strategy == "auto":
            return form_for(owed, tokens, trains=self._trains)
        return first_suitable_form(self.strategy, owed, tokens)


@dataclass(frozen=True, eq=False)
class _KnownTerms:
    """Some terms at a site, as batches need them.

    Args:
        nodes: their nodes, in the order of the sum; one tuple for all sites with the same nodes.
        values: the increments.
        dtype: what the side path computes in.
    """

    nodes: tuple[str, ...]
    values: Sequence[LowRank]
    dtype: torch.dtype

    @staticmethod
    def of(site: Site, terms: Sequence[Term], requested_dtype: torch.dtype | None) -> _KnownTerms:
        """Return some terms of a site; ``requested_dtype`` as for `side_dtype`."""
        values = [term.value for term in terms]
        nodes = tuple([term.node for term in terms])
        return _KnownTerms(nodes, values, side_dtype(site.weight, values, requested_dtype))


def _known_terms(plan: Plan, requested_dtype: torch.dtype | None) -> dict[str, _KnownTerms]:
    """Return site → all its terms."""
    found: dict[str, _KnownTerms] = {}
    nodes: dict[tuple[str, ...], tuple[str, ...]] = {}
    for name, terms in plan.terms.items():
        known = _KnownTerms.of(plan.sites[name], terms, requested_dtype)
        found[name] = replace(known, nodes=nodes.setdefault(known.nodes, known.nodes))
    return found


def _charged(ledger: Ledger, owner: object, nbytes: int) -> None:
    """Make the ledger count bytes until ``owner`` is collected."""
    with _batch_named():
        ledger.charge(owner, nbytes)


def _lent(ledger: Ledger, owner: object, nbytes: int, device: torch.device) -> Tensor:
    """Return memory that the ledger counts until ``owner`` is collected."""
    with _batch_named():
        lend = ledger.lend(owner, nbytes)
    return lend(nbytes, device)


@contextmanager
def _batch_named() -> Iterator[None]:
    """Say that it is a batch which has no room, and how much a batch needs.

    Sites lay out their factors one after the other, as the forward reaches them. So the ledger's
    error knows the bytes of one site alone, and the budget that it names is only the next step.
    """
    try:
        yield
    except BudgetError as error:
        raise error.within("a batch of paths, laid out beside the weights").advised(
            "that is for one site, and the sites after it need room as well: count three times "
            "the bytes of each path's lineage",
            'or take less room: route(…, strategy="nodes"), or fewer paths in a batch',
        ) from error


class _LifetimeToken:
    """A lifetime token: the ledger gets the bytes of a route back when this object is collected."""
