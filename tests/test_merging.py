"""Merging: number by number as PEFT and mergekit define it, and the same laws in every space."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from dense import dense, denses, draw, gauged, zoo_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lora_tree as lt
from lora_tree.algebra.elementwise import merged
from lora_tree.errors import PathError, ShapeMismatch, SpecError, TreeError

SEEDS = st.integers(0, 2**16)
DENSITIES = st.sampled_from([0.3, 0.6, 0.9])


def tensors(seed: int, count: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 8, generator=g) for _ in range(count)]


@pytest.fixture(scope="module")
def peft_merging() -> ModuleType:
    return importlib.import_module("peft.utils.merge_utils")


# ---------------------------------------------------------------------- the definitions
@settings(max_examples=25)
@given(SEEDS, DENSITIES, st.lists(st.sampled_from([1.0, 0.5, 2.0]), min_size=3, max_size=3))
def test_each_method_is_peft_s(
    peft_merging: ModuleType, seed: int, density: float, weights: list[float]
) -> None:
    given_, factors = tensors(seed), torch.tensor(weights)
    peers: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: peft_merging.task_arithmetic(given_, factors),
        "magnitude_prune": lambda: peft_merging.magnitude_prune(given_, factors, density),
        "ties": lambda: peft_merging.ties(given_, factors, density),
        "dare_linear": lambda: peft_merging.dare_linear(given_, factors, density),
        "dare_ties": lambda: peft_merging.dare_ties(given_, factors, density),
    }
    for method, peer in peers.items():
        torch.manual_seed(seed)
        wanted = peer()
        draw_ = torch.Generator().manual_seed(seed)
        found = merged(given_, weights, method=method, density=density, draw=draw_)
        torch.testing.assert_close(found, wanted)


@settings(max_examples=25)
@given(SEEDS, DENSITIES)
def test_sce_is_what_its_paper_says(seed: int, density: float) -> None:
    """Select by variance, weigh by energy, erase minorities: in loops (arXiv 2408.07990)."""
    given_ = tensors(seed)
    stack = torch.stack(given_).double()
    variance = stack.var(dim=0, unbiased=False).flatten()
    keep = int(density * int((variance != 0).sum()))
    chosen = set(variance.topk(keep).indices.tolist())
    flat = stack.reshape(3, -1).clone()
    for i in range(flat.shape[1]):
        if i not in chosen:
            flat[:, i] = 0.0
    energy = flat.square().sum(1)
    shares = energy / energy.sum()
    wanted = torch.zeros(flat.shape[1], dtype=torch.float64)
    for i in range(flat.shape[1]):
        majority = 1.0 if float(flat[:, i].sum()) >= 0 else -1.0
        agree = [k for k in range(3) if float(flat[k, i].sign()) == majority]
        if agree:
            whole = sum(float(shares[k]) for k in agree)
            wanted[i] = sum(float(shares[k] * flat[k, i]) for k in agree) / whole
    found = merged([t.double() for t in given_], [1.0] * 3, method="sce", density=density)
    torch.testing.assert_close(found.flatten(), wanted)


def test_a_dense_merge_is_peft_s_own_of_adapters(peft_merging: ModuleType) -> None:
    """As add_weighted_adapter with ties_svd: the merged ΔW, cut by SVD."""
    one, other = lt.Adapter({"q": draw(1, 2)}), lt.Adapter({"q": draw(2, 2)})
    found = lt.merge([one, other], [1.0, 0.7], method="ties", density=0.5, space="dense", rank=3)
    weights = torch.tensor([1.0, 0.7])
    whole = [dense(adapter.modules["q"]) for adapter in (one, other)]
    wanted = peft_merging.ties(whole, weights, 0.5)
    U, S, Vh = torch.linalg.svd(wanted)
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    torch.testing.assert_close(dense(found.adapter.modules["q"]), best, rtol=1e-5, atol=1e-5)
    assert found.cut.error == pytest.approx(float(S[3:].square().sum().sqrt()), rel=1e-5)
    apart = float((best - whole[0]).norm() / whole[0].norm())
    assert found.distances[0] == pytest.approx(apart, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "theirs"), [("ties", "ties_svd"), ("magnitude_prune", "magnitude_prune_svd")]
)
def test_a_dense_merge_is_what_peft_makes_of_loaded_adapters(method: str, theirs: str) -> None:
    peft = importlib.import_module("peft")
    values = {"one": draw(1, 2, scale=0.5), "two": draw(2, 2, scale=0.5)}
    config = peft.LoraConfig(r=2, lora_alpha=1, target_modules=["q"])
    model = peft.get_peft_model(
        torch.nn.Sequential(OrderedDict(q=torch.nn.Linear(8, 6))), config, adapter_name="one"
    )
    model.add_adapter("two", config)
    layer = model.base_model.model.q
    for name, value in values.items():
        layer.lora_A[name].weight.data.copy_(value.A)
        layer.lora_B[name].weight.data.copy_(value.B)
    model.base_model.add_weighted_adapter(
        ["one", "two"], [1.0, 0.7], "merged", combination_type=theirs, svd_rank=3, density=0.5
    )
    adapters = [lt.Adapter({"q": value}) for value in values.values()]
    found = lt.merge(adapters, [1.0, 0.7], method=method, density=0.5, space="dense", rank=3)
    got = dense(found.adapter.modules["q"]).float()
    torch.testing.assert_close(got, layer.get_delta_weight("merged"), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- the spaces
@settings(max_examples=15)
@given(SEEDS)
def test_what_is_linear_is_the_same_in_every_space(seed: int) -> None:
    adapters = [zoo_of(seed), zoo_of(seed + 1, without="conv")]
    weights = [0.5, -2.0]
    wanted = denses(lt.combine(list(zip(adapters, weights, strict=True))))
    for space in ("core", "knots", "dense"):
        rank = 8 if space == "dense" else None
        found = lt.merge(adapters, weights, method="linear", space=space, rank=rank)
        got = denses(found.adapter)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)


@settings(max_examples=15)
@given(SEEDS, DENSITIES)
def test_core_and_knots_are_merges_of_dense_coordinates(seed: int, density: float) -> None:
    """The same numbers from dense SVDs of [ΔW_1 … ΔW_n], with no factor in sight."""
    values = [draw(seed + i, 2) for i in range(3)]
    adapters = [lt.Adapter({"q": value}) for value in values]
    whole = [dense(value) for value in values]
    U, S, _ = torch.linalg.svd(torch.cat(whole, dim=1), full_matrices=False)
    W = torch.linalg.svd(torch.cat([w.mT for w in whole], dim=1), full_matrices=False)[0][:, :6]
    for method in ("ties", "magnitude_prune", "sce"):
        coordinates = [U.mT @ w @ W for w in whole]
        inside = merged(coordinates, [1.0] * 3, method=method, density=density)
        found = lt.merge(adapters, method=method, density=density, space="core")
        got = dense(found.adapter.modules["q"])
        torch.testing.assert_close(got, U @ inside @ W.mT, rtol=1e-4, atol=1e-4)
        rows = [torch.diag(1 / S) @ U.mT @ w for w in whole]
        inside = merged(rows, [1.0] * 3, method=method, density=density)
        found = lt.merge(adapters, method=method, density=density, space="knots")
        got = dense(found.adapter.modules["q"])
        torch.testing.assert_close(got, U @ torch.diag(S) @ inside, rtol=1e-4, atol=1e-4)


@settings(max_examples=15)
@given(SEEDS)
def test_order_and_gauge_do_not_change_a_merge(seed: int) -> None:
    adapters = [zoo_of(seed + i) for i in range(3)]
    twins = [gauged(adapter, seed) for adapter in reversed(adapters)]
    for space in ("core", "knots"):
        one, other = (lt.merge(each, density=0.8, space=space) for each in (adapters, twins))
        assert lt.deviation(one.adapter, other.adapter).relative_error < 1e-4


def test_random_drops_go_by_the_seed_and_the_module() -> None:
    adapters = [zoo_of(1), zoo_of(2)]

    def merge(given_: list[lt.Adapter], seed: int = 0) -> lt.Adapter:
        return lt.merge(given_, method="dare_linear", density=0.5, seed=seed).adapter

    assert lt.diff(merge(adapters), merge(adapters)).is_nothing
    assert not lt.diff(merge(adapters), merge(adapters, 1)).is_nothing
    few = [lt.Adapter({"q_proj": adapter.modules["q_proj"]}) for adapter in adapters]
    alone = merge(few).modules["q_proj"]
    torch.testing.assert_close(dense(alone), dense(merge(adapters).modules["q_proj"]))


def test_biases_are_merged_like_the_rest() -> None:
    A, B = draw(1, 2).A, draw(1, 2).B
    one, other = (lt.LowRank(A, B, 2.0, torch.full((6,), x)) for x in (1.0, -3.0))
    found = lt.merge([lt.Adapter({"q": one}), lt.Adapter({"q": other})], method="ties")
    bias = found.adapter.modules["q"].bias
    assert bias is not None
    assert bias.tolist() == [-6.0] * 6


def test_what_can_t_be_merged_is_refused() -> None:
    x, y = lt.Adapter({"q": draw(1, 2)}), lt.Adapter({"q": draw(1, 2, out=9)})
    with pytest.raises(SpecError, match="did you mean 'ties'"):
        lt.merge([x], method="tise")
    with pytest.raises(SpecError, match="0 < density"):
        lt.merge([x], density=0.0)
    with pytest.raises(SpecError, match="expected one of core, knots, dense"):
        lt.merge([x], space="flat")
    with pytest.raises(SpecError, match="the result has full rank"):
        lt.merge([x], space="dense")
    with pytest.raises(SpecError, match="takes a list of adapters"):
        lt.merge([])
    with pytest.raises(SpecError, match="1 adapter, but 2 weights"):
        lt.merge([x], [1.0, 2.0])
    with pytest.raises(ShapeMismatch, match="a and b: q"):
        lt.merge([x, y], names=["a", "b"])
    huge = lt.LowRank(torch.ones(1, 5000), torch.ones(5000, 1))
    with pytest.raises(SpecError, match=r"q: space='dense': a weight of 5000 × 5000 is too large"):
        lt.merge([lt.Adapter({"q": huge})], space="dense", rank=1)


def test_paths_are_merged_into_a_node() -> None:
    tree = lt.AdapterTree()
    tree.add("fr", adapter=zoo_of(1))
    tree.add("fr/legal", adapter=zoo_of(2), weight=0.5)
    tree.add("fr/medical", adapter=zoo_of(3))
    told, found = lt.merge_paths(tree, ["fr/legal", "fr/medical"], to="fr/both", density=0.5)
    wanted = lt.merge([zoo_of(2).scaled(0.5), zoo_of(3)], density=0.5)
    assert lt.deviation(wanted.adapter, found.adapter).relative_error < 1e-5
    assert tree.adapter("fr/both") is found.adapter
    assert told.added == ("fr/both",)
    with pytest.raises(TreeError, match="exists already"):
        lt.merge_paths(tree, ["fr/legal"], to="fr/both")
    with pytest.raises(PathError, match="no node 'fr/x'"):
        lt.merge_paths(tree, ["fr/x"], to="fr/c")
    before = tree.paths()
    with pytest.raises(SpecError, match="they add nothing to the nodes above fr/legal/c"):
        lt.merge_paths(tree, ["fr/legal"], to="fr/legal/c")
    assert tree.paths() == before
