"""The laws of switching: a value is a function of the path, bare means bare, and a failure leaves
what was there.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import low_rank
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.engine import answers
from lora_tree.engine.switching import merged as merged_engine
from lora_tree.errors import PathError, SpecError, StateError, TreeError


class Net(nn.Module):
    """Five linear sites, one embedding, one untouched layer, one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 24)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.head = nn.Linear(24, 7, bias=False)
        self.norm = nn.LayerNorm(24)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = self.norm(x + torch.tanh(layer(x)))
        out: Tensor = self.head(x)
        return out


SITES = {"embed": (24, 13), **{f"layers.{i}": (24, 24) for i in range(4)}, "head": (7, 24)}
PATHS = ["a", "a/b", "a/b/c", "a/b/d", "a/e", "f", "f/g", "f/g/h", "f/i", "j"]


def adapter(rng: random.Random, *, sites: list[str] | None = None) -> lt.Adapter:
    draw = torch.Generator().manual_seed(rng.randrange(2**31))
    modules = {}
    for name in sites or rng.sample(sorted(SITES), rng.randint(1, len(SITES))):
        r, scale = rng.choice([1, 2, 4, 7]), rng.choice([0.5, 2.0, 0.3, -1.7])
        layout = lt.Layout("embedding" if name == "embed" else "linear")
        modules[name] = low_rank(*SITES[name], r, seed=draw, scale=scale, layout=layout)
    return lt.Adapter(modules)


def forest(seed: int = 0) -> lt.AdapterTree:
    rng = random.Random(seed)
    tree = lt.AdapterTree()
    for path in PATHS:
        tree.add(path, adapter=adapter(rng), weight=rng.choice([1.0, 0.8, -0.5]))
    return tree


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def picture(module: nn.Module) -> dict[str, Any]:
    """Everything about a module that "bare" speaks of."""
    hooks = {
        f"{name}.{kind}": list(getattr(m, kind))
        for name, m in module.named_modules()
        for kind in vars(m)
        if "hook" in kind and hasattr(getattr(m, kind), "__len__")
    }
    return {
        "state": {k: v.detach().clone() for k, v in module.state_dict().items()},
        "address": {k: v.data_ptr() for k, v in module.state_dict().items()},
        "flags": {k: p.requires_grad for k, p in module.named_parameters()},
        "training": {k: m.training for k, m in module.named_modules()},
        "attributes": {k: sorted(vars(m)) for k, m in module.named_modules()},
        "hooks": hooks,
    }


def assert_same(x: dict[str, Any], y: dict[str, Any]) -> None:
    assert x["state"].keys() == y["state"].keys()
    for name, tensor in x["state"].items():
        assert torch.equal(tensor, y["state"][name]), name
    assert {k: v for k, v in x.items() if k != "state"} == {
        k: v for k, v in y.items() if k != "state"
    }


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_switches_leave_no_trace_of_history(dtype: torch.dtype) -> None:
    tree, base = forest(), net(dtype)
    places: list[lt.Blend] = [*PATHS, "", {"a/b/c": 0.5, "a/e": 0.5}, "f/g/h:0.3+j:0.7"]
    expected = []
    for place in places:  # a fresh model for each, whose first switch it is
        fresh = net(dtype)
        model = lt.attach(tree, fresh)
        model.activate(place)
        expected.append(weights(fresh))
        model.detach()
    before = picture(base)
    model = lt.attach(tree, base)
    assert_same(picture(base), before)
    rng = random.Random(1)
    addresses = before["address"]
    for _ in range(1000):
        i = rng.randrange(len(places))
        mode = rng.choice(["merged", "merged", "merged", "unmerged"])
        model.activate(places[i], mode=mode)  # type: ignore[arg-type]
        want = expected[i] if mode == "merged" else before["state"]
        assert all(torch.equal(p, want[k]) for k, p in base.named_parameters())
    assert {k: v.data_ptr() for k, v in base.state_dict().items()} == addresses
    model.deactivate()
    assert_same(picture(base), before)
    model.detach()
    assert_same(picture(base), before)


def test_while_merged_there_is_no_hook_and_no_wrapper() -> None:
    tree, base = forest(), net()
    before = picture(base)
    lt.attach(tree, base).activate("a/b/c")
    after = picture(base)
    assert {k: v for k, v in after.items() if k != "state"} == {
        k: v for k, v in before.items() if k != "state"
    }


def test_only_sites_whose_plan_changed_are_written() -> None:
    rng = random.Random(3)
    tree = lt.AdapterTree()
    tree.add("a", adapter=adapter(rng, sites=["layers.0", "layers.1"]))
    tree.add("a/b", adapter=adapter(rng, sites=["layers.1"]))
    tree.add("a/c", adapter=adapter(rng, sites=["head"]))
    base = net()
    model = lt.attach(tree, base)
    model.activate("a/b")
    versions = {k: p._version for k, p in base.named_parameters()}
    model.activate("a/c")
    moved = {k for k, p in base.named_parameters() if p._version != versions[k]}
    assert moved == {"layers.1.weight", "head.weight"}


def test_a_switch_is_seen_by_autograd() -> None:
    base = net()
    model = lt.attach(forest(), base)
    loss = base(torch.tensor([[1, 2]])).sum()
    model.activate("a/b/c")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------- faults
class Boom(Exception):
    pass


@pytest.mark.parametrize("start", ["", "a/b/c"])
def test_a_fault_at_any_write_of_a_switch_leaves_the_state_before(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, base = forest(), net(torch.bfloat16)
    model = lt.attach(tree, base)
    model.activate("f/g/h")
    model.activate(start)
    before, active = picture(base), model.active
    real = merged_engine._add
    writes = 0

    def count(*args: Any) -> None:
        nonlocal writes
        writes += 1
        real(*args)

    monkeypatch.setattr(merged_engine, "_add", count)
    model.activate("f/g/h")
    model.activate(start)
    total = writes // 2
    assert total >= 4
    for n in range(total):
        for torn in (False, True):
            left = n

            def fail(site: Any, target: Tensor, *rest: Any, torn: bool = torn) -> None:
                nonlocal left
                left -= 1
                if left == -1:
                    if torn:
                        target.zero_()
                    raise Boom
                real(site, target, *rest)

            monkeypatch.setattr(merged_engine, "_add", fail)
            with pytest.raises(Boom):
                model.activate("f/g/h")
            monkeypatch.setattr(merged_engine, "_add", real)
            assert_same(picture(base), before)
            assert model.active == active
    model.activate("f/g/h")
    model.deactivate()
    assert_same(picture(base), picture(net(torch.bfloat16)) | {"address": picture(base)["address"]})


@pytest.mark.parametrize("start", [("a/b/c", "merged"), ("a/b/c", "unmerged"), ("", "merged")])
@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_a_refused_switch_changes_nothing(start: tuple[str, str], mode: str) -> None:
    tree, base = forest(), net()
    tree.add("bad", adapter=lt.Adapter({"head": lt.LowRank(torch.ones(1, 24), torch.ones(8, 1))}))
    model = lt.attach(tree, base)
    model.activate(start[0], mode=start[1])  # type: ignore[arg-type]
    out = base(torch.tensor([[1, 2]]))
    before, epoch = picture(base), model.epoch
    for wrong in ("bad", "a/b/x", {"a": float("nan")}, {}, "a:b"):
        with pytest.raises(lt.errors.LoraTreeError):
            model.activate(wrong, mode=mode)  # type: ignore[arg-type]
    assert_same(picture(base), before)
    assert (model.active, model.epoch) == (start[0], epoch)
    assert torch.equal(base(torch.tensor([[1, 2]])), out)


# ---------------------------------------------------------------------- using, threads, states
def test_using_restores_nested_and_after_exceptions() -> None:
    base = net()
    model = lt.attach(forest(), base)
    model.activate("f", mode="unmerged")
    before = picture(base)["state"]
    with pytest.raises(Boom), model.using("a/b"):
        inside = weights(base)
        with model.using("j", mode="unmerged"):
            assert (model.active, model.state) == ("j", lt.State.UNMERGED)
            assert all(torch.equal(p, before[k]) for k, p in base.named_parameters())
        assert (model.active, model.state) == ("a/b", lt.State.MERGED)
        assert all(torch.equal(p, inside[k]) for k, p in base.named_parameters())
        raise Boom
    assert (model.active, model.state) == ("f", lt.State.UNMERGED)


def test_asyncio_tasks_of_one_thread_never_run_under_each_others_path() -> None:
    model = lt.attach(forest(), net())
    seen: list[object] = []

    async def ask(path: str, inside: asyncio.Event, leave: asyncio.Event) -> None:
        with model.using(path, mode="unmerged"):
            inside.set()
            await leave.wait()
            seen.append(model.active)

    async def both() -> None:
        inside, leave = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(ask("f", inside, leave))
        await inside.wait()
        for other in (
            lambda: model.using("j").__enter__(),
            lambda: model.activate("j"),
            model.deactivate,
        ):
            with pytest.raises(StateError, match=r"another asyncio task[\s\S]*asyncio\.Lock"):
                other()
        leave.set()
        await first
        await ask("j", asyncio.Event(), leave)

    asyncio.run(both())
    assert seen == ["f", "j"]
    assert model.active == ""


def test_what_is_inside_a_block_may_open_more_also_in_tasks_of_its_own() -> None:
    model = lt.attach(forest(), net())
    seen: list[object] = []

    async def child() -> None:
        with model.using("a", mode="unmerged"):
            await asyncio.sleep(0)
            seen.append(model.active)

    async def parent() -> None:
        with model.using("j", mode="unmerged"):
            await asyncio.create_task(child())
            model.prefetch("f")
            seen.append(model.active)

    with model.using("f"):
        asyncio.run(parent())
        seen.append(model.active)
    assert [*seen, model.active] == ["a", "j", "f", ""]


def test_a_prefetch_disturbs_nobody_and_may_come_from_anywhere() -> None:
    model = lt.attach(forest(), net())

    async def both() -> None:
        async def ask() -> None:
            model.prefetch("j")

        with model.using("f"):
            thread = threading.Thread(target=model.prefetch, args=("a",))
            thread.start()
            thread.join()
            await asyncio.create_task(ask())
            assert model.active == "f"

    asyncio.run(both())


def test_blocks_that_are_left_out_of_order_are_told() -> None:
    model = lt.attach(forest(), net())
    first, second = model.using("f", mode="unmerged"), model.using("j", mode="unmerged")
    first.__enter__()
    second.__enter__()
    with pytest.raises(StateError, match="left while one that was entered after it is still open"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    model.deactivate()
    assert model.active == ""


def test_another_thread_can_not_switch_under_using() -> None:
    model = lt.attach(forest(), net())
    order: list[str] = []

    def other() -> None:
        model.activate("f/i")
        order.append("other")

    with model.using("a/b"):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.1)
        assert model.active == "a/b"
        order.append("using")
    thread.join(10)
    assert not thread.is_alive()
    assert order == ["using", "other"]
    assert model.active == "f/i"


def test_threads_that_switch_all_the_time_see_their_own_path() -> None:
    base = net()
    model = lt.attach(forest(), base)
    ids = torch.arange(6)[None]
    expected = {}
    for path in PATHS:
        with model.using(path), torch.no_grad():
            expected[path] = base(ids)
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            path = rng.choice(PATHS)
            with model.using(path), torch.no_grad():
                if not torch.equal(base(ids), expected[path]):
                    wrong.append(path)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_the_epoch_moves_with_every_switch() -> None:
    model = lt.attach(forest(), net())
    epochs = [model.epoch]
    for path in ("a", "a/b", ""):
        model.activate(path)
        epochs.append(model.epoch)
    assert epochs == sorted(set(epochs))


def test_one_base_has_one_tree_at_a_time() -> None:
    tree, base = forest(), net()
    model = lt.attach(tree, base)
    with pytest.raises(StateError, match="attached already"):
        lt.attach(tree, base)
    model.detach()
    with pytest.raises(StateError, match="was detached"):
        model.activate("a")
    model.detach()
    lt.attach(tree, base).activate("a")


@pytest.mark.parametrize("how", ["merged", "unmerged", "prepared"])
def test_a_base_whose_model_was_dropped_while_a_path_was_active_is_refused(how: Any) -> None:
    base = net()
    model = lt.attach(forest(), base)
    if how == "prepared":
        model.prepare(max_rank=64)
    else:
        model.activate("a", mode=how)
    del model
    with pytest.raises(StateError, match="dropped without detach"):
        lt.attach(forest(), base)


def test_a_model_dropped_while_bare_leaves_its_base_to_others() -> None:
    base = net()
    lt.attach(forest(), base).activate("")
    model = lt.attach(forest(), base)
    with model.using("a", mode="unmerged"):
        pass
    del model
    lt.attach(forest(), base)


@pytest.mark.parametrize("inside", ["using", "route"])
def test_what_a_with_goes_back_to_can_not_be_changed_meanwhile(inside: str) -> None:
    tree, base = forest(), net()
    model = lt.attach(tree, base)
    model.activate("j")
    with model.using("a") if inside == "using" else model.route(["a", ""]):
        for change in (
            lambda: tree.remove("j"),
            lambda: tree.rename("j", "k"),
            lambda: tree.update("j", weight=2.0),
        ):
            with pytest.raises(TreeError, match="j: active on an attached model"):
                change()
    assert model.active == "j"
    model.activate("a")
    tree.remove("j")


def test_what_is_attached_is_a_tree_to_a_base() -> None:
    tree, base = forest(), net()
    with pytest.raises(
        SpecError,
        match=r"expected an AdapterTree, got Net\n.*the tree comes first: attach\(tree, base",
    ):
        lt.attach(base, tree)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"expected an AdapterTree, got str\n.*lora_tree\.load"):
        lt.attach("zoo", base)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"the base must be a torch\.nn\.Module, got str"):
        lt.attach(tree, "org/model")  # type: ignore[arg-type]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_model_is_not_copied_but_its_tree_and_base_are(
    copied: Callable[[object], object],
) -> None:
    model = lt.attach(forest(), net())
    with pytest.raises(
        StateError, match=r"can't be copied or pickled.*\n.*attach\(copy\.deepcopy\(tree\), copy"
    ):
        copied(model)
    model.activate("a/b")
    ids = torch.arange(13)[None]
    wanted = model.base(ids)
    model.detach()
    twin = lt.attach(copy.deepcopy(model.tree), copy.deepcopy(model.base))
    twin.activate("a/b")
    assert torch.equal(twin.base(ids), wanted)


def test_detach_gives_the_flags_back_that_trainable_took() -> None:
    base = net()
    base.norm.requires_grad_(False)
    before = picture(base)
    model = lt.attach(forest(), base)
    model.trainable("a")
    model.trainable("f")
    model.trainable()
    assert not any(p.requires_grad for p in base.parameters())
    model.detach()
    assert_same(picture(base), before)


def test_a_failed_attach_leaves_the_tree_as_it_was() -> None:
    tree = lt.AdapterTree(defaults=dict(r=2))
    tree.add("a", target_modules=["head"])
    tree.add("b", target_modules=["hed"])
    with pytest.raises(lt.errors.BaseMismatch, match="b: target 'hed' matches nothing"):
        lt.attach(tree, net())
    assert tree["a"].fresh is not None
    assert tree["a"].loaded is None


def test_a_base_is_free_again_after_an_attach_that_failed_in_any_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, tree = net(), lt.AdapterTree(defaults={"r": 2, "target_modules": ["head"]})
    tree.add("fresh")
    with monkeypatch.context() as patch, pytest.raises(Boom) as kept:
        patch.setattr(
            "lora_tree.engine.fresh.fresh_adapter",
            lambda *args, **kwargs: (_ for _ in ()).throw(Boom()),
        )
        lt.attach(tree, base)
    assert kept.tb is not None  # which holds the model that came to nothing
    lt.attach(tree, base).detach()
    base.register_module("later", nn.LazyLinear(3))
    lt.attach(tree, base, host_budget="1MiB").activate("fresh")


def test_an_interrupt_after_the_last_write_of_a_switch_leaves_no_path_that_nobody_knows_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = lt.attach(forest(), base := net())
    before, real = weights(base), merged_engine.exact_mode

    @contextlib.contextmanager
    def interrupted(*devices: torch.device) -> Iterator[None]:
        with real(*devices):
            yield
        raise KeyboardInterrupt

    monkeypatch.setattr(merged_engine, "exact_mode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.activate("a")
    monkeypatch.setattr(merged_engine, "exact_mode", real)
    model.deactivate()
    assert all(torch.equal(p, before[k]) for k, p in base.named_parameters())


def test_a_copy_of_a_base_with_a_path_beside_it_is_refused_when_it_runs() -> None:
    model, ids = lt.attach(forest(), base := net()), torch.tensor([[1, 2]])
    bare = base(ids)
    model.activate("a", mode="unmerged")
    twin = copy.deepcopy(base)
    for path in ("a", "j", ""):
        model.activate(path, mode="unmerged")
        with pytest.raises(StateError, match=r"this is a copy of a base[\s\S]*deactivate"):
            twin(ids)
    assert torch.equal(copy.deepcopy(base)(ids), bare)


def test_what_is_made_under_inference_mode_can_train_and_is_fp32_whatever_the_default() -> None:
    tree, base = (
        lt.AdapterTree(defaults={"r": 2, "target_modules": ["head"], "lora_bias": True}),
        net(),
    )
    tree.add("fresh")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            model = lt.attach(tree, base)
            (group,) = model.trainable("fresh", dtype=None)
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in group["params"]} == {torch.float32}
    model.activate("fresh", mode="unmerged")
    model(torch.tensor([[1, 2]])).sum().backward()
    assert all(p.grad is not None for p in group["params"])


def test_the_default_device_says_nothing_about_where_adapters_are(tmp_path: Path) -> None:
    forest().save(tmp_path / "zoo")
    ids, results = torch.tensor([[1, 2], [3, 4], [5, 6]]), []
    for default in ("cpu", "meta"):
        model = lt.attach(lt.load(tmp_path / "zoo"), base := net(), host_budget="1GiB")
        found = []
        with torch.no_grad():
            for mode in ("merged", "unmerged"):
                with torch.device(default):
                    model.activate("a/b/c", mode=mode)  # type: ignore[arg-type]
                found.append(base(ids))
            for strategy in ("nodes", "paths", "grouped", "matrix"):
                with contextlib.ExitStack() as stack:
                    with torch.device(default):
                        stack.enter_context(
                            model.route(["a/b/c", {"f": 0.5, "j": 2.0}, ""], strategy=strategy)
                        )
                    found.append(base(ids))
            with torch.device(default):
                found += [
                    t
                    for v in lt.Adapter.load(tmp_path / "zoo" / "f").modules.values()
                    for t in v.tensors
                ]
                found += [t for v in model.tree.flatten("f/g").modules.values() for t in v.tensors]
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_trainable_takes_over_no_node_where_one_is_a_group() -> None:
    tree = forest()
    tree.add("g", group=True)
    model = lt.attach(tree, net())
    own = tree.adapter("a")
    with pytest.raises(StateError, match="g is a group without an adapter"):
        model.trainable("a", "g")
    assert tree.adapter("a") is own
    assert not model.factors


def test_trainable_gives_the_factors_that_the_tree_holds_whatever_became_of_the_node() -> None:
    tree = forest()
    model = lt.attach(tree, net())

    def held(path: str) -> list[int]:
        adapter = tree.adapter(path)
        assert adapter is not None
        return sorted(id(t) for v in adapter.modules.values() for t in v.tensors)

    def trained(path: str) -> list[int]:
        (group,) = model.trainable(path)
        model.trainable()
        return sorted(map(id, group["params"]))

    first = trained("j")
    assert first == held("j")
    tree.rename("j", "k")
    tree.add("j", adapter=adapter(random.Random(3)))
    assert trained("j") == held("j") != first
    assert trained("k") == held("k") == first, "the parameters go along with the node"
    tree.update("j", adapter=adapter(random.Random(4)))
    assert trained("j") == held("j")
    tree.remove("k")
    model.trainable("a")
    assert sorted(model.factors.paths) == ["a", "j"], "a node that is gone has no parameters"


def test_what_can_not_be_applied_in_a_mode_names_its_node() -> None:
    tree, base = lt.AdapterTree(), nn.Sequential(nn.Linear(4, 3, bias=False))
    value = lt.LowRank(torch.ones(1, 4), torch.ones(3, 1), bias=torch.ones(3))
    tree.add("a", adapter=lt.Adapter({"0": value}))
    with pytest.raises(lt.errors.UnmergedOnly, match="a: 0: can't be merged"):
        lt.attach(tree, base).activate("a")


def test_nodes_in_use_can_not_be_changed() -> None:
    tree = forest()
    model = lt.attach(tree, net())
    model.activate("a/b/c")
    for change in (
        lambda: tree.remove("a/b/c"),
        lambda: tree.remove("a", recursive=True),
        lambda: tree.move("a/b", "z"),
        lambda: tree.rename("a", "aa"),
        lambda: tree.update("a/b", weight=2.0),
        lambda: tree.update("a", adapter=adapter(random.Random(9))),
    ):
        with pytest.raises(TreeError, match=r"active on an attached model[\s\S]*deactivate"):
            change()
    tree.add("a/b/c/new", adapter=adapter(random.Random(5)))
    tree.remove("f/i")
    tree.rename("j", "k")
    model.activate("k")
    tree.remove("a/b/c", recursive=True)
    with pytest.raises(PathError):
        model.activate("a/b/c")


def test_a_changed_weight_or_adapter_counts_from_the_next_activation() -> None:
    tree, base = forest(), net()
    model = lt.attach(tree, base)
    model.activate("a/b")
    model.deactivate()
    tree.update("a/b", weight=0.25)
    model.activate("a/b")
    fresh = net()
    lt.attach(tree, fresh).activate("a/b")
    assert all(
        torch.equal(x, y) for x, y in zip(base.parameters(), fresh.parameters(), strict=True)
    )


def test_in_place_drifts_and_says_so() -> None:
    tree, base = forest(), net()
    before = weights(base)
    with pytest.warns(lt.MergedWarning, match="rounding") as told:
        model = lt.attach(tree, base, pristine="none")
    assert told[0].filename == __file__, "the warning points at the line that attaches"
    exact = net()
    lt.attach(tree, exact).activate("a/b/c")
    for path in ("f/g/h", "j", "a/b/c"):
        model.activate(path)
    for k, p in base.named_parameters():
        torch.testing.assert_close(p, exact.get_parameter(k), rtol=1e-4, atol=1e-4)
    assert model._merged.pristine.nbytes == 0
    model.deactivate()
    for k, p in base.named_parameters():
        torch.testing.assert_close(p, before[k], rtol=1e-4, atol=1e-4)


def test_pristine_copies_touched_weights_only() -> None:
    tree, base = lt.AdapterTree(), net()
    tree.add("a", adapter=adapter(random.Random(0), sites=["layers.2"]))
    model = lt.attach(tree, base)
    assert model._merged.pristine.nbytes == 0
    model.activate("a")
    assert model._merged.pristine.nbytes == 24 * 24 * 4


# ---------------------------------------------------------------------- blends
def test_a_blend_is_the_dense_sum_with_a_shared_ancestor_at_full_weight() -> None:
    tree, base = forest(), net(torch.float64)
    before = weights(base)
    model = lt.attach(tree, base)
    model.activate({"a/b/c": 0.3, "a/b/d": 0.7})
    coefficients = {"a": 1.0, "a/b": 1.0, "a/b/c": 0.3, "a/b/d": 0.7}
    expected = dict(before)
    for node, c in coefficients.items():
        held = tree.adapter(node)
        assert held is not None
        for name, v in held.modules.items():
            delta = c * tree[node].weight * v.scale * (v.B.double() @ v.A.double())
            expected[f"{name}.weight"] = expected[f"{name}.weight"] + (
                delta.T if name == "embed" else delta
            )
    for k, p in base.named_parameters():
        torch.testing.assert_close(p.detach(), expected[k], rtol=1e-12, atol=1e-12)
    spelled = weights(base)
    model.activate("a/b/d:0.7+a/b/c:0.3")
    assert all(torch.equal(p, spelled[k]) for k, p in base.named_parameters())


# ---------------------------------------------------------------------- training one node
def test_training_a_node_moves_it_alone() -> None:
    tree = lt.AdapterTree(defaults={"r": 4, "target_modules": ["layers.0", "head"]})
    tree.add("a", adapter=adapter(random.Random(0), sites=["layers.0"]))
    tree.add("a/b")
    base = net()
    before = weights(base)
    model = lt.attach(tree, base)
    groups = model.trainable("a/b")
    assert [g["name"] for g in groups] == ["a/b"]
    assert sum(p.requires_grad for p in model.parameters()) == len(groups[0]["params"]) == 4
    with pytest.raises(StateError, match=r"a/b: .*trains, and can't be merged"):
        model.activate("a/b")
    frozen = tree.adapter("a")
    assert frozen is not None
    held = [t.clone() for v in frozen.modules.values() for t in v.tensors]
    model.activate("a/b", mode="unmerged")
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    ids, target = torch.arange(6)[None], torch.randint(0, 7, (6,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(base(ids)[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(p, before[k]) for k, p in base.named_parameters())
    assert all(
        torch.equal(x, y)
        for x, y in zip(held, (t for v in frozen.modules.values() for t in v.tensors), strict=True)
    )
    with torch.no_grad():
        unmerged = base(ids)
        assert model.trainable() == []
        model.activate("a/b")
        torch.testing.assert_close(base(ids), unmerged, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in model.parameters())
    first = weights(base)
    with torch.no_grad():
        groups[0]["params"][0].mul_(2)  # trained further, in place: the same objects, other numbers
    model.activate("a/b")
    assert not all(torch.equal(p, first[k]) for k, p in base.named_parameters())


def test_bad_arguments_are_refused_by_name() -> None:
    tree, base = forest(), net()
    with pytest.raises(SpecError, match=r"pristine.*'gost'"):
        lt.attach(tree, base, pristine="gost")  # type: ignore[arg-type]
    model = lt.attach(tree, base)
    with pytest.raises(SpecError, match="mode must be"):
        model.activate("a", mode="merge")  # type: ignore[arg-type]
    with pytest.raises(PathError, match=r"no node 'a/bb'.*did you mean 'a/b'"):
        model.activate("a/bb")
    with pytest.raises(PathError, match=r"'x/\*' matches no node"):
        model.trainable("x/*")


def test_autocast_inference_mode_and_low_precision_products_do_not_touch_the_bits() -> None:
    torch.manual_seed(0)
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"0": lt.LowRank(torch.randn(64, 512), torch.randn(512, 64))}))
    base, expected = (nn.Sequential(nn.Linear(512, 512)) for _ in range(2))
    expected.load_state_dict(base.state_dict())
    lt.attach(tree, expected).activate("a")
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        model = lt.attach(tree, base)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            model.activate("a")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert all(
        torch.equal(x, y) for x, y in zip(base.parameters(), expected.parameters(), strict=True)
    )
    with torch.inference_mode():
        model.activate("a", mode="unmerged")
    base(torch.ones(1, 512)).sum().backward()


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
@pytest.mark.parametrize(
    "nothing", [{"x": 0.0}, {"": 0.5}, "x:0+:3", "group", {"x": 1.0, "": 2.0, "group": 0.0}]
)
def test_a_blend_of_nothing_leaves_the_base_bare(nothing: lt.Blend, mode: Any) -> None:
    base = nn.Sequential(nn.Linear(3, 3))
    tree = lt.AdapterTree()
    tree.add("x", adapter=lt.Adapter({"0": lt.LowRank(torch.ones(1, 3), torch.ones(3, 1))}))
    tree.add("group", group=True)
    model = lt.attach(tree, base)
    bare = {name: t.clone() for name, t in base.state_dict().items()}
    model.activate("x", mode=mode)
    model.activate(nothing, mode=mode)
    changes = lt.parse_blend(nothing).get("x", 0.0) != 0.0
    assert model.state is (lt.State(mode) if changes else lt.State.BARE)
    if not changes:
        assert all(torch.equal(t, bare[name]) for name, t in base.state_dict().items())
        assert not base._forward_hooks
        model.prepare(max_rank=1)  # which wants a bare model


def test_a_mistyped_mode_gets_a_suggestion() -> None:
    model = lt.attach(lt.AdapterTree(), nn.Linear(2, 2))
    with pytest.raises(
        SpecError,
        match=r"^mode must be 'merged' or 'unmerged', got 'mergd'; did you mean 'merged'\?$",
    ):
        model.activate("", mode="mergd")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- answering for the base
def test_what_is_no_attribute_of_ours_is_the_bases_to_read_and_to_set() -> None:
    import joint

    base = joint.base()
    base.warnings_issued = {}
    model = lt.attach(joint.tree(base), base)
    for name in (
        "config",
        "generation_config",
        "dtype",
        "device",
        "main_input_name",
        "warnings_issued",
        "name_or_path",
    ):
        assert getattr(model, name) is getattr(base, name) or getattr(model, name) == getattr(
            base, name
        ), name
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.can_generate() is base.can_generate()
    model.add_model_tags(["ours"])
    model.warnings_issued["estimate_tokens"] = True
    assert base.model_tags == ["ours"]
    assert base.warnings_issued["estimate_tokens"]
    model.enable_input_require_grads()
    assert base.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.int64)).requires_grad
    model.disable_input_require_grads()
    model.activation_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in base.modules())

    other = type(base.generation_config)(max_new_tokens=3)
    model.generation_config = other
    assert base.generation_config is other
    assert "generation_config" not in vars(model)
    model.note_of_mine = 1  # the base has none
    assert "note_of_mine" not in vars(base)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.generate(ids, do_sample=False), base.generate(ids, do_sample=False))
    assert model.tree is not None
    assert hasattr(model, "base")
    assert not hasattr(model, "no_such_thing")
    with pytest.raises(AttributeError, match="neither TreeModel nor its base has 'no_such_thing'"):
        model.no_such_thing  # noqa: B018


def test_what_would_save_or_change_the_base_alone_is_refused_by_name_and_hasattr_says_no() -> None:
    import joint
    from transformers import PreTrainedModel

    base = joint.base()
    model = lt.attach(joint.tree(base), base)
    refused = [name for name in answers.REFUSED if hasattr(base, name)]
    assert {"save_pretrained", "push_to_hub", "add_adapter", "resize_token_embeddings"} <= set(
        refused
    )
    for name in refused:
        assert not hasattr(model, name)
        with pytest.raises(
            StateError, match=f"^a TreeModel does not answer '{name}' for its LlamaForCausalLM\n"
        ):
            getattr(model, name)
    merges = [
        n
        for n in dir(PreTrainedModel)
        if n.endswith(("_adapter", "_adapters")) and not n.startswith("_")
    ]
    assert set(merges) <= set(answers.REFUSED)  # whatever transformers may add


def test_a_model_that_is_not_made_yet_or_no_longer_attached_answers_what_it_can() -> None:
    bare = lt.TreeModel.__new__(lt.TreeModel)
    torch.nn.Module.__init__(bare)
    with pytest.raises(AttributeError):
        bare.config  # noqa: B018
    base = torch.nn.Sequential(torch.nn.Linear(2, 2))
    base.config = {"a": 1}
    model = lt.attach(lt.AdapterTree(), base)
    model.detach()
    assert model.config == {"a": 1}
    with pytest.raises(StateError, match="can't be copied"):
        copy.deepcopy(model)
