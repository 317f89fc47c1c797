"""Behaviour: the present behaviour of a base, as one value.

    Request      a path or blend in a mode, or a path for every row of a batch
       │ compose    everything that can fail: checks, pins, lays out          (stage.py)
    Behaviour    the request with its plan, its side paths and its pins
       │ install    the only writer to the base; puts the old one back if it fails
    the base

Nothing about a base's state is kept anywhere else, so to go back to an earlier state is to install
an earlier value.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeAlias

from ..adapter import Adapter
from ..blend import Blend
from .plan import PlacedPlan, Plan
from .routing.forms import Strategy
from .rows.batch import Batch
from .rows.batch_axis import BatchAxis

__all__ = [
    "Ahead",
    "Behaviour",
    "FactorParameters",
    "LaidOut",
    "Mode",
    "Pins",
    "Request",
    "RoutedRows",
    "SideHooks",
    "State",
]

Mode: TypeAlias = Literal["merged", "unmerged"]


class State(enum.Enum):
    """The states of a base."""

    BARE = "bare"  # the base alone
    MERGED = "merged"  # a path is written into the weights
    UNMERGED = "unmerged"  # a path runs beside them
    ROUTED = "routed"  # a path for every row of a batch runs beside them
    DETACHED = "detached"  # the model has given its base back


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """The rows of a routed batch: what each owes, how they lie, and how their sums are added up."""

    batch: Batch
    axis: BatchAxis
    strategy: Strategy


@dataclass(frozen=True, eq=False)
class Request:
    """A request to a base.

    Args:
        selection: a path or a blend, or one for every row.
        mode: into the weights or beside them; a batch always runs beside them.
        rows: of a routed batch; None: one path or blend for everything.
    """

    selection: Blend | tuple[Blend, ...]
    mode: Mode = "merged"
    rows: RoutedRows | None = None

    @property
    def blends(self) -> tuple[Blend, ...]:
        """The paths and blends that it names."""
        return self.selection if isinstance(self.selection, tuple) else (self.selection,)


class LaidOut(Protocol):
    """Side paths, ready to run. A value: it can be installed again after others were."""

    @property
    def of(self) -> object:
        """The `SideHooks` that laid them out, and run them."""

    def install(self) -> None:
        """Make these the side paths that run. If that fails half-way, the next `install`, of these
        or of others, repairs it.
        """


Ahead: TypeAlias = Callable[[Mapping[str, Adapter], bool], object]
"""Prepares for the adapters of a request while the newest of them is still being hashed.

It is called with node → adapter, and with whether these are all the adapters of the request. It may
bind, check and lay out, but take no room from the cache: the load that waits for the hash holds
some. If the hash is wrong, the request raises."""


class SideHooks(Protocol):
    """The side paths of one base: hooks that come and go (`Unmerged`), or permanent ones
    (`Prepared`).
    """

    @property
    def permanent(self) -> bool:
        """The hooks stay in the base while it is bare."""

    @property
    def nothing(self) -> LaidOut:
        """An empty set of side paths, to be installed when nothing is to run beside the weights."""

    def lay_out(self, placed: PlacedPlan) -> LaidOut:
        """Return the side paths of one path or blend; raise if a site can't have one."""

    def look_ahead(self, placed: PlacedPlan) -> None:
        """Do the part of `lay_out` that takes no room, and raise what that would raise."""

    def lay_out_rows(self, placed: PlacedPlan, rows: RoutedRows) -> LaidOut:
        """Return the side paths of a batch; raise if a site of the plan can't have one."""

    @property
    def reached(self) -> set[str]:
        """The nodes that a gradient has come back to; the reader clears it."""

    def forget(self) -> None:
        """Drop what is kept for paths used before; take permanent hooks out."""


class Pins(Protocol):
    """Adapters that the cache may not evict until they are released."""

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Node → its adapter."""

    def release(self) -> None:
        """Let the cache evict them. Does nothing the second time."""


class FactorParameters(Protocol):
    """The factors that a model has made parameters."""

    @property
    def paths(self) -> Sequence[str]:
        """The nodes that have some."""

    def shown(self, path: str, adapter: Adapter) -> Adapter:
        """Return a node's adapter with the parameters that train now as its factors."""


@dataclass(frozen=True, eq=False)
class Behaviour:
    """A request, and everything that is needed to make the base do it.

    Args:
        request: the request that it fulfils.
        placed: what every site gets.
        weights: the plan that is written into the weights: all of it, or an empty one.
        side_paths: the side paths; none if the plan is written into the weights.
        pins: the adapters that the plan was made of.
        adapters: the same ones as the plan has them: with the parameters that train now.
    """

    request: Request
    placed: PlacedPlan
    weights: Plan
    side_paths: LaidOut
    pins: Pins
    adapters: Mapping[str, Adapter]

    # Derived and not stored, so that it can't disagree with the plan.
    @cached_property
    def state(self) -> State:
        """The state that this behaviour puts the base in."""
        if self.request.rows is not None:
            return State.ROUTED
        if not self.placed.plan.terms:
            return State.BARE
        return State.MERGED if self.weights.terms else State.UNMERGED
