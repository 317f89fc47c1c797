"""Stage: makes behaviours, and makes one of them the base's.

    compose(request) → Behaviour     everything that can fail: checks, pins, lays out; the base is
                                     not touched
    install(behaviour)               the only writer: weights, side paths, save hook, claim; rolls
                                     back if it fails

Law: after a failed call the base behaves as before, and `current` says so. A behaviour that a block
remembers keeps its pins, so bringing it back needs no more room and reads no file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..adapter import Adapter
from ..errors import StateError
from ..tree import AdapterTree
from ..weights import Weight
from .behaviour import (
    Ahead,
    Behaviour,
    FactorParameters,
    LaidOut,
    Pins,
    Request,
    SideHooks,
    State,
)
from .blocks import Blocks
from .fresh import settle_fresh
from .host import Claim, CompileWatch, self_saving_modules, warn_on_save
from .plan import EMPTY_PLAN, PlacedPlan, Plan
from .planner import Planner
from .rows.batch import tree_node
from .switching.merged import MergedWeights

__all__ = ["Stage"]


class Stage:
    """The current behaviour of one base, and the blocks that will bring back earlier ones.

    Args:
        base: the model.
        tree: the tree whose nodes are used.
        claim: tells the next model that attaches to this base whether it is bare.
        merged: writes plans into the weights.
        side_hooks: runs plans beside the weights.
        planner: makes plans.
        compiled: knows whether the base was compiled; a compiled forward ignores side paths.
        pin: pins the adapters of some nodes, which stay in memory until they are released.
        factors: the factors that train, or did.
    """

    def __init__(
        self,
        base: nn.Module,
        tree: AdapterTree,
        claim: Claim,
        *,
        merged: MergedWeights,
        side_hooks: SideHooks,
        planner: Planner,
        compiled: CompileWatch,
        pin: Callable[[Iterable[str], Ahead | None], Pins],
        factors: FactorParameters,
    ) -> None:
        self._base, self._tree, self._claim = base, tree, claim
        self._merged, self._planner = merged, planner
        self._compiled = compiled
        self._pin, self._factors = pin, factors
        self._save_hooks: list[RemovableHandle] = []
        self._warns_on_save: bool | None = False
        """True while the save hooks are in; None: a call failed while they were put in or taken
        out.
        """
        self.blocks = Blocks()
        self.side_hooks = side_hooks
        self._closed = False
        # Key/value caches outside of this library go by it.
        self.epoch = 0
        """The number of times that a behaviour was installed."""
        self.current = self.compose(Request(""))

    # ------------------------------------------------------------------ what can fail
    def compose(self, request: Request) -> Behaviour:
        """Check a request, pin its adapters and lay out its side paths. The base is not touched.

        Raises:
            PathError, SpecError: a path is not in the tree, or a blend makes no sense.
            BaseMismatch: an adapter does not fit, or can't be applied in this mode.
            FolderError, FormatError, BudgetError: an adapter can't be loaded.
            StateError: a node that trains was to be merged, or the base is compiled.
        """
        owed = self._owed(request)
        nodes: dict[str, None] = {}
        is_fresh = False
        for _, node, _ in owed:
            nodes[node] = None
            is_fresh = is_fresh or self._tree[node].fresh is not None
        if is_fresh:
            settle_fresh(self._tree, self._base, nodes, self._planner.binder.own_value)
        lineages = None
        if not isinstance(request.selection, tuple):
            lineages = partial(self._tree.counting_lineages, request.selection)
        # A plan that was made before a file's hash was known. `placed` finds it again, as that of a
        # path that was used before.
        prepared: list[PlacedPlan] = []
        ahead = partial(self._look_ahead, request, owed, lineages, prepared)
        try:
            # The cache keeps these adapters until the pins are released, on any way out.
            pins = self._pin(nodes, ahead)
        except BaseException:
            if prepared:
                # Plans and side paths made of an adapter that is refused would keep its memory.
                prepared.clear()
                self._planner.forget()
                if not self.side_hooks.permanent:
                    self.side_hooks.forget()
            raise
        try:
            adapters: dict[str, Adapter] = {}
            terms: list[tuple[str, Weight, Adapter]] = []
            for name, node, weight in owed:
                if node not in pins.adapters:
                    continue  # a group: it has no adapter
                adapters[node] = self._factors.shown(node, pins.adapters[node])
                terms.append((name, weight, adapters[node]))
            placed = self._planner.placed(terms, lineages)
            weights, side_paths = self._parts(request, placed)
            return Behaviour(request, placed, weights, side_paths, pins, adapters)
        except BaseException:
            pins.release()
            raise

    def _look_ahead(
        self,
        request: Request,
        owed: Sequence[tuple[str, str, Weight]],
        lineages: Callable[[], list[list[str]]] | None,
        prepared: list[PlacedPlan],
        adapters: Mapping[str, Adapter],
        are_all: bool,
    ) -> None:
        """Prepare a request while one of its files is hashed; see `Ahead`.

        Args:
            request, owed, lineages: as in `compose`.
            prepared: gets the plan, if all adapters are there, because nothing else may keep it.
            adapters: node → adapter.
            are_all: none is missing.
        """
        try:
            terms: list[tuple[str, Weight, Adapter]] = []
            for name, node, weight in owed:
                if node in adapters:
                    terms.append((name, weight, self._factors.shown(node, adapters[node])))
            if not are_all:
                # Binding is most of the work, and an adapter is bound only once.
                for name, _, adapter in terms:
                    self._planner.binder.bind(tree_node(name), adapter)
                return
            placed = self._planner.placed(terms, lineages)
            prepared.append(placed)
            if request.rows is None and request.mode != "merged":
                self.side_hooks.look_ahead(placed)
        except Warning:
            raise  # the caller turns warnings into errors, and each warning is given only once
        except Exception:
            # If the hash is right, `compose` meets it again. If not, the wrong files are the error.
            return

    def _owed(self, request: Request) -> list[tuple[str, str, Weight]]:
        """Return (name in the plan, node, its coefficient). In a batch every node counts once: its
        rows have coefficients of their own.
        """
        if request.rows is not None:
            return request.rows.batch.owed_nodes
        assert not isinstance(request.selection, tuple)
        owed: list[tuple[str, str, Weight]] = []
        for node, coefficient in self._tree.coefficients(request.selection).items():
            owed.append((node, node, coefficient))
        return owed

    def _parts(self, request: Request, placed: PlacedPlan) -> tuple[Plan, LaidOut]:
        """Check a plan in the mode asked for; return the plan to write into the weights, and the
        side paths.
        """
        if request.rows is None and request.mode == "merged":
            self._merged.mergeable.check(placed, self._factors)
            return placed.plan, self.side_hooks.nothing
        # Permanent hooks were there when the base was compiled. Any other hook would be ignored
        # without an error.
        if placed.plan.terms and not self.side_hooks.permanent:
            self._compiled.check(self._base)
        if request.rows is None:
            return EMPTY_PLAN, self.side_hooks.lay_out(placed)
        return EMPTY_PLAN, self.side_hooks.lay_out_rows(placed, request.rows)

    def is_current(self, behaviour: Behaviour) -> bool:
        """Return whether composing its request again would give the same: its sites, adapters and
        factors have not changed.
        """
        if behaviour.side_paths.of is not self.side_hooks:
            return False  # the base was prepared meanwhile
        plan = behaviour.placed.plan
        if plan.look(self._base) != behaviour.placed.dtypes:
            return False  # a module was replaced, or the base was cast
        for node, adapter in behaviour.adapters.items():
            now = self._tree[node].loaded or behaviour.pins.adapters.get(node)
            if now is None or self._factors.shown(node, now) is not adapter:
                return False
        return plan.is_unchanged()

    # ------------------------------------------------------------------ the only writer
    def become(self, request: Request) -> None:
        """Compose a request and install it; on an error the base behaves as before."""
        new = self.compose(request)
        try:
            self.install(new)
        finally:
            self._retire(new)

    def install(self, new: Behaviour) -> None:
        """Make a behaviour the base's own.

        Raises:
            ForeignWrite: other code wrote to a merged weight. Nothing was written.
            MemoryError, RuntimeError: what torch raised. The old behaviour is back.
        """
        old = self.current
        # Outside of the `try`: a roll-back would take the foreign write for one of ours.
        self._merged.verify(new.weights)
        try:
            self._write(new)
            self.current = new
            self.epoch += 1
        except BaseException:
            self.current = old
            self._write(old, after_failure=True)
            raise
        # Only now: until here a failure needs its adapters again.
        self._retire(old)

    def renew(self) -> None:
        """Compose and install the current request again, because its parts have changed."""
        self.become(self.current.request)

    def start_over(self, put_back: Callable[[], None]) -> None:
        """Make the base bare, after ``put_back`` has decided which weights are its own."""
        # Composed first, because that may fail and `put_back` can't be taken back.
        bare = self.compose(Request(""))
        with torch.no_grad():
            put_back()
        self.install(bare)

    def prepare(self, make: Callable[[], SideHooks]) -> None:
        """Make the base bare, and from now on use the permanent side paths that ``make`` makes."""
        before = self.side_hooks
        self.side_hooks = fixed = make()
        try:
            self.become(Request(""))
        except BaseException:
            self.side_hooks = before
            fixed.forget()  # its hooks would stay in the base otherwise
            # The roll-back of `become` still saw the fixed side paths in the base.
            self._tell_claim(self.current)
            raise

    def close(self) -> None:
        """Make the base bare for good: open blocks bring nothing back."""
        self.become(Request(""))
        self._closed = True

    # ------------------------------------------------------------------ blocks
    @contextlib.contextmanager
    def coming_back(self) -> Iterator[None]:
        """Reactivate the present path when the ``with`` is left, after exceptions too."""
        # The block holds the behaviour, and with it its pins and what was laid out for it.
        block = self.blocks.enter(self.current)
        try:
            yield
        finally:
            in_order = self.blocks.leave(block)
            try:
                if not in_order:
                    raise StateError(
                        "a `using` or `route` was left while one that was entered after it is "
                        "still open",
                        "leave them in reverse order; model.deactivate() makes the base bare again",
                    )
                if not self._closed:
                    self._bring_back(block.before)
            finally:
                self._retire(block.before)

    def _bring_back(self, before: Behaviour) -> None:
        if before is self.current:
            return
        if self.is_current(before):
            self.install(before)
        else:
            self.become(before.request)

    # ------------------------------------------------------------------ what is in use
    def requests(self) -> Iterator[Request]:
        """Yield the current request, and those that blocks will bring back."""
        for behaviour in (self.current, *self.blocks.earlier_behaviours):
            yield behaviour.request

    def merged_nodes(self) -> set[str]:
        """Return the nodes that are in the weights now, or will be when a block is left."""
        nodes: set[str] = set()
        for behaviour in (self.current, *self.blocks.earlier_behaviours):
            if behaviour.weights.terms:
                nodes.update(behaviour.adapters)
        return nodes

    # ------------------------------------------------------------------ private
    def _write(self, behaviour: Behaviour, *, after_failure: bool = False) -> None:
        """Make every write to the base that a behaviour needs. A second call completes one that
        failed half-way.
        """
        self._merged.switch(behaviour.weights, after_failure=after_failure)
        behaviour.side_paths.install()
        self._tell_claim(behaviour)
        merged = bool(behaviour.weights.terms)
        if merged != self._warns_on_save:
            self._warn_on_save(merged)

    def _tell_claim(self, behaviour: Behaviour) -> None:
        """Note whether the base is bare, for a model that is attached after this one was
        dropped.
        """
        self._claim.bare = behaviour.state is State.BARE and not self.side_hooks.permanent

    def _warn_on_save(self, merged: bool) -> None:
        """Put in the hooks that warn in ``save_pretrained`` while a path is merged, or take them
        out.
        """
        self._warns_on_save = None
        while self._save_hooks:
            self._save_hooks.pop().remove()
        if merged:
            for module in self_saving_modules(self._base):
                register: Any = module.register_state_dict_pre_hook  # torch has no types for it
                self._save_hooks.append(register(warn_on_save))
        self._warns_on_save = merged

    def _retire(self, behaviour: Behaviour) -> None:
        """Release the pins of a behaviour that is neither current nor remembered by a block."""
        if behaviour is not self.current and behaviour not in self.blocks.earlier_behaviours:
            behaviour.pins.release()
