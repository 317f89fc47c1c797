"""Memory that goes from hand to hand: nobody's numbers change, nothing is held twice, and nothing
stays behind.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.cache import shelf as module
from lora_tree.cache.shelf import PAGED, Shelf

PAGE = 4096
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere the allocator has the memory"
)

TAKE = st.tuples(st.just("take"), st.integers(1, 40 * PAGE))
DROP = st.tuples(st.just("drop"), st.integers(0, 30))
LESS = st.tuples(st.just("at most"), st.integers(-PAGE, 60 * PAGE))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the system was asked for: (bytes that were there, bytes that are)."""
    asked: list[tuple[int, int]] = []
    plain = module._grow_range

    def grown(address: int, held: int, size: int) -> int:
        asked.append((held, size))
        return plain(address, held, size)

    monkeypatch.setattr(module, "_grow_range", grown)
    return asked


def mapped(address: int) -> bool:
    ranges = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()
    ]
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


@settings(deadline=None)
@given(steps=st.lists(st.one_of(TAKE, TAKE, DROP, LESS), max_size=60))
def test_what_is_held_keeps_its_numbers_whatever_comes_and_goes(
    steps: list[tuple[str, int]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PAGED", 1)
        shelf, held = Shelf(most_bytes=50 * PAGE), list[tuple[int, Tensor]]()
        for i, (what, number) in enumerate(steps):
            if what == "take":
                piece = shelf.take(number)
                assert piece.shape == (number,)
                held.append((i, piece.fill_(i)))
            elif what == "drop" and held:
                del held[number % len(held)]
            elif what == "at most":
                shelf.trim_to(number)
                assert shelf.ready_bytes <= max(number, 0)
            assert shelf.ready_bytes <= 50 * PAGE
            assert all(bool((piece == of).all()) for of, piece in held)
        shelf.close()
        assert shelf.ready_bytes == 0
        assert all(bool((piece == of).all()) for of, piece in held)


@linux
def test_what_comes_back_is_taken_again_in_parts_and_together(made: list[tuple[int, int]]) -> None:
    shelf = Shelf()
    whole = shelf.take(4 * PAGED).fill_(7)
    del whole
    parts = [shelf.take(2 * PAGED) for _ in range(2)]
    assert all(bool((part == 7).all()) for part in parts)
    del parts[0], parts[0]
    again = shelf.take(4 * PAGED)
    assert bool((again == 7).all())
    assert made == [(0, 4 * PAGED)]


@linux
def test_a_piece_for_which_nothing_fits_is_made_of_what_there_is(
    made: list[tuple[int, int]],
) -> None:
    shelf = Shelf()
    one, between, other = (shelf.take(PAGED).fill_(7) for _ in range(3))
    del one, other
    assert shelf.ready_bytes == 2 * PAGED
    large = shelf.take(3 * PAGED)
    assert bool((large[:PAGED] == 7).all())
    assert not large[PAGED:].any()
    assert made[3:] == [(PAGED, 3 * PAGED)]
    assert shelf.ready_bytes == 0, "the other one makes room for what is new"
    assert bool((between == 7).all())


@linux
def test_what_is_not_needed_goes_back_to_the_system() -> None:
    shelf = Shelf(most_bytes=2 * PAGED)
    held, idle, more = (shelf.take(PAGED) for _ in range(3))
    addresses = [piece.data_ptr() for piece in (held, idle, more)]
    del idle
    assert shelf.ready_bytes == PAGED
    assert all(mapped(address) for address in addresses)
    shelf.close()
    assert [mapped(address) for address in addresses] == [True, False, True]
    del more
    held += 1
    assert [mapped(address) for address in addresses] == [True, False, False]


def test_without_the_calls_of_linux_the_allocator_has_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LIBC", None)
    shelf = Shelf()
    piece = shelf.take(PAGED)
    assert piece.shape == (PAGED,)
    del piece
    assert shelf.ready_bytes == 0
    module.trim()


# ---------------------------------------------------------------------- under a budget
WIDTH, R = 2048, 32
NODE = 4 * R * 2 * WIDTH  # bytes
SLACK = 8 * PAGE  # a piece takes whole pages, and counts as what it was asked for


@pytest.fixture
def tree(tmp_path: Path) -> lt.AdapterTree:
    """Eight nodes of half a megabyte."""
    grown, draw = lt.AdapterTree(), torch.Generator().manual_seed(0)
    for i in range(8):
        A, B = torch.randn(R, WIDTH, generator=draw), torch.randn(WIDTH, R, generator=draw)
        grown.add(f"n{i}", adapter=lt.Adapter({"0": lt.LowRank(A, B)}))
    grown.save(tmp_path / "zoo")
    return lt.load(tmp_path / "zoo")


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH))


@linux
@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_a_full_cache_asks_the_system_for_nothing_more(
    tree: lt.AdapterTree, made: list[tuple[int, int]], mode: lt.model.Mode
) -> None:
    budget = 4 * NODE
    model = lt.attach(tree, base(), host_budget=budget)
    for path in [*tree.paths(), *tree.paths()]:
        model.activate(path, mode=mode)
        tier = model.cache.stats().tiers[0]
        assert tier.held_bytes + tier.ready_bytes <= budget + SLACK
    warm = sum(size - held for held, size in made)
    assert warm <= budget
    for path in tree.paths():
        model.activate(path, mode=mode)
    assert sum(size - held for held, size in made) == warm
    model.detach()
    assert model.cache.stats().tiers[0].ready_bytes == 0


@linux
def test_what_comes_back_late_is_no_more_than_there_is_room_for(tree: lt.AdapterTree) -> None:
    model = lt.attach(tree, base(), host_budget=2 * NODE)
    held = [model.tree.adapter(path) for path in ("n0", "n1", "n2", "n3")]
    assert model.cache.stats().tiers[0].evictions == 2
    held.clear()
    model.activate("n4")
    tier = model.cache.stats().tiers[0]
    assert tier.held_bytes + tier.ready_bytes <= 2 * NODE + SLACK


@linux
def test_what_a_batch_lays_out_takes_the_room_of_what_is_ready(tree: lt.AdapterTree) -> None:
    budget = 6 * NODE
    model = lt.attach(tree, base(), host_budget=budget)
    for path in tree.paths():
        model.activate(path, mode="unmerged")
    with model.route(["n0", "n1"], strategy="paths"):
        model(torch.zeros(2, WIDTH))
        tier = model.cache.stats().tiers[0]
        assert tier.laid_out_bytes >= 2 * NODE
        assert tier.held_bytes + tier.ready_bytes <= budget + SLACK
