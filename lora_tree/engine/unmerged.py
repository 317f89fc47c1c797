"""Unmerged: the base untouched, and one side path per site, for one path (however deep) or for a
path per row.

A side path is a forward hook on the site's own module. It is there while a path is active, and is
removed after that. The side paths laid out for the last paths are kept, as far as there is room.
Factors that train are used directly, without a copy, so that autograd sees them.

A node counts as reached by training when a gradient comes back through a side path with its
factors. A step of an optimiser moves no other node, and it does not matter which module of the base
the forward began at.

Law: side paths that are laid out passed every check, so a path whose side paths were kept is not
checked again.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import BaseMismatch, BudgetError, StateError, listing
from ..sites import Site
from .arithmetic import exact_mode
from .behaviour import RoutedRows
from .finite import check_side_paths
from .hook import Hook
from .kernels import routes
from .last_used import LastUsed
from .ledger import FREE_FIRST, Ledger, Unbounded
from .plan import EMPTY_PLAN, PlacedPlan, Plan, WeightDtypes
from .routing.factor_tables import FactorTables
from .routing.path_form import read_in_place
from .routing.routed_side import routed_sides
from .routing.router import Router
from .rows.batch import Batch, tree_node
from .rows.batch_axis import BatchAxis
from .sidepaths.forward_guard import ForwardGuard
from .sidepaths.ground import Ground, check_grounds, check_one_input, grounds_of
from .sidepaths.inside import InsideForwards
from .sidepaths.readers import Readers, readers_of
from .sidepaths.side import (
    Draft,
    GroundedSide,
    Manner,
    PathSide,
    Side,
    SideKind,
    Sides,
    raise_for_copy,
    side_kinds,
)
from .sidepaths.uncalled import UncalledSites
from .slab import Slab
from .unpromised import global_hooks, saved_tensor_hook

__all__ = ["SidePaths", "Unmerged"]

_Read: TypeAlias = tuple[Readers, Mapping[str, Site]]

KEPT_PATHS = 64
PORTION = 1 << 20
"""The bytes of memory that are taken in one piece for factors that are laid out."""


@dataclass(frozen=True, eq=False)
class SidePaths:
    """The side paths of one path or of a batch, ready to run.

    Args:
        of: the owner of the hooks that run them.
        plan: its sites and terms.
        sides: site → its side path.
        mark: the behaviour's number for key/value caches and recorded backwards; None: nothing to
            guard.
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
        if self.plan.fixed:
            return found
        for name, terms in self.plan.terms.items():
            nodes = [term.node for term in terms if term.trained]
            nodes += [each.node for each in self.plan.overrides.get(name, ()) if each.trained]
            if nodes:
                # A node may have an increment and an override at one site.
                found[name] = list(dict.fromkeys(map(tree_node, nodes)))
        return found

    def install(self) -> None:
        """Make these the side paths that run."""
        self.of.run(self)


class Unmerged:
    """The hooks that run side paths.

    Args:
        base: the model.
        manner: how side paths compute.
        ledger: bounds the memory that is laid out.
        reached: gets the nodes that a gradient has come back to; may be shared with other views of
            the base. None: a new set.
    """

    permanent = False

    def __init__(
        self,
        base: nn.Module,
        manner: Manner,
        *,
        ledger: Ledger | None = None,
        reached: set[str] | None = None,
    ) -> None:
        self._manner = manner
        self._ledger = ledger or Unbounded()
        self._hooked: dict[str, tuple[Site, RemovableHandle]] = {}
        self._kept: LastUsed[Sides] = LastUsed(KEPT_PATHS)
        # Side paths of earlier requests are the first to go if room is needed.
        self._ledger.spare(self._kept)
        self._in_place: LastUsed[Sides] = LastUsed(KEPT_PATHS)
        """The kept side paths that take no memory beside the adapters."""
        self._router = Router(manner, ledger=self._ledger)
        self._tables = FactorTables()
        self._finite: weakref.WeakKeyDictionary[Plan, tuple[WeightDtypes, torch.dtype | None]] = (
            weakref.WeakKeyDictionary()
        )
        """Plan → the dtypes for which batches of it were found to be finite."""
        self._has_hooks: Mapping[str, Site] | None = {}
        """The sites that have hooks; None: a call failed while hooks were put in."""
        self._uncalled = UncalledSites(base)
        self._forward_guard = ForwardGuard(base)
        # Every side path uses these two of torch at every call, so they are looked up once.
        self._on_all_modules, self._packs_saved = global_hooks(), saved_tensor_hook()
        self._base = base
        self._inside = InsideForwards(base, ran=self._ran, dropped=manner.dropped)
        self._watches = False
        """True: some forwards are watched, or may be after a call that failed."""
        self._read_by: weakref.WeakKeyDictionary[Plan, dict[bool, _Read]]
        self._read_by = weakref.WeakKeyDictionary()
        """Plan → the modules that read its weights, and its sites that need a hook; for a path and
        for a batch."""
        self.nothing = SidePaths(self, EMPTY_PLAN, {}, None)
        """An empty set of side paths, to be installed when nothing is to run beside the weights."""
        self._running = self.nothing
        self._settled = True
        """False: a call failed half-way, and the hooks may be those of two behaviours."""
        self.reached: set[str] = set() if reached is None else reached
        """The nodes that a gradient has come back to; the reader clears it."""

    # ------------------------------------------------------------------ what can fail
    def lay_out(self, placed: PlacedPlan) -> SidePaths:
        """Check one path or blend, and return its side paths; they are kept for the last plans.

        Raises:
            MergedOnly: a site does not run when its module is called; says which and why.
            BaseMismatch: a side path would hold a number that is not finite; names the node and the
                module.
            BudgetError: there is no room for them; names the nodes.
        """
        if not placed.plan.terms:
            return self.nothing
        sides = self._sides(placed)
        assert sides is not None, "only `look_ahead` may get None"
        return SidePaths(self, placed.plan, sides, placed.plan.mark)

    def look_ahead(self, placed: PlacedPlan) -> None:
        """Check one path or blend, and lay out what takes no room, for `lay_out` to find.

        Raises:
            MergedOnly, BaseMismatch: as `lay_out`.
        """
        plan = placed.plan
        if plan.terms and plan.fixed and not plan.overrides:
            self._sides(placed, ahead=True)

    def _sides(self, placed: PlacedPlan, *, ahead: bool = False) -> Sides | None:
        """Return the side paths of a plan: the kept ones if they are still valid, else new ones.

        Args:
            placed: the plan.
            ahead: return None instead of laying out what takes room.
        """
        plan = placed.plan
        # The dtypes are in the key because a side path is laid out for the dtype of its weight, and
        # the base may be cast.
        key = plan, placed.dtypes
        sides = self._kept.again(key) or self._in_place.again(key)
        # Adapters may have come back to other addresses. `of` shifts the addresses in the tables,
        # or makes new tables if it can't.
        known = None if sides is None else sides.tables
        if known is not None and known is not self._tables.of(plan):
            sides = None
        if sides is None:
            kinds = side_kinds(plan, self._manner.dtype)
            if plan.overrides:
                check_grounds(plan)
            check_side_paths(placed, kinds)
            sides = self._laid_out(placed, kinds, ahead=ahead)
            # Any code may write to factors that train, so nothing made of them is kept.
            if sides is not None and plan.fixed:
                # The ledger drops what `_kept` keeps to make room. Dropping side paths that take no
                # memory makes none, provided that evicting an adapter frees its memory even while a
                # plan refers to it. So these are kept in `_in_place`.
                is_free = not sides.nbytes and self._ledger.reclaims and plan.is_in_buffers
                (self._in_place if is_free else self._kept).keep(key, sides)
        return sides

    def lay_out_rows(self, placed: PlacedPlan, rows: RoutedRows) -> SidePaths:
        """Check the nodes of a batch, and return its side paths.

        Raises:
            MergedOnly, BaseMismatch, BudgetError: as `lay_out`.
            SpecError: no such strategy.
        """
        batch, axis = rows.batch, rows.axis
        check = partial(self._check_rows, placed, batch)
        route = self._router.route(placed, batch, rows.strategy, check=check)
        return SidePaths(
            self, placed.plan, routed_sides(route, axis), route.mark, axis, route.mixed
        )

    def _check_rows(self, placed: PlacedPlan, batch: Batch) -> None:
        if placed.plan.overrides:
            check_grounds(placed.plan)
        # As long as no row owes a node more than its full weight, one check holds for all batches
        # of a plan.
        ordinary = max(batch.largest.values(), default=0.0) <= 1.0
        checked = placed.dtypes, self._manner.dtype
        if ordinary and self._finite.get(placed.plan) == checked:
            return
        kinds = side_kinds(placed.plan, self._manner.dtype)
        check_side_paths(placed, kinds, None if ordinary else batch.largest)
        if ordinary and placed.plan.fixed:
            self._finite[placed.plan] = checked

    def _laid_out(
        self, placed: PlacedPlan, kinds: Mapping[str, SideKind], *, ahead: bool
    ) -> Sides | None:
        plan, laid = placed.plan, Sides()
        drafts: list[Draft] = []
        devices: set[torch.device] = set()
        total = 0
        for name, terms in plan.terms.items():
            drafts.append(Draft(plan.sites[name], terms, kinds[name], trains=placed.trains))
            devices.add(drafts[-1].device)
        if any(map(routes, devices)):
            laid.tables = tables = self._tables.of(plan)
            read_in_place(drafts, tables)
        stacked = []
        for draft in drafts:
            if draft.stacks:
                stacked.append(draft)
                total += draft.nbytes
        if ahead and stacked:
            return None
        # Made before they are counted, because only then it is known which had to be copied.
        overridden = grounds_of(plan) if plan.overrides else {}
        grounds = {}
        for name, overrides in overridden.items():
            grounds[name] = Ground(plan.sites[name], overrides)
            total += grounds[name].nbytes
        try:
            # Before anything is made: the cache may have to evict first. It counts the bytes until
            # `laid` is collected.
            lend = self._ledger.lend(laid, total)
        except BudgetError as error:
            where = f"{_nodes(plan)}: laid out beside the weights"
            raise error.within(where).advised(FREE_FIRST) from error
        laid.nbytes = total
        portions = _portions(stacked)
        sides: dict[str, PathSide] = {}
        with exact_mode(*devices):
            for device, nbytes, portion in portions:
                slab = Slab(lend(nbytes, device))
                for draft in portion:
                    sides[draft.site.name] = PathSide(draft, self._manner, slab)
            for draft in drafts:
                name = draft.site.name
                side = sides.get(name) or PathSide(draft, self._manner)
                laid[name] = GroundedSide(grounds[name], side) if name in grounds else side
        return laid

    # ------------------------------------------------------------------ the only writer of hooks
    def run(self, paths: SidePaths) -> None:
        """Make the base run these side paths, and no others.

        A second call completes one that failed half-way.
        """
        if paths is self._running and self._settled:
            return
        # This comes first, so that every new hook finds its side path at once.
        self._running, self._settled = paths, False
        readers, called = self._readers(paths)
        # Most bases call each layer, and then there is nothing to watch.
        if readers.watched or self._watches:
            self._watches = True  # set before: a call that fails may leave some watched
            self._inside.run(readers.watched, paths.sides, paths.axis)
            self._watches = bool(readers.watched)
        self._put_hooks(paths.plan, called)
        self._uncalled.expect(paths.plan)
        places = self._inside.places(paths.mixed) if self._watches else paths.mixed
        self._forward_guard.watch(paths.mark, paths.axis, places)
        self._settled = True

    def _put_hooks(self, plan: Plan, wanted: Mapping[str, Site]) -> None:
        """Put a hook on the module of each of these sites, and on no other module.

        Args:
            plan: the plan that runs.
            wanted: its sites that are called: name → site.
        """
        # Most switches are between paths with the same sites. The sites are compared by identity:
        # under the same name there may be another module now.
        if self._has_hooks == wanted:
            return
        self._has_hooks = None  # not known if this call fails half-way
        for name in list(self._hooked):
            site, handle = self._hooked[name]
            if plan.sites.get(name) is not site:
                handle.remove()
                del self._hooked[name]
        new = [site for name, site in wanted.items() if name not in self._hooked]
        has_new_output = {site: site.has_new_output for site in new}
        for site in new:
            hook = self._hook(site, has_new_output[site])
            handle = site.module.register_forward_hook(hook, with_kwargs=True)
            self._hooked[site.name] = site, handle
        self._has_hooks = {name: site for name, (site, _) in self._hooked.items()}

    def _readers(self, paths: SidePaths) -> _Read:
        """Return the modules that read the weights of these paths, and the sites to hook."""
        known = self._read_by.setdefault(paths.plan, {})
        is_routed = paths.axis is not None
        if is_routed not in known:
            plan = paths.plan
            sites = [site for name, site in plan.sites.items() if plan.terms.get(name)]
            readers = readers_of(self._base, sites, is_routed)
            called = {*readers.called, *plan.overrides}
            hooked = {name: site for name, site in plan.sites.items() if name in called}
            known[is_routed] = readers, hooked
        return known[is_routed]

    def forget(self) -> None:
        """Drop the side paths kept for earlier requests."""
        self._kept.forget()
        self._in_place.forget()
        self._router.forget()
        self._tables.forget()

    # ------------------------------------------------------------------ in a forward
    def _hook(self, site: Site, has_new_output: bool) -> Any:
        """Return a site's forward hook.

        Args:
            site: the site.
            has_new_output: its module's output is new memory.
        """
        name, guard, inside = site.name, self._forward_guard, self._inside
        on_all_modules = self._on_all_modules

        def side_path(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
        ) -> Any:
            # While the guard probes, a copy of the base runs on purpose.
            if module is not site.module and not guard.probing:
                raise_for_copy(module, name)
            # Some models call a layer by keyword.
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not isinstance(out, Tensor):
                raise BaseMismatch(
                    f"{name}: called with {type(x).__name__}, returned {type(out).__name__}; a "
                    "side path needs tensors",
                    'use activate(…, mode="merged")',
                )
            # Looked up at every call: the hook stays while paths with the same site come and go.
            running = self._running
            if name in running.plan.overrides:
                check_one_input(site, args, kwargs)
            # Another hook, on the module or on all modules, may have kept the output; so may a
            # forward that other code has put on this module since.
            alone = len(module._forward_hooks) == 1 and not on_all_modules
            spare = has_new_output and alone and "forward" not in vars(module)
            side = running.sides[name]
            if not (self._watches and inside.is_watched):
                after = self._ran(site, side(out, x, spare, None))
            else:
                with inside.apart(x) as (layout, note):
                    after = self._ran(site, side(out, x, spare, layout))
                    note(after)
            if after.grad_fn is not None and x.requires_grad and not out.requires_grad:
                _raise_for_stop(module, name)
            return after

        return Hook(side_path)

    def _ran(self, site: Site, after: Tensor) -> Tensor:
        """Note that a site's side path ran, guard its backward, and return its result ``after``."""
        self._uncalled.called.add(site.name)
        # It can be seen only inside the layer whether checkpointing runs it.
        if self._packs_saved(False) is not None or not torch.is_grad_enabled():
            self._forward_guard.may_run_again(after)
        if after.grad_fn is not None:
            training = self._running.training.get(site.name)
            if training:
                # A hook on the graph: a gradient reaches it only if rows of this forward went
                # through these nodes.
                after.grad_fn.register_prehook(partial(self._reach, training))
        return after

    def _reach(self, nodes: Sequence[str], grads: object) -> None:
        """Note that a backward has reached a side path, whose nodes get their gradients next."""
        self.reached.update(nodes)


def _raise_for_stop(module: nn.Module, name: str) -> NoReturn:
    """Refuse a layer of the base that passes no gradient on: nodes below it would not learn.

    Raises:
        StateError: always; names the site.
    """
    raise StateError(
        f"{name}: this {type(module).__name__} passes no gradient to the layers before it, so "
        "nodes there would not train",
        "a quantiser of weights alone trains (bitsandbytes, torchao's weight-only kinds); one that "
        "quantises inputs for inference does not",
    )


def _portions(drafts: Sequence[Draft]) -> list[tuple[torch.device, int, list[Draft]]]:
    """Return (device, bytes, drafts): successive drafts for one slab of about `PORTION` bytes.

    One slab for all drafts would need that much memory in one piece; one for each site would make
    thousands of small pieces.
    """
    portions: list[tuple[torch.device, int, list[Draft]]] = []
    portion: list[Draft] = []
    nbytes = 0
    for draft in drafts:
        if portion and (nbytes >= PORTION or draft.device != portion[0].device):
            portions.append((portion[0].device, nbytes, portion))
            portion, nbytes = [], 0
        portion.append(draft)
        nbytes += Slab.padded_bytes(draft.down_bytes) + Slab.padded_bytes(draft.up_bytes)
    if portion:
        portions.append((portion[0].device, nbytes, portion))
    return portions


def _nodes(plan: Plan) -> str:
    """Return the nodes of a plan for a message, in the order of the sum."""
    nodes: dict[str, None] = {}
    for terms in plan.terms.values():
        for term in terms:
            nodes[term.node] = None
    return listing(nodes)
