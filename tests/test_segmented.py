"""Routed sums by our own kernels, run by Triton's interpreter on the CPU, against float64 by hand.

The interpreter multiplies no bf16 and rounds to it by cutting off, so outputs here are fp32 and
fp16. What a GPU does is tested on one (`make test-gpu`).
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from interpreter import interpreted
from oracle import doubled, low_rank, net_by_hand, with_sum
from sampling import sampled, slow
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import lora_tree as lt
from lora_tree.engine.kernels import (
    FactorTable,
    RoutedKernels,
    Segments,
    Tiling,
    group_of,
    segment_numbers,
)
from lora_tree.errors import SpecError, StateError

pytest.importorskip("triton", reason="Triton has no build for this platform")

CPU = torch.device("cpu")
Factors = list[tuple[Tensor, Tensor, float]]


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        found = {}
        for name in ("shrink", "expand", "outer", "direct", "in_place"):
            found[name] = stack.enter_context(contextlib.contextmanager(interpreted)(name))
        yield found


def made(
    kinds: Sequence[Sequence[float]], of_row: Sequence[int], tokens: int, dtype: torch.dtype
) -> tuple[Segments, Tiling]:
    sizes, numbers = segment_numbers(kinds, of_row, group_of(tokens))
    return Segments(sizes, numbers), Tiling.of(sizes, tokens, dtype)


def factors_for(into: int, out: int, ranks: Sequence[int], dtype: torch.dtype) -> Factors:
    draw = torch.Generator().manual_seed(into + out)
    found = []
    for i, r in enumerate(ranks):
        A, B = torch.randn(r, into, generator=draw), torch.randn(out, r, generator=draw)
        found.append((A.to(dtype) * 0.3, B.to(dtype) * 0.3, (0.5, -1.25, 1.0)[i % 3]))
    return found


KINDS = [(1.0, 0.0, 0.0), (1.0, 0.5, 0.0), (0.0, 0.0, 0.0), (1.0, 0.0, -2.0)]
BATCHES = {
    "one token": ([3, 1, 0, 2, 1], 1, (70, 130), (4, 20, 1)),
    "more rows than a group": ([i % 4 for i in range(37)], 1, (33, 40), (4, 8, 2)),
    "few tokens": ([0, 1, 2, 3, 3, 1, 0], 5, (48, 140), (3, 3, 3)),
    "more tokens than a tile": ([2, 3, 1], 75, (40, 30), (16, 17, 2)),
    "wide": ([1, 0], 2, (2100, 20), (4, 4, 4)),
    "one input": ([1], 1, (700, 130), (4, 20, 1)),
    "one bare input": ([2], 1, (70, 40), (4, 20, 1)),
    "a span of outputs": ([i % 4 for i in range(17)], 16, (40, 700), (8, 16, 8)),
    "a span of one row": ([3], 1030, (40, 30), (8, 16, 8)),
    "more entries than a program takes": ([3, 1, 2], 20, (40, 30), (40, 8, 33)),
}
LARGE = ("wide", "a span of outputs", "a span of one row")


def cases() -> list[Any]:
    """Every batch with factors of every dtype; the large ones, which take the interpreter seconds,
    with factors of one.
    """
    found = []
    for name in BATCHES:
        dtypes = [torch.float32, torch.float16, torch.bfloat16]
        for factor in dtypes[:1] if name in LARGE else dtypes:
            marks = slow if name in LARGE or factor == torch.float16 else ()
            found.append(pytest.param(name, factor, id=f"{name}-{factor}", marks=marks))
    return found


@pytest.mark.parametrize(("name", "factor"), cases())
def test_the_kernels_are_the_sum_in_float64_and_their_plain_functions(
    modules: dict[str, Any], name: str, factor: torch.dtype
) -> None:
    of_row, tokens, (into, out), ranks = BATCHES[name]
    shrink, expand, outer = modules["shrink"], modules["expand"], modules["outer"]
    factors = factors_for(into, out, ranks, factor)
    table = FactorTable.of(factors, CPU)
    segments, tiling = made(KINDS, of_row, tokens, torch.float32)
    draw = torch.Generator().manual_seed(0)
    x, base, grad = (
        torch.randn(len(of_row) * tokens, width, generator=draw) for width in (into, out, out)
    )
    bare = [row for row, kind in enumerate(of_row) if kind == 2]
    for row in bare:
        mine = slice(row * tokens, (row + 1) * tokens)
        x[mine], base[mine] = float("inf"), -0.0
    wanted, to_x = base.double(), torch.zeros(x.shape, dtype=torch.float64)
    to_factors = [
        (torch.zeros_like(A).double(), torch.zeros_like(B).double()) for A, B, _ in factors
    ]
    for row, kind in enumerate(of_row):
        mine = slice(row * tokens, (row + 1) * tokens)
        for (A, B, scale), c, (to_A, to_B) in zip(factors, KINDS[kind], to_factors, strict=True):
            if c:
                delta = B.double() @ A.double() * (c * scale)
                wanted[mine] += x[mine].double() @ delta.mT
                to_x[mine] += grad[mine].double() @ delta
                whole = grad[mine].double().mT @ x[mine].double() * (c * scale)
                to_A += B.double().mT @ whole
                to_B += whole @ A.double().mT

    low = shrink.shrink(x, segments, table, 0, tiling)
    copied, in_place = torch.full_like(base, float("nan")), base.clone()
    expand.expand(low, base, copied, segments, table, 1, tiling)
    expand.expand(low, in_place, in_place, segments, table, 1, tiling)
    assert torch.equal(copied.view(torch.int32), in_place.view(torch.int32))
    for row in bare:
        mine = slice(row * tokens, (row + 1) * tokens)
        assert torch.equal(copied[mine].view(torch.int32), base[mine].view(torch.int32))
    torch.testing.assert_close(copied.double(), wanted, rtol=1e-5, atol=1e-4)
    by_hand = shrink.reference_shrink(x, segments, factors, 0, tiling)
    plain = expand.reference_expand(by_hand, base, segments, factors, 1, tiling, base.dtype)
    torch.testing.assert_close(copied, plain, rtol=1e-5, atol=1e-4)

    narrow, fresh = (
        shrink.shrink(grad, segments, table, 1, tiling),
        torch.full_like(x, float("nan")),
    )
    expand.expand(narrow, None, fresh, segments, table, 0, tiling)
    torch.testing.assert_close(fresh.double(), to_x, rtol=1e-5, atol=1e-4)
    plainly = shrink.reference_shrink(grad, segments, factors, 1, tiling)
    for side, (sums, plain_sums, wide) in enumerate(((narrow, plainly, x), (low, by_hand, grad))):
        found = outer.outer(sums, wide, segments, table, side, tiling)
        parts = found.split([each[side].numel() for each in factors])
        others = outer.reference_outer(plain_sums, wide, segments, factors, side, tiling)
        for part, other, exact in zip(parts, others, to_factors, strict=True):
            mine = exact[side]
            # what is stored is rounded to the factors' dtype
            close = dict(rtol=max(1e-4, torch.finfo(factor).eps * 2), atol=1e-3 * len(x) ** 0.5)
            torch.testing.assert_close(part.view(mine.shape).double(), mine, **close)
            torch.testing.assert_close(other.double(), mine, rtol=1e-4, atol=1e-3 * len(x) ** 0.5)


ONE_ROW = {
    "one input": (1, (700, 70), (4, 20, 1)),
    "a few inputs": (5, (48, 140), (3, 3, 3)),
    "sixteen inputs": (16, (300, 20), (16, 17, 2)),
    "more entries than a program takes": (2, (40, 100), (40, 8, 33, 64, 1, 9)),
}


@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ONE_ROW)
def test_one_launch_adds_what_a_row_of_few_inputs_owes(
    modules: dict[str, Any], name: str, factor: torch.dtype
) -> None:
    tokens, (into, out), ranks = ONE_ROW[name]
    factors = factors_for(into, out, ranks, factor)
    table = FactorTable.of(factors, CPU)
    kind = tuple([(1.0, 0.5, 0.0, -2.0)[i % 4] for i in range(len(ranks))])
    sizes, numbers = segment_numbers([kind], [0], 1)
    segments, tiling = Segments(sizes, numbers), Tiling.of(sizes, tokens, torch.float32)
    draw = torch.Generator().manual_seed(0)
    x, base = (torch.randn(tokens, width, generator=draw) for width in (into, out))
    wanted = base.double()
    for (A, B, scale), c in zip(factors, kind, strict=True):
        wanted += x.double() @ (B.double() @ A.double() * (c * scale)).mT
    direct = modules["direct"]
    assert direct.is_direct(segments, table, tiling)
    # What lies behind the last output is not written to.
    memory = torch.full((base.numel() + 64,), float("nan"))
    added = memory[: base.numel()].view_as(base).copy_(base)
    direct.bound_direct(x, added, segments, table, tiling)(table.to_shrink, x, added)
    torch.testing.assert_close(added.double(), wanted, rtol=1e-5, atol=1e-4)
    assert memory[base.numel() :].isnan().all()
    low = modules["shrink"].shrink(x, segments, table, 0, tiling)
    modules["expand"].expand(low, base, base, segments, table, 1, tiling)
    torch.testing.assert_close(added, base, rtol=1e-5, atol=1e-4)


def test_a_row_that_owes_nothing_keeps_its_bits_in_one_launch(modules: dict[str, Any]) -> None:
    factors = factors_for(40, 70, (4, 3), torch.float32)
    table = FactorTable.of(factors, CPU)
    sizes, numbers = segment_numbers([(0.0, 0.0)], [0], 1)
    segments, tiling = Segments(sizes, numbers), Tiling.of(sizes, 1, torch.float32)
    x, out = torch.full((1, 40), float("inf")), torch.full((1, 70), -0.0)
    modules["direct"].bound_direct(x, out, segments, table, tiling)(table.to_shrink, x, out)
    assert torch.equal(out.view(torch.int32), torch.full((1, 70), -0.0).view(torch.int32))


def test_many_rows_inputs_or_factors_are_not_added_in_one_launch(modules: dict[str, Any]) -> None:
    is_direct = modules["direct"].is_direct

    def asked(rows: int, tokens: int, rank: int, width: int) -> bool:
        factors = [(torch.zeros(rank, width), torch.zeros(8, rank), 1.0)]
        sizes, numbers = segment_numbers([(1.0,)], [0] * rows, group_of(tokens, rows))
        tiling = Tiling.of(sizes, tokens, torch.float32)
        return bool(is_direct(Segments(sizes, numbers), FactorTable.of(factors, CPU), tiling))

    assert asked(1, 1, 16, 4096)
    assert asked(1, 16, 16, 4096)
    assert not asked(1, 17, 16, 4096)
    assert not asked(2, 1, 16, 4096)
    assert not asked(1, 1, 128, 4096)


def test_lists_with_room_to_spare_give_the_same_bits(modules: dict[str, Any]) -> None:
    of_row = [3, 1, 0, 2, 1]
    factors = factors_for(70, 130, (4, 20, 1), torch.float32)
    table = FactorTable.of(factors, CPU)
    x, base = torch.randn(5, 70), torch.randn(5, 130)
    found = []
    for entries in (0, 40):
        sizes, numbers = segment_numbers(KINDS, of_row, 16, entries=entries)
        segments, tiling = Segments(sizes, numbers), Tiling.of(sizes, 1, torch.float32)
        low = modules["shrink"].shrink(x, segments, table, 0, tiling)
        out = base.clone()
        modules["expand"].expand(low, out, out, segments, table, 1, tiling)
        found.append([out, modules["outer"].outer(low, base, segments, table, 1, tiling)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_row_that_owes_nothing_is_in_no_entry_and_rows_that_share_nodes_are_neighbours() -> None:
    sizes, numbers = segment_numbers(KINDS, [3, 1, 2, 0, 1], 2)
    segments = Segments(sizes, numbers)
    assert segments.order.tolist() == [2, 3, 1, 4, 0]
    assert segments.owed.tolist() == [0, 1, 1, 1, 1]
    # A group's entries are filled up to four.
    assert segments.begins.tolist() == [0, 4, 8, 12]
    assert segments.nodes.tolist() == [0, -1, -1, -1, 0, 1, -1, -1, 0, 2, -1, -1]
    assert segments.owners.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    nothing = [0, 0]
    assert segments.coefficients.tolist() == [
        *([0, 1], nothing, nothing, nothing),
        *([1, 1], [0.5, 0.5], nothing, nothing),
        *([1, 0], [-2, 0], nothing, nothing),
    ]
    assert segments.by_node[:5].tolist() == [0, 4, 8, 5, 9]
    assert segments.node_begins.tolist() == [0, 3, 4, 5]
    assert sizes.largest == 4


def test_cleared_lists_owe_nothing_and_name_no_node() -> None:
    sizes, numbers = segment_numbers(KINDS, [3, 1, 2, 0, 1], 2)
    segments = Segments(sizes, numbers)
    segments.clear()
    assert set(segments.nodes.tolist()) == {-1}
    assert not segments.owed.any()
    assert not segments.coefficients.any()


# ---------------------------------------------------------------------- a whole model
class Everything:
    """A set of everything."""

    def __contains__(self, value: object) -> bool:
        return True


class Counted:
    """A launch that notes its name when it runs."""

    def __init__(self, launch: Any, name: str, names: list[str]) -> None:
        self.launch, self.name, self.names = launch, name, names

    def __call__(self, *args: Any) -> Any:
        self.names.append(self.name)
        return self.launch(*args)

    @property
    def low(self) -> Tensor:
        found: Tensor = self.launch.low
        return found


@pytest.fixture
def launched(modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Batches take the kernels, as they do on CUDA; the names of the launches."""
    names: list[str] = []

    def counted(name: str) -> Any:
        def launch(*args: Any) -> Any:
            names.append(name)
            return getattr(modules[name], name)(*args)

        return launch

    def counted_when_run(name: str) -> Any:
        bind = getattr(modules["in_place"], name)
        return lambda *args: Counted(bind(*args), name.removeprefix("bound_"), names)

    for name in ("bound_shrink", "bound_expand", "bound_direct"):
        monkeypatch.setattr(modules["in_place"], name, counted_when_run(name))
    # No launch for the sake of its compilation.
    monkeypatch.setattr(modules["in_place"], "_LOADED", Everything())
    kernels = RoutedKernels(
        *[counted(name) for name in ("shrink", "expand", "outer")],
        modules["in_place"].bound_in_place,
    )
    monkeypatch.setattr("lora_tree.engine.routing.segmented.routes", lambda device: True)
    monkeypatch.setattr("lora_tree.engine.routing.forms.routes", lambda device: True)
    monkeypatch.setattr("lora_tree.engine.routing.routed.routes", lambda device: True)
    monkeypatch.setattr("lora_tree.engine.prepared_segments.routes", lambda device: True)
    monkeypatch.setattr("lora_tree.engine.routing.path_form.routes", lambda device: True)
    monkeypatch.setattr("lora_tree.engine.unmerged.routes", lambda device: True)
    for module in ("routing.segmented", "prepared_segments"):
        monkeypatch.setattr(f"lora_tree.engine.{module}.routed_kernels", lambda: kernels)
    return names


PATHS = ("a", "a/b", "a/b/c", "a/d", "e")
ROWS: list[lt.Blend] = ["a/b/c", "", "a/d", {"a/b": 0.5, "a/d": 0.25, "e": -1.0}, "e", "a"]


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(20, 36), nn.Tanh(), nn.Linear(36, 20))
    return layers.to(dtype).requires_grad_(False)


def forest(factors: torch.dtype = torch.float32, *, bias: bool = False) -> lt.AdapterTree:
    tree = lt.AdapterTree()
    draw = torch.Generator().manual_seed(2)
    for i, path in enumerate(PATHS):
        values = {}
        for name, (out, into) in {"0": (36, 20), "2": (20, 36)}.items():
            A = torch.randn(2 + i, into, generator=draw) * 0.3
            B = torch.randn(out, 2 + i, generator=draw) * 0.3
            b = torch.randn(out, generator=draw) if bias else None
            values[name] = lt.LowRank(A.to(factors), B.to(factors), 0.5 + i, b)
        tree.add(path, adapter=lt.Adapter(values), weight=1.0 - 0.1 * i)
    return tree


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_every_row_of_a_batch_is_what_it_is_by_hand(
    launched: list[str], tokens: int, bias: bool
) -> None:
    base, tree = net(), forest(bias=bias)
    model = lt.attach(tree, base)
    x = torch.randn(len(ROWS), tokens, 20)
    with torch.no_grad():
        bare = base(x)
        wanted = net_by_hand(base, tree, x, ROWS, doubled(tree))
        with model.route(ROWS, batch_first=True):
            y = base(x)
    assert launched == ["shrink", "expand"] * 2, "two launches a site"
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(y[1].view(torch.int32), bare[1].view(torch.int32))


def test_sites_of_one_shape_share_the_launches_of_a_batch(
    launched: list[str], modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    make = modules["in_place"]._bind
    monkeypatch.setattr(
        modules["in_place"], "_bind", lambda *args: made.append(args) or make(*args)
    )
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Linear(20, 20) for _ in range(4)]).requires_grad_(False)
    tree, draw = lt.AdapterTree(), torch.Generator().manual_seed(1)
    for path in PATHS:
        values = {str(i): low_rank(20, 20, 4, seed=draw, scale=0.05) for i in range(4)}
        tree.add(path, adapter=lt.Adapter(values))
    x = torch.randn(len(ROWS), 2, 20)
    with torch.no_grad():
        wanted = []
        for blend, row in zip(ROWS, x, strict=True):
            wanted.append(with_sum(base, tree, blend)(row.double()))
        model = lt.attach(tree, base)
        for order in (range(len(ROWS)), [3, 0, 5, 1, 4, 2]):
            with model.route([ROWS[i] for i in order], batch_first=True):
                y = base(x[list(order)])
            exact = torch.stack([wanted[i] for i in order])
            torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    assert len(made) == 2, "one for each batch"
    assert launched == ["shrink", "expand"] * 8


@pytest.mark.parametrize("after", [torch.float64, torch.bfloat16], ids=str)
def test_a_base_that_is_cast_takes_the_forms_of_its_new_dtype(
    launched: list[str], after: torch.dtype
) -> None:
    x = torch.randn(len(ROWS), 2, 20).to(after)
    outputs = []
    for before in (torch.float32, after):
        base = net(torch.float32)
        model = lt.attach(forest(), base)
        with torch.no_grad():
            base.to(before)
            with model.route(ROWS, batch_first=True):
                base(x.to(before))
            base.to(after)
            with model.route(ROWS[::-1], batch_first=True):
                outputs.append(base(x))
    assert torch.equal(*outputs), "the same bits, whatever was routed before the cast"


def nothing(*args: Any) -> Any:
    return torch.empty(0)


def idle_in_place(*args: Any) -> Any:
    return lambda x, out, table: None


IDLE = RoutedKernels(nothing, nothing, nothing, idle_in_place)
"""Launches that write nothing."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what would be a launch on a device: all operations but views and allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in str(func) and "_unsafe_view" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["a/b/c", {"a/b": 0.5, "e": 0.25}], ids=["path", "blend"])
def test_an_unmerged_path_adds_two_operations_a_site(path: lt.Blend) -> None:
    base = net()
    model = lt.attach(forest(), base)
    x = torch.randn(3, 2, 20)
    with torch.no_grad():
        base(x)
        with Operations() as bare:
            base(x)
        model.activate(path, mode="unmerged")
        base(x)
        with Operations() as side_hooks:
            base(x)
    assert len(side_hooks.names) - len(bare.names) == 2 * 2, side_hooks.names


def test_a_batch_adds_no_operation_beside_its_launches(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter runs a kernel as operations, so these launches write nothing.
    monkeypatch.setattr("lora_tree.engine.routing.segmented.routed_kernels", lambda: IDLE)
    base = net()
    model = lt.attach(forest(), base)
    x = torch.randn(len(ROWS), 2, 20)
    with torch.no_grad():
        with Operations() as bare:
            base(x)
        with model.route(ROWS, batch_first=True):
            base(x)
            with Operations() as routed:
                base(x)
    assert routed.names == bare.names


def test_the_order_of_rows_does_not_change_a_bit(launched: list[str]) -> None:
    base = net()
    model = lt.attach(forest(), base)
    x = torch.randn(len(ROWS), 2, 20)
    with torch.no_grad():
        with model.route(ROWS, batch_first=True):
            y = base(x)
        order = random.Random(0).sample(range(len(ROWS)), len(ROWS))
        with model.route([ROWS[i] for i in order], batch_first=True):
            z = base(x[order])
    assert torch.equal(z, y[order])


@pytest.mark.parametrize("trained", [("a/b",), ("a/b/c", "a/d", "e"), PATHS], ids=len)
def test_gradients_are_those_of_float64(launched: list[str], trained: tuple[str, ...]) -> None:
    base, tree = net(), forest()
    model = lt.attach(tree, base).train()
    model.trainable(*trained)
    x = torch.randn(len(ROWS), 3, 20)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    exact = doubled(tree)
    net_by_hand(base, tree, other, ROWS, exact).sin().sum().backward()
    with model.route(ROWS, batch_first=True):
        base(leaf).sin().sum().backward()
    assert "outer" in launched
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)
    for node in PATHS:
        adapter = tree.adapter(node)
        assert adapter is not None
        for name, value in adapter.modules.items():
            for side, factor in (("A", value.A), ("B", value.B)):
                if node not in trained:
                    assert factor.grad is None
                    continue
                wanted = exact[node, name, side].grad
                assert factor.grad is not None
                assert wanted is not None
                torch.testing.assert_close(factor.grad.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_forward_of_frozen_nodes_hands_the_inputs_gradient_on(launched: list[str]) -> None:
    base, tree = net(), forest()
    model = lt.attach(tree, base)
    x = torch.randn(len(ROWS), 20)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    net_by_hand(base, tree, other[:, None], ROWS, doubled(tree)).sum().backward()
    with model.route(ROWS, batch_first=True):
        base(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert launched.count("outer") == 0


def test_under_autocast_the_output_is_as_narrow_as_the_bases(launched: list[str]) -> None:
    base, tree = net(), forest()
    model = lt.attach(tree, base)
    x = torch.randn(len(ROWS), 2, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        expected = net_by_hand(base, tree, x, ROWS, doubled(tree))
        with model.route(ROWS, batch_first=True):
            y = base(x)
    assert y.dtype == torch.float16
    assert launched
    torch.testing.assert_close(y.double(), expected.double(), rtol=2e-2, atol=2e-2)


def test_factors_that_an_optimiser_moves_are_read_where_they_are(launched: list[str]) -> None:
    base, tree = net(), forest()
    model = lt.attach(tree, base).train()
    groups = model.trainable("a/b", "a/d")
    rows: list[lt.Blend] = ["a/b", "a/d", "a/b"]
    x = torch.randn(3, 20)
    with model.route(rows, batch_first=True):
        base(x)
        with torch.no_grad():
            for p in (p for group in groups for p in group["params"]):
                p.data = p.detach() * 2.0  # other memory, as after a move
        y = base(x)
    wanted = net_by_hand(base, tree, x[:, None], rows, doubled(tree))[:, 0]
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)


def test_another_batch_over_known_nodes_sends_nothing_but_its_lists(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = net()
    model = lt.attach(forest(), base)
    x = torch.randn(4, 20)
    rows = ["a/b/c", "a/d", "e", "a"]
    with torch.no_grad(), model.route(rows, batch_first=True):
        base(x)
    sent: list[Tensor] = []

    def uploaded(numbers: Tensor, device: torch.device) -> Tensor:
        sent.append(numbers)
        return numbers.to(device)

    for module in ("rows.batch", "kernels.factor_table", "routing.owed", "routing.at_once"):
        monkeypatch.setattr(f"lora_tree.engine.{module}.uploaded", uploaded)
    with torch.no_grad(), model.route(rows[::-1], batch_first=True):
        base(x)
    assert len(sent) == 1, "one copy, for all sites"


def _steps_of_another_batch(sites: int, leaves: int) -> int:
    """Return the bytecode instructions of the package that a new batch of four rows takes."""
    base = nn.Sequential(*[nn.Linear(8, 8) for _ in range(sites)]).requires_grad_(False)
    tree = lt.AdapterTree()
    paths = [f"n{i:02}" for i in range(leaves)]
    for path in paths:
        values = {str(i): lt.LowRank(torch.randn(2, 8), torch.randn(8, 2)) for i in range(sites)}
        tree.add(path, adapter=lt.Adapter(values))
    model = lt.attach(tree, base)
    x = torch.randn(leaves, 8)

    def run(rows: Sequence[lt.Blend]) -> None:
        with torch.no_grad(), model.route(rows, batch_first=True):
            base(x)

    run(paths)
    run([*paths[1:], paths[0]])
    steps = 0

    def step(frame: Any, event: str, argument: object) -> Any:
        nonlocal steps
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        steps += event == "opcode"
        return step

    def enter(frame: Any, event: str, argument: object) -> Any:
        if "/lora_tree/" not in frame.f_code.co_filename:
            return None
        return step(frame, event, argument)

    traced = sys.gettrace()
    # A collection within the batch would run finalizers of earlier models, which are ours too.
    gc.disable()
    sys.settrace(enter)
    try:
        run(paths[::-1])
    finally:
        sys.settrace(traced)
        gc.enable()
    return steps


def test_another_batch_takes_no_step_for_each_node_of_each_site(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_tree.engine.routing.segmented.routed_kernels", lambda: IDLE)
    by_sites = {}
    for leaves in (6, 24):
        steps = [_steps_of_another_batch(sites, leaves) for sites in (2, 10)]
        by_sites[leaves] = (steps[1] - steps[0]) // 8
    assert by_sites[24] == by_sites[6]
    # Bytecode instructions: a route finds what its plan has decided, and sites share launches.
    assert by_sites[6] <= 1100


def test_what_the_kernels_do_not_cover_takes_the_forms_of_stock_operations(
    launched: list[str],
) -> None:
    base = net().double()
    tree = forest(torch.float64)
    model = lt.attach(tree, base)
    x = torch.randn(len(ROWS), 2, 20, dtype=torch.float64)
    with torch.no_grad(), model.route(ROWS, batch_first=True):
        y = base(x)
    assert launched == []
    torch.testing.assert_close(y, net_by_hand(base, tree, x, ROWS, doubled(tree)))


# ---------------------------------------------------------------------- compiled
@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BATCHES_OF_SIX: list[list[lt.Blend]] = [
    ROWS,
    ["e", "e", "a/b/c", "", "a/d", "a/b"],
    ["a/b/c"] * 6,
]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("tokens", sampled([1, 20], [1]))
def test_a_prepared_base_needs_no_rank_and_is_traced_once_for_all_batches(
    launched: list[str], tokens: int
) -> None:
    base, tree = net(), forest()
    model = lt.attach(tree, base)
    model.prepare()
    counter = CompileCounter()
    compiled: Any = torch.compile(base, backend=counter)
    x = torch.randn(6, tokens, 20)
    exact = doubled(tree)
    frames: dict[str, set[int]] = {}
    with torch.no_grad():
        bare = compiled(x)
        for rows in BATCHES_OF_SIX:
            del launched[:]
            with model.route(rows, batch_first=True):
                y = compiled(x)
            frames.setdefault("batch", set()).add(counter.frame_count)
            assert launched == ["shrink", "expand"] * 2
            torch.testing.assert_close(
                y.double(), net_by_hand(base, tree, x, rows, exact), rtol=1e-5, atol=1e-5
            )
            for row, blend in enumerate(rows):
                assert blend or torch.equal(y[row].view(torch.int32), bare[row].view(torch.int32))
        for path in ("a/b/c", "e", "a/d"):
            with model.using(path, mode="unmerged"):
                y = compiled(x)
            frames.setdefault("path", set()).add(counter.frame_count)
            torch.testing.assert_close(
                y.double(), net_by_hand(base, tree, x, [path] * 6, exact), rtol=1e-5, atol=1e-5
            )
        assert torch.equal(compiled(x), bare)
    assert all(len(counts) == 1 for counts in frames.values()), frames


@slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_batch_hands_the_inputs_gradient_on(launched: list[str]) -> None:
    base, tree = net(), forest()
    model = lt.attach(tree, base)
    model.prepare()
    compiled: Any = torch.compile(base, backend="aot_eager")
    x = torch.randn(6, 3, 20)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    net_by_hand(base, tree, other, ROWS, doubled(tree)).square().sum().backward()
    with model.route(ROWS, batch_first=True):
        compiled(leaf).square().sum().backward()
        late = compiled(leaf).square().sum()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_a_switch_rewrites_the_buffers_in_place_and_nothing_stays_in_them(
    launched: list[str],
) -> None:
    base, tree = net(), forest()
    model = lt.attach(tree, base)
    model.prepare()
    x = torch.randn(6, 20)
    with torch.no_grad():
        bare = base(x)
        segments: Any = model._stage.side_hooks._segments[0]  # type: ignore[attr-defined]

        def places() -> list[int]:
            lists = [each.memory.data_ptr() for each in segments._lists[6]]
            return [*lists, segments._addresses.data_ptr(), segments._scales.data_ptr()]

        with model.route(ROWS, batch_first=True):
            y = base(x)
            before = places()
            site = segments.sites["0"]
            captured = site.run(bare.new_zeros(6, 36), x, 6, torch.float32)
            assert captured.any()
        with model.route(BATCHES_OF_SIX[1], batch_first=True):
            assert not torch.equal(base(x), y)
            assert places() == before
        # as a graph does that was captured above, and is replayed while nothing is active
        assert not site.run(bare.new_zeros(6, 36), x, 6, torch.float32).any()


def test_a_batch_that_owes_more_than_any_before_gets_new_lists_and_says_so(
    launched: list[str],
) -> None:
    base, tree = net(), forest()
    for i in range(4):
        adapter = tree.adapter("e")
        assert adapter is not None
        tree.add(f"m{i}", adapter=adapter)
    model = lt.attach(tree, base)
    model.prepare()
    every = dict.fromkeys(tree.paths(), 0.1)
    rows: list[lt.Blend] = [every, "e"]
    x = torch.randn(2, 20)
    exact = doubled(tree)
    with torch.no_grad():
        with model.route(["a", "e"], batch_first=True):
            base(x)
        with (
            pytest.warns(RuntimeWarning, match="capture it again"),
            model.route(rows, batch_first=True),
        ):
            y = base(x)
    wanted = net_by_hand(base, tree, x[:, None], rows, exact)[:, 0]
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)


def test_without_kernels_prepare_asks_for_a_rank_and_changes_nothing() -> None:
    base = net()
    model = lt.attach(forest(), base)
    with pytest.raises(SpecError, match="0: prepare needs max_rank"):
        model.prepare()
    assert not any(module._forward_hooks for module in base.modules())
    model.prepare(max_rank=40)


def test_factors_of_another_kind_than_was_prepared_for_are_refused(launched: list[str]) -> None:
    base, tree = net(), forest()
    model = lt.attach(tree, base)
    model.prepare()
    adapter = tree.adapter("e")
    assert adapter is not None
    tree.update("e", adapter=adapter.to(dtype=torch.float16))
    with pytest.raises(StateError, match=r"e: 0: its factors are torch\.float16"):
        model.activate("e", mode="unmerged")
    assert model.active == ""
    model.activate("a", mode="unmerged")
