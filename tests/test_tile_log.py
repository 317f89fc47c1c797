"""Undo logs by our own kernel, run by Triton's interpreter: the base comes back bit for bit.

The interpreter multiplies no bf16 and rounds to it by cutting off. Codes hold the difference to
whatever was rounded, so bf16 bases come back here, too; what a GPU does is tested on one.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import interpreted
from sampling import sampled
from test_kernels import bits, exact, forest, part, same
from torch import Tensor

import lora_tree as lt
from lora_tree.engine.kernels import BARE, NO_TERMS, LogMemory, LogPart, MergeTerm
from lora_tree.engine.kernels.log_part import WIDTH
from lora_tree.engine.switching import undo_log

pytest.importorskip("triton", reason="Triton has no build for this platform")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def merge() -> Iterator[Any]:
    yield from interpreted("merge")


@pytest.fixture(scope="module")
def undo(merge: Any) -> Iterator[Any]:
    # Its sums are those of `merge`, so it has to find the one for the interpreter. There numpy
    # multiplies, and a product's bits depend on its width, so both have tiles of one width.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "COLUMNS", WIDTH)
        patch.setitem(sys.modules, "lora_tree.engine.kernels.merge", merge)
        yield from interpreted("undo")


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(undo_log.INTEGERS[tensor.itemsize])


SHAPES = [
    ((1, 64, 128), (16,), False),
    ((1, 70, 130), (3, 20), False),
    ((3, 65, 34), (8, 8), False),
    ((2, 66, 33), (8,), False),  # no pairs
    ((1, 10, 600), (1, 2), True),
]


@pytest.mark.parametrize(
    ("weight", "factor"),
    sampled(
        itertools.product(DTYPES, DTYPES[:2]),
        [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ),
    ids=str,
)
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
        old.append((BARE, NO_TERMS))
    for state, scale in enumerate((0.001, 0.01, 0.001, 0.0), 1):
        parts, wanted = [], []
        for i, (shape, ranks, turned) in enumerate(SHAPES):
            each = part(weight, factor, shape, ranks, turned=turned)
            terms = [MergeTerm(t.left, t.right, t.scale * scale) for t in each.terms if scale]
            states = old[i][0], state if terms else BARE
            laid = undo.lay_out_terms(terms, shape[0])
            parts.append(LogPart(held[i], memories[i], old[i][1], laid, states))
            merged = type(each)(each.weight, own[i], terms)
            wanted.append(exact(merged))
            if terms:
                merge.lay_out_parts([merged], interpreted=True).run()
                wanted[-1] = merged.weight
            old[i] = (states[1], laid)
        assert undo.rewrite(parts, interpreted=True) == [False] * len(SHAPES)
        for mine, theirs in zip(held, wanted, strict=True):
            assert torch.equal(raw(mine), raw(theirs.to(weight))), "the bits of a merge"
    assert all(torch.equal(raw(a), raw(b)) for a, b in zip(held, own, strict=True))


@pytest.mark.parametrize("shape", [(1, 64, 128), (2, 65, 70)], ids=str)
def test_terms_of_any_number_of_slots_follow_one_another(
    undo: Any, merge: Any, shape: tuple[int, int, int]
) -> None:
    """Slots are filled up where old and new have not as many; their scales may differ or not."""
    own = part(torch.float16, torch.float16, shape, (1,)).pristine
    held, memory = own.clone(), LogMemory.of(own, 64, share=1)
    history = [
        ((16,), (0.01,)),
        ((3, 20, 8), (0.01, 0.01, 0.01)),
        ((8, 8), (0.01, -0.003)),
        ((3, 20, 8, 40), (0.01, 0.01, -0.02, 0.01)),  # more slots than are unrolled
        ((1,), (0.02,)),
    ]
    state, old = BARE, NO_TERMS
    for number, (ranks, scales) in enumerate(history, 1):
        merged = part(torch.float16, torch.float16, shape, ranks, scales=scales)
        merged = type(merged)(merged.weight, own, merged.terms)
        merge.lay_out_parts([merged], interpreted=True).run()
        new = undo.lay_out_terms(merged.terms, shape[0])
        one = LogPart(held, memory, old, new, (state, number))
        assert undo.rewrite([one], interpreted=True) == [False]
        assert torch.equal(raw(held), raw(merged.weight)), ranks
        state, old = number, new
    assert undo.rewrite(
        [LogPart(held, memory, old, NO_TERMS, (state, BARE))], interpreted=True
    ) == [False]
    assert torch.equal(raw(held), raw(own))


@pytest.mark.parametrize("weight", [torch.float32, torch.float16], ids=str)
def test_the_codes_and_exceptions_are_those_of_stock_operations(
    undo: Any, merge: Any, weight: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(3)
    own = (torch.randn(1, 64, 64, generator=draw) * 0.02).to(weight)
    own[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 65504.0])
    # Small whole numbers: their products are exact in any order.
    left = torch.randint(-3, 4, (1, 64, 8), generator=draw).half()
    right = torch.randint(-3, 4, (1, 8, 64), generator=draw).half()
    held, memory = own.clone(), LogMemory.of(own, 64, share=1)
    laid = undo.lay_out_terms([MergeTerm(left, right, 2.0**-9)], 1)
    put_in = LogPart(held, memory, NO_TERMS, laid, (BARE, 1))
    assert undo.rewrite([put_in], interpreted=True) == [False]
    delta = (left.float() @ right.float() * 2.0**-9)[0]
    after = (own[0].float() + delta).to(weight)
    log = undo_log._encoded(own[0], after, delta, (), 1)
    assert torch.equal(raw(held[0]), raw(after))
    # Byte j of 32 columns has columns j, j + 8, j + 16 and j + 24, where stock operations take four
    # that lie side by side; and a code of 1 is stored as 0.
    by_byte = memory.codes.view(64, 2, 1, 8) ^ 0x55
    codes = [(by_byte >> (2 * i)) & 3 for i in range(4)]
    by_column = torch.cat(codes, dim=2).flatten()
    found = {}
    for row in range(64):
        begin, end = memory.ends[0, row : row + 2].tolist()
        for i in range(begin, end):
            found[64 * row + int(memory.columns[0, i])] = int(memory.bits[0, i])
    assert len(found) == end > 0
    # A pair's second number is in the reach of the first one's carry if that is an exception.
    carried = {place + 1 for place in found if place % 2 == 0 and weight != torch.float32}
    wanted = dict(zip(log.places.tolist(), log.bits.tolist(), strict=True))
    assert {p: b for p, b in found.items() if p not in carried} == {
        p: b for p, b in wanted.items() if p not in carried
    }
    assert all(int(raw(own).flatten()[place]) == bits for place, bits in found.items())
    differ = (by_column != undo_log._unpacked(log.codes, 64 * 64)).nonzero().flatten().tolist()
    assert set(differ) <= carried
    assert int(memory.depths[0]) == memory.ends[0].int().diff().max()


def test_a_tile_without_room_is_left_as_it_was_and_says_so(undo: Any, merge: Any) -> None:
    draw = torch.Generator().manual_seed(3)
    own = torch.randn(1, 130, 260, generator=draw).half()
    own[0, :64, :64] *= 1e-4  # the first tile loses its numbers in the increment
    held, memory = own.clone(), LogMemory.of(own, 64)
    left, right = torch.randn(1, 130, 4, generator=draw), torch.randn(1, 4, 260, generator=draw)
    laid = undo.lay_out_terms([MergeTerm(left.half(), right.half(), 0.002)], 1)
    put_in = LogPart(held, memory, NO_TERMS, laid, (BARE, 7))
    assert undo.rewrite([put_in], interpreted=True) == [True]
    assert memory.states.tolist()[0] == BARE
    assert set(memory.states.tolist()[1:]) == {7}
    assert torch.equal(held[0, :64, :64], own[0, :64, :64])
    assert not torch.equal(held, own)
    take_out = LogPart(held, memory, laid, NO_TERMS, (7, BARE))
    assert undo.rewrite([take_out], interpreted=True) == [False]
    assert torch.equal(held, own)


# ---------------------------------------------------------------------- a whole model
@pytest.fixture
def rewritten(undo: Any, merge: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Logs are written by the kernel, as on CUDA; the parts of every launch that is laid out."""
    launched: list[int] = []

    def launch(parts: list[LogPart]) -> Any:
        launched.append(len(parts))
        return undo.lay_out_logs(parts, interpreted=True)

    monkeypatch.setattr("lora_tree.engine.switching.tile_log.logs", lambda device: True)
    monkeypatch.setattr("lora_tree.engine.switching.pristine.logs", lambda device: True)
    monkeypatch.setattr("lora_tree.engine.switching.tile_log.log_launch", launch)
    monkeypatch.setattr("lora_tree.engine.switching.tile_log.lay_terms", undo.lay_out_terms)
    monkeypatch.setattr("lora_tree.engine.switching.merged.usable", lambda device: True)
    monkeypatch.setattr(
        "lora_tree.engine.switching.merged.merge_launch",
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


@pytest.mark.parametrize("place", sampled(["log", "auto"], ["log"]))
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


def test_terms_are_laid_out_once_for_a_plan_while_its_factors_stay_where_they_are(
    rewritten: list[int], undo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, base = small()
    laid = 0

    def counted(*args: Any) -> Any:
        nonlocal laid
        laid += 1
        return undo.lay_out_terms(*args)

    monkeypatch.setattr("lora_tree.engine.switching.tile_log.lay_terms", counted)
    model = lt.attach(tree, base, pristine="log")
    model.activate("a/b")
    merged = bits(base)
    model.activate("d")
    before = laid
    for path in ("a/b", "d", "a/b"):
        model.activate(path)
    launches = len(rewritten)
    for path in ("d", "a/b", "d", "a/b"):
        model.activate(path)
        assert same(bits(base), merged) == (path == "a/b")
    assert len(rewritten) == launches, "known launches run again"
    model.activate("")
    model.activate("a/b")
    assert len(rewritten) > launches, "a log's memory is another one after that"
    assert laid == before
    assert same(bits(base), merged)
    # As if a cache had evicted the adapters since, and sent them to other places.
    monkeypatch.setattr("lora_tree.engine.plan.Plan.places", lambda plan: (1,))
    model.activate("d")
    assert laid > before


def test_a_switch_that_is_cut_off_is_taken_back(
    rewritten: list[int], undo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, base = small()
    bare = bits(base)
    model = lt.attach(tree, base, pristine="log")
    model.activate("a/b")
    before = bits(base)
    turns = iter([True])

    real = undo.LaidLogs.run

    def failing(launch: Any) -> Any:
        found = real(launch)
        if next(turns, False):
            raise KeyboardInterrupt  # everything is written, and nobody has noted it
        return found

    # In the second round the launch is one that was kept.
    model.activate("d")
    model.activate("a/b")
    for start, kept in (("a/b", before), ("", bare)):
        model.activate(start)
        turns = iter([True])
        monkeypatch.setattr(undo.LaidLogs, "run", failing)
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
