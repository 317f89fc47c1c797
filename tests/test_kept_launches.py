"""A switch that was made before runs its kept launch: what it still asks of the base, and what
becomes of it when the launch fails.

The kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sampling import sampled
from test_kernels import Experts, bits, forest, kernel, made, merging, same
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.engine.kernels import MergePart
from lora_tree.engine.switching.switches import SiteWrite
from lora_tree.engine.switching.watch import WatchedWeight
from lora_tree.errors import ForeignWrite, TiedWeights
from lora_tree.sites import Site, Ways

pytest.importorskip("triton", reason="Triton has no build for this platform")

__all__ = ["kernel", "made", "merging"]  # pytest finds fixtures by their names in this module

HOPS = ("a/b", "a/c", "a/b", "a/c")  # after these the launches are kept


def test_a_switch_made_before_asks_for_every_site_once(
    made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, base = forest()
    model = lt.attach(tree, base)
    for path in HOPS:
        model.activate(path)
    asked: list[str] = []

    def counted(owner: type, name: str) -> None:
        good = getattr(owner, name)

        def call(*args: Any) -> Any:
            asked.append(f"{owner.__name__}.{name}")
            return good(*args)

        monkeypatch.setattr(owner, name, call)

    counted(Ways, "dtypes")
    counted(Site, "is_in")
    counted(WatchedWeight, "is_untouched")
    counted(SiteWrite, "__new__")
    model.activate("a/b")
    assert Counter(asked) == {"Ways.dtypes": 1, "WatchedWeight.is_untouched": 4}


def replace_module(base: Any) -> None:
    base.linear = nn.Linear(70, 66)


def replace_weight(base: Any) -> None:
    base.linear.weight = nn.Parameter(base.linear.weight.detach() * 2)


def replace_holder_of_experts(base: Any) -> None:
    base.experts = Experts()


def write_in_place(base: Any) -> None:
    with torch.no_grad():
        base.linear.weight.mul_(2)


def write_behind_autograd(base: Any) -> None:
    base.linear.weight.data += 1


def exchange_data(base: Any) -> None:
    base.linear.weight.data = base.linear.weight.data * 2


def cast(base: Any) -> None:
    base.half()


FOREIGN: dict[Callable[[Any], None], str] = {
    replace_module: "linear",
    replace_weight: "linear",
    replace_holder_of_experts: "experts",
    write_in_place: "linear",
    write_behind_autograd: "linear",
    exchange_data: "linear",
    cast: "conv.weight, experts.up, linear.weight, words",
}


@pytest.mark.parametrize("deed", FOREIGN, ids=[deed.__name__ for deed in FOREIGN])
def test_a_foreign_change_to_a_merged_base_is_noticed_though_launches_are_kept(
    merging: list[int], deed: Callable[[Any], None]
) -> None:
    tree, base = forest()
    model = lt.attach(tree, base)
    for path in HOPS:
        model.activate(path)
    deed(base)
    now, launches = bits(base), len(merging)
    for path in ("a/b", "a/c", "d", ""):
        with pytest.raises(ForeignWrite, match=rf"^{FOREIGN[deed]}"):
            model.activate(path)
    assert same(bits(base), now)
    assert len(merging) == launches, "nothing was launched"
    assert model.active == "a/c"


@pytest.mark.parametrize(
    "deed", sampled(FOREIGN, [write_in_place, cast]), ids=[deed.__name__ for deed in FOREIGN]
)
def test_a_foreign_change_to_a_bare_base_is_what_kept_launches_give_way_to(
    merging: list[int], deed: Callable[[Any], None]
) -> None:
    tree, base = forest()
    model = lt.attach(tree, base)
    for path in (*HOPS, ""):
        model.activate(path)
    torch.manual_seed(1)
    deed(base)
    now, alone = bits(base), copy.deepcopy(base)
    fresh = lt.attach(tree, alone)
    for path in ("a/c", "a/b", "a/c"):
        fresh.activate(path)
        model.activate(path)
        assert same(bits(base), bits(alone))
    model.activate("")
    assert same(bits(base), now)


def test_a_weight_that_was_tied_after_its_launch_was_kept_is_refused(merging: list[int]) -> None:
    tree, base = forest()
    model = lt.attach(tree, base)
    for path in HOPS:
        model.activate(path)
    base.other = nn.Linear(70, 66, bias=False)
    base.other.weight = base.linear.weight  # type: ignore[union-attr, assignment]
    now, launches = bits(base), len(merging)
    with pytest.raises(TiedWeights, match=r"linear: its weight is tied to other\.weight"):
        model.activate("a/b")
    assert same(bits(base), now)
    assert len(merging) == launches


def test_a_kept_launch_that_fails_leaves_the_path_before(
    merging: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    good: Any = importlib.import_module("lora_tree.engine.switching.merged").merge_launch
    fails: list[bool] = []

    class Failing:
        def __init__(self, parts: list[MergePart]) -> None:
            self._launch = good(parts)
            self._weight = parts[0].weight

        def run(self) -> None:
            if fails:
                fails.clear()
                self._weight.zero_()  # half of it is done
                raise RuntimeError("the device is gone")
            self._launch.run()

    monkeypatch.setattr("lora_tree.engine.switching.merged.merge_launch", Failing)
    tree, base = forest()
    model = lt.attach(tree, base)
    seen = {}
    for path in HOPS:
        model.activate(path)
        seen[path] = bits(base)
    fails.append(True)
    with pytest.raises(RuntimeError, match="the device is gone"):
        model.activate("a/b")
    assert model.active == "a/c"
    assert same(bits(base), seen["a/c"])
    for path in HOPS:
        model.activate(path)
        assert same(bits(base), seen[path])


@pytest.mark.parametrize("wide", [False, True])
def test_a_launch_that_is_not_all_of_a_switch_leaves_the_rest_to_stock_operations(
    made: list[int], wide: bool
) -> None:
    tree, base = forest()
    if wide:
        base.words.double()  # no kernel writes it
    only = lt.Adapter({"linear": lt.LowRank(torch.randn(2, 70), torch.randn(66, 2))})
    tree.add("e", adapter=only)
    model = lt.attach(tree, base)
    seen: dict[str, dict[str, Tensor]] = {}
    for path in ("a/b", "e", "a/b", "e", "", "e", "d", "e"):
        model.activate(path)
        assert same(bits(base), seen.setdefault(path, bits(base))), path
    model.detach()
    lt.attach(tree, base).activate("e")
    assert same(bits(base), seen["e"])
