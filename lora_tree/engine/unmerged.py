"""Unmerged: the base untouched, and one side path per site, for one path (however deep) or for a path per row.

A side path is a forward hook on the site's own module, there while something is active and gone after it. What is laid
out for a path is kept for the last paths used, as far as there is room; factors that train go through as they are, so
that autograd sees them. A node is noted as trained on when a gradient comes back through a side path of its own: a step
of an optimiser moves no other, and it does not matter which module of the base the forward began at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import BaseMismatch, BudgetError, listing
from ..sites import Site
from .arithmetic import exact_mode
from .batch_axis import BatchAxis
from .forward_guard import ForwardGuard
from .last_used import LastUsed
from .ledger import Ledger, Unbounded
from .plan import EMPTY_PLAN, Plan
from .routed import Route
from .side import Draft, Manner, PathSide, Side, Sides, check_own
from .slab import Slab
from .uncalled import UncalledSites
from .unpromised import any_global_hook

__all__ = ["SidePaths", "Unmerged"]

KEPT_PATHS = 64
PORTION = 1 << 20  # bytes that are taken at once for what is laid out


@dataclass(frozen=True, eq=False)
class SidePaths:
    """The side paths that run, for one path or for a batch.

    Args:
        of: whose hooks run it.
        plan: its sites and terms.
        sides: site → its side path.
        mark: what key/value caches and recorded backwards know it by; None: nothing to watch.
        axis: how the rows of a batch lie.
        mixed: the sites where the rows of a batch do not all owe the same.
    """

    of: Unmerged
    plan: Plan
    sides: Mapping[str, Side]
    mark: int | None
    axis: BatchAxis | None = None
    mixed: Sequence[Site] = ()

    @cached_property
    def training(self) -> dict[str, list[str]]:
        """Site → the nodes that train there."""
        found: dict[str, list[str]] = {}
        for name, node in self.plan.live:
            found.setdefault(name, []).append(node)
        return found

    def install(self) -> None:
        """Make these the side paths that run."""
        self.of.run(self)


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
        self._kept: LastUsed[Sides] = LastUsed(KEPT_PATHS)
        self._ledger.spare(self._kept)
        self._uncalled = UncalledSites(base)
        self._forward_guard = ForwardGuard(base)
        self._running = SidePaths(self, EMPTY_PLAN, {}, None)
        self.reached: set[str] = set()
        """The nodes that a gradient has come back to; the reader clears it."""

    permanent = False

    def check(self, plan: Plan) -> None:
        """Check that every site of the plan runs when its module is called.

        Raises:
            MergedOnly: one does not; says which and why.
        """
        for name, terms in plan.terms.items():
            plan.sites[name].check_mode(terms[0].value, merged=False, node=terms[0].node)

    def lay_out(self, plan: Plan) -> SidePaths:
        """Return the side paths of one path or blend; what is laid out is kept for the last plans.

        Raises:
            BudgetError: there is no room for them; names the nodes.
        """
        key = plan, *[site.dtype for site in plan.sites.values()]  # the base may be cast
        sides = self._kept.get(key, lambda: self._laid_out(plan), keep=plan.fixed)
        return SidePaths(self, plan, sides, plan.mark if plan.terms else None)

    def lay_out_rows(self, route: Route, axis: BatchAxis) -> SidePaths:
        """Return the side paths of a batch whose rows lie as ``axis`` says."""
        return SidePaths(self, route.plan, route.sides(axis), route.mark, axis, route.mixed)

    def run(self, paths: SidePaths) -> None:
        """Let the base run these, and no others. Called again, it mends what a call that failed left half done."""
        self._running = paths
        sites = paths.plan.sites
        gone = [name for name, (site, _) in self._hooked.items() if sites.get(name) is not site]
        for name in gone:
            self._hooked[name][1].remove()
            del self._hooked[name]
        for name, site in sites.items():
            if name not in self._hooked:
                handle = site.module.register_forward_hook(self._hook(site), with_kwargs=True)
                self._hooked[name] = site, handle
        self._uncalled.expect(paths.plan)
        self._forward_guard.watch(paths.mark, paths.axis, paths.mixed)

    def forget(self) -> None:
        """Drop what is kept for paths used before."""
        self._kept.forget()

    # ------------------------------------------------------------------ private
    def _laid_out(self, plan: Plan) -> Sides:
        laid, sites, manner = Sides(), plan.sites, self._manner
        drafts = {
            name: Draft(sites[name], terms, manner.dtype) for name, terms in plan.terms.items()
        }
        try:
            lend = self._ledger.lend(laid, sum(draft.nbytes for draft in drafts.values()))
        except BudgetError as error:
            nodes = listing(
                dict.fromkeys(term.node for terms in plan.terms.values() for term in terms)
            )
            raise error.within(f"{nodes}: laid out beside the weights") from error
        with exact_mode(*{draft.device for draft in drafts.values()}):
            for device, nbytes, names in _portions(drafts):
                slab = Slab(lend(nbytes, device))
                laid.update((name, PathSide(drafts[name], manner, slab)) for name in names)
        return laid

    def _hook(self, site: Site) -> Any:
        name, fired = site.name, self._uncalled.fired

        def side_path(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
        ) -> Any:
            if not self._forward_guard.probing:
                check_own(module, site)
            fired.add(name)
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not isinstance(out, Tensor):
                raise BaseMismatch(
                    f"{name}: called with {type(x).__name__}, returned {type(out).__name__}; a side path needs tensors",
                    'use activate(…, mode="merged")',
                )
            self._forward_guard.side_path_runs()
            spare = (
                site.makes_its_output and len(module._forward_hooks) == 1 and not any_global_hook()
            )
            after = self._running.sides[name](out, x, spare)
            if after.grad_fn is not None and not self._forward_guard.probing:
                self._forward_guard.guard(after)
                training = self._running.training.get(name)
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
