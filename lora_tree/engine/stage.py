"""Stage: makes behaviours, and makes one of them the base's.

    compose(request) → Behaviour     everything that can fail: checks, pins, lays out; the base is not touched
    install(behaviour)               the only writer: weights, side paths, save hook, claim; rolls back if it fails

Law: after a call that failed the base does what it did before, and `current` says so. A behaviour that a block
remembers keeps its pins, so bringing it back needs no room and no file that it did not have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..adapter import Adapter
from ..errors import StateError
from ..tree import AdapterTree
from .behaviour import Behaviour, FactorParameters, LaidOut, Pins, Request, SideHooks, State
from .blocks import Blocks
from .finite import check_beside
from .fresh import settle_fresh
from .host import Claim, CompileWatch, saved_by_themselves, warn_on_save
from .merged import Merged
from .plan import EMPTY_PLAN, Binder, Plan
from .routed import Router
from .side import Manner

__all__ = ["Stage"]


class Stage:
    """The current behaviour of one base, and the blocks that will bring back earlier ones.

    Args:
        base: the model.
        tree: whose nodes.
        claim: what the next model that attaches to this base will be told of it.
        merged, beside, router, binder: what this composes with.
        manner: how side paths compute.
        compiled: whether the base was compiled, which no side path survives.
        pin: paths → their adapters, which stay in memory until they are released.
        factors: the factors that train, or did.
    """

    def __init__(
        self,
        base: nn.Module,
        tree: AdapterTree,
        claim: Claim,
        *,
        merged: Merged,
        beside: SideHooks,
        router: Router,
        binder: Binder,
        manner: Manner,
        compiled: CompileWatch,
        pin: Callable[[Iterable[str]], Pins],
        factors: FactorParameters,
    ) -> None:
        self._base, self._tree, self._claim = base, tree, claim
        self._merged, self._router, self._binder = merged, router, binder
        self._manner, self._compiled = manner, compiled
        self._pin, self._factors = pin, factors
        self._save_hooks: list[RemovableHandle] = []
        self.blocks = Blocks()
        self.beside = beside
        self._closed = False
        self.epoch = 0
        """How often a behaviour was installed."""
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
        coefficients = self._coefficients(request)
        settle_fresh(self._tree, self._base, coefficients)
        pins = self._pin(coefficients)
        try:
            adapters: dict[str, Adapter] = {}
            terms: list[tuple[str, float, Adapter]] = []
            for node, coefficient in coefficients.items():
                if node not in pins.adapters:
                    continue  # a group
                adapters[node] = self._factors.shown(node, pins.adapters[node])
                terms.append((node, coefficient, adapters[node]))
            plan = self._binder.plan(terms)
            laid = self._laid_out(request, plan)
            dtypes = tuple([site.dtype for site in plan.sites.values()])
            return Behaviour(request, plan, laid, pins, adapters, dtypes)
        except BaseException:
            pins.release()
            raise

    def is_current(self, behaviour: Behaviour) -> bool:
        """Whether composing its request anew would give the same: its sites, adapters and factors are as they were."""
        plan = behaviour.plan
        if behaviour.beside.of is not self.beside:
            return False  # the base was prepared meanwhile
        if not all(site.is_in(self._base) for site in plan.sites.values()):
            return False
        if behaviour.dtypes != tuple([site.dtype for site in plan.sites.values()]):
            return False  # the base was cast
        for node, adapter in behaviour.adapters.items():
            now = self._tree[node].loaded or behaviour.pins.adapters.get(node)
            if now is None or self._factors.shown(node, now) is not adapter:
                return False
        return plan.is_as_it_was()

    # ------------------------------------------------------------------ the only writer
    def become(self, request: Request) -> None:
        """Compose a request and install it; on an error the base does what it did before."""
        new = self.compose(request)
        try:
            self.install(new)
        finally:
            self._retire(new)

    def install(self, new: Behaviour) -> None:
        """Make a behaviour the base's own.

        Raises:
            ForeignWrite: somebody else wrote to a merged weight. Nothing was written.
            MemoryError, RuntimeError: what torch raised. The old behaviour is back.
        """
        old = self.current
        self._merged.verify(new.weights)
        try:
            self._write(new)
            self.current = new
            self.epoch += 1
        except BaseException:
            self.current = old
            self._write(old, after_failure=True)
            raise
        self._retire(old)

    def renew(self) -> None:
        """Compose and install the current request anew, because what it is made of has changed."""
        self.become(self.current.request)

    def start_over(self, put_back: Callable[[], None]) -> None:
        """Be bare, after ``put_back`` has settled what the base's own weights are."""
        bare = self.compose(Request(""))
        with torch.no_grad():
            put_back()
        self.install(bare)

    def prepare(self, make: Callable[[], SideHooks]) -> None:
        """Run the fixed side paths that ``make`` puts in from now on, while the base is bare."""
        before = self.beside
        self.beside = fixed = make()
        try:
            self.become(Request(""))
        except BaseException:
            self.beside = before
            fixed.forget()  # its hooks are permanent otherwise
            raise

    def close(self) -> None:
        """Be bare for good: open blocks bring nothing back."""
        self.become(Request(""))
        self._closed = True

    @contextlib.contextmanager
    def coming_back(self) -> Iterator[None]:
        """Bring back what is active now when the ``with`` is left, after exceptions too."""
        block = self.blocks.enter(self.current)
        try:
            yield
        finally:
            in_order = self.blocks.leave(block)
            try:
                if not in_order:
                    raise StateError(
                        "a `using` or `route` was left while one that was entered after it is still open",
                        "leave them in reverse order; model.deactivate() makes the base bare again",
                    )
                if not self._closed:
                    self._bring_back(block.before)
            finally:
                self._retire(block.before)

    # ------------------------------------------------------------------ what is in use
    def requests(self) -> Iterator[Request]:
        """The request that the base does now, and those that blocks will bring back."""
        yield self.current.request
        for before in self.blocks.befores:
            yield before.request

    def merged_nodes(self) -> set[str]:
        """The nodes that are in the weights now, or will be when a block is left."""
        behaviours = [self.current, *self.blocks.befores]
        return {
            node
            for behaviour in behaviours
            if behaviour.weights.terms
            for node in behaviour.adapters
        }

    # ------------------------------------------------------------------ private
    def _coefficients(self, request: Request) -> Mapping[str, float]:
        """Node → its coefficient. In a batch every node counts once: its rows have coefficients of their own."""
        if request.rows is not None:
            return dict.fromkeys(request.rows.batch.nodes, 1.0)
        (blend,) = request.blends
        return self._tree.coefficients(blend)

    def _laid_out(self, request: Request, plan: Plan) -> LaidOut:
        """The side paths of a request; where it is merged, the check that it can be, and none."""
        rows = request.rows
        if rows is None and request.mode == "merged":
            self._merged.check(plan, owned=self._factors.paths)
            return self.beside.lay_out(EMPTY_PLAN)
        if plan.terms and not self.beside.permanent:
            self._compiled.check(self._base)
        self.beside.check(plan)
        check_beside(plan, self._manner.dtype, None if rows is None else rows.batch.largest)
        if rows is None:
            return self.beside.lay_out(plan)
        return self.beside.lay_out_rows(
            self._router.route(rows.batch, plan, rows.strategy), rows.axis
        )

    def _bring_back(self, before: Behaviour) -> None:
        if before is self.current:
            return
        if self.is_current(before):
            self.install(before)
        else:
            self.become(before.request)

    def _write(self, behaviour: Behaviour, *, after_failure: bool = False) -> None:
        """Make every write to the base that a behaviour needs. Called again, it mends what a failure left half done."""
        self._merged.switch(behaviour.weights, after_failure=after_failure)
        behaviour.beside.install()
        self._claim.bare = behaviour.state is State.BARE and not self.beside.permanent
        self._warn_on_save(bool(behaviour.weights.terms))

    def _warn_on_save(self, merged: bool) -> None:
        """``save_pretrained`` of a base with a path merged into it would write that path: warn while there is one."""
        if merged and not self._save_hooks:
            for module in saved_by_themselves(self._base):
                hook = module.register_state_dict_pre_hook(warn_on_save)  # type: ignore[no-untyped-call]
                self._save_hooks.append(hook)
        while self._save_hooks and not merged:
            self._save_hooks.pop().remove()

    def _retire(self, behaviour: Behaviour) -> None:
        """Release the pins of a behaviour that is neither current nor remembered by a block."""
        if behaviour is not self.current and behaviour not in self.blocks.befores:
            behaviour.pins.release()
