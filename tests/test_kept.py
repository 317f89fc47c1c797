"""What is kept for paths used before: dropping any of it at any time costs time, and changes
nothing else.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from oracle import random_adapter
from torch import nn

import lora_tree as lt
from lora_tree.engine import unmerged
from lora_tree.engine.binder import Binder
from lora_tree.engine.last_used import LastUsed
from lora_tree.engine.marks import Marks
from lora_tree.engine.planner import Planner


class Made:
    """Something that can be known to be alive."""


adapter = partial(random_adapter, {"0": (3, 4)})


def test_the_last_ones_stay_and_what_is_in_use_is_found_again() -> None:
    kept: LastUsed[Made] = LastUsed(2)
    held = kept.get("a", Made)
    gone = weakref.ref(kept.get("b", Made))
    kept.get("c", Made), kept.get("d", Made)
    assert gone() is None
    assert kept.get("a", Made) is held
    while kept.drop():
        pass
    assert kept.find("a") is held
    assert kept.find("d") is None
    kept.forget()
    assert kept.get("a", Made) is not held


def test_an_adapter_that_nobody_holds_leaves_a_binder() -> None:
    planner = Planner(Binder(nn.Sequential(nn.Linear(4, 3)), None), kept=0)
    mine = adapter(0)
    plan = planner.plan([("fr", 1.0, mine)])
    assert planner.plan([("fr", 1.0, mine)]) is plan
    gone = weakref.ref(mine)
    del mine, plan
    gc.collect()
    assert gone() is None


def test_a_plan_made_again_has_the_mark_it_had_and_another_one_has_not() -> None:
    base = nn.Sequential(nn.Linear(4, 3))
    mine, other = adapter(0), adapter(1)
    planner = Planner(Binder(base, None), kept=0)
    mark = planner.plan([("fr", 1.0, mine)]).mark
    assert planner.plan([("fr", 1.0, mine)]).mark == mark
    assert (
        len({mark, planner.plan([("fr", 0.5, mine)]).mark, planner.plan([("fr", 1.0, other)]).mark})
        == 3
    )
    base[0] = nn.Linear(4, 3)
    assert planner.plan([("fr", 1.0, mine)]).mark != mark
    same = Planner(Binder(base, None), kept=0, origin=lambda adapter: "the same file")
    assert same.plan([("fr", 1.0, mine)]).mark == same.plan([("fr", 1.0, other)]).mark


def test_marks_are_forgotten_before_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_tree.engine.marks.KEPT_MARKS", 2)
    marks = Marks()
    first = marks.of("a")
    marks.of("b")
    assert marks.of("a") == first
    marks.of("c")
    assert marks.of("a") == first
    assert marks.of("b") != first + 1


def test_a_path_runs_on_though_everything_kept_for_it_was_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unmerged, "KEPT_PATHS", 0)
    base = nn.Sequential(nn.Linear(4, 3))
    tree = lt.AdapterTree()
    for seed, path in enumerate(("fr", "de")):
        tree.add(path, adapter=adapter(seed))
    model = lt.attach(tree, base)
    x = torch.randn(5, 4)
    model.activate("fr", mode="unmerged")
    expected = base(x)
    with model.using("de", mode="unmerged"):
        assert not torch.equal(base(x), expected)
    assert torch.equal(base(x), expected)
