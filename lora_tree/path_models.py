"""PathModels: makes the path models of one `TreeModel`, and closes the stages of dropped ones.

    add(path)         view of the base → stage over the view → PathModel, held weakly
    caller drops it   its finalizer only notes the stage, because it may run in any thread
    close_dropped()   the next verb of the TreeModel, which holds the lock, closes the noted stages
    close()           on detach: closes those that are left

A stage over a view has a binder, a planner and side paths of its own. It shares the cache, the
factors that train and the compute dtype with the base's stage.

Law: the nodes of a path model are in use, and its adapters pinned, until it is closed or dropped. A
path model keeps its `TreeModel` alive; the `TreeModel` keeps no path model alive.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from functools import partial

from torch import nn

from .blend import Blend
from .cache import Cache
from .cache.pinning import Pinning
from .engine.binder import Binder
from .engine.fresh import settle_fresh
from .engine.host import Claim, CompileWatch
from .engine.planner import Planner
from .engine.sidepaths.side import Manner
from .engine.stage import Stage
from .engine.switching.merged import MergedWeights
from .engine.unmerged import Unmerged
from .engine.view import viewed
from .errors import StateError
from .path_model import PathModel
from .training.factors import Factors
from .tree import AdapterTree

__all__ = ["PathModels"]


class PathModels:
    """The path models of one `TreeModel`; iterating yields those that are alive.

    Args:
        tree, base, cache: those of the `TreeModel`.
        base_name: the base's own name, if it has one.
        stage, binder: those of the base.
        factors: the factors that train, of the whole tree.
        manner: what side paths compute in.
    """

    def __init__(
        self,
        tree: AdapterTree,
        base: nn.Module,
        *,
        base_name: str | None,
        stage: Stage,
        binder: Binder,
        cache: Cache,
        factors: Factors,
        manner: Manner,
    ) -> None:
        self._tree, self._base, self._base_name = tree, base, base_name
        self._base_stage, self._base_binder = stage, binder
        self._cache, self._factors, self._manner = cache, factors, manner
        self._alive: weakref.WeakSet[PathModel] = weakref.WeakSet()
        self.dropped: deque[Stage] = deque()
        """Stages of path models that were collected, for `close_dropped`."""

    def __iter__(self) -> Iterator[PathModel]:
        # A copy: one may be collected while the caller iterates.
        return iter(list(self._alive))

    def add(self, blend: Blend, *, owner: nn.Module) -> PathModel:
        """Make the path model of a path or blend.

        Args:
            blend: a path or blend, in a mapping that its caller does not change any more.
            owner: the `TreeModel`. It is not kept here: the two would keep each other alive.

        Raises:
            PathError, SpecError, BaseMismatch, FolderError, FormatError, BudgetError, StateError:
                as `TreeModel.at`.
        """
        # Here and not in the view: fresh nodes take their factors once, from the base itself.
        coefficients = self._tree.coefficients(blend)
        settle_fresh(self._tree, self._base, coefficients, self._base_binder.own_value)
        view = viewed(self._base)
        made = PathModel(
            blend,
            view,
            self._stage_over(view),
            self._factors,
            owner=owner,
            check=partial(_refuse_merged, self._base_stage),
            dropped=self.dropped.append,
        )
        self._alive.add(made)
        return made

    @property
    def nodes(self) -> set[str]:
        """The nodes that some path model runs."""
        used: set[str] = set()
        for path_model in self:
            used.update(path_model.nodes)
        return used

    def close_dropped(self) -> None:
        """Close the stages of collected path models. The caller holds the `TreeModel`'s lock."""
        while self.dropped:
            self.dropped.popleft().close()

    def close(self) -> None:
        """Close every path model that is alive."""
        for path_model in self:
            path_model.close()

    def _stage_over(self, view: nn.Module) -> Stage:
        """Return a stage over a view, which never writes into the base's weights."""
        reached = self._base_stage.side_hooks.reached
        return Stage(
            view,
            self._tree,
            Claim(view),
            merged=MergedWeights(view, place="none"),
            side_hooks=Unmerged(view, self._manner, ledger=self._cache, reached=reached),
            planner=Planner(
                Binder(view, self._tree.base, own_name=self._base_name),
                origin=self._cache.origin,
                kept=1,  # a path model never has another path
            ),
            compiled=CompileWatch(False),
            pin=Pinning(self._cache, view),
            factors=self._factors,
        )


def _refuse_merged(stage: Stage) -> None:
    """Refuse a forward of a path model while its base's weights hold another path.

    Raises:
        StateError: names what is merged.
    """
    if stage.current.weights.terms:
        raise StateError(
            f"{stage.current.request.selection!r} is merged into the base's weights, and a path "
            "model adds to the base's own",
            'model.deactivate(), or model.activate(path, mode="unmerged")',
        )
