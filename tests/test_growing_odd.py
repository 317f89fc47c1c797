"""Growing and absorbing adapters that are unlike each other, empty, equal or broken."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from dense import denses, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lora_tree as lt
from lora_tree.errors import LoraTreeError, ShapeMismatch, SpecError

SHAPES = {"q": (12, 16), "k": (7, 16), "v": (12, 9)}
SEEDS = st.integers(0, 2**16)

# One adapter: the rank of each module that it has. Zero ranks stand for factors of zeros.
RANKS = st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(0, 4), min_size=1)


def odd(seed: int, ranks: dict[str, int]) -> lt.Adapter:
    """An adapter with these ranks; a part of rank 1 of each module is the same for all seeds."""
    modules: dict[str, lt.LowRank] = {}
    for name, rank in ranks.items():
        out, into = SHAPES[name]
        value = lt.LowRank(torch.zeros(1, into), torch.zeros(out, 1))
        if rank:
            shared = draw(len(name) + ord(name[0]), 1, out=out, into=into)
            value = lt.concat([shared, draw(seed, rank, out=out, into=into)])
        modules[name] = value
    return lt.Adapter(modules)


def tree_of(adapters: list[lt.Adapter]) -> lt.AdapterTree:
    tree = lt.AdapterTree()
    for i, adapter in enumerate(adapters):
        tree.add(f"n{i}", adapter=adapter)
    return tree


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The Frobenius norm of the difference; a module that is missing is zero."""
    zero = torch.zeros((), dtype=torch.float64)
    parts = [(one.get(n, zero) - other.get(n, zero)).norm() for n in {*one, *other}]
    return math.hypot(*map(float, parts))


def same_tree(tree: lt.AdapterTree, before: lt.AdapterTree) -> bool:
    if tree.paths() != before.paths():
        return False
    return all(tree.adapter(path) is before.adapter(path) for path in tree.paths())


@settings(max_examples=8)
@given(st.lists(RANKS, min_size=2, max_size=6), SEEDS, st.sampled_from([1e-3, 0.2]), st.data())
def test_unlike_zero_and_equal_adapters_keep_what_the_certificate_says(
    kinds: list[dict[str, int]], seed: int, most: float, data: st.DataObject
) -> None:
    adapters = [odd(seed + 31 * i, ranks) for i, ranks in enumerate(kinds)]
    again = data.draw(st.integers(0, len(adapters) - 1))
    adapters.append(adapters[again])
    tree = tree_of(adapters)
    before = copy.copy(tree)
    grown = lt.grow(tree, max_error=most)
    squares: list[float] = []
    for old in before.paths():
        new = grown.edited.moved.get(old, old)
        wanted, got = denses(before.flatten(old)), denses(tree.flatten(new))
        error, norm = distance(wanted, got), distance(wanted, {})
        told = grown.edited.errors[new]
        assert told.error == pytest.approx(error, rel=1e-3, abs=1e-5)
        assert told.norm == pytest.approx(norm, rel=1e-6, abs=1e-12)
        # An adapter that is zero has no relative error: it stays zero within rounding.
        squares.append((error / norm) ** 2 if norm else error**2)
    assert math.sqrt(sum(squares) / len(squares)) <= most * 1.001
    assert len(tree.leaves()) == len(adapters)


def test_equal_adapters_are_held_once() -> None:
    tree = tree_of([odd(5, {"q": 3, "v": 2})] * 4)
    lt.grow(tree, max_error=1e-3)
    assert tree.adapter("shared").ranks == {"q": 4, "v": 3}
    for leaf in tree.leaves():
        adapter = tree.adapter(leaf)
        assert adapter is not None
        assert all(value.norm() < 1e-5 for value in adapter.modules.values())


def broken(value: float) -> lt.Adapter:
    adapter = odd(3, {"q": 2, "v": 1})
    A = adapter.modules["v"].A.clone()
    A[0, 0] = value
    return lt.Adapter({**adapter.modules, "v": lt.LowRank(A, adapter.modules["v"].B)})


@pytest.mark.parametrize("paths", [None, ["n*"]])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_broken_adapter_is_refused_by_its_name(number: float, paths: list[str] | None) -> None:
    tree = tree_of([odd(1, {"q": 2}), odd(2, {"q": 2}), broken(number)])
    before = copy.copy(tree)
    with pytest.raises(SpecError, match=r"n2: v: the factors are not finite"):
        lt.grow(tree, paths, max_error=0.1)
    assert same_tree(tree, before)


HEAD = {"head.weight": lt.Override(torch.ones(3, 4))}
HIDES = {"q.weight": lt.Override(torch.ones(12, 16))}


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (lt.Adapter({}), "n2: has factors of no module, so it shares nothing with the others"),
        (
            lt.Adapter({}, overrides=HEAD),
            "n2: has factors of no module, so it shares nothing with the others",
        ),
        (
            lt.Adapter(odd(3, {"v": 1}).modules, overrides=HIDES),
            "n2: replaces q.weight, so nothing above it counts there",
        ),
    ],
)
def test_what_can_not_share_is_left_alone_and_refused_by_name(
    adapter: lt.Adapter, why: str
) -> None:
    tree = tree_of([odd(1, {"q": 2}), odd(2, {"q": 2}), adapter])
    before = copy.copy(tree)
    with pytest.raises(SpecError, match=why):
        lt.grow(tree, ["n*"], max_error=0.1)
    assert same_tree(tree, before)
    grown = lt.grow(tree, max_error=0.1)
    assert grown.edited.notes == (f"left alone: {why}",)
    assert tree.adapter("n2") is adapter
    assert len(grown.edited.changed) == 2


def test_one_that_is_left_alone_is_told_where_too_few_remain() -> None:
    tree = tree_of([odd(1, {"q": 2}), lt.Adapter({})])
    with pytest.raises(SpecError, match=r"at least two flat adapters, got n0\n  left alone: n1:"):
        lt.grow(tree, max_error=0.1)


@pytest.mark.parametrize(
    ("adapter", "error", "says"),
    [
        (broken(float("nan")), SpecError, r"^late: v: the factors are not finite"),
        (broken(float("-inf")), SpecError, r"^late: v: the factors are not finite"),
        (lt.Adapter({}), SpecError, r"^late: the adapter adds nothing"),
        (odd(1, {"q": 0}), SpecError, r"^late: the adapter adds nothing"),
        (lt.Adapter({"q": draw(1, 2, out=5, into=16)}), ShapeMismatch, r"^late: shared: q: "),
    ],
)
def test_what_no_node_can_take_is_refused_by_its_name(
    adapter: lt.Adapter, error: type[LoraTreeError], says: str
) -> None:
    tree = tree_of([odd(i, {"q": 2, "v": 1}) for i in range(3)])
    lt.grow(tree, max_error=1e-3)
    before = copy.copy(tree)
    with pytest.raises(error, match=says):
        lt.absorb(tree, "late", adapter)
    assert same_tree(tree, before)


@settings(max_examples=5)
@given(RANKS.filter(lambda ranks: any(ranks.values())), SEEDS)
def test_an_adapter_of_any_modules_and_ranks_is_absorbed_exactly(
    ranks: dict[str, int], seed: int
) -> None:
    tree = tree_of([odd(i, {"q": 2, "v": 1}) for i in range(3)])
    lt.grow(tree, max_error=1e-3)
    late = odd(seed, ranks)
    told = lt.absorb(tree, "late", late)
    wanted = denses(late)
    got = denses(tree.flatten(told.edited.added[0]))
    assert distance(wanted, got) < 1e-5 * distance(wanted, {})


def test_biases_count_in_what_is_left_below_each_node() -> None:
    def biased(seed: int, *, scale: float) -> lt.Adapter:
        draw_bias = torch.Generator().manual_seed(seed)
        bias = 3.0 * torch.randn(12, generator=draw_bias)
        value = draw(seed, 2, out=12, into=16, scale=scale)
        return lt.Adapter({"q": lt.LowRank(value.A, value.B, scale, bias)})

    tree = lt.AdapterTree()
    tree.add("a", adapter=biased(1, scale=0.5))
    tree.add("a/b", adapter=biased(2, scale=-0.7), weight=0.5)
    tree.add("c", adapter=odd(3, {"q": 2}))
    new = biased(4, scale=1.3)
    wanted = denses(new)
    told = lt.absorb(tree, "new", new)
    own = {path: denses(tree.adapter(path)) for path in ("a", "a/b", "c")}
    column = torch.zeros(12, 1, dtype=torch.float64)
    on_c = {"q": torch.cat([own["c"]["q"], column], dim=1)}
    below = {"": {}, "a": own["a"], "a/b": {"q": own["a"]["q"] + 0.5 * own["a/b"]["q"]}, "c": on_c}
    for path, there in below.items():
        left = distance(wanted, there) / distance(wanted, {})
        assert told.left[path] == pytest.approx(left, rel=1e-6)


def test_an_adapter_of_biases_alone_is_absorbed() -> None:
    tree = tree_of([odd(1, {"q": 2})])
    zeros = lt.LowRank(torch.zeros(1, 16), torch.zeros(12, 1), 1.0, torch.ones(12))
    told = lt.absorb(tree, "new", lt.Adapter({"q": zeros}))
    assert told.left[""] == 1.0
    flat = tree.flatten(told.edited.added[0]).modules["q"]
    torch.testing.assert_close(flat.bias * flat.scale, torch.ones(12))


def test_a_leaf_that_is_switched_off_is_left_alone_and_refused_by_name() -> None:
    tree = tree_of([odd(1, {"q": 2}), odd(2, {"q": 2}), odd(3, {"q": 2})])
    tree.update("n2", weight=0.0)
    mine = tree.adapter("n2")
    with pytest.raises(SpecError, match="n2: its weight is 0, so it shares nothing"):
        lt.grow(tree, ["n*"], max_error=1e-3)
    lt.grow(tree, max_error=1e-3)
    assert tree.adapter("n2") is mine
    assert tree["n2"].weight == 0.0


def test_a_module_that_weights_switch_off_stays_off_with_its_override() -> None:
    head = {"v.weight": lt.Override(torch.ones(12, 9))}
    tree = lt.AdapterTree()
    tree.add("a", adapter=odd(1, {"q": 2, "k": 2}), weight={"k": 0.0})
    tree.add("b", adapter=odd(2, {"q": 2}))
    own = lt.Adapter(odd(3, {"q": 2, "v": 1}).modules, overrides=head)
    tree.add("c", adapter=own, weight={"v": 0.0})
    wanted = {path: denses(tree.flatten(path)) for path in ("a", "b", "c")}
    grown = lt.grow(tree, max_error=1e-6)
    for path, before in wanted.items():
        flat = tree.flatten(grown.edited.moved.get(path, path))
        assert not flat.overrides
        assert distance(denses(flat), before) < 1e-5


def test_leaves_whose_weights_leave_nothing_share_nothing() -> None:
    tree = lt.AdapterTree()
    for name in ("a", "b"):
        tree.add(name, adapter=odd(1, {"q": 2}), weight={"q": 0.0})
    with pytest.raises(SpecError, match="are 0 at all of their modules"):
        lt.grow(tree, max_error=1e-3)
