"""A prepared model under torch.compile: exact, and traced no more however often the paths
change.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from architectures import ARCHS, BLEND, along, assert_close, dense, run
from sampling import sampled
from test_route import ROWS as KIND_ROWS
from test_route import _inputs, tree_for
from test_route_architectures import ROWS, batch_of, rows_by_hand, without_shared
from test_sites import KINDS, Base
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lora_tree as lt
from lora_tree.errors import BaseMismatch, MergedOnly, SpecError, StateError
from lora_tree.lowrank import PARAMETER


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def blind_to_hooks() -> None:
    """torch's own default: a trace does not ask for hooks."""
    config: Any = torch._dynamo.config
    config._config["skip_nnmodule_hook_guards"].default = True
    config.skip_nnmodule_hook_guards = True


def small(*, nodes: int = 4) -> tuple[nn.Module, lt.AdapterTree]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    tree = lt.AdapterTree()
    shapes = {"0": (16, 8), "2": (8, 16)}
    for i in range(nodes):
        path = f"n{i}" if i % 2 == 0 else f"n{i - 1}/n{i}"
        names = list(shapes) if i % 3 else ["0"]
        factors = {
            n: (torch.randn(2 + i % 2, shapes[n][1]), torch.randn(shapes[n][0], 2 + i % 2))
            for n in names
        }
        modules = {n: lt.LowRank(A.double(), B.double(), 0.3) for n, (A, B) in factors.items()}
        tree.add(path, adapter=lt.Adapter(modules), weight=0.5 + i)
    return base, tree


@pytest.mark.parametrize("name", sampled(["llama", "gpt2", "t5", "vit"], ["llama"]))
def test_compiled_every_path_and_every_row_is_the_dense_model(name: str) -> None:
    arch = ARCHS[name]
    base = arch.base()
    tree = without_shared(name, arch.tree(base))
    inputs = batch_of(arch, len(ROWS))
    bare, rows = run(base, inputs), rows_by_hand(base, tree, inputs, ROWS)
    alone = {path: run(dense(base, tree, along(path)), inputs) for path in ("a/b/c", "a/d")}
    model = lt.attach(tree, base)
    model.prepare(max_rank=64)
    compiled: Any = torch.compile(base, backend="eager")
    assert torch.equal(run(compiled, inputs), bare)
    for path, wanted in alone.items():
        with model.using(path, mode="unmerged"):
            assert_close(run(compiled, inputs), wanted)
            with model.route(ROWS, batch_first=True):
                got = run(compiled, inputs)
                assert_close(got, rows)
                assert torch.equal(got[1], bare[1])
            assert_close(run(compiled, inputs), wanted)
    with model.using("a/b/c"):
        assert_close(run(compiled, inputs), alone["a/b/c"])
    assert torch.equal(run(compiled, inputs), bare)
    model.detach()
    assert not any(m._forward_hooks for m in base.modules())


def test_another_path_is_never_compiled_again() -> None:
    base, tree = small(nodes=8)
    x = torch.randn(4, 3, 8).double()
    model = lt.attach(tree, base)
    model.prepare(max_rank=40)
    counter = CompileCounter()
    compiled = torch.compile(base, backend=counter)
    paths = tree.paths()
    with torch.no_grad():
        compiled(x)
        with model.using(paths[0], mode="unmerged"):
            compiled(x)
        with model.route([paths[1], paths[2], "", paths[0]]):
            compiled(x)
        before = counter.frame_count
        assert before == 3, "bare, a path, and a batch"
        for i in range(12):
            blend: lt.Blend = (
                paths[i % 8] if i % 3 else {paths[i % 8]: 0.5, paths[(i + 1) % 8]: -1.0}
            )
            rows = [paths[(i + j) % 8] for j in range(3)] + ["" if i % 2 else paths[i % 8]]
            with model.using(blend, mode="unmerged"):
                assert not torch.equal(compiled(x), base.forward(x) * 0)
            with model.route(rows):
                got = compiled(x)
            for row, path in enumerate(rows):
                with model.using(path, mode="unmerged"):
                    torch.testing.assert_close(
                        got[row], base(x[row : row + 1])[0], rtol=1e-12, atol=1e-12
                    )
            model.activate(paths[i % 8])
            compiled(x)
            model.deactivate()
            compiled(x)
    assert counter.frame_count == before


@pytest.mark.parametrize(
    "name", [n for n, k in KINDS.items() if k.layout != PARAMETER and k.is_linear]
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_every_kind_of_site_prepared_is_what_it_is_without(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    kind = KINDS[name]
    base = Base(kind.make()).double()
    tree, x = tree_for(kind, torch.float64, bias=bias), _inputs(kind, torch.float64)
    wanted: dict[str, Tensor] = {}
    for prepared in (False, True):
        model = lt.attach(tree, base)
        if prepared:
            model.prepare(max_rank=20)
        for blend in ("a/b/c", "a/d", "a/b:0.5+e:2"):
            with model.using(blend, mode="unmerged"):
                got = base(x).detach()
            torch.testing.assert_close(got, wanted.setdefault(blend, got), rtol=1e-12, atol=1e-12)
        with model.route(KIND_ROWS):
            got = base(x).detach()
        torch.testing.assert_close(got, wanted.setdefault("rows", got), rtol=1e-12, atol=1e-12)
        model.detach()


def test_gradients_reach_the_input_through_a_compiled_batch() -> None:
    base, tree = small()
    x = torch.randn(3, 5, 8).double()
    found = []
    for prepared in (False, True):
        model = lt.attach(tree, base)
        call: Any = base
        if prepared:
            model.prepare(max_rank=20)
            call = torch.compile(base, backend="aot_eager")
        leaf = x.clone().requires_grad_()
        with model.route(["n0/n1", "", "n2"]):
            call(leaf).square().sum().backward()
        found.append(leaf.grad)
        model.detach()
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_what_was_not_prepared_for_is_refused_and_changes_nothing() -> None:
    base, tree = small()
    model = lt.attach(tree, base)
    model.prepare(max_rank=5)
    x = torch.randn(2, 3, 8).double()
    with model.using("n0/n1", mode="unmerged"):
        wanted = base(x)
        message = "0: n0, n0/n1, n2 have rank 7 together, and the model was prepared for at most 5"
        with pytest.raises(StateError, match=message), model.route(["n0/n1", "n2"]):
            pass
        assert torch.equal(base(x), wanted)
        message = "a prepared model chooses by itself how it adds up, got strategy 'paths'"
        with pytest.raises(SpecError, match=message), model.route(["n0", ""], strategy="paths"):
            pass
        tree.add(
            "late",
            adapter=lt.Adapter(
                {"0": lt.LowRank(torch.ones(2, 8).double(), torch.ones(16, 2).double())}
            ),
        )
        model.activate("late", mode="unmerged")  # a site that was prepared takes later nodes too
        model.activate("n0/n1", mode="unmerged")
        assert torch.equal(base(x), wanted)
    with (
        model.route(["n0", ""], batch_first=True),
        pytest.raises(BaseMismatch, match=r"0: its input is \(3, 2, 8\)"),
    ):
        base(x.transpose(0, 1))
    with (
        model.route(["n0", ""]),
        pytest.raises(BaseMismatch, match=r"0: its input is \(2, 2, 8\)[\s\S]*batch_first=True"),
    ):
        base(torch.randn(2, 2, 8).double())
    model.trainable("n0")
    with pytest.raises(StateError, match="n0: trains, which a prepared model can't do"):
        model.activate("n0", mode="unmerged")
    assert model.state is lt.State.BARE


def test_a_site_that_came_later_is_refused_by_name() -> None:
    base, tree = small(nodes=1)  # n0 changes site 0 alone
    model = lt.attach(tree, base)
    model.prepare(max_rank=4)
    value = lt.LowRank(torch.ones(2, 16).double(), torch.ones(8, 2).double())
    tree.add("n0/late", adapter=lt.Adapter({"2": value}))
    with pytest.raises(StateError, match="n0/late: 2: not prepared"):
        model.activate("n0/late", mode="unmerged")


@pytest.mark.usefixtures("blind_to_hooks")
@pytest.mark.parametrize("when", ["before prepare", "after prepare", "on another thread"])
def test_what_was_compiled_for_another_base_does_not_run_for_a_prepared_one(when: str) -> None:
    x = torch.randn(2, 3, 8).double()
    other, _ = small()
    base, tree = small()
    with torch.no_grad():
        if when == "before prepare":
            torch.compile(other, backend="eager")(x)
        model = lt.attach(tree, base)
        model.prepare(max_rank=40)
        if when == "after prepare":
            torch.compile(other, backend="eager")(x)
        if when == "on another thread":
            elsewhere = torch.no_grad()(torch.compile(other, backend="eager"))
            ThreadPoolExecutor(1).submit(elsewhere, x).result()
        compiled: Any = torch.compile(base, backend="eager")
        with model.using("n0/n1", mode="unmerged"):
            beside = compiled(x)
        with model.route(["", "n0/n1"]):
            routed = compiled(x)
        bare = other(x)
        assert torch.equal(compiled(x), bare)
        assert torch.equal(torch.compile(other, backend="eager")(x), bare)
        model.activate("n0/n1")
        wanted = base(x)
    torch.testing.assert_close(beside, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(routed[1], wanted[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(routed[0], bare[0])


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.usefixtures("blind_to_hooks")
def test_a_base_compiled_beside_its_weights_is_not_run_as_another_one_was() -> None:
    x = torch.randn(2, 3, 8).double()
    other, _ = small()
    base, tree = small()
    with torch.no_grad():
        torch.compile(other, backend="eager")(x)
        model = lt.attach(tree, base)
        model.activate("n0", mode="unmerged")
        wanted = base(x)
        assert torch.equal(torch.compile(base, backend="eager")(x), wanted)


@pytest.mark.usefixtures("blind_to_hooks")
@pytest.mark.parametrize("first", ["this base", "another base"])
def test_a_compiled_base_is_refused_after_compiled_code_was_dropped(first: str) -> None:
    x = torch.randn(2, 3, 8).double()
    other, _ = small()
    base, tree = small()
    model = lt.attach(tree, base)
    compiled = torch.compile(base, backend="eager")
    with torch.no_grad():
        compiled(x)
        if first == "another base":
            # Its guard on hooks drops all that was compiled, and torch counts from 0 again.
            lt.attach(tree, other).activate("n0", mode="unmerged")
        with pytest.raises(StateError, match="compiled"):
            model.activate("n0", mode="unmerged")


def test_prepare_comes_once_before_anything_is_active_and_before_compiling() -> None:
    base, tree = small()
    model = lt.attach(tree, base)
    for wrong in (0, 1.5, True):
        with pytest.raises(SpecError, match="max_rank must be a whole number from 1"):
            model.prepare(max_rank=wrong)  # type: ignore[arg-type]
    model.activate("n0")
    with pytest.raises(StateError, match="needs a bare model"):
        model.prepare(max_rank=4)
    model.deactivate()
    model.prepare(max_rank=4)
    with pytest.raises(StateError, match="not prepared yet"):
        model.prepare(max_rank=4)


def test_a_base_that_was_compiled_bare_is_refused_beside_its_weights_and_switched_merged() -> None:
    """What torch.compile wraps around a base after attach is seen too: its trace would ignore our
    hooks in silence.
    """
    base, tree = small()
    x = torch.randn(2, 3, 8).double()
    model = lt.attach(tree, base)
    with model.using("n0", mode="unmerged"):
        pass
    compiled: Any = torch.compile(base, backend="eager")
    with torch.no_grad():
        compiled(x)
    for attempt in range(2):
        with pytest.raises(StateError, match="compiled forward ignores hooks"):
            model.activate("n0", mode="unmerged")
        with (
            pytest.raises(StateError, match="compiled forward ignores hooks"),
            model.route(["n0", ""]),
        ):
            pass
        with pytest.raises(StateError, match="compiled forward ignores hooks"):
            model.prepare(max_rank=4 + attempt)
    model.activate("n0/n1")
    with torch.no_grad():
        assert torch.equal(compiled(x), base(x))
    model.deactivate()
    del compiled
    model.activate("n0", mode="unmerged")


def test_fused_experts_are_left_to_merging() -> None:
    arch = ARCHS["mixtral, experts"]
    base = arch.base()
    model = lt.attach(arch.tree(base), base)
    model.prepare(max_rank=8)
    with pytest.raises(MergedOnly, match="down_proj: can't run in a prepared model"):
        model.activate("a", mode="unmerged")
    with model.using(BLEND):
        assert model.state is lt.State.MERGED
