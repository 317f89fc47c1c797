"""TreeModel: a tree bound to one base; makes a path the base's behaviour, and undoes it again.

    BARE                 the base alone
    MERGED               the path is written into the weights; no hook, no wrapper, the same
                         addresses
    UNMERGED, ROUTED     the weights are the base's own; side paths run as hooks, for one path or
                         for a path per row
    DETACHED             nothing of ours is left; the model can't be used again

Every state but the last leads to every other. A call checks everything before it changes anything.
If it fails, the state before the call is kept. One lock guards the switches: while one thread is
inside ``using`` or ``route``, other threads wait to switch the base.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import nn

from .adapter import Adapter
from .attachment import Attachment, check_tree_comes_first
from .base_names import warn_of_base
from .blend import Blend, parse_blend
from .cache import Cache, Frequency, Policy
from .cache.link import link_to
from .cache.pinning import Pinning
from .engine.answers import AnswersForBase
from .engine.behaviour import Mode, Request, RoutedRows, State
from .engine.binder import Binder
from .engine.fresh import settle_fresh
from .engine.host import CompileWatch, MergedWarning, claim, release_claim, unwrapped
from .engine.plan import Plan
from .engine.planner import KEPT_PLANS, Planner
from .engine.prepared import Prepared, side_path_increments
from .engine.routing.expansion import expansions
from .engine.routing.forms import Strategy
from .engine.rows.batch import Batch
from .engine.rows.batch_axis import BatchAxis, SeenSites
from .engine.sidepaths.side import Manner
from .engine.stage import Stage
from .engine.switching.copy_place import Copies, CopyPlace
from .engine.switching.merged import MergedWeights
from .engine.unmerged import Unmerged
from .errors import SpecError, StateError, suggest
from .given import check_iterable
from .path_model import PathModel
from .path_models import PathModels
from .storage import Source
from .training.bare_base_watch import BareBaseWatch
from .training.every_rank import joined
from .training.factors import Factors
from .training.rank_names import ranks
from .training.session import Training
from .tree import AdapterTree

__all__ = ["MergedWarning", "State", "TreeModel", "attach"]

KEPT_IN_BUDGET = 64
"""Plans kept under a budget, if the cache can free their adapters' memory all the same."""


def attach(
    tree: AdapterTree,
    base: nn.Module,
    *,
    pristine: CopyPlace = "auto",
    compute_dtype: torch.dtype | None = None,
    host_budget: int | str | None = None,
    device_budget: int | str | None = None,
    eviction: Callable[[], Policy] = Frequency,
) -> TreeModel:
    """Bind a tree to an instantiated base. The base is not changed until a path is activated.

    Args:
        tree: fresh nodes get their adapters now.
        base: any ``torch.nn.Module``; ``torch.compile`` and DDP wrappers are looked through.
        pristine: where the base's own weights are kept while a path is merged: a copy of the
            weights that adapters touch, made when first needed. ``device``: beside the weights;
            ``host``: in host memory, pinned on CUDA; ``auto``: on the device if it has room for
            them and an eighth of its memory stays free, else on the host. If memory runs out on the
            device, a warning says so and the host is taken. ``log``: no copies, but an undo log of
            two bits a number; exact as well, and many times slower on a CPU. ``none``: nowhere;
            paths are added and subtracted in place, and the weights drift by a rounding with every
            switch. See `TreeModel.pristine`.
        compute_dtype: what unmerged side paths compute in; None: the widest of the factors' and the
            weight's own.
        host_budget, device_budget: how much memory adapters that come from files may take, in RAM
            and on the base's device: bytes, or ``"8GiB"``. None: ``LORA_TREE_HOST_BUDGET`` and
            ``LORA_TREE_DEVICE_BUDGET`` count, then tree.yaml, else there is no bound. For a base on
            the CPU both are RAM, and the smaller counts.
        eviction: a class or a function that makes an eviction policy; called once for each kind of
            memory.

    Raises:
        SpecError: ``tree`` or ``base`` is something else, a budget or a dtype makes no sense, or
            ``eviction`` is no class or function.
        StateError: the base is attached already, or wrapped by PEFT or FSDP.
        BaseMismatch: a fresh node targets nothing in this base; names the node.

    >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> tree = AdapterTree(defaults=dict(r=2, target_modules=["0"]))
    >>> _ = tree.add("fr")
    >>> model = attach(tree, base)
    >>> with model.using("fr"):
    ...     tuple(base(torch.zeros(1, 4)).shape)
    (1, 3)
    >>> model.active, model.state.value
    ('', 'bare')
    """
    how = Attachment(pristine, compute_dtype, host_budget, device_budget, eviction)
    return TreeModel(tree, base, how)


class TreeModel(AnswersForBase):
    """A tree bound to a base; made by `attach`.

    Args:
        tree: fresh nodes get their adapters now.
        base: the model.
        how: the other arguments of `attach`.

    It owns the factors that train; the base's own keys stay as they are. An attribute that a
    `TreeModel` does not have is its base's, to read and to set, as trainers expect (``config``,
    ``get_input_embeddings``, ``dtype``, …). A few names by which the base alone would be saved or
    changed are refused.

    >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> base.config = "the base's own"
    >>> attach(AdapterTree(), base).config
    "the base's own"
    """

    def __init__(self, tree: AdapterTree, base: nn.Module, how: Attachment) -> None:
        super().__init__()
        check_tree_comes_first(tree, base)
        budgets = how.budgets(tree)
        inner, compiled = unwrapped(base)
        if isinstance(inner, TreeModel):
            raise StateError(
                "the base is a TreeModel already", "attach to its .base after detach()"
            )
        self.tree = tree
        self.base = inner
        # nn.Module begins in training mode. The base's own flag is taken instead, so that a trainer
        # that reads `model.training` learns the mode that the base is in.
        self.training = inner.training
        self.factors = Factors()
        self._detached = False
        # Reentrant: `using` holds it while it calls `activate`, and the code inside a block may
        # switch again. A plain lock would deadlock there.
        self._lock = threading.RLock()
        self._merged = MergedWeights(inner, place=how.pristine)
        self._manner = Manner(how.compute_dtype)
        self._compiled = CompileWatch(compiled)
        self._seen_sites = SeenSites()
        link = link_to(inner)
        # The claim comes before the fresh nodes: if another model holds this base, the tree is
        # still as the caller left it.
        own_claim = claim(inner, self)
        try:
            settle_fresh(tree, inner, tree.paths())
        except BaseException:
            # The error's traceback may keep this model alive for long, and so its claim.
            release_claim(inner)
            raise
        self.cache = Cache(tree, budgets, policy=how.eviction, link=link)
        cache = self.cache

        def keeps(plan: Plan) -> bool:
            # A plan keeps its adapters alive, and under a budget the cache decides about memory.
            return cache.reclaims and plan.is_in_buffers

        name = getattr(inner, "name_or_path", None)
        own_name = name if isinstance(name, str) and name else None
        # The warning is for the caller of `attach`, two frames up from here.
        warn_of_base("the tree", tree.base, own_name, stacklevel=3)
        self._binder = Binder(
            inner,
            tree.base,
            own_name=own_name,
            own_value=self._merged.pristine.known,
        )
        self._planner = Planner(
            self._binder,
            origin=self.cache.origin,
            kept=KEPT_IN_BUDGET if cache.bounded else KEPT_PLANS,
            keeps=keeps if cache.bounded else None,
        )
        self._stage = Stage(
            inner,
            tree,
            own_claim,
            merged=self._merged,
            side_hooks=Unmerged(inner, self._manner, ledger=self.cache),
            planner=self._planner,
            compiled=self._compiled,
            pin=Pinning(self.cache, inner),
            factors=self.factors,
        )
        self._path_models = PathModels(
            tree,
            inner,
            base_name=own_name,
            stage=self._stage,
            binder=self._binder,
            cache=self.cache,
            factors=self.factors,
            manner=self._manner,
        )
        self._training = Training(
            inner,
            tree,
            self.factors,
            stage=self._stage,
            path_models=self._path_models,
            binder=self._binder,
            manner=self._manner,
            bare_base_watch=BareBaseWatch(inner, TreeModel.forward),
        )
        if how.pristine == "none":
            warnings.warn(
                'pristine="none": paths are added to and subtracted from the weights in place, '
                "and every switch leaves a rounding behind",
                MergedWarning,
                stacklevel=3,
            )
        # A missing attribute is the base's from here on. Before, it is a mistake in this method,
        # which the base's answer would hide.
        self._answers = True
        # Last, because anything before may raise. From here on the tree asks this model before a
        # node is changed, and under a budget it reads files through it.
        tree.attach(self, reads=self.cache.bounded)

    # ------------------------------------------------------------------ switching
    @property
    def pristine(self) -> Copies:
        """The places where the base's own weights are kept now, and the bytes that this takes.

        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> tree = AdapterTree(defaults=dict(r=2, target_modules=["0"]))
        >>> _ = tree.add("fr")
        >>> model = attach(tree, base)
        >>> with model.using("fr"):
        ...     model.pristine
        Copies(requested='auto', device_bytes=0, host_bytes=48, log_bytes=0)
        """
        return self._merged.pristine.copies

    @property
    def active(self) -> Blend | tuple[Blend, ...]:
        """The path or blend that is active now; ``""`` is the bare base; one for each row if
        routed.
        """
        return self._stage.current.request.selection

    @property
    def state(self) -> State:
        """The state of the base now."""
        return State.DETACHED if self._detached else self._stage.current.state

    @property
    def epoch(self) -> int:
        """A number that grows with every switch that succeeds."""
        return self._stage.epoch

    def activate(self, blend: Blend, *, mode: Mode = "merged") -> None:
        """Make a path or a blend the base's behaviour.

        Args:
            blend: ``"fr/legal"``, ``{"fr/legal": 0.5, "fr/medical": 0.5}``, or the same as a
                string; ``""`` for the bare base.
            mode: ``merged`` writes it into the weights (no cost in forward); ``unmerged`` runs it
                beside them (a switch costs next to nothing, the weights stay the base's own).

        Raises:
            PathError, SpecError: not a path of the tree, or not a blend.
            BaseMismatch: an adapter on the way does not fit this base, or can't be applied in this
                mode, or its scale times its factors is not finite in the base's dtype.
            FolderError, FormatError: an adapter's files can't be read.
            BudgetError: the path does not fit into a budget; says how much is needed.
            StateError: detached, or a node that trains was to be merged, or other code wrote to
                a merged weight.

        On an error the state before the call is kept.
        """
        with self._lock:
            # Under the lock, because another thread may have detached the model while this one
            # waited.
            self._usable()
            if mode not in get_args(Mode):
                near = suggest(str(mode), get_args(Mode))
                raise SpecError(f"mode must be 'merged' or 'unmerged', got {mode!r}{near}")
            # A copy: the caller may go on to change the mapping, and a block may bring this back.
            copied = dict(blend) if isinstance(blend, Mapping) else blend
            self._stage.become(Request(copied, mode))

    def deactivate(self) -> None:
        """Make the base bare again, as it was before `attach`: weights, buffers, hooks."""
        self.activate("")

    @contextlib.contextmanager
    def using(self, blend: Blend, *, mode: Mode = "merged") -> Iterator[TreeModel]:
        """Activate a path or a blend for the length of a ``with``.

        The path that was active before comes back at its end, also after an exception. Other
        threads that switch this base wait until the block is left.
        """
        with self._lock:
            self._usable()
            # Entered before the switch, so that the block remembers the path that was active. It
            # keeps that path's pins too: no memory and no file is needed to bring it back.
            with self._stage.coming_back():
                self.activate(blend, mode=mode)
                yield self

    @contextlib.contextmanager
    def route(
        self,
        paths: Iterable[Blend],
        *,
        strategy: Strategy = "auto",
        repeat: int = 1,
        tile: int = 1,
        batch_first: bool = False,
    ) -> Iterator[TreeModel]:
        """Give every row of a batch its own path, for the length of a ``with``.

        The path that was active before comes back at its end, also after an exception. Any row may
        have any path or blend, in any order, in forward and in backward; ``""`` is the bare base,
        bit for bit. Only the nodes on the batch's lineages are loaded. ``generate`` may repeat rows
        for beams and sequences.

        Args:
            paths: one path or blend for every row.
            strategy: how the sums are added up: ``nodes``, ``paths``, ``grouped``, ``matrix`` or
                ``segmented`` (Triton kernels). They agree to rounding; ``auto`` takes one
                by the device, the dtype and the number of inputs.
            repeat: k if each row occurs k times in succession in the base's input, as for beams.
            tile: k if the whole batch is stacked k times, as for preference pairs or guidance.
            batch_first: every site puts the rows on the first axis. Needed only if a first batch
                has as many tokens as rows and the base can't be run on shapes alone (a mixture of
                experts) to see which is which.

        Raises:
            PathError, SpecError: a path is not in the tree; names the row. Or a factor or strategy
                makes no sense.
            BaseMismatch: an adapter does not fit, or changes a weight that no side path can reach;
                in forward: the first axis of a site's input is not the rows.
            FolderError, FormatError: an adapter's files can't be read.
            StateError: detached, or the base was compiled before; in forward: a key/value cache of
                another path.

        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> tree = AdapterTree(defaults=dict(r=2, target_modules=["0"]))
        >>> for path in ("fr", "fr/legal"): _ = tree.add(path)
        >>> model = attach(tree, base)
        >>> with model.route(["fr/legal", "", "fr", "fr/legal"]):
        ...     tuple(base(torch.zeros(4, 4)).shape)
        (4, 3)
        """
        with self._lock:
            try:
                rows = iter(paths)
            except TypeError:
                raise SpecError(
                    f"paths: expected a path or a blend for each row, got {paths!r:.80}"
                ) from None
            # A list, because an iterator can be read once; a string is refused by `Batch.of`.
            paths = paths if isinstance(paths, str) else list(rows)
            batch = Batch.of(self.tree, paths)
            axis = self._row_axis(len(batch), repeat=repeat, tile=tile, batch_first=batch_first)
            self._usable()
            # A weight can hold one path only, so rows of several paths always run beside the
            # weights.
            with self._stage.coming_back():
                self._stage.become(
                    Request(tuple(paths), "unmerged", RoutedRows(batch, axis, strategy))
                )
                # The innermost block: `generate` is wrapped only while these rows are routed, and
                # it is as before when the earlier path comes back.
                with expansions(self.base, axis):
                    yield self

    def at(self, blend: Blend) -> PathModel:
        """Return a path or blend as a separate ``nn.Module``, for a trainer or for comparison.

        It shares the base's parameters and has modules of its own, so that several paths can be
        used side by side: a policy and its reference, say. Forward, ``generate``, the base without
        its head, and backward through checkpointed layers all run its path, whatever is active
        here. The tree refuses to change the path's nodes until the module is dropped, or its
        ``close()`` is called.

        Args:
            blend: as for `activate`; ``""`` is the bare base.

        Raises:
            PathError, SpecError: not a path of the tree, or not a blend.
            BaseMismatch, FolderError, FormatError, BudgetError: as `activate` with
                ``mode="unmerged"``.
            StateError: detached; or a part of the base can't be made a second time (it is sharded,
                compiled, or its forward was replaced by a function). In a forward: a path is merged
                into the weights.

        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> tree = AdapterTree(defaults=dict(r=2, target_modules=["0"]))
        >>> for path in ("fr", "fr/legal"): _ = tree.add(path)
        >>> model = attach(tree, base)
        >>> policy, reference = model.at("fr/legal"), model.at("fr")
        >>> tuple(policy(torch.zeros(1, 4)).shape), model.active
        ((1, 3), '')
        """
        with self._lock:
            self._usable()
            copied = dict(blend) if isinstance(blend, Mapping) else blend
            return self._path_models.add(copied, owner=self)

    def prefetch(self, paths: Blend | Iterable[Blend]) -> None:
        """Load the nodes of some paths or blends in the background, and return at once.

        A node that can't be loaded is an error of the call that needs it, if one ever does.

        Args:
            paths: the ones needed soonest first. Nodes that the budget has no room for are left
                out.

        Raises:
            PathError, SpecError: not a path of the tree, or not a blend.
            StateError: detached.

        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> tree = AdapterTree(defaults=dict(r=2, target_modules=["0"]))
        >>> _ = tree.add("fr")
        >>> attach(tree, base).prefetch(["fr"])
        """
        # Without the lock, so that it does not wait for a block that another thread has open.
        self._attached()
        check_iterable(paths, "paths: expected a list of paths or blends")
        blends = [paths] if isinstance(paths, (str, Mapping)) else list(paths)
        # A dict is a set that keeps its order: the node that is needed soonest is loaded first.
        nodes: dict[str, None] = {}
        for blend in blends:
            nodes |= dict.fromkeys(self.tree.coefficients(blend))
        self.cache.prefetch(nodes)

    def trust(self, what: Literal["pristine", "weights"]) -> None:
        """Settle which weights are the base's own after a `ForeignWrite`, and make the base bare.

        Args:
            what: ``pristine`` puts the copies back; ``weights`` takes the present weights for the
                base's own.

        Raises:
            ForeignWrite: the copies do not fit any more, because a module was replaced or resized;
                nothing was changed.
            StateError: detached, or there are no copies (``pristine="none"``), or the weights were
                written to and have an undo log; nothing was changed.
        """
        with self._lock:
            self._usable()
            if what == "pristine":
                self._stage.start_over(self._merged.restore)
            elif what == "weights":
                self._stage.start_over(self._merged.forget)
            else:
                raise SpecError(f"trust 'pristine' or 'weights', got {what!r}")

    def detach(self) -> None:
        """Make the base bare, unfreeze what `trainable` froze of it, and release it.

        This object can't be used afterwards; a second call does nothing.
        """
        with self._lock:
            if self._detached:
                return
            self._usable()
            self._path_models.close()
            # In this order: the base is bare before anything that made it so is dropped.
            self._stage.close()
            self._training.close()
            self._merged.forget()
            self._stage.side_hooks.forget()
            self._planner.forget()
            # Before the cache: a tree that still asked this model would read from a cache that is
            # closed.
            self.tree.release(self)
            self.cache.close()
            release_claim(self.base)
            # Last, so that after an error in a step above the caller can call detach() again.
            self._detached = True

    def read_adapter(self, path: str, source: Source) -> Adapter:
        """Read a node's files within the budgets; the tree calls this."""
        return self.cache.read(path, source)

    def nodes_in_use(self) -> list[str]:
        """Return the nodes that the tree refuses to change.

        The base's behaviour depends on them now, or will again when a ``with`` is left, or they
        train.
        """
        used = {path for path in self.factors.training_paths if path in self.tree}
        used |= self._path_models.nodes
        for request in self._stage.requests():
            for blend in request.blends:
                # The whole lineage, and not the nodes with a coefficient: if a node of weight 0 got
                # another weight, it would belong to the path that is active.
                for path in parse_blend(blend):
                    used.update(self.tree.lineage(path))
        return sorted(used)

    def prepare(self, *, max_rank: int | None = None) -> None:
        """Install permanent side paths over buffers of a fixed size, for ``torch.compile``.

        They stay until `detach`. After it, ``activate(…, mode="unmerged")`` and `route` rewrite the
        buffers in place, so a base that is compiled next is traced once while bare, once for a path
        and once for each number of routed rows, and never again for another path. Merged switching
        needs none of this.

        Args:
            max_rank: columns of every buffer: the largest Σr of a path, or of all nodes of a batch
                together, at any site. A site costs ``max_rank · (in + out)`` numbers, and as much
                work as that at every step. Linear layers on CUDA need none where Triton runs:
                their buffers hold the addresses of the nodes' factors.

        Raises:
            StateError: a path is active, the model is prepared or detached already, or the base is
                compiled already.
            SpecError: ``max_rank`` is not a positive whole number, or is missing where a site needs
                it.
            BaseMismatch, FormatError: a node does not fit the base, or its files can't be read.

        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> tree = AdapterTree(defaults=dict(r=2, target_modules=["0"]))
        >>> for path in ("fr", "fr/legal"): _ = tree.add(path)
        >>> model = attach(tree, base)
        >>> model.prepare(max_rank=4)
        >>> with model.route(["fr/legal", ""]):
        ...     tuple(base(torch.zeros(2, 4)).shape)
        (2, 3)
        """
        with self._lock:
            self._usable()
            if self.state is not State.BARE or self._stage.side_hooks.permanent:
                raise StateError(
                    "prepare needs a bare model that is not prepared yet",
                    "deactivate(), or detach()",
                )
            # A base that was compiled before was traced without the new hooks, and would never call
            # them.
            self._compiled.check(self.base, compiles_next=True)
            # Nodes may have been added since `attach`. Each needs its adapter now, because a buffer
            # is laid out for the increments of all nodes at its site, and its size is fixed.
            settle_fresh(self.tree, self.base, self.tree.paths(), self._binder.own_value)
            values = side_path_increments(self.tree, self._binder)
            # A function, because the stage makes the new side paths itself: it puts the earlier
            # ones back if the switch to the new ones fails.
            paths = self.tree.paths()
            make = partial(
                Prepared,
                values,
                max_rank=max_rank,
                dtype=self._manner.dtype,
                nodes=len(paths),
                depth=max((len(self.tree.lineage(path)) for path in paths), default=0),
            )
            self._stage.prepare(make)

    # ------------------------------------------------------------------ training
    def trainable(
        self, *paths: str, dtype: torch.dtype | None = torch.float32, dropout: float = 0.0
    ) -> list[dict[str, Any]]:
        """Let exactly these nodes train; everything else, the base too, is frozen.

        Args:
            *paths: paths, or patterns like ``"fr/*"``; none: nothing trains.
            dtype: the dtype in which factors train, for a base of any dtype; wider if a factor is
                wider; None: each factor's own.
            dropout: the fraction of a site's input that is dropped for them while the model is in
                training mode; a row has one mask for all nodes on its lineage that train.

        Returns:
            one parameter group per node, ``{"name": path, "params": [A and B of every module]}``,
            in the order of the sum. ``lr``, ``weight_decay`` and other options of an optimiser may
            be added; so may ``clip_norm``, which `follow` obeys.

        Raises:
            PathError: a path or pattern matches no node.
            SpecError: ``dropout`` is not from 0 to below 1, or ``dtype`` is none that factors can
                train in.
            BudgetError: the active path does not fit into a budget once other nodes train.
            StateError: a node is merged into the weights now; or the factors are sharded, and
                others train, or in another dtype.

        On an error everything is as it was: what trains, in which parameters, and what is frozen.

        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> tree = AdapterTree(defaults=dict(r=2, target_modules=["0"]))
        >>> for path in ("fr", "fr/legal"): _ = tree.add(path)
        >>> groups = attach(tree, base).trainable("fr/*")
        >>> [(group["name"], [tuple(p.shape) for p in group["params"]]) for group in groups]
        [('fr/legal', [(2, 4), (3, 2)])]
        """
        with self._lock:
            self._usable()
            chosen = self.tree.matching(paths)
            return self._training.train(chosen, dtype, dropout, within=self)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimiser step each node as an optimiser over that node alone would.

        A node without rows since the last step, in no micro-batch and on no rank, is not moved at
        all: no momentum, no decay. It had rows if a gradient came back through a side path of its
        own, whichever module of the base the forward began at. If a group has a ``clip_norm``, its
        gradients are clipped to it before each step. With several ranks, every rank has to step.

        The step raises `StateError`, and moves nothing, if a node without rows has a gradient other
        than zero: the loss used its factors directly.

        Args:
            optimizer: made of the groups that `trainable` returned. Followed until it is collected.

        Raises:
            SpecError: a group does not belong to a node that trains.
            StateError: the model is prepared for ``torch.compile``, or detached.

        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> tree = AdapterTree(defaults=dict(r=2, target_modules=["0"]))
        >>> for path in ("fr", "de"): _ = tree.add(path)
        >>> model = attach(tree, base)
        >>> optimizer = torch.optim.AdamW(model.trainable("*"), lr=1e-3)
        >>> model.follow(optimizer)
        >>> with model.route(["fr", "fr"]):
        ...     model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()                  # moves fr; de had no rows
        """
        with self._lock:
            self._usable()
            self._training.follow(optimizer)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and the record that `follow` keeps of the nodes that had rows."""
        super().zero_grad(set_to_none)
        self._training.forget_rows()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base's forward under the active path.

        If several ranks train together, every factor that trains is in every rank's backward, so
        that a node may have rows on one rank only.
        """
        # FSDP2 swaps the parameters around a forward, so they are looked at before each.
        self._training.renew_if_moved()
        out = self.base(*args, **kwargs)
        if torch.is_grad_enabled() and ranks() > 1:
            out = joined(out, [p for p in self.factors.parameters() if p.requires_grad])
        return out

    @contextlib.contextmanager
    def gathered(self) -> Iterator[AdapterTree]:
        """Yield the tree with whole factors, to save or flatten it while FSDP2 shards them.

        Every rank has to enter, and none may run a forward inside; one of them saves. Without FSDP2
        the tree is yielded as it is.

        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> tree = AdapterTree(defaults=dict(r=2, target_modules=["0"]))
        >>> _ = tree.add("fr")
        >>> model = attach(tree, base)
        >>> with model.gathered() as tree:
        ...     tree.flatten("fr").ranks
        {'0': 2}
        """
        with self._lock:
            self._usable()
            with self._training.gathered(self):
                yield self.tree

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            StateError: always.
        """
        raise StateError(
            "a TreeModel can't be copied or pickled: it is bound to its base",
            "copy the base before attach or after detach(), and attach to the copy: "
            "lora_tree.attach(copy.deepcopy(tree), copy.deepcopy(base))",
            "to keep what was trained: tree.save(folder)",
        )

    # ------------------------------------------------------------------ private
    def _row_axis(self, rows: int, *, repeat: int, tile: int, batch_first: bool) -> BatchAxis:
        """Return the layout of a routed batch's rows in the base's inputs."""
        return BatchAxis(
            rows, repeat=repeat, tile=tile, batch_first=batch_first, seen=self._seen_sites
        )

    def _attached(self) -> None:
        if self._detached:
            raise StateError(
                "this model was detached", "attach the tree again: lora_tree.attach(tree, base)"
            )

    def _usable(self) -> None:
        """Check that the caller may switch the base.

        The caller holds the lock, which keeps out other threads. It does not keep out other asyncio
        tasks of the same thread, so each open block has an owner, which is checked here.
        """
        self._attached()
        self._stage.blocks.check_innermost()
        # Tested here to save a call: every switch comes by, and there is hardly ever one.
        if self._path_models.dropped:
            self._path_models.close_dropped()
