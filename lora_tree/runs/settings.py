"""The settings of a run: the same settings, data and base come to the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..errors import SpecError, listing
from ..training.levels import Over

__all__ = ["Settings"]

LOSSES = ("auto", "rows", "paths")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Settings:
    """The settings with which a run trains.

    Args:
        steps: of the optimiser.
        batch: rows in a micro-batch.
        accumulate: micro-batches in a step.
        lr: learning rate at its height.
        lr_of: node → its own learning rate, where it has one.
        loss: a mean over ``rows``, every token alike; over ``paths``, each path's own tokens;
            ``auto``: rows where several levels of the tree train, else paths.
        weight_decay: of AdamW, for every node; None: by depth, see `lora_tree.weight_decays`.
        decay_by_depth: the decay at depth 0, 1, …, the last one also below; None: as the tree says.
        decay_of: node → its own decay, where it has one.
        clip_norm: the norm to which the gradients of each node are clipped; None: not at all.
        dropout: the part of a site's input that nodes in training do not see.
        warm_up: steps in which the rate rises.
        schedule: how it goes on: ``cosine`` to a hundredth, ``linear`` to nothing, or ``constant``.
        temperature: rows are drawn path by path with it; see `PathSampler`.
        weights: path → its weight in the loss; 1 where it is not named.
        beta: of preferences: how much a ratio to the reference counts. A small one lets a node move
            far from its parent.
        hold_back: the share of each path's rows that is not trained on, rounded down. They decide
            whether a leaf beats its parent.
        seed: of the order of rows, and of dropout.

    Raises:
        SpecError: a value makes no sense.

    >>> Settings(steps=10, warm_up=2).rate_at(0), Settings(steps=10, schedule="linear").rate_at(5)
    (0.5, 0.5)
    """

    steps: int = 200
    batch: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    lr_of: Mapping[str, float] = field(default_factory=dict)
    loss: Over = "auto"
    weight_decay: float | None = None
    decay_by_depth: Sequence[float] | None = None
    decay_of: Mapping[str, float] = field(default_factory=dict)
    clip_norm: float | None = 1.0
    dropout: float = 0.0
    warm_up: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    temperature: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)
    beta: float = 0.1
    hold_back: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate"):
            _check(name, getattr(self, name), _is_count, "a whole number from 1")
        _check(
            "warm_up",
            self.warm_up,
            lambda v: isinstance(v, int) and 0 <= v <= self.steps,
            "from 0 to steps",
        )
        _check("lr", self.lr, _is_positive, "a positive number")
        for node, rate in self.lr_of.items():
            _check(f"lr of {node}", rate, _is_positive, "a positive number")
        _check("loss", self.loss, lambda v: v in LOSSES, "auto, rows or paths")
        if self.weight_decay is not None:
            _check("weight_decay", self.weight_decay, _is_at_least_0, "0 or more")
            if self.decay_by_depth is not None:
                raise SpecError(
                    "weight_decay and decay_by_depth both say how nodes decay", "give one"
                )
        for decay in self.decay_by_depth or ():
            _check("a decay by depth", decay, _is_at_least_0, "0 or more")
        for node, decay in self.decay_of.items():
            _check(f"decay of {node}", decay, _is_at_least_0, "0 or more")
        if self.clip_norm is not None:
            _check("clip_norm", self.clip_norm, _is_positive, "a positive number")
        _check("beta", self.beta, _is_positive, "a positive number")
        _check("hold_back", self.hold_back, lambda v: 0 <= v < 1, "from 0 to below 1")
        _check("dropout", self.dropout, lambda v: 0 <= v < 1, "from 0 to below 1")
        # Infinity is allowed: it draws every path equally often.
        _check("temperature", self.temperature, lambda v: v > 0, "more than 0")
        _check(
            "schedule",
            self.schedule,
            lambda v: v in SCHEDULES,
            "cosine, linear or constant",
        )
        for path, weight in self.weights.items():
            _check(f"weight of {path}", weight, _is_at_least_0, "0 or more")

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Settings:
        """Return the settings of which this is the `plain` form.

        Raises:
            SpecError: there is a word that this version does not have, or a value makes no sense.

        >>> Settings.from_plain(Settings(lr=0.1).plain()) == Settings(lr=0.1)
        True
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(plain) - known)
        if unknown:
            raise SpecError(f"unknown settings: {listing(unknown)}", "upgrade lora_tree")
        given = dict(plain)
        if given.get("temperature") == "inf":
            given["temperature"] = math.inf
        return cls(**given)

    @property
    def rows_a_step(self) -> int:
        """Rows in a step."""
        return self.batch * self.accumulate

    def rate_at(self, step: int) -> float:
        """Return the factor on the learning rate at a step, counted from 0."""
        if step < self.warm_up:
            # The count begins at 1, because a first step at rate 0 would change nothing.
            return (step + 1) / self.warm_up
        # A warm-up may be as long as the whole run, which would make this a division by zero.
        done = (step - self.warm_up) / max(self.steps - self.warm_up, 1)
        if self.schedule == "cosine":
            return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if self.schedule == "linear" else 1.0

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain data, for JSON.

        Two runs are compared by this value, so mappings are sorted.
        """
        made: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Mapping):
                value = dict(sorted(value.items()))
            elif isinstance(value, tuple):
                value = list(value)
            made[f.name] = value
        if math.isinf(self.temperature):
            made["temperature"] = "inf"  # JSON has no infinity
        return made


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _is_positive(value: Any) -> bool:
    return bool(0 < value < math.inf)  # false for NaN, too


def _is_at_least_0(value: Any) -> bool:
    return bool(0 <= value < math.inf)


def _check(name: str, value: Any, fits: Callable[[Any], Any], expected: str) -> None:
    try:
        # True is an int in Python, and steps=True is a mistake.
        good = not isinstance(value, bool) and bool(fits(value))
    except TypeError:
        good = False
    if not good:
        raise SpecError(f"{name} must be {expected}, got {value!r}")
