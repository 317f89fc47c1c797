"""Undo logs by our own kernel, run by Triton's interpreter: the base comes back bit for bit.

The interpreter multiplies no bf16 and rounds to it by cutting off. Codes hold the difference to
whatever was rounded, so bf16 bases come back here, too; what a GPU does is tested on one.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_kernels import bits, exact, forest, interpreted, part, same
from torch import Tensor

import lora_tree as lt
from lora_tree.engine import undo_log
from lora_tree.engine.kernels import BARE, LogMemory, LogPart, MergeTerm

pytest.importorskip("triton", reason="Triton has no build for this platform")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def merge() -> Iterator[Any]:
    yield from interpreted("merge")


@pytest.fixture(scope="module")
def undo(merge: Any) -> Iterator[Any]:
    # Its tiles and sums are those of `merge`, so it has to find the one for the interpreter.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lora_tree.engine.kernels.merge", merge)
        yield from interpreted("undo")


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(undo_log.INTEGERS[tensor.itemsize])


SHAPES = [
    ((1, 64, 128), (16,), False),
    ((1, 70, 130), (3, 20), False),
    ((3, 65, 34), (8, 8), False),
    ((1, 10, 600), (1, 2), True),
]


@pytest.mark.parametrize("factor", DTYPES[:2], ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
def test_weights_go_from_terms_to_terms_in_place_and_come_back(
    undo: Any, merge: Any, weight: torch.dtype, factor: torch.dtype
) -> None:
    own, held, memories, old = [], [], [], []
    for shape, ranks, turned in SHAPES:
        each = part(weight, factor, shape, ranks, turned=turned)
        own.append(each.pristine)
        held.append(each.pristine.clone())
        height = merge.ROWS[factor]
        memories.append(LogMemory.of(each.pristine, height, share=1))
        old.append((BARE, ()))
    for state, scale in enumerate((0.001, 0.01, 0.001, 0.0), 1):
        parts, wanted = [], []
        for i, (shape, ranks, turned) in enumerate(SHAPES):
            each = part(weight, factor, shape, ranks, turned=turned)
            terms = [MergeTerm(t.left, t.right, t.scale * scale) for t in each.terms if scale]
            states = old[i][0], state if terms else BARE
            parts.append(LogPart(held[i], memories[i], old[i][1], terms, states))
            merged = type(each)(each.weight, own[i], terms)
            wanted.append(exact(merged))
            if terms:
                merge.lay_out_parts([merged], interpreted=True).run()
                wanted[-1] = merged.weight
            old[i] = (states[1], terms)
        assert undo.rewrite(parts, interpreted=True) == [False] * len(SHAPES)
        for mine, theirs in zip(held, wanted, strict=True):
            assert torch.equal(raw(mine), raw(theirs.to(weight))), "the bits of a merge"
    assert all(torch.equal(raw(a), raw(b)) for a, b in zip(held, own, strict=True))


@pytest.mark.parametrize("weight", [torch.float32, torch.float16], ids=str)
def test_the_codes_and_exceptions_are_those_of_stock_operations(
    undo: Any, merge: Any, weight: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(3)
    own = (torch.randn(1, 64, 128, generator=draw) * 0.02).to(weight)
    own[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 65504.0])
    # Small whole numbers: their products are exact in any order.
    left = torch.randint(-3, 4, (1, 64, 8), generator=draw).half()
    right = torch.randint(-3, 4, (1, 8, 128), generator=draw).half()
    held, memory = own.clone(), LogMemory.of(own, 64, share=1)
    terms = [MergeTerm(left, right, 2.0**-9)]
    assert undo.rewrite([LogPart(held, memory, (), terms, (BARE, 1))], interpreted=True) == [False]
    delta = (left.float() @ right.float() * 2.0**-9)[0]
    after = (own[0].float() + delta).to(weight)
    log = undo_log._encoded(own[0], after, delta, (), 1)
    assert torch.equal(raw(held[0]), raw(after))
    assert torch.equal(memory.codes.flatten(), log.codes)
    count = int(memory.counts[0])
    assert count == len(log.places) > 0
    assert torch.equal(memory.places[0, :count].int(), log.places)
    assert torch.equal(memory.bits[0, :count], log.bits)


def test_a_tile_without_room_is_left_as_it_was_and_says_so(undo: Any, merge: Any) -> None:
    draw = torch.Generator().manual_seed(3)
    own = torch.randn(1, 130, 260, generator=draw).half()
    own[0, :64, :128] *= 1e-4  # the first tile loses its numbers in the increment
    held, memory = own.clone(), LogMemory.of(own, 64)
    left, right = torch.randn(1, 130, 4, generator=draw), torch.randn(1, 4, 260, generator=draw)
    terms = [MergeTerm(left.half(), right.half(), 0.002)]
    assert undo.rewrite([LogPart(held, memory, (), terms, (BARE, 7))], interpreted=True) == [True]
    assert memory.states.tolist()[0] == BARE
    assert set(memory.states.tolist()[1:]) == {7}
    assert torch.equal(held[0, :64, :128], own[0, :64, :128])
    assert not torch.equal(held, own)
    assert undo.rewrite([LogPart(held, memory, terms, (), (7, BARE))], interpreted=True) == [False]
    assert torch.equal(held, own)


# ---------------------------------------------------------------------- a whole model
@pytest.fixture
def rewritten(undo: Any, merge: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Logs are written by the kernel, as on CUDA; the number of parts of every launch."""
    launched: list[int] = []

    def rewrite(parts: list[LogPart]) -> Any:
        launched.append(len(parts))
        return undo.rewrite(parts, interpreted=True)

    monkeypatch.setattr("lora_tree.engine.tile_log.logs", lambda device: True)
    monkeypatch.setattr("lora_tree.engine.pristine.logs", lambda device: True)
    monkeypatch.setattr("lora_tree.engine.tile_log.rewrite_logs", rewrite)
    monkeypatch.setattr("lora_tree.engine.merged.usable", lambda device: True)
    monkeypatch.setattr(
        "lora_tree.engine.merged.merge_launch",
        lambda parts: merge.lay_out_parts(parts, interpreted=True),
    )
    return launched


def small() -> tuple[lt.AdapterTree, Any]:
    """Increments small beside the weights: each exception takes the interpreter long."""
    tree, base = forest()
    for path in tree.paths():
        adapter = tree.adapter(path)
        assert adapter is not None
        for value in adapter.modules.values():
            value.B.mul_(0.1)
    return tree, base.half()


@pytest.mark.parametrize("place", ["log", "auto"])
def test_every_history_ends_in_the_bits_of_a_fresh_model(rewritten: list[int], place: Any) -> None:
    tree, base = small()
    bare = bits(base)
    fresh = {"": bare}
    for path in ("a/b", "a/c", "d"):
        model = lt.attach(tree, base, pristine=place)
        model.activate(path)
        fresh[path] = bits(base)
        assert model.pristine.kind == "log"
        assert 0 < model.pristine.log_bytes
        model.detach()
        assert same(bits(base), bare)
    model = lt.attach(tree, base, pristine=place)
    rng = random.Random(0)
    for _ in range(12):
        path = rng.choice(list(fresh))
        model.activate(path)
        assert same(bits(base), fresh[path]), path
    assert max(rewritten) == 4, "one launch for all sites"
    model.detach()
    assert same(bits(base), bare)


def test_a_switch_that_is_cut_off_is_taken_back(
    rewritten: list[int], undo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, base = small()
    bare = bits(base)
    model = lt.attach(tree, base, pristine="log")
    model.activate("a/b")
    before = bits(base)
    turns = iter([True])

    def failing(parts: list[LogPart]) -> Any:
        found = undo.rewrite(parts, interpreted=True)
        if next(turns, False):
            raise KeyboardInterrupt  # everything is written, and nobody has noted it
        return found

    for start, kept in (("a/b", before), ("", bare)):
        model.activate(start)
        turns = iter([True])
        monkeypatch.setattr("lora_tree.engine.tile_log.rewrite_logs", failing)
        with pytest.raises(KeyboardInterrupt):
            model.activate("d")
        assert model.active == start
        assert same(bits(base), kept)
    model.detach()
    assert same(bits(base), bare)


def test_the_room_grows_and_a_log_that_is_too_large_gives_way_to_a_copy(
    rewritten: list[int],
) -> None:
    tree, base = small()
    bare = bits(base)
    adapter = tree.adapter("d")
    assert adapter is not None
    huge = {
        n: lt.LowRank(v.A * 40, v.B * 400, v.scale, None, v.layout)
        for n, v in adapter.modules.items()
    }
    tree.update("d", adapter=lt.Adapter(huge))
    model = lt.attach(tree, base, pristine="log")
    model.activate("a/b")
    merged = bits(base)
    with pytest.warns(RuntimeWarning, match="more than half of their memory"):
        model.activate("d")
    large = bits(base)
    assert model.pristine.host_bytes > 0
    for path, wanted in (("a/b", merged), ("d", large), ("", bare), ("d", large)):
        model.activate(path)
        assert same(bits(base), wanted), path
    model.detach()
    assert same(bits(base), bare)
