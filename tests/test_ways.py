"""Whether a base still has some sites: one pass gives the answer that each site would give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_tree.sites import Site, Ways, find_site

NAMES = ("layers.0.attn.q", "layers.0.attn.k", "layers.0.up", "layers.1.attn.q", "layers.1.up")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
        self.up = nn.Linear(4, 6)


def nested() -> Any:
    base: Any = nn.Module()
    base.layers = nn.ModuleList([Layer(), Layer()])
    base.head = nn.Linear(6, 3)
    return base


def sites_of(base: Any) -> list[Site]:
    return [find_site(base, name) for name in (*NAMES, "head")]


def keep(base: Any) -> None:
    pass


def replace_a_module(base: Any) -> None:
    base.layers[1].up = nn.Linear(4, 6)


def replace_the_only_one_in_the_base_itself(base: Any) -> None:
    base.head = nn.Linear(6, 3)


def replace_what_holds_it(base: Any) -> None:
    base.layers[0] = Layer()


def replace_what_holds_it_and_keep_it(base: Any) -> None:
    old = base.layers[0]
    base.layers[0] = Layer()
    base.layers[0].attn, base.layers[0].up = old.attn, old.up


def swap_two(base: Any) -> None:
    attn = base.layers[0].attn
    attn["q"], attn["k"] = attn["k"], attn["q"]


def take_one_out(base: Any) -> None:
    del base.layers[0].attn["k"]


def put_none_in_its_place(base: Any) -> None:
    base.layers[0].attn = None


def resize_a_weight(base: Any) -> None:
    base.layers[1].up.weight = nn.Parameter(torch.zeros(9, 4))


def exchange_the_data_for_another_shape(base: Any) -> None:
    base.layers[1].up.weight.data = torch.zeros(9, 4)


def take_a_weight_away(base: Any) -> None:
    base.layers[1].up.weight = None


def put_a_lazy_weight_in_its_place(base: Any) -> None:
    base.layers[1].up.weight = nn.parameter.UninitializedParameter()


def replace_a_weight(base: Any) -> None:
    base.layers[1].up.weight = nn.Parameter(torch.zeros(6, 4))


def cast(base: Any) -> None:
    base.to(torch.float64)


def cast_one(base: Any) -> None:
    base.layers[0].up.to(torch.bfloat16)


DEEDS: tuple[tuple[Callable[[Any], None], bool], ...] = (
    (keep, True),
    (replace_a_module, False),
    (replace_the_only_one_in_the_base_itself, False),
    (replace_what_holds_it, False),
    (replace_what_holds_it_and_keep_it, True),
    (swap_two, False),
    (take_one_out, False),
    (put_none_in_its_place, False),
    (resize_a_weight, False),
    (exchange_the_data_for_another_shape, False),
    (take_a_weight_away, False),
    (put_a_lazy_weight_in_its_place, False),
    (replace_a_weight, True),
    (cast, True),
    (cast_one, True),
)


@pytest.mark.parametrize(("deed", "stays"), DEEDS, ids=[deed.__name__ for deed, _ in DEEDS])
@pytest.mark.parametrize("looks", [0, 1, 2])
def test_the_answer_is_that_of_each_site(
    deed: Callable[[Any], None], stays: bool, looks: int
) -> None:
    base = nested()
    sites = sites_of(base)
    ways = Ways(sites)
    for _ in range(looks):
        assert ways.dtypes(base) == (torch.float32,) * len(sites)
    deed(base)
    for _ in range(2):
        found = ways.dtypes(base)
        assert (found is not None) == all(site.is_in(base) for site in sites) == stays
        if found is not None:
            assert found == tuple(site.dtype for site in sites)


def test_a_module_that_comes_back_is_found_again() -> None:
    base = nested()
    ways = Ways(sites_of(base))
    assert ways.dtypes(base) is not None
    old = base.layers[0]
    base.layers[0] = Layer()
    assert ways.dtypes(base) is None
    base.layers[0] = old
    assert ways.dtypes(base) is not None


def test_a_weight_that_was_never_plain_has_no_shape_to_compare() -> None:
    base = nested()
    base.layers[0].up.weight = None  # as a layer that keeps quantised numbers under other names
    base.layers[1].up.weight = nn.parameter.UninitializedParameter(dtype=torch.float16)
    kinds = [type(find_site(base, "head"))] * 2
    sites = [
        kind(name, base.get_submodule(name), "")
        for kind, name in zip(kinds, ("layers.0.up", "layers.1.up"), strict=True)
    ]
    ways = Ways(sites)
    for _ in range(2):
        assert ways.dtypes(base) == (None, torch.float16)
    base.layers[1].up.weight.materialize((6, 4))
    assert ways.dtypes(base) is None
    assert not sites[1].is_in(base)


def test_the_next_look_looks_up_every_module_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = nested()
    ways = Ways(sites_of(base))
    assert ways.dtypes(base) is not None

    class Counted(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            asked.append(name)
            return super().get(name, default)

    asked: list[str] = []
    for module in base.modules():
        object.__setattr__(module, "_modules", Counted(module._modules))
    assert ways.dtypes(base) is not None
    # `layers` and `head`; two layers, and in each attn and up; q, k and q.
    assert sorted(asked) == sorted(
        ["layers", "head", "0", "1", "attn", "attn", "up", "up", "q", "k", "q"]
    )


def test_no_way_holds_the_base() -> None:
    base = nested()
    ways = Ways(sites_of(base))
    assert ways.dtypes(base) is not None
    held = [ways._first, ways._further, ways._children, ways._sites, ways._weights]
    flat: list[Any] = []
    for found in held:
        flat += _flat(found)
    assert not any(each is base for each in flat)


def _flat(found: Any) -> list[Any]:
    flat: list[Any] = []
    for each in found.values() if isinstance(found, dict) else found:
        flat += each if isinstance(each, tuple) else [each]
    return flat
