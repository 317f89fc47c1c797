"""A path's factors are read where the cache put them: by kernels, or as the one product of a node.

The kernels run in Triton's interpreter, and a link that copies within host memory plays a device
with memory of its own. Results are compared with sums by hand in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import doubled, net_by_hand, random_adapter
from test_placement import Counting
from test_segmented import forest, launched, modules, net

import lora_tree as lt
from lora_tree.engine.kernels import FactorTable

__all__ = ["launched", "modules"]  # fixtures

PATHS: list[lt.Blend] = ["a", "a/b/c", {"a/b": 0.5, "a/d": 0.25, "e": -1.0}]


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Counting:
    made = Counting()
    monkeypatch.setattr("lora_tree.model.link_to", lambda base: made)
    return made


@pytest.mark.parametrize("shape", [(20,), (1, 1, 20), (2, 3, 20), (70, 20)], ids=str)
@pytest.mark.parametrize("path", PATHS, ids=["node", "path", "blend"])
def test_a_path_is_the_sum_in_float64_in_one_launch_for_few_inputs_and_in_two_for_many(
    launched: list[str], path: lt.Blend, shape: tuple[int, ...]
) -> None:
    base, tree = net(), forest()
    model = lt.attach(tree, base)
    x = torch.randn(shape)
    with torch.no_grad():
        wanted = net_by_hand(base, tree, x.view(1, -1, 20), [path], doubled(tree)).view(shape)
        model.activate(path, mode="unmerged")
        y = base(x)
    assert launched == (["direct"] if x.numel() <= 16 * 20 else ["shrink", "expand"]) * 2
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_graph_captures_two_launches_a_site_which_are_compiled_before(
    launched: list[str], modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tree = net(), forest()
    model = lt.attach(tree, base)
    x = torch.randn(3, 20)
    monkeypatch.setattr(modules["in_place"], "_LOADED", set())
    with torch.no_grad():
        model.activate("a/b/c", mode="unmerged")
        first = base(x)
        assert launched == ["shrink", "expand", "direct"] * 2
        del launched[:]
        assert torch.equal(base(x), first)
        model.activate({"a/b": 0.5, "e": 0.25}, mode="unmerged")
        base(x)
        assert launched == ["direct"] * 4, "other nodes, as many, need no other kernels"
        del launched[:]
        base(x[:1])
        assert launched == ["shrink", "expand", "direct"] * 2, "a single input does"
        del launched[:]
        model.activate("a/b/c", mode="unmerged")
        monkeypatch.setattr(modules["in_place"], "_is_captured", lambda tensor: True)
        torch.testing.assert_close(base(x), first, rtol=1e-5, atol=1e-5)
        assert launched == ["shrink", "expand"] * 2


def test_inputs_of_other_sizes_and_dtypes_in_turn_are_each_added_to(launched: list[str]) -> None:
    base, tree = net(torch.float16), forest()
    model = lt.attach(tree, base)
    exact = doubled(tree)
    model.activate("a/b/c", mode="unmerged")
    for count, dtype in ((2, torch.float16), (40, torch.float16), (2, torch.float32), (2, None)):
        x = torch.randn(count, 20)
        if dtype is not None:
            base.to(dtype)
            x = x.to(dtype)
        narrow = torch.float16 if dtype is None else dtype
        with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=dtype is None):
            y = base(x)
        with torch.no_grad():
            wanted = net_by_hand(base, tree, x[None].double(), ["a/b/c"], exact)[0]
        assert y.dtype == narrow
        close = 2e-2 if narrow == torch.float16 else 1e-5
        torch.testing.assert_close(y.double(), wanted, rtol=close, atol=close)


def test_what_the_kernels_read_is_what_was_sent_and_nothing_is_made_of_it(
    launched: list[str], link: Counting
) -> None:
    base = net()
    model = lt.attach(forest(), base, device_budget="1MiB")
    x = torch.randn(4, 20)
    with torch.no_grad():
        bare = base(x)
        model.activate("a/b/c", mode="unmerged")
        beside = base(x)
        device = model.cache.stats().tiers[-1]
        assert (len(link.sent), device.nodes, device.laid_out_bytes) == (3, 3, 0)
        for buffer in link.sent:
            buffer.zero_()
        after = base(x)
    assert not torch.equal(beside, bare)
    assert torch.equal(after, bare), "a stack would still have the numbers"
    assert "direct" in launched


def test_one_node_needs_neither_a_stack_nor_a_kernel(link: Counting) -> None:
    base = net()
    model = lt.attach(forest(), base, device_budget="1MiB")
    x = torch.randn(4, 20)
    with torch.no_grad():
        bare = base(x)
        model.activate("e", mode="unmerged")
        assert not torch.equal(base(x), bare)
        assert model.cache.stats().tiers[-1].laid_out_bytes == 0
        link.sent[-1].zero_()
        assert torch.equal(base(x), bare)
        model.activate("a/b", mode="unmerged")
        assert model.cache.stats().tiers[-1].laid_out_bytes > 0, (
            "two nodes are stacked for one product"
        )


def test_one_node_in_another_dtype_is_laid_out_in_that_of_the_site() -> None:
    base = net()
    model = lt.attach(forest(torch.bfloat16), base, host_budget="1MiB")
    x = torch.randn(4, 20)
    with torch.no_grad():
        wanted = net_by_hand(base, model.tree, x[:, None], ["e"] * 4, doubled(model.tree))[:, 0]
        model.activate("e", mode="unmerged")
        torch.testing.assert_close(base(x).double(), wanted, rtol=1e-5, atol=1e-5)
    assert model.cache.stats().tiers[-1].laid_out_bytes > 0


def test_gradients_of_a_path_are_those_of_float64(launched: list[str]) -> None:
    base, tree = net(), forest()
    model = lt.attach(tree, base).train()
    model.trainable("a/b/c")
    x = torch.randn(5, 3, 20)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    exact = doubled(tree)
    net_by_hand(base, tree, other.view(1, -1, 20), ["a/b/c"], exact).sin().sum().backward()
    model.activate("a/b/c", mode="unmerged")
    base(leaf).sin().sum().backward()
    # The parents by the kernels, forward and backward; the node that trains by stock products.
    assert launched == ["shrink", "expand"] * 4
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)
    adapter = tree.adapter("a/b/c")
    assert adapter is not None
    for name, value in adapter.modules.items():
        for side, factor in (("A", value.A), ("B", value.B)):
            wanted = exact["a/b/c", name, side].grad
            assert factor.grad is not None
            assert wanted is not None
            torch.testing.assert_close(factor.grad.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bias", "fp64", "large rank"])
def test_what_the_kernels_do_not_cover_is_added_by_stock_products(
    launched: list[str], kind: str
) -> None:
    base, tree = net(), forest(bias=kind == "bias")
    if kind == "large rank":
        shapes = {"0": (36, 20), "2": (20, 36)}
        tree.add("a/wide", adapter=random_adapter(shapes, r=200, scale=0.01))
    path = "a/wide" if kind == "large rank" else "a/b"
    model = lt.attach(tree, base)
    x = torch.randn(4, 20)
    model.activate(path, mode="unmerged")
    if kind == "fp64":
        base.double()
        x = x.double()
    with torch.no_grad():
        y = base(x)
        wanted = net_by_hand(base, tree, x[:, None], [path] * 4, doubled(tree))[:, 0]
    assert launched == []
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_batch_of_one_path_reads_factors_where_they_lie(
    launched: list[str], link: Counting
) -> None:
    base, tree = net(), forest()
    model = lt.attach(tree, base, device_budget="1MiB")
    x = torch.randn(3, 20)
    with torch.no_grad():
        wanted = net_by_hand(base, tree, x[:, None], ["a/b/c"] * 3, doubled(tree))[:, 0]
        with model.route(["a/b/c"] * 3):
            y = base(x)
            assert model.cache.stats().tiers[-1].laid_out_bytes == 0
    assert launched == ["direct"] * 2
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_tables_of_all_sites_of_a_path_are_sent_as_one(
    launched: list[str], link: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    real = FactorTable.of_all

    def counted(sites: Any, device: torch.device) -> Any:
        sent.append(len(sites))
        return real(sites, device)

    monkeypatch.setattr(FactorTable, "of_all", staticmethod(counted))
    model = lt.attach(forest(), net())
    for _ in range(3):
        for path in ("a/b/c", "e"):
            model.activate(path, mode="unmerged")
    assert sent == [2, 2], "once for each path, for both sites"
