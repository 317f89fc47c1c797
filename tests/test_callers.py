"""Walks up the call stack: each finds the nearest caller it was asked for, and keeps nothing
alive.
"""

from __future__ import annotations

import gc
import types
import weakref
from typing import Any

from lora_tree.callers import called_by, called_from, caller_in, caller_object


def module_of(name: str, source: str, **given: Any) -> types.ModuleType:
    """A module of that name, made of source."""
    module = types.ModuleType(name)
    vars(module).update(given)
    exec(source, vars(module))
    return module


def test_a_function_is_found_by_its_name_however_far_out() -> None:
    def save_pretrained(depth: int) -> bool:
        return save_pretrained(depth - 1) if depth else called_by("save_pretrained")

    def other(depth: int) -> bool:
        return other(depth - 1) if depth else called_by("save_pretrained")

    assert save_pretrained(20)
    assert not other(20)


def test_a_module_is_found_by_its_whole_name() -> None:
    there = module_of("a.checkpoint", "def run(call): return call()")
    assert there.run(lambda: called_from("a.checkpoint"))
    assert not there.run(lambda: called_from("checkpoint"))
    assert not called_from("a.checkpoint")


def test_the_nearest_owner_that_matches_counts() -> None:
    class Owner:
        def __init__(self, inner: Owner | None) -> None:
            self.inner = inner

        def run(self) -> Any:
            return self.inner.run() if self.inner else caller_object(matches)

    def matches(owner: Any) -> bool:
        seen.append(owner)
        return isinstance(owner, Owner)

    seen: list[Any] = []
    innermost = Owner(None)
    assert Owner(Owner(innermost)).run() is innermost
    assert [owner for owner in seen if isinstance(owner, Owner)] == [innermost]
    assert caller_object(lambda owner: isinstance(owner, Owner)) is None


def test_a_caller_beyond_the_end_of_the_walk_is_not_found() -> None:
    there = module_of(
        "a.trainer",
        "class Loop:\n    def run(self, call): return call()\ndef run(call): return call()",
    )

    def ask() -> str | None:
        return caller_in(["a.trainer"], until=forward.__code__)

    def forward() -> str | None:
        return ask()

    assert there.Loop().run(ask) == "Loop"
    assert there.run(ask) == "run", "a function without a self is told by its name"
    assert there.Loop().run(forward) is None
    assert ask() is None


def test_a_walk_keeps_no_callers_locals_alive() -> None:
    class Big:
        pass

    def inner() -> None:
        assert called_by("outer")
        assert caller_in([__name__], until=test_a_walk_keeps_no_callers_locals_alive.__code__)

    def outer() -> weakref.ref[Big]:
        big = Big()
        inner()
        return weakref.ref(big)

    gc.disable()
    try:
        assert outer()() is None
    finally:
        gc.enable()
