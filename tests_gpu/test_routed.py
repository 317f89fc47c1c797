"""Batches of several paths by our kernels on CUDA: against float64, compiled, in a graph."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from oracle import doubled, net_by_hand, no_waiting
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.engine.kernels import logs, routes

CUDA = torch.device("cuda", 0)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RANKS = {"a": 8, "a/b": 3, "a/b/c": 16, "a/d": 40, "e": 1}
ROWS: list[lt.Blend] = ["a/b/c", "", "a/d", {"a/b": 0.5, "a/d": 0.25, "e": -1.0}, "e", "a"]
CLOSE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]


def net(dtype: torch.dtype, into: int = 200, inner: int = 328) -> nn.Sequential:
    """Return two linear layers whose sizes are no multiples of a tile."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(into, inner), nn.Tanh(), nn.Linear(inner, into))
    return layers.to(CUDA, dtype).requires_grad_(False)


def forest(base: nn.Sequential, factors: torch.dtype) -> lt.AdapterTree:
    tree = lt.AdapterTree()
    draw = torch.Generator().manual_seed(2)
    for path, r in RANKS.items():
        values = {}
        for name in ("0", "2"):
            linear: Any = base.get_submodule(name)
            A = torch.randn(r, linear.in_features, generator=draw) * 0.1
            B = torch.randn(linear.out_features, r, generator=draw) * 0.1
            values[name] = lt.LowRank(A.to(CUDA, factors), B.to(CUDA, factors), 0.5)
        tree.add(path, adapter=lt.Adapter(values), weight=0.9)
    return tree


def test_the_kernels_run_here() -> None:
    assert routes(CUDA)


@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("factors", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_is_what_it_is_by_hand_and_bare_rows_keep_their_bits(
    dtype: torch.dtype, factors: torch.dtype, tokens: int
) -> None:
    base = net(dtype)
    tree = forest(base, factors)
    model = lt.attach(tree, base)
    x = torch.randn(len(ROWS), tokens, 200, device=CUDA, dtype=dtype)
    with torch.no_grad():
        bare = base(x)
        with model.route(ROWS, batch_first=True):
            y = base(x)
        close = CLOSE[max(dtype, factors, key=lambda each: CLOSE[each])]
        wanted = net_by_hand(base, tree, x, ROWS, doubled(tree))
    torch.testing.assert_close(y.double(), wanted, rtol=close, atol=close)
    assert torch.equal(y[1], bare[1])
    order = random.Random(0).sample(range(len(ROWS)), len(ROWS))
    with torch.no_grad(), model.route([ROWS[i] for i in order], batch_first=True):
        assert torch.equal(base(x[order]), y[order])


@pytest.mark.parametrize("inputs", [1, 7, 16, 17])
@pytest.mark.parametrize("factors", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_path_of_few_inputs_is_what_it_is_by_hand_and_so_is_it_in_a_graph(
    dtype: torch.dtype, factors: torch.dtype, inputs: int
) -> None:
    base = net(dtype)
    tree = forest(base, factors)
    model = lt.attach(tree, base)
    x = torch.randn(inputs, 200, device=CUDA, dtype=dtype)
    close = CLOSE[max(dtype, factors, key=lambda each: CLOSE[each])]
    exact = doubled(tree)
    for path in ("a/b/c", "e", "a/d"):
        model.activate(path, mode="unmerged")
        with torch.no_grad():
            y = base(x)
            wanted = net_by_hand(base, tree, x[None], [path], exact)[0]
            torch.testing.assert_close(y.double(), wanted, rtol=close, atol=close)
            assert torch.equal(base(x), y)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = base(x)
            graph.replay()
            torch.testing.assert_close(captured.double(), wanted, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_gradients_are_those_of_float64(dtype: torch.dtype, autocast: bool) -> None:
    if autocast and dtype != torch.float32:
        pytest.skip("autocast is for fp32 bases")
    base = net(dtype)
    tree = forest(base, torch.float32)
    model = lt.attach(tree, base).train()
    model.trainable("a/b/c", "a/d", "e")
    x = torch.randn(len(ROWS), 5, 200, device=CUDA, dtype=dtype)
    leaf = x.clone().requires_grad_()
    other = x.double().requires_grad_()
    exact = doubled(tree)
    net_by_hand(base, tree, other, ROWS, exact).sin().sum().backward()
    close = CLOSE[torch.bfloat16 if autocast else dtype]
    with (
        model.route(ROWS, batch_first=True),
        torch.autocast("cuda", torch.bfloat16, enabled=autocast),
    ):
        y = base(leaf)
    y.double().sin().sum().backward()
    assert leaf.grad is not None
    assert other.grad is not None
    pairs = [(leaf.grad, other.grad)]
    for node in ("a/b/c", "a/d", "e"):
        adapter = tree.adapter(node)
        assert adapter is not None
        for name, value in adapter.modules.items():
            for side, factor in (("A", value.A), ("B", value.B)):
                assert factor.grad is not None
                wanted = exact[node, name, side].grad
                assert wanted is not None
                pairs.append((factor.grad, wanted))
    for got, wanted in pairs:
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < 2 * close, float(error)


def test_another_batch_waits_for_nothing_and_a_training_step_neither() -> None:
    base = net(torch.bfloat16)
    model = lt.attach(forest(base, torch.bfloat16), base).train()
    groups = model.trainable("a/b/c", "a/d")
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    x = torch.randn(4, 3, 200, device=CUDA, dtype=torch.bfloat16)

    def step(rows: list[lt.Blend]) -> None:
        with model.route(rows, batch_first=True):
            base(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(["a/b/c", "a/d", "a/b/c", "a/d"])
    with no_waiting():
        step(["a/d", "a/b/c", "a/b/c", "a/d"])


def test_a_prepared_base_needs_no_rank_compiled_or_captured() -> None:
    base = net(torch.float32)
    tree = forest(base, torch.float32)
    model = lt.attach(tree, base)
    model.prepare()
    exact = doubled(tree)
    x = torch.randn(len(ROWS), 3, 200, device=CUDA)
    others: list[list[lt.Blend]] = [
        ["e", "e", "a/b/c", "", "a/d", "a/b"],
        ["a/b/c"] * 5 + [""],
    ]
    with torch.no_grad():
        bare = base(x)
        compiled: Any = torch.compile(base)
        for rows in (ROWS, *others):
            with model.route(rows, batch_first=True):
                y = compiled(x)
            wanted = net_by_hand(base, tree, x, rows, exact)
            torch.testing.assert_close(y.double(), wanted, rtol=1e-3, atol=1e-3)
        with model.route(ROWS, batch_first=True):
            base(x)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                base(x)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = base(x)
        for rows in (ROWS, *others):
            with model.route(rows, batch_first=True):
                graph.replay()
                torch.cuda.synchronize()
            wanted = net_by_hand(base, tree, x, rows, exact)
            torch.testing.assert_close(out.double(), wanted, rtol=1e-3, atol=1e-3)
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(out, bare)


@pytest.mark.parametrize("factors", DTYPES[::2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(200, 328), (256, 320), (65, 129)], ids=str)
def test_an_undo_log_brings_the_bases_bits_back_after_any_history(
    sizes: tuple[int, int], dtype: torch.dtype, factors: torch.dtype
) -> None:
    base = net(dtype, *sizes)
    tree = forest(base, factors)
    bare = {name: value.clone() for name, value in base.state_dict().items()}
    fresh: dict[str, dict[str, Tensor]] = {"": bare}
    for path in RANKS:
        # Copies and logs give the same bits, though the tiles of their kernels differ.
        model = lt.attach(tree, base, pristine="device")
        model.activate(path)
        fresh[path] = {name: value.clone() for name, value in base.state_dict().items()}
        model.detach()
    model = lt.attach(tree, base, pristine="log")
    rng = random.Random(0)
    for _ in range(50):
        path = rng.choice(list(fresh))
        model.activate(path)
        for name, value in base.state_dict().items():
            assert torch.equal(value, fresh[path][name]), (path, name)
    assert logs(CUDA), "the kernel wrote them"
    model.detach()
    assert all(torch.equal(value, bare[name]) for name, value in base.state_dict().items())
