"""The order of a module's raw parameters: what is a guess, and what a base makes of it."""

from __future__ import annotations

from typing import Any

import pytest

from lora_tree.errors import SpecError
from lora_tree.nesting import Nesting

NAMES = ["x.up", "x.down", "y.up", "y.down", "q_proj"]
BOTH = {"x": ("up", "down"), "y": ("up", "down")}


def test_only_increments_whose_order_was_assumed_move() -> None:
    nesting = Nesting(BOTH, frozenset({"x"}))
    assert nesting.certain == {"y": ("up", "down")}
    registered = {"x": ("down", "mix", "up"), "y": ("down", "up")}
    known, moved = nesting.settled(registered, NAMES)
    assert moved == {"x.up": "x.down", "x.down": "x.up"}
    assert known == Nesting({"x": ("down", "up"), "y": ("down", "up")}, frozenset())
    assert nesting == Nesting(BOTH, frozenset({"x"}))


def test_what_is_settled_stays() -> None:
    registered = {"x": ("down", "up")}
    known, _ = Nesting(BOTH, frozenset({"x"})).settled(registered, NAMES)
    assert known.settled(registered, NAMES) == (known, {})


def test_an_order_of_other_parameters_leaves_a_guess_a_guess() -> None:
    nesting = Nesting(BOTH, frozenset({"x"}))
    known, moved = nesting.settled({"x": ("up", "gate")}, NAMES)
    assert (known, moved) == (nesting, {})


def test_a_single_parameter_has_no_order() -> None:
    known, moved = Nesting({}, frozenset()).settled({"x": ("up", "down")}, ["x.up"])
    assert (known, moved) == (Nesting({}, frozenset()), {})


@pytest.mark.parametrize(
    ("registered", "message"),
    [
        (3, "expected a mapping from modules to their parameters in order, got 3"),
        ({"x": "up"}, "x: expected its parameters in order, got 'up'"),
        ({"x": 3}, "x: expected its parameters in order, got 3"),
    ],
)
def test_what_is_no_order_is_refused(registered: Any, message: str) -> None:
    with pytest.raises(SpecError) as refused:
        Nesting(BOTH, frozenset()).settled(registered, NAMES)
    assert str(refused.value) == message
