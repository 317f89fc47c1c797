"""Training over one base now: its factors, the flags of the base, the optimisers it follows.

    train(paths)    check everything; then the nodes' factors become parameters, the rest is frozen
    follow(opt)     each node is stepped as by an optimiser over it alone (steps.py)
    gathered()      whole factors in the tree, where FSDP2 shards them

Law: a call that fails changes neither which nodes train nor their parameters.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..adapter import Adapter
from ..engine.behaviour import State
from ..engine.binder import Binder
from ..engine.fresh import settle_fresh
from ..engine.packing import Packing
from ..engine.sidepaths.side import Manner, side_device
from ..engine.stage import Stage
from ..errors import SpecError, StateError
from ..given import check_dtype, unchecked
from ..tree import AdapterTree, Node
from .bare_base_watch import BareBaseWatch
from .every_rank import every_layer
from .factors import Factors
from .sharded import gather_adapter
from .steps import NodeSteps

__all__ = ["Training"]


class Renewed(Protocol):
    """A path model, as training sees it."""

    def renew(self) -> None:
        """Lay out its path again, from the present factors."""


class Training:
    """The nodes that train over one base, and everything that goes with that.

    Args:
        base: the model; frozen while anything trains.
        tree: of the nodes.
        factors: hold the nodes' parameters.
        stage: laid out again when other nodes or parameters train.
        path_models: path models of the same base, which are also laid out again.
        binder: checks a node's adapter against the base.
        manner: gets the dropout.
        bare_base_watch: looks whether a trainer was given the bare base.
    """

    def __init__(
        self,
        base: nn.Module,
        tree: AdapterTree,
        factors: Factors,
        *,
        stage: Stage,
        path_models: Iterable[Renewed],
        binder: Binder,
        manner: Manner,
        bare_base_watch: BareBaseWatch,
    ) -> None:
        self._base, self._tree, self._factors = base, tree, factors
        self._stage, self._binder, self._manner = stage, binder, manner
        self._path_models = path_models
        self._bare_base_watch = bare_base_watch
        self._packing = Packing(base)
        self._steps: weakref.WeakKeyDictionary[torch.optim.Optimizer, NodeSteps]
        self._steps = weakref.WeakKeyDictionary()
        # The base's `requires_grad` flags before the first call of `train`, for `close`. A second
        # call must not take its own flags for the base's.
        self._flags: list[tuple[nn.Parameter, bool]] | None = None
        self._layers: list[RemovableHandle] = []  # hooks of `every_layer`

    def train(
        self,
        chosen: list[str],
        dtype: torch.dtype | None,
        dropout: float,
        *,
        within: nn.Module,
    ) -> list[dict[str, Any]]:
        """Let exactly these nodes train; see `TreeModel.trainable`.

        Args:
            within: the module that holds the base and the factors, which FSDP2 may have sharded.

        Raises:
            SpecError: ``dropout`` or ``dtype`` makes no sense.
            StateError: a node is merged into the weights, or has no adapter; or the factors are
                sharded, and others train, or in another dtype.
        """
        _check_dropout(dropout)
        check_dtype(dtype)
        if dtype is not None and dtype.itemsize == 1:
            raise SpecError(f"dtype: factors can't train in {dtype}", "dtype=torch.float32")
        self._check_unmerged(chosen)
        if chosen:
            self._packing.check()
        # A parameter that is made under inference_mode could never train.
        with torch.inference_mode(False):
            bound = self._bound(chosen, dtype, within)
            with self._as_before_on_failure():
                self._own(bound, dtype)
                self._bare_base_watch.look(bool(chosen))
                self._packing.forbid(bool(chosen))
                self._set_layer_hooks(self._factors.sharded)
                self._manner.dropout = dropout
                if self._flags is None:
                    self._flags = _flags_of(self._base)
                self._base.requires_grad_(False)
                self._factors.train_only(chosen)
                # Last, because side paths are laid out from the new factors and flags.
                self._renew()
        return [{"name": path, "params": self._factors.of(path)} for path in chosen]

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Step each node as an optimiser over that node alone would; see `TreeModel.follow`.

        Raises:
            SpecError: a group is not that of a node that trains.
            StateError: the model is prepared for ``torch.compile``.
        """
        if self._stage.side_hooks.permanent:
            raise StateError(
                "a prepared model can't train", "attach again, and train before prepare()"
            )
        if not isinstance(unchecked(optimizer), torch.optim.Optimizer):
            raise SpecError(
                f"follow takes an optimiser of torch, got {type(optimizer).__name__}",
                "make one of what model.trainable(…) returns",
            )
        # The new one is made before the old one goes: if its groups are refused, the old one stays.
        before = self._steps.get(optimizer)
        steps = NodeSteps(optimizer, self._factors, self._stage.side_hooks.reached)
        if before is not None:
            before.remove()
        self._steps[optimizer] = steps

    def forget_rows(self) -> None:
        """Forget which nodes a gradient came back to, because the gradients were thrown away."""
        self._stage.side_hooks.reached.clear()

    def renew_if_moved(self) -> None:
        """Lay out side paths again if FSDP2 has swapped the parameters that they were made from."""
        if self._factors.moved:
            self._renew()

    @contextlib.contextmanager
    def gathered(self, within: nn.Module) -> Iterator[None]:
        """Let the tree hold whole factors, for the length of a ``with``; see `TreeModel.gathered`.

        Args:
            within: the module that holds the base and the factors, which FSDP2 may have sharded.
        """
        self._factors.refresh(self._tree, within)
        parts: dict[str, Adapter] = {}
        for path in self._factors.paths:
            # A node may have been removed since it trained.
            adapter = self._tree.adapter(path) if path in self._tree else None
            if adapter is not None:
                parts[path] = adapter
        # All are gathered before the first is put into the tree: a
        # failure leaves the tree as it is.
        full = {path: gather_adapter(adapter) for path, adapter in parts.items()}
        try:
            for path, adapter in full.items():
                self._tree.replace(self._tree[path].with_loaded(adapter))
            yield
        finally:
            for path, adapter in parts.items():
                self._tree.replace(self._tree[path].with_loaded(adapter))

    def close(self) -> None:
        """Give the base its flags back, and take every hook out; a second call is a no-op."""
        for parameter, flag in self._flags or ():
            parameter.requires_grad_(flag)
        self._bare_base_watch.look(False)
        self._packing.forbid(False)
        self._set_layer_hooks(False)

    # ------------------------------------------------------------------ private
    def _check_unmerged(self, chosen: list[str]) -> None:
        in_weights = self._stage.merged_nodes()
        merged = next((path for path in chosen if path in in_weights), None)
        if merged is None:
            return
        # A path may wait in the outer of two `with` blocks; it would be merged
        # again when the inner one is left.
        later = ""
        if merged not in self._stage.current.adapters:
            later = ", or will be again when a `with` block ends,"
        raise StateError(
            f"{merged} is merged into the weights{later} and can't train",
            'activate(…, mode="unmerged") first',
        )

    def _bound(
        self, paths: list[str], dtype: torch.dtype | None, within: nn.Module
    ) -> dict[str, Adapter]:
        """Return the adapters of some nodes, each found to fit the base and free to train.

        Fresh nodes are made here, and the tree gets this rank's parts of sharded factors. The next
        call would do both again, so nothing has to be undone.
        """
        settle_fresh(self._tree, self._base, paths, self._binder.own_value)
        self._factors.refresh(self._tree, within)
        self._factors.check_sharded(paths, dtype)
        # Fresh nodes got their adapters above, so only a group has none.
        bound = {}
        for path in paths:
            adapter = self._tree.adapter(path)
            if adapter is None:
                raise StateError(f"{path} is a group without an adapter, nothing in it can train")
            bound[path] = self._binder.bind(path, adapter)
        return bound

    def _own(self, bound: Mapping[str, Adapter], dtype: torch.dtype | None) -> None:
        """Make nodes' factors parameters of the model."""
        self._factors.follow(self._tree)
        for path, adapter in bound.items():
            places = {}
            for name, value in adapter.modules.items():
                places[name] = side_device(self._binder.site(name).weight, [value])
            for tensor, override in adapter.overrides.items():
                places[tensor] = self._binder.device_of(tensor, override)
            owned = self._factors.own(path, adapter, dtype, places)
            # The tree holds the parameters themselves, so a save writes their values of that time.
            if owned is not adapter:
                self._tree.replace(self._tree[path].holding(owned))

    @contextlib.contextmanager
    def _as_before_on_failure(self) -> Iterator[None]:
        """Put everything that trains back as it was, if the block fails."""
        before = _TrainingSnapshot(
            nodes=[self._tree[path] for path in self._tree.paths()],
            factors=dict(self._factors.items()),
            flags=[*_flags_of(self._base), *_flags_of(self._factors)],
            dropout=self._manner.dropout,
            base_flags=self._flags,
            is_watching=self._bare_base_watch.is_watching,
            packing_forbidden=self._packing.forbidden,
        )
        try:
            yield
        except BaseException:
            self._put_back(before)
            raise

    def _put_back(self, before: _TrainingSnapshot) -> None:
        # The tree first, and then the factors: their law is that both hold the same parameters.
        for node in before.nodes:
            if self._tree[node.path] is not node:
                self._tree.replace(node)
        self._factors.clear()
        self._factors.update(before.factors)
        for parameter, flag in before.flags:
            parameter.requires_grad_(flag)
        self._manner.dropout, self._flags = before.dropout, before.base_flags
        self._bare_base_watch.look(before.is_watching)
        self._packing.forbid(before.packing_forbidden)
        self._set_layer_hooks(self._factors.sharded)
        # Laying out one path model may have failed after others had got the new factors.
        for path_model in list(self._path_models):
            path_model.renew()

    def _renew(self) -> None:
        # A merged path has no factor that trains, and a bare base has no path.
        if self._stage.current.state in (State.UNMERGED, State.ROUTED):
            self._stage.renew()
        for path_model in list(self._path_models):
            path_model.renew()

    def _set_layer_hooks(self, wanted: bool) -> None:
        """Put the hooks of `every_layer` on the base, or take them off."""
        while self._layers:
            self._layers.pop().remove()
        if wanted:
            self._layers = every_layer(self._base)


@dataclass(frozen=True, eq=False)
class _TrainingSnapshot:
    """The state of training before a call that may fail."""

    nodes: list[Node]
    factors: dict[str, nn.Module]
    flags: list[tuple[nn.Parameter, bool]]
    dropout: float
    base_flags: list[tuple[nn.Parameter, bool]] | None
    is_watching: bool
    packing_forbidden: bool


def _flags_of(module: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    return [(parameter, parameter.requires_grad) for parameter in module.parameters()]


def _check_dropout(dropout: object) -> None:
    if not isinstance(dropout, Real) or not 0 <= float(dropout) < 1:
        raise SpecError(f"dropout must be from 0 to below 1, got {dropout!r}")
