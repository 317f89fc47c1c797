"""An adapter that is evicted from a device leaves its memory, and comes back as the same object.

A link that copies within host memory plays the device. It gives each transfer memory that no
earlier one had, so that an address from before the eviction is found out.
"""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import doubled, lineage, net_by_hand
from sampling import sampled
from test_placement import Counting
from test_segmented import forest, launched, modules, net
from torch import Tensor

import lora_tree as lt
from lora_tree.cache.link import Arrived
from lora_tree.cache.pack import held_bytes, is_vacated, pack, vacate
from lora_tree.engine.binder import Binder
from lora_tree.engine.planner import Planner
from lora_tree.engine.sidepaths.side import Draft
from lora_tree.engine.switching.launches import KeptLaunch, Launches
from lora_tree.renaming import Renaming

__all__ = ["launched", "modules"]  # fixtures

PATHS = ("a", "a/b", "a/b/c", "a/d", "e")


def held_in_memory(path: str) -> int:
    adapter = forest().adapter(path)
    assert adapter is not None
    return held_bytes(pack(adapter, Counting().allocate))


BYTES = {path: held_in_memory(path) for path in PATHS}


class Moving(Counting):
    """Gives every transfer other memory than all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Tensor] = []

    def send(self, adapter: lt.Adapter, again: lt.Adapter | None = None) -> Arrived:
        # These take the memory that was freed, and keep it.
        self.taken += [torch.zeros(BYTES["e"] + 64 * i, dtype=torch.uint8) for i in range(-40, 9)]
        return super().send(adapter, again)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Moving:
    made = Moving()
    monkeypatch.setattr("lora_tree.model.link_to", lambda base: made)
    return made


@pytest.fixture
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> lt.AdapterTree:
    """The tree's adapters in memory, or in files."""
    if getattr(request, "param", "memory") == "memory":
        return forest()
    forest().save(tmp_path / "zoo")
    return lt.load(tmp_path / "zoo")


def room(*paths: str) -> int:
    return sum(BYTES[node] for node in {node for path in paths for node in lineage(path)})


@pytest.mark.parametrize("by", ["stock", "kernels", "prepared"])
@pytest.mark.parametrize("tree", sampled(["memory", "files"], ["files"]), indirect=True)
def test_any_traffic_under_a_tight_budget_means_what_it_means_by_hand(
    link: Moving, tree: lt.AdapterTree, by: str, request: pytest.FixtureRequest
) -> None:
    if by != "stock":
        request.getfixturevalue("launched")
    base, exact, plain = net(), doubled(forest()), net()
    # Stock operations stack a path once more.
    device_budget = 2 * room("a/b/c") if by == "stock" else room("a/b/c", "a/d")
    host_budget = room("a/b/c", "a/d")
    model = lt.attach(tree, base, device_budget=device_budget, host_budget=host_budget)
    if by == "prepared":
        model.prepare()
    x, rng = torch.randn(3, 20), random.Random(0)
    with torch.no_grad():
        for _ in range(16):
            path = rng.choice(PATHS)
            wanted = net_by_hand(plain, forest(), x[:, None], [path] * 3, exact)[:, 0]
            model.activate(path, mode=rng.choice(["merged", "unmerged", "unmerged"]))
            torch.testing.assert_close(base(x).double(), wanted, rtol=1e-5, atol=1e-5)
            model.deactivate()
            if by == "stock":
                continue
            rows = rng.choice([["e", "", "e"], ["a/b/c", "a", "a/d"], ["a/d", "a/b", "a/b/c"]])
            with model.route(rows, batch_first=True):
                y = base(x)
            wanted = net_by_hand(plain, forest(), x[:, None], rows, exact)[:, 0]
            torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    assert model.cache.stats().tiers[-1].evictions > 3


@pytest.mark.parametrize("tree", ["memory", "files"], indirect=True)
def test_what_comes_back_is_neither_bound_nor_laid_out_again(
    launched: list[str], link: Moving, tree: lt.AdapterTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = net()
    model = lt.attach(tree, base, device_budget=room("a/b/c"), host_budget=room(*PATHS))
    x = torch.randn(2, 20)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for path in ("a/b/c", "e"):
            model.activate(path, mode="unmerged")
            found[path] = base(x)
            model.deactivate()
        sent, steps = len(link.sent), []
        for owner, name in ((Planner, "_made"), (Renaming, "bound"), (Draft, "__init__")):
            plain = getattr(owner, name)
            monkeypatch.setattr(
                owner, name, lambda *a, n=name, p=plain, **k: steps.append(n) or p(*a, **k)
            )
        for path in ("a/b/c", "e", "a/b/c"):
            model.activate(path, mode="unmerged")
            assert torch.equal(base(x), found[path])
            model.deactivate()
    assert len(link.sent) > sent, "it was evicted and sent again"
    assert steps == []


def test_an_evicted_adapter_has_no_memory_though_its_plan_is_kept(
    link: Moving, launched: list[str]
) -> None:
    model = lt.attach(forest(), net(), device_budget=room("a/b/c"))
    tier = model.cache._loader.top
    for path in (*PATHS, *reversed(PATHS)):
        model.activate(path, mode="unmerged")
        model.deactivate()
    gc.collect()
    seen = list(model.cache._loader._sent.values())
    assert len(seen) == len(PATHS), "the plans keep them"
    assert sum(map(held_bytes, seen)) == tier.stats().held_bytes <= room("a/b/c")
    assert any(map(is_vacated, seen))


@pytest.mark.parametrize("kernels", [False, True], ids=["stock", "kernels"])
def test_a_backward_that_needs_an_evicted_adapter_is_an_error(
    link: Moving, kernels: bool, request: pytest.FixtureRequest
) -> None:
    if kernels:
        request.getfixturevalue("launched")
    base = net()
    model = lt.attach(forest(), base, device_budget=room("a/b/c") * (1 if kernels else 2))
    inner: list[Tensor] = []
    x = torch.randn(2, 20, requires_grad=True)
    base[1].register_forward_hook(lambda module, args, out: inner.append(out))
    model.activate("e", mode="unmerged")
    base(x)
    model.deactivate()
    model.activate("a/b/c", mode="unmerged")  # evicts e
    assert model.cache.stats().tiers[-1].evictions == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inner[0].sum().backward()


def test_after_a_move_of_the_base_nothing_stays_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    links = [Moving(), Moving()]
    home = ["here"]
    monkeypatch.setattr("lora_tree.model.link_to", lambda base: links[0])
    monkeypatch.setattr("lora_tree.cache.pinning.link_to", lambda base: links[1])
    monkeypatch.setattr("lora_tree.cache.pinning._device_of", lambda base: home[0])
    base, x = net(), torch.randn(2, 20)
    model = lt.attach(forest(), base, device_budget="1MiB")
    with torch.no_grad():
        for path in ("e", "a/b"):
            model.activate(path, mode="unmerged")
        before = list(model.cache._loader._sent.values())
        beside = base(x)
        home[0] = "there"
        model.activate("a/b", mode="unmerged")
        assert torch.equal(base(x), beside)
    assert len(before) == 3
    assert all(map(is_vacated, before))
    assert len(links[1].sent) == 2


def test_files_without_a_lock_come_back_as_another_object(link: Moving, tmp_path: Path) -> None:
    forest().save(tmp_path / "zoo")
    (tmp_path / "zoo" / "tree.lock").unlink()
    base, x = net(), torch.randn(2, 20)
    model = lt.attach(lt.load(tmp_path / "zoo"), base, device_budget=2 * room("a/b/c"))
    with torch.no_grad():
        for path in ("e", "a/b/c", "e"):
            model.activate(path, mode="unmerged")
            wanted = net_by_hand(base, forest(), x[:, None], [path] * 2, doubled(forest()))[:, 0]
            torch.testing.assert_close(base(x).double(), wanted, rtol=1e-5, atol=1e-5)
            model.deactivate()


def test_a_launch_is_not_known_after_a_factor_has_moved() -> None:
    base, adapter = net(), forest().adapter("e")
    assert adapter is not None
    link = Moving()
    packed = pack(adapter, link.allocate)
    sent = link.send(packed).adapter
    plan = Planner(Binder(base, None)).plan([("e", 1.0, sent)])
    names = tuple(plan.sites)
    nothing: Any = None
    launch = KeptLaunch(
        nothing,
        covered=frozenset(names),
        devices=frozenset([torch.device("cpu")]),
        is_whole=True,
        places=plan.places(),
    )
    launches = Launches()
    launches.keep(plan, names, launch)
    assert launches.find(plan, names, 0) is launch
    vacate(sent)
    assert launches.find(plan, names, 0) is None
    assert link.send(packed, sent).adapter is sent
    assert launches.find(plan, names, 0) is None


def test_what_was_made_of_an_evicted_adapter_for_this_base_is_not_kept(
    link: Moving, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the base fused modules that the adapter has apart.
    monkeypatch.setattr(Renaming, "bound", lambda self, adapter: adapter.with_tensors(Tensor.clone))
    model = lt.attach(forest(), net(), device_budget=room("a/b/c"))
    for path in (*PATHS, *reversed(PATHS)):
        model.activate(path, mode="unmerged")
        model.deactivate()
    gc.collect()
    seen = list(model.cache._loader._sent.values())
    assert not any(map(is_vacated, seen)), "only what the tier holds is alive"
