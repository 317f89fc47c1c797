"""Laws that need a GPU: bits after any history, no synchronisations, streams, graphs."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import no_waiting
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.engine.kernels import MergePart, MergeTerm, can_merge, merge_launch, usable
from lora_tree.errors import LoraTreeError

CUDA = torch.device("cuda", 0)
PATHS = ("a", "a/b", "a/b/c", "a/d", "e", "e/f")
RANKS = {"a": 4, "a/b": 16, "a/b/c": 3, "a/d": 24, "e": 1, "e/f": 8}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

pytestmark = [
    # torch's warnings about itself: its debug mode is a prototype, its compiler advises TF32
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]


class Conv1D(nn.Module):
    """A stand-in for transformers' class of this name, with a weight of (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Experts(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(*((3, 96, 80) if transposed else (3, 80, 96))))


class Zoo(nn.Module):
    """A model with a site of every kind, aligned and not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.odd = nn.Linear(256, 192), nn.Linear(77, 131)
        self.turned, self.words = Conv1D(160, 96), nn.Embedding(301, 64)
        self.conv, self.last = (
            nn.Conv2d(16, 24, 3),
            nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last),
        )
        self.experts, self.back = Experts(False), Experts(True)
        self.attention = nn.MultiheadAttention(64, 4)


MODULES = ["linear", "odd", "turned", "words", "conv", "last", "attention"]


def zoo(dtype: torch.dtype) -> Zoo:
    torch.manual_seed(0)
    return Zoo().to(dtype).to(CUDA).requires_grad_(False)


def forest(
    base: nn.Module, factors: torch.dtype, where: torch.device | str = "cpu"
) -> lt.AdapterTree:
    spec = dict(target_modules=MODULES, target_parameters=["experts.up", "back.up"])
    tree = lt.AdapterTree(defaults=spec)
    for path in PATHS:
        tree.add(path, r=RANKS[path], lora_alpha=RANKS[path] * (0.7 if path == "a/d" else 1.0))
    lt.attach(tree, base).detach()
    grown = lt.AdapterTree()
    draw = torch.Generator().manual_seed(1)
    for path in PATHS:
        adapter = tree.adapter(path)
        assert adapter is not None

        def drawn(tensor: Tensor) -> Tensor:
            return (torch.randn(tensor.shape, generator=draw) * 0.1).to(where, factors)

        grown.add(path, adapter=adapter.with_tensors(drawn))
    return grown


def bits(base: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in base.state_dict().items()}


def same(x: dict[str, Tensor], y: dict[str, Tensor]) -> bool:
    def raw(t: Tensor) -> Tensor:
        return t.contiguous().view(torch.uint8)

    return all(torch.equal(raw(value), raw(y[name])) for name, value in x.items())


def test_the_kernels_run_here() -> None:
    assert usable(CUDA)


# ---------------------------------------------------------------------- the law of switches
@pytest.mark.parametrize("factors", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_hundred_switches_end_in_the_bits_of_a_fresh_activation(
    dtype: torch.dtype, factors: torch.dtype
) -> None:
    base = zoo(dtype)
    bare = bits(base)
    tree = forest(base, factors)
    fresh = {}
    for path in PATHS:
        model = lt.attach(tree, base)
        model.activate(path)
        fresh[path] = bits(base)
        model.detach()
        assert same(bits(base), bare)
    assert not same(fresh["a"], fresh["a/b"])
    rng = random.Random(0)
    for place in ("device", "host"):
        model = lt.attach(tree, base, pristine=place)  # type: ignore[arg-type]
        for _ in range(100):
            path = rng.choice(["", *PATHS])
            model.activate(path)
            assert same(bits(base), fresh[path] if path else bare), (place, path)
        assert model.pristine.kind == place
        model.detach()
    assert same(bits(base), bare)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merge_is_the_rounded_float64_but_for_a_few_entries(dtype: torch.dtype) -> None:
    for factors in DTYPES:
        draw = torch.Generator(CUDA).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device=CUDA)  # noqa: B023

        pristine = normal(1, 1024, 2048).to(dtype)
        terms = [
            MergeTerm(
                (normal(1, 1024, r) * 0.1).to(factors),
                (normal(1, r, 2048) * 0.1).to(factors),
                scale,
            )
            for r, scale in ((16, 1.0), (8, 0.3), (64, -2.5))
        ]
        part = MergePart.of(torch.full_like(pristine, float("nan")), pristine, terms)
        assert can_merge(part.weight, part.pristine, part.terms)
        merge_launch([part]).run()
        exact = pristine.double()
        for term in terms:
            exact = exact + term.left.double() @ term.right.double() * term.scale
        if dtype == torch.float32:
            torch.testing.assert_close(part.weight.double(), exact, rtol=1e-6, atol=1e-6)
        else:
            wrong = int((part.weight != exact.to(dtype)).sum())
            allowed = 10_000 if dtype == torch.bfloat16 else 1_000
            assert wrong <= exact.numel() // allowed, (factors, wrong)


def test_the_bits_do_not_depend_on_where_factors_lie() -> None:
    draw = torch.Generator(CUDA).manual_seed(0)
    pristine = torch.randn((1, 320, 512), generator=draw, device=CUDA).bfloat16()
    left, right = (
        torch.randn(s, generator=draw, device=CUDA).bfloat16() for s in ((1, 320, 16), (1, 16, 512))
    )
    found = []
    for shift in (0, 1, 3):
        moved = []
        for factor in (left, right):
            memory = torch.empty(factor.numel() + shift, dtype=factor.dtype, device=CUDA)
            moved.append(memory[shift:].view(factor.shape).copy_(factor))
        weight = torch.empty_like(pristine)
        merge_launch([MergePart.of(weight, pristine, [MergeTerm(*moved, 0.5)])]).run()
        found.append(weight)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_in_place_a_path_goes_on_and_off() -> None:
    base = zoo(torch.float32)
    tree = forest(base, torch.float32)
    bare = bits(base)
    with pytest.warns(lt.MergedWarning):
        model = lt.attach(tree, base, pristine="none")
    model.activate("a/b/c")
    model.activate("e")
    model.activate("")
    for name, value in bits(base).items():
        torch.testing.assert_close(value, bare[name], rtol=1e-5, atol=1e-5)
    assert (model.pristine.kind, model.pristine.nbytes) == ("none", 0)


# ---------------------------------------------------------------------- pristine
def test_a_full_device_sends_the_copies_to_the_host_and_the_bits_are_the_same() -> None:
    base = net(width=2048)
    tree = small(base, where=CUDA)
    model = lt.attach(tree, base)
    model.activate("a/b/c")
    assert model.pristine.kind == "device"
    expected = bits(base)
    model.detach()
    del model
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved(CUDA) + (4 << 20)) / total, CUDA
    )
    try:
        held = []
        for nbytes in (1 << 22, 1 << 21, 1 << 16):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    held.append(torch.empty(nbytes, dtype=torch.uint8, device=CUDA))
        del held[-16:]  # a MiB for the switch itself; a copy of one weight takes eight
        model = lt.attach(tree, base, pristine="device")
        with pytest.warns(RuntimeWarning, match="no room on the device"):
            model.activate("a/b/c")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    assert model.pristine.kind == "host"
    assert same(bits(base), expected)


def test_a_foreign_write_is_noticed() -> None:
    base = zoo(torch.bfloat16)
    model = lt.attach(forest(base, torch.bfloat16), base)
    model.activate("a/b")
    base.linear.weight.data[0, 0] += 1.0  # no version counter sees it
    with pytest.raises(LoraTreeError, match=r"linear\.weight: written or replaced by other code"):
        model.activate("a")
    model.trust("pristine")
    assert model.active == ""


# ---------------------------------------------------------------------- no waiting
def net(dtype: torch.dtype = torch.bfloat16, width: int = 128) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*layers).to(CUDA, dtype).requires_grad_(False)


def small(
    base: nn.Module, factors: torch.dtype = torch.bfloat16, where: torch.device | str = "cpu"
) -> lt.AdapterTree:
    tree = lt.AdapterTree()
    draw = torch.Generator().manual_seed(2)
    for path in PATHS:
        modules = {}
        for name, module in base.named_modules():
            if isinstance(module, nn.Linear):
                A = torch.randn(8, module.in_features, generator=draw) * 0.1
                B = torch.randn(module.out_features, 8, generator=draw) * 0.1
                modules[name] = lt.LowRank(A.to(where, factors), B.to(where, factors), 0.5)
        tree.add(path, adapter=lt.Adapter(modules))
    return tree


def test_a_forward_beside_the_weights_and_a_new_batch_wait_for_nothing() -> None:
    base = net()
    model = lt.attach(small(base), base)
    x = torch.randn(6, 5, 128, device=CUDA, dtype=torch.bfloat16)
    with torch.no_grad():
        model.activate("a/b/c", mode="unmerged")
        with model.route(["a", "", "e", "a/d", "e/f", "a/b/c"]):
            base(x)
        with no_waiting():
            base(x)
            model.activate("a/d", mode="unmerged")
            base(x)
            for strategy in ("auto", "nodes", "paths", "grouped", "matrix", "segmented"):
                with model.route(["e", "a/b/c", "", "a/d", "a", "a/b"], strategy=strategy):  # type: ignore[arg-type]
                    base(x)


def test_a_path_is_added_from_what_was_sent_and_takes_no_memory_beside_it() -> None:
    base = net()
    model = lt.attach(small(base), base, device_budget="64MiB")
    x = torch.randn(6, 5, 128, device=CUDA, dtype=torch.bfloat16)
    with torch.no_grad():
        for path in ("a/b/c", "e/f", "a"):
            model.activate(path, mode="merged")
            merged = base(x)
            model.activate(path, mode="unmerged")
            torch.testing.assert_close(base(x), merged, rtol=2**-5, atol=2**-4)
            assert model.cache.stats().tiers[-1].laid_out_bytes == 0


def test_a_training_step_waits_for_nothing_and_its_factors_are_where_the_base_is() -> None:
    base = net()
    model = lt.attach(small(base), base).train()
    groups = model.trainable("a/b", "a/d", "e/f")
    assert {p.device for group in groups for p in group["params"]} == {CUDA}
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    model.follow(optimizer)
    x = torch.randn(6, 5, 128, device=CUDA, dtype=torch.bfloat16)
    labels = torch.randint(0, 128, (6, 5), device=CUDA)

    def step(paths: list[str]) -> None:
        with model.route(paths, batch_first=True):
            lt.path_loss(model(x), labels, paths).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(["a/b", "a/d", "e/f", "a/b", "a/d", "e/f"])
    before = [p.detach().clone() for group in groups for p in group["params"]]
    with no_waiting():
        step(["a/d", "e/f", "a/b", "e/f", "a/d", "a/b"])
    after = [p for group in groups for p in group["params"]]
    assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_merged_switch_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = net()
    model = lt.attach(small(base), base)
    for path in ("a/b", "a/d", "a/b"):
        model.activate(path)
    compared: list[Tensor] = []
    real = torch.equal

    def equal(x: Tensor, y: Tensor) -> bool:
        compared.append(x)
        torch.cuda.set_sync_debug_mode("default")
        try:
            return real(x, y)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(torch, "equal", equal)
    with no_waiting():
        model.activate("a/d")
    assert len(compared) == 1


# ---------------------------------------------------------------------- placement
def test_trained_nodes_are_saved_flattened_and_exported_with_parents_on_the_host(
    tmp_path: Path,
) -> None:
    base = net()
    tree = small(base)
    model = lt.attach(tree, base)
    model.trainable("a/b")
    by_hand = tree.flatten("a/b/c").to(device="cpu")
    tree.save(tmp_path / "zoo")
    again = lt.load(tmp_path / "zoo")
    assert torch.equal(
        again.flatten("a/b/c").modules["0"].A.cpu().float(), by_hand.modules["0"].A.float()
    )
    model.trainable()
    model.activate("a/b/c")
    merged = base[0].weight.clone()
    model.detach()
    lt.attach(again, base).activate("a/b/c")
    assert torch.equal(base[0].weight, merged)


def test_a_base_that_is_moved_takes_adapters_and_factors_along() -> None:
    base = net().cpu()
    model = lt.attach(small(base), base)
    model.activate("a/b", mode="unmerged")
    groups = model.trainable("a/b")
    model.to(CUDA)
    assert {p.device for p in groups[0]["params"]} == {CUDA}
    model.activate("a/b", mode="unmerged")
    x = torch.randn(2, 3, 128, device=CUDA, dtype=torch.bfloat16)
    model(x).sum().backward()
    model.trainable()
    model.activate("a/d")
    assert model.cache.stats().tiers[-1].name == "device"
    assert model.pristine.kind == "device"


# ---------------------------------------------------------------------- cache and threads
def test_threads_share_a_base_under_tight_budgets(tmp_path: Path) -> None:
    base = net(torch.float32)
    tree = small(base, torch.float32)
    x = torch.randn(3, 128, device=CUDA)
    expected = {}
    model = lt.attach(tree, base)
    with torch.no_grad():
        for path in PATHS:
            with model.using(path):
                expected[path] = base(x)
    model.detach()
    tree.save(tmp_path / "zoo")
    one = tree.adapter("a").nbytes  # type: ignore[union-attr]
    model = lt.attach(lt.load(tmp_path / "zoo"), base, host_budget=8 * one, device_budget=8 * one)
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            path, mode = rng.choice(PATHS), rng.choice(["merged", "unmerged"])
            with torch.no_grad(), model.using(path, mode=mode):  # type: ignore[arg-type]
                model.prefetch(rng.choice(PATHS))
                if not torch.allclose(base(x), expected[path], rtol=1e-4, atol=1e-4):
                    wrong.append(path)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    host, device = model.cache.stats().tiers
    assert device.held_bytes <= 8 * one
    assert host.held_bytes <= 8 * one
    assert device.loads > 0


def _wide(width: int, rank: int, layers: int) -> tuple[nn.Sequential, lt.AdapterTree]:
    """Return a base on the device, and a tree of four nodes in host memory."""
    base = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).to(CUDA)
    tree = lt.AdapterTree()
    for i in range(4):
        values = {}
        for name in range(layers):
            values[str(name)] = lt.LowRank(torch.randn(rank, width), torch.randn(width, rank))
        tree.add(f"n{i}", adapter=lt.Adapter(values))
    return base.requires_grad_(False), tree


def _check_arrived(model: lt.TreeModel, path: str, wanted: lt.Adapter) -> None:
    sent = model._stage.current.adapters[path]
    for name, value in wanted.modules.items():
        for there, here in zip(sent.modules[name].tensors, value.tensors, strict=True):
            assert there.device == CUDA
            assert torch.equal(there.cpu(), here)


def test_what_is_read_from_files_is_page_locked_and_arrives_whole(tmp_path: Path) -> None:
    base, tree = _wide(2048, 32, 1)
    tree.save(tmp_path / "zoo")
    opened = lt.load(tmp_path / "zoo")
    one = tree.adapter("n0").nbytes  # type: ignore[union-attr]
    # The host's tier holds two, so memory is unlocked, reused, and freed while a copy from it runs.
    model = lt.attach(opened, base, host_budget=2 * one + 8192, device_budget=2 * one)
    for path in [*opened.paths(), *opened.paths(), "n3", "n2"]:
        model.activate(path, mode="unmerged")
        held, wanted = opened.adapter(path), tree.adapter(path)
        assert held is not None
        assert wanted is not None
        assert all(tensor.is_pinned() for tensor in held.modules["0"].tensors)
        _check_arrived(model, path, wanted)


def test_values_in_memory_arrive_whole_through_staging_buffers() -> None:
    base, tree = _wide(4096, 256, 3)  # 25 MB: more than both buffers hold
    model = lt.attach(tree, base, device_budget="60MiB")
    for path in [*tree.paths(), *tree.paths()]:
        model.activate(path, mode="unmerged")
        wanted = tree.adapter(path)
        assert wanted is not None
        _check_arrived(model, path, wanted)


# ---------------------------------------------------------------------- compiled, and captured
def test_a_prepared_base_compiles_once_for_all_paths() -> None:
    base = net(torch.float32)
    tree = small(base, torch.float32)
    plain = lt.attach(copy.deepcopy(tree), copy.deepcopy(base))
    model = lt.attach(tree, base)
    model.prepare(max_rank=32)
    compiled: Any = torch.compile(base)
    x = torch.randn(4, 5, 128, device=CUDA)
    with torch.no_grad():
        for path in ("a/b/c", "e/f"):
            with model.using(path, mode="unmerged"), plain.using(path, mode="unmerged"):
                torch.testing.assert_close(compiled(x), plain.base(x), rtol=1e-4, atol=1e-4)
        for paths in (["a", "", "e", "a/d"], ["e/f", "a", "a", ""]):
            with model.route(paths), plain.route(paths):
                torch.testing.assert_close(compiled(x), plain.base(x), rtol=1e-4, atol=1e-4)


def test_a_captured_graph_runs_the_path_that_was_merged_since() -> None:
    base = net(torch.float32)
    model = lt.attach(small(base, torch.float32), base)
    x = torch.randn(4, 128, device=CUDA)
    with torch.no_grad():
        model.activate("a")
        base(x)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            base(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = base(x)
        for path in ("a/b/c", "", "e/f"):
            model.activate(path)
            graph.replay()
            assert torch.equal(out, base(x)), path


def test_an_adapter_that_comes_back_is_the_same_and_its_paths_are_as_they_were(
    tmp_path: Path,
) -> None:
    base = net()
    small(base).save(tmp_path / "zoo")
    tree = lt.load(tmp_path / "zoo")
    nbytes = 4 * 2 * 8 * 128 * 2  # four layers, A and B, rank 8, bf16
    model = lt.attach(tree, base, host_budget="64MiB", device_budget=4 * nbytes)
    x = torch.randn(4, 128, device=CUDA, dtype=torch.bfloat16)
    found: dict[tuple[str, str], torch.Tensor] = {}
    with torch.no_grad():
        for _ in range(3):
            for path in ("a/b/c", "e/f", "a/d"):
                for mode in ("unmerged", "merged"):
                    model.activate(path, mode=mode)  # type: ignore[arg-type]
                    y = base(x)
                    assert torch.equal(y, found.setdefault((path, mode), y))
                    model.deactivate()
    assert model.cache.stats().tiers[-1].evictions > 6
