"""Unmerged: the base untouched, and one side path per site, for one path (however deep) or for a path per row.

A side path is a forward hook on the site's own module, there while something is active and gone after it. What is laid
out for a path is kept for the last paths used, as far as there is room; factors that train go through as they are, so
that autograd sees them. A node is noted as trained on when a gradient comes back through a side path of its own: a step
of an optimiser moves no other, and it does not matter which module of the base the forward began at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import BaseMismatch, BudgetError, listing
from ..sites import Site
from .arithmetic import exact_mode
from .axis import RowAxis
from .entry import Entry
from .kept import Kept, Ledger, Unbounded
from .plan import Plan
from .routed import Route
from .side import Draft, Laid, Manner, PathSide, Side, check_own
from .slab import Slab
from .unpromised import any_global_hook
from .watch import Watch

__all__ = ["Unmerged"]

KEPT_PATHS = 64
PORTION = 1 << 20  # bytes that are taken at once for what is laid out


class Unmerged:
    """The hooks that run side paths.

    Args:
        base: the model.
        manner: how side paths compute.
        ledger: who bounds what is laid out.
    """

    def __init__(self, base: nn.Module, manner: Manner, *, ledger: Ledger | None = None) -> None:
        self._manner = manner
        self._ledger = ledger or Unbounded()
        self._hooked: dict[str, tuple[Site, RemovableHandle]] = {}
        self._current: Mapping[str, Side] = {}
        self._ready: Laid | None = None
        self._kept: Kept[Laid] = Kept(KEPT_PATHS)
        self._ledger.spare(self._kept)
        self._watch = Watch(base)
        self._entry = Entry(base)
        self._training: dict[str, list[str]] = {}
        self.reached: set[str] = set()
        """The nodes that a gradient has come back to; forgotten by whoever reads it."""

    def check(self, plan: Plan) -> None:
        """That every site of the plan runs when its module is called.

        Raises:
            MergedOnly: one does not; says which and why.
        """
        for name, terms in plan.terms.items():
            plan.sites[name].check_mode(terms[0].value, merged=False, node=terms[0].node)

    def sides(self, plan: Plan) -> Laid:
        """The side paths of one path or blend; the same object for a plan that was used before."""
        key = plan, *[site.dtype for site in plan.sites.values()]  # the base may be cast
        return self._kept.get(key, lambda: self._laid_out(plan), keep=plan.fixed)

    def ready(self, plan: Plan) -> None:
        """Lay out what `switch` will run: all that can fail."""
        self._ready = None
        self._ready = self.sides(plan)

    def ready_for(self, route: Route, axis: RowAxis) -> None:
        """Lay out what `switch_to` will run: all that can fail."""
        self._ready = None
        route.sides(axis)

    def switch(self, plan: Plan) -> None:
        """Run one path or blend beside the weights; an empty plan is the bare base."""
        self._switch(plan, self.sides(plan), plan.mark if plan.terms else None, None)

    def switch_to(self, route: Route, axis: RowAxis) -> None:
        """Run a batch of paths beside the weights, its rows lying as ``axis`` says."""
        axis.sites = route.mixed
        self._switch(route.plan, route.sides(axis), route.mark, axis)

    def forget(self) -> None:
        """Drop what is kept for paths used before."""
        self._kept.forget()

    @property
    def current(self) -> object:
        """What is laid out for what runs now; whoever holds it will find it again."""
        return self._current

    # ------------------------------------------------------------------ private
    def _laid_out(self, plan: Plan) -> Laid:
        laid, sites, manner = Laid(), plan.sites, self._manner
        drafts = {name: Draft(sites[name], terms, manner.dtype) for name, terms in plan.terms.items()}
        try:
            lend = self._ledger.lend(laid, sum(draft.nbytes for draft in drafts.values()))
        except BudgetError as error:
            nodes = listing(dict.fromkeys(term.node for terms in plan.terms.values() for term in terms))
            raise error.within(f"{nodes}: laid out beside the weights") from error
        with exact_mode(*{draft.device for draft in drafts.values()}):
            for device, nbytes, names in _portions(drafts):
                slab = Slab(lend(nbytes, device))
                laid.update((name, PathSide(drafts[name], manner, slab)) for name in names)
        return laid

    def _switch(self, plan: Plan, sides: Mapping[str, Side], mark: int | None, axis: RowAxis | None) -> None:
        self._current, self._ready = sides, None
        for name in [n for n, (site, _) in self._hooked.items() if plan.sites.get(n) is not site]:
            self._hooked.pop(name)[1].remove()
        for name, site in plan.sites.items():
            if name not in self._hooked:
                handle = site.module.register_forward_hook(self._hook(site), with_kwargs=True)
                self._hooked[name] = site, handle
        self._training = {
            name: training
            for name, terms in plan.terms.items()
            if (training := [term.node for term in terms if term.trains])
        }
        self._watch.expect(plan)
        self._entry.watch(mark, axis)

    def _hook(self, site: Site) -> Any:
        name, fired = site.name, self._watch.fired

        def side_path(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            if not self._entry.probing:
                check_own(module, site)
            fired.add(name)
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not isinstance(out, Tensor):
                raise BaseMismatch(
                    f"{name}: called with {type(x).__name__}, returned {type(out).__name__}; a side path needs tensors",
                    'use activate(…, mode="merged")',
                )
            self._entry.side_path_runs()
            spare = site.makes_its_output and len(module._forward_hooks) == 1 and not any_global_hook()
            after = self._current[name](out, x, spare)
            if after.grad_fn is not None and not self._entry.probing:
                self._entry.guard(after)
                training = self._training.get(name)
                if training:
                    after.grad_fn.register_prehook(partial(self._reach, training))
            return after

        return side_path

    def _reach(self, nodes: Sequence[str], grads: object) -> None:
        """A backward comes by a side path: the gradients of these nodes are made next."""
        self.reached.update(nodes)


def _portions(drafts: Mapping[str, Draft]) -> Iterator[tuple[torch.device, int, list[str]]]:
    """Sites one after the other on one device, and the bytes of slab that they take together: about `PORTION`."""
    for device, names in groupby(drafts, key=lambda name: drafts[name].device):
        portion: list[str] = []
        nbytes = 0
        for name in names:
            portion.append(name)
            nbytes += drafts[name].slab_bytes
            if nbytes >= PORTION:
                yield device, nbytes, portion
                portion, nbytes = [], 0
        if portion:
            yield device, nbytes, portion
