"""pristine="log": the base's own bits come back from two bits a weight, whatever was merged before.

What is compared with are the base's bits before `attach`, a fresh model, and dense float64 sums by
hand.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from oracle import coefficients, dense
from test_kernels import bits, forest, same
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.engine.arithmetic import Scratch, exact_mode
from lora_tree.engine.switching import undo_log
from lora_tree.engine.switching.undo_log import UndoLog
from lora_tree.errors import ForeignWrite, StateError
from lora_tree.sites import find_site

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight has several blocks, and the last one is short."""
    monkeypatch.setattr(undo_log, "BLOCK", 700)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("factors", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_history_ends_in_the_bits_of_a_fresh_model_and_the_base_comes_back(
    dtype: torch.dtype, factors: torch.dtype
) -> None:
    tree, base = forest()
    for path in tree.paths():
        adapter = tree.adapter(path)
        assert adapter is not None
        tree.update(path, adapter=adapter.to(dtype=factors))
    base = base.to(dtype)
    bare = bits(base)
    fresh = {}
    for path in ("a/b", "a/c", "d"):
        model = lt.attach(tree, base, pristine="log")
        model.activate(path)
        fresh[path] = bits(base)
        model.detach()
        assert same(bits(base), bare), path
    rng = random.Random(0)
    model = lt.attach(tree, base, pristine="log")
    for _ in range(30):
        path = rng.choice(["", *fresh])
        model.activate(path)
        assert same(bits(base), fresh[path] if path else bare), path
    assert model.pristine.kind in ("log", "none")
    model.activate("a/b")
    assert (model.pristine.kind, model.pristine.host_bytes) == ("log", 0)
    model.detach()
    assert same(bits(base), bare)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merge_is_one_rounding_of_the_dense_sum(dtype: torch.dtype) -> None:
    tree, base = forest()
    base = base.to(dtype)
    own: Tensor = base.linear.weight.detach().double()  # type: ignore[union-attr, operator]
    wanted = own.clone()
    for node, c in coefficients(tree, "a/b").items():
        adapter = tree.adapter(node)
        assert adapter is not None
        value = adapter.modules["linear"]
        wanted += dense(value) * c  # its scale is in it
    lt.attach(tree, base, pristine="log").activate("a/b")
    got: Any = base.linear.weight.double()  # type: ignore[union-attr, operator]
    bound = wanted.abs() * torch.finfo(dtype).eps / 2 + 1e-6
    assert ((got - wanted).abs() <= bound).all()


def log_of(own: Tensor, *, out: int) -> tuple[Tensor, UndoLog]:
    base = nn.Sequential(nn.Linear(own.shape[1], out, bias=False)).to(own.dtype)
    base.requires_grad_(False)
    weight: Tensor = base[0].weight  # type: ignore[assignment]
    weight.copy_(own)
    return weight, UndoLog(find_site(base, "0"), weight)


def value(out: int, into: int, size: float, dtype: torch.dtype, seed: int = 0) -> lt.LowRank:
    draw = torch.Generator().manual_seed(seed)
    A, B = torch.randn(48, into, generator=draw), torch.randn(out, 48, generator=draw)
    return lt.LowRank((A * size).to(dtype), (B * size).to(dtype), 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_at_every_edge_of_the_dtype_come_back(dtype: torch.dtype) -> None:
    """−0, infinities, NaNs with a payload, subnormal and largest numbers, random bits."""
    whole = undo_log.INTEGERS[dtype.itemsize]
    edge = torch.finfo(dtype)
    special = [0.0, -0.0, edge.max, -edge.max, edge.tiny, -edge.smallest_normal / 4, float("inf")]
    own = torch.randint(-(1 << 15), 1 << 15, (60, 64), dtype=torch.int64)
    if dtype == torch.float32:
        own = own * 65_537 + 12_345
    numbers = own.to(whole).view(dtype).clone()
    numbers[0, : len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)
    weight, log = log_of(numbers, out=60)
    with exact_mode(CPU):
        for size in (1e-3, 0.3, 10.0):
            log.write(weight, [value(60, 64, size, torch.float32)], Scratch())
            assert torch.equal(log.own(weight).view(whole), numbers.view(whole))
        log.write(weight, [], Scratch())
    assert torch.equal(weight.view(whole), numbers.view(whole))


@pytest.mark.parametrize(("size", "most"), [(0.003, 0.13), (0.01, 0.15), (0.03, 0.25)])
def test_the_log_of_ordinary_increments_takes_an_eighth_of_the_weight(
    size: float, most: float
) -> None:
    """Increments of 0.3 %, 3.5 % and 31 % of the weights' spread; adapters have the first two."""
    own = (torch.randn(512, 512, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    weight, log = log_of(own, out=512)
    with exact_mode(CPU):
        log.write(weight, [value(512, 512, size, torch.bfloat16)], Scratch())
        assert log.nbytes <= most * weight.nbytes
        log.write(weight, [value(512, 512, size, torch.bfloat16, seed=1)], Scratch())
        log.write(weight, [], Scratch())
    assert torch.equal(weight, own)


def test_where_a_log_would_be_larger_than_half_of_the_weight_a_copy_takes_its_place() -> None:
    tree, base = forest()
    base = base.bfloat16()
    bare = bits(base)
    for path in tree.paths():  # in bf16, for which stock operations may have another product
        narrow = tree.adapter(path)
        assert narrow is not None
        tree.update(path, adapter=narrow.to(dtype=torch.bfloat16))
    adapter = tree.adapter("d")
    assert adapter is not None
    huge = {
        n: lt.LowRank(v.A * 40, v.B * 40, v.scale, None, v.layout)
        for n, v in adapter.modules.items()
    }
    tree.update("d", adapter=lt.Adapter(huge))
    model = lt.attach(tree, base, pristine="log")
    with pytest.warns(RuntimeWarning, match="more than half of their memory"):
        model.activate("d")
    first = bits(base)
    assert model.pristine.host_bytes > 0
    for path in ("a/b", "d", "", "d"):
        model.activate(path)
    assert same(bits(base), first)
    model.activate("a/b")
    merged = bits(base)
    model.detach()
    assert same(bits(base), bare)
    lt.attach(tree, base, pristine="log").activate("a/b")
    assert same(bits(base), merged), "the same bits from a copy as from a log"


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("start", ["", "d"])
def test_a_fault_at_any_block_leaves_the_state_before(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, base = forest()
    base = base.bfloat16()
    model = lt.attach(tree, base, pristine="log")
    model.activate("a/b")
    merged = bits(base)
    model.activate(start)
    before = bits(base)
    real = undo_log._encoded
    calls = 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*args)

    monkeypatch.setattr(undo_log, "_encoded", counted)
    model.activate("a/b")
    total = calls
    model.activate(start)
    assert total > 8
    for n in range(total):
        turns = itertools.count()

        def failing(*args: Any, turns: Any = turns, n: int = n) -> Any:
            if next(turns) == n:
                raise MemoryError("no room")
            return real(*args)

        monkeypatch.setattr(undo_log, "_encoded", failing)
        with pytest.raises(MemoryError, match="no room"):
            model.activate("a/b")
        assert same(bits(base), before)
        assert model.active == start
    monkeypatch.setattr(undo_log, "_encoded", real)
    model.activate("a/b")
    assert same(bits(base), merged)


def test_a_foreign_write_is_noticed_and_only_the_weights_as_they_are_can_be_trusted() -> None:
    tree, base = forest()
    model = lt.attach(tree, base, pristine="log")
    model.activate("a/b")
    base.linear.weight.data[0, 0] += 1.0  # type: ignore[union-attr, index]
    written = bits(base)
    with pytest.raises(ForeignWrite, match=r"linear\.weight"):
        model.activate("a")
    with pytest.raises(StateError, match=r"linear\.weight: an undo log brings back only"):
        model.trust("pristine")
    assert same(bits(base), written)
    model.trust("weights")
    model.activate("d")
    model.activate("")
    assert same(bits(base), written)


def test_a_bare_weight_that_its_owner_changes_is_logged_anew() -> None:
    tree, base = forest()
    model = lt.attach(tree, base, pristine="log")
    model.activate("a/b")
    model.activate("")
    with torch.no_grad():
        base.linear.weight.mul_(2)  # type: ignore[union-attr, operator]
    changed = bits(base)
    model.activate("a/b")
    model.activate("")
    assert same(bits(base), changed)


def test_factors_that_train_after_they_were_merged_do_not_matter_to_the_log() -> None:
    tree, base = forest()
    bare = bits(base)
    model = lt.attach(tree, base, pristine="log")
    factors = model.trainable("a/b")[0]["params"]
    model.trainable()
    model.activate("a/b")
    with torch.no_grad():
        for factor in factors:
            factor.add_(1.0)
    model.activate("")
    assert same(bits(base), bare)


def test_a_product_is_repeated_with_as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, log = log_of(torch.randn(64, 64), out=64)
    own, before = weight.clone(), torch.get_num_threads()
    used: list[int] = []
    real = undo_log._delta

    def delta(*args: Any) -> Tensor:
        used.append(torch.get_num_threads())
        return real(*args)

    monkeypatch.setattr(undo_log, "_delta", delta)
    with exact_mode(CPU):
        log.write(weight, [value(64, 64, 0.01, torch.float32)], Scratch())
        torch.set_num_threads(before + 1)
        try:
            log.write(weight, [], Scratch())
            assert torch.get_num_threads() == before + 1
        finally:
            torch.set_num_threads(before)
    assert used == [before, before]
    assert torch.equal(weight, own)


def test_an_increment_is_taken_out_on_the_device_where_it_was_put_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, log = log_of(torch.randn(64, 64), out=64)
    own = weight.clone()
    real = undo_log._add_block
    bare: list[bool] = []

    def add_block(*args: Any) -> None:
        bare.append(log._blocks == [None])
        real(*args)

    monkeypatch.setattr(undo_log, "_add_block", add_block)
    with exact_mode(CPU):
        log.write(weight, [value(64, 64, 0.01, torch.float32)], Scratch())
        log._device = torch.device("cpu", 0)  # as if the weight had been moved since
        log.write(weight, [value(64, 64, 0.01, torch.float32, seed=1)], Scratch())
        assert bare == [True, True]
        assert log._device == weight.device
        assert torch.equal(log.own(weight), own)
        log.write(weight, [], Scratch())
    assert torch.equal(weight, own)


def test_a_weight_that_is_overridden_gets_a_copy_of_its_own() -> None:
    """Its own numbers are then in a copy, from which increments give the bits that a log gives."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(1024, 1100)).requires_grad_(False).bfloat16()
    tree = lt.AdapterTree()
    low = value(1100, 1024, 0.01, torch.bfloat16)
    tree.add("a", adapter=lt.Adapter({"0": low}))
    other = torch.randn(1100, 1024).bfloat16()
    tree.add("b", adapter=lt.Adapter({}, overrides={"0.weight": lt.Override(other)}))
    bare = bits(base)
    model = lt.attach(tree, base, pristine="log")
    model.activate("a")
    assert model.pristine.kind == "log"
    merged = bits(base)
    for path, wanted in (("b", None), ("a", merged), ("b", None), ("", bare)):
        model.activate(path)
        if wanted is None:
            assert torch.equal(base[0].weight, other)
        else:
            assert same(bits(base), wanted)
    assert model.pristine.kind == "host"


def test_a_cast_while_merged_is_noticed() -> None:
    tree, base = forest()
    model = lt.attach(tree, base, pristine="log")
    model.activate("a/b")
    base.half()
    with pytest.raises(ForeignWrite):
        model.activate("")
