"""What a switch between two plans writes is made once, and kept no longer than either plan."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import lora_tree as lt
from lora_tree.engine.binder import Binder
from lora_tree.engine.plan import EMPTY_PLAN, Plan
from lora_tree.engine.planner import Planner
from lora_tree.engine.switching import switches
from lora_tree.engine.switching.pristine import Pristine
from lora_tree.engine.switching.switches import KeptSwitches


def adapter(*names: str) -> lt.Adapter:
    return lt.Adapter({n: lt.LowRank(torch.randn(2, 4), torch.randn(4, 2)) for n in names})


def base() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)


def plans(**adapters: lt.Adapter) -> tuple[nn.Module, dict[str, Plan]]:
    over = base()
    planner = Planner(Binder(over, None), kept=0)
    return over, {node: planner.plan([(node, 1.0, value)]) for node, value in adapters.items()}


def test_what_becomes_bare_comes_first_and_what_stays_is_left_out() -> None:
    shared = adapter("1")
    over = base()
    planner = Planner(Binder(over, None))
    old = planner.plan([("s", 1.0, shared), ("x", 1.0, adapter("2"))])
    new = planner.plan([("s", 1.0, shared), ("y", 1.0, adapter("0"))])
    found = KeptSwitches().between(old, new)
    assert [write.site.name for write in found.all.site_writes] == ["2", "0"]
    assert (found.bare.names, found.merged.names) == (("2",), ("0",))
    assert [(bool(write.old), bool(write.new)) for write in found.all.site_writes] == [
        (True, False),
        (False, True),
    ]
    back = found.undone()
    assert (back.bare.names, back.merged.names) == (("0",), ("2",))


def test_whether_the_new_plan_has_every_site_of_the_old_one() -> None:
    _, found = plans(two=adapter("0", "1"), one=adapter("0"))
    kept = KeptSwitches()
    assert kept.between(found["one"], found["two"]).keeps_sites
    assert not kept.between(found["two"], found["one"]).keeps_sites
    assert not kept.between(found["one"], EMPTY_PLAN).keeps_sites
    assert kept.between(EMPTY_PLAN, found["one"]).keeps_sites


def test_a_module_that_was_replaced_is_another_site() -> None:
    over = base()
    planner = Planner(Binder(over, None), kept=0)
    value = adapter("0")
    old = planner.plan([("n", 1.0, value)])
    over[0] = nn.Linear(4, 4)  # type: ignore[index]
    new = planner.plan([("n", 1.0, value)])
    assert not KeptSwitches().between(old, new).keeps_sites


def test_the_same_switch_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Plan, Plan]] = []
    good = switches._switch

    def counted(old: Plan, new: Plan) -> Any:
        made.append((old, new))
        return good(old, new)

    monkeypatch.setattr(switches, "_switch", counted)
    _, found = plans(a=adapter("0"), b=adapter("0"))
    kept, (a, b) = KeptSwitches(), found.values()
    for old, new in ((a, b), (b, a)) * 3:
        assert kept.between(old, new) is kept.between(old, new)
    assert made == [(a, b), (b, a)]


def test_of_the_switches_to_one_plan_the_oldest_go() -> None:
    _, found = plans(**{f"n{i}": adapter("0") for i in range(switches.KEPT + 2)})
    to, *others = found.values()
    kept = KeptSwitches()
    first = [kept.between(old, to) for old in others]
    assert kept.between(others[-1], to) is first[-1]
    assert kept.between(others[0], to) is not first[0]


@pytest.mark.parametrize("which", ["old", "new"])
def test_it_is_gone_with_either_plan(which: str) -> None:
    _, found = plans(old=adapter("0"), new=adapter("0"))
    kept = KeptSwitches()
    known = weakref.ref(kept.between(found["old"], found["new"]))
    assert known() is not None
    factor = weakref.ref(found[which].terms["0"][0].value)
    del found[which]
    gc.collect()
    assert known() is None
    assert factor() is None, "a plan's factors go with it"


def test_a_copy_that_is_dropped_is_freed() -> None:
    over, found = plans(a=adapter("0"), b=adapter("0"))
    kept, pristine = KeptSwitches(), Pristine("host")
    known = kept.between(found["a"], found["b"])
    back = kept.between(found["b"], EMPTY_PLAN)
    (source,) = pristine.begin(known).values()
    assert pristine.begin(known) is pristine.begin(known), "found once"
    pristine.begin(back)  # nothing is merged into it any more
    copy = weakref.ref(source)
    del source
    over[0].weight.add_(1)  # type: ignore[index, union-attr, operator]
    pristine.verify()
    gc.collect()
    assert copy() is None
    (source,) = pristine.begin(known).values()
    assert torch.equal(source, over[0].weight)  # type: ignore[index, union-attr, arg-type]
