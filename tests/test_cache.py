"""The laws of the cache: budgets hold, what is in use stays, and what an adapter is does not depend
on the cache.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from cached import BYTES, RANKS, adapter, cached, inputs, poison, weights, zoo
from oracle import lineage
from oracle import net as base
from torch import Tensor, nn

import lora_tree as lt
from benchmarks.host_link import HostLink
from lora_tree.budget import Budgets, parse_bytes
from lora_tree.cache import Cache, Frequency, Lru
from lora_tree.cache.pack import buffer_of, held_bytes, pack, vacate
from lora_tree.cache.shelf import Shelf
from lora_tree.errors import (
    BudgetError,
    FormatError,
    LoraTreeError,
    PathError,
    SpecError,
    StateError,
    UnlockedError,
)
from lora_tree.folder.adapters import hashing as hashing_room
from lora_tree.folder.adapters import source as source_room
from lora_tree.overlay import over


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return zoo(tmp_path / "zoo")


def attached(folder: Path, budget: int | str | None, **more: object) -> lt.TreeModel:
    return lt.attach(lt.load(folder), base(), host_budget=budget, **more)  # type: ignore[arg-type]


def value(folder: Path, path: str, *, mode: str = "merged") -> Tensor:
    """What a model without a cache returns: loaded from the folder, for this one path."""
    model = attached(folder, None)
    model.activate(path, mode=mode)  # type: ignore[arg-type]
    return model.base(inputs())


def need(*paths: str) -> int:
    return sum(BYTES[node] for node in {node for path in paths for node in lineage(path)})


# ---------------------------------------------------------------------- budgets are said
def test_the_nearest_place_that_says_a_budget_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tree.yaml").write_text("version: 1\ncache: {host_budget: 3kB, device_budget: 5kB}\n")
    for argument, variable, expected in (
        (None, None, 3000),
        (None, "4000", 4000),
        ("2KiB", "4000", 2048),
    ):
        monkeypatch.setenv("LORA_TREE_HOST_BUDGET", variable or " ")
        model = attached(folder, argument)
        assert model.cache.stats().tiers[0].budget_bytes == expected
    monkeypatch.setenv("LORA_TREE_HOST_BUDGET", "much")
    with pytest.raises(SpecError, match="LORA_TREE_HOST_BUDGET: got 'much', which is not a size"):
        attached(folder, None)
    with pytest.raises(SpecError, match="host_budget: got '1Gb': no unit 'Gb'; did you mean 'GB'"):
        attached(folder, "1Gb")


def test_of_a_base_on_the_cpu_the_smaller_of_two_budgets_bounds_one_tier(folder: Path) -> None:
    model = lt.attach(lt.load(folder), base(), host_budget=4000, device_budget=need("a"))
    (tier,) = model.cache.stats().tiers
    assert (tier.name, tier.budget_bytes) == ("host", need("a"))
    with pytest.raises(BudgetError, match=r"device_budget is 84 B\n  device_budget=336 "):
        model.activate("a/b")


@pytest.mark.parametrize(
    "bad", ["", "GiB", "-1", -1, 0, "0.0001B", True, 1.5, None, "1 2", "9" * 30, 10**400, "1e9"]
)
def test_what_is_no_size_is_refused(bad: object) -> None:
    with pytest.raises(SpecError, match="write a number of bytes"):
        parse_bytes(bad)  # type: ignore[arg-type]


def test_budgets_in_yaml_survive_a_save_and_mistakes_are_located(
    folder: Path, tmp_path: Path
) -> None:
    yaml = folder / "tree.yaml"
    yaml.write_text("version: 1\ncache: {host_budget: 3kB}\n")
    tree = lt.load(folder)
    tree.save(tmp_path / "copy")
    assert lt.load(tmp_path / "copy").cache.host_budget == "3kB"
    for line, text in (
        (
            "{host_budge: 3kB}",
            r"tree.yaml:2:9: unknown key 'host_budge' in cache; did you mean 'host_budget'",
        ),
        (
            "{host_budget: 3kb}",
            r"tree.yaml:2:9: cache.host_budget: got '3kb', which is not a size: no unit 'kb'",
        ),
        (
            "{host_budget: 0}",
            r"tree.yaml:2:9: cache.host_budget: got 0, which is not a size: a budget is at least 1",
        ),
        # A colon in the value is not taken for that of a message.
        (
            "{host_budget: 'much: 3kB'}",
            r"got 'much: 3kB', which is not a size: write a number of bytes, or one with a unit",
        ),
    ):
        yaml.write_text(f"version: 1\ncache: {line}\n")
        with pytest.raises(SpecError, match=text):
            lt.load(folder)


# ---------------------------------------------------------------------- without budgets
def test_without_a_budget_the_tree_keeps_what_is_read(folder: Path) -> None:
    model = attached(folder, None)
    model.activate("a/b")
    kept = model.tree["a/b"].loaded
    assert kept is not None
    assert model.tree.adapter("a/b") is kept
    shutil.rmtree(folder)
    model.activate("")
    model.activate("a/b")
    model.detach()
    assert model.tree["a/b"].loaded is kept
    stats = model.cache.stats()
    assert (
        stats.requests,
        stats.served,
        stats.tiers[0].budget_bytes,
        stats.tiers[0].held_bytes,
    ) == (2, 1, None, 0)


def test_without_a_budget_a_prefetched_node_becomes_the_trees_when_it_is_used(folder: Path) -> None:
    model = attached(folder, None)
    model.prefetch(["a/b", "e"])
    assert model.cache.wait(10)
    shutil.rmtree(folder)
    model.activate("a/b")
    assert model.tree["a/b"].loaded is not None
    assert model.tree["e"].loaded is None
    assert model.cache.stats().served == 1
    assert cached(model) == {"e"}


# ---------------------------------------------------------------------- budgets hold
@pytest.mark.parametrize("eviction", [Lru, Frequency])
@pytest.mark.parametrize("mode", ["merged", "unmerged", "route"])
def test_any_traffic_stays_inside_the_budget_and_means_what_it_means_without(
    folder: Path, mode: str, eviction: type[Lru], monkeypatch: pytest.MonkeyPatch
) -> None:
    evicted = poison(monkeypatch)
    budget = 2 * need("a/b/c")
    model, rng = attached(folder, budget, eviction=eviction), random.Random(0)
    expected = {
        p: value(folder, p, mode="merged" if mode == "merged" else "unmerged") for p in RANKS
    }
    for _ in range(120):
        path = rng.choice(sorted(RANKS))
        model.deactivate()
        if mode == "route":
            with model.route([path, path, path]):
                assert torch.equal(model.base(inputs()), expected[path])
        else:
            model.activate(path, mode=mode)  # type: ignore[arg-type]
            assert torch.equal(model.base(inputs()), expected[path])
        assert set(lineage(path)) <= cached(model)
        assert model.cache.stats().tiers[0].held_bytes <= budget
    assert evicted
    stats = model.cache.stats()
    assert stats.tiers[0].evictions == len(evicted)
    assert stats.tiers[0].loads == len(evicted) + len(cached(model))
    assert 0 < stats.hit_rate < 1


def test_a_mixed_batch_under_a_budget_is_the_batch_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    free, tight = attached(folder, None), attached(folder, 2150)
    rng = random.Random(1)
    for strategy in ("nodes", "paths", "grouped", "matrix", "auto"):
        for _ in range(8):
            paths = [rng.choice(["", *sorted(RANKS)]) for _ in range(2)] + [""]
            with free.route(paths, strategy=strategy), tight.route(paths, strategy=strategy):  # type: ignore[arg-type]
                assert torch.equal(tight.base(inputs()), free.base(inputs()))
            assert tight.cache.stats().tiers[0].held_bytes <= 2150
    assert tight.cache.stats().tiers[0].evictions


def test_what_is_laid_out_for_side_paths_counts_and_goes_first(folder: Path) -> None:
    model = attached(folder, 2 * need("e/f") + need("e/g") - need("e"))
    model.activate("e/f", mode="unmerged")
    tier = model.cache.stats().tiers[0]
    assert (tier.laid_out_bytes, tier.held_bytes) == (need("e/f"), 2 * need("e/f"))
    model.activate("")
    assert model.cache.stats().tiers[0].laid_out_bytes == need("e/f"), "kept for the next time"
    model.activate("e/g")
    tier = model.cache.stats().tiers[0]
    assert (tier.laid_out_bytes, tier.evictions) == (need("e/f"), 0)
    model.prefetch(["a"])
    model.cache.wait(10)
    tier = model.cache.stats().tiers[0]
    assert (tier.laid_out_bytes, tier.evictions) == (0, 0)


def test_a_budget_smaller_than_one_lineage_says_how_much_is_needed(folder: Path) -> None:
    model = attached(folder, need("a/b/c") - 1)
    with pytest.raises(BudgetError) as told:
        model.activate("a/b/c")
    assert str(told.value) == (
        "a/b/c: 504 B have to be in memory at once (a 84 B, a/b 252 B, a/b/c 168 B); host_budget "
        "is 503 B\n"
        "  host_budget=504 (bytes, 504 B) is the least that is enough"
    )
    assert isinstance(told.value, MemoryError)
    assert (model.active, model.state) == ("", lt.State.BARE)
    assert torch.equal(model.base(inputs()), base()(inputs()))
    model.activate("e/f")  # what was loaded for the request that failed can go
    enough = attached(folder, need("a/b/c"))
    enough.activate("a/b/c")
    with pytest.raises(
        BudgetError, match=r"e: 168 B .*\(e 168 B\) beside 504 B that are in use(.|\n)*deactivate"
    ):
        enough.activate("e")
    assert torch.equal(enough.base(inputs()), value(folder, "a/b/c"))
    with pytest.raises(
        BudgetError, match=r"^a, a/b, a/b/c: laid out beside the weights: 504 B more are needed"
    ):
        enough.activate("a/b/c", mode="unmerged")
    assert enough.state is lt.State.MERGED


def test_a_batch_without_room_says_that_more_than_one_site_needs_it(folder: Path) -> None:
    model = attached(folder, need("a/b/c", "e/f"))
    with pytest.raises(BudgetError) as told, model.route(["a/b/c", "e/f", "a/b/c"]):
        model.base(inputs()[:3])
    first, *todo = str(told.value).splitlines()
    assert first.startswith("a batch of paths, laid out beside the weights: ")
    assert "more are needed, and" in first
    # Nothing else is active, so there is nothing that deactivate() would free.
    assert "deactivate" not in str(told.value)
    assert todo[1:] == [
        "  that is for one site, and the sites after it need room as well: count three times the "
        "bytes of each path's lineage",
        '  or take less room: route(…, strategy="nodes"), or fewer paths in a batch',
    ]
    with model.route(["a/b/c", "e/f", "a/b/c"], strategy="nodes"):
        model.base(inputs()[:3])


def test_what_a_with_goes_back_to_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    model = attached(folder, need("a/b/c") * 2 + need("e/g") * 2)
    model.activate("a/b/c", mode="unmerged")
    expected = model.base(inputs())
    with model.using("e/g", mode="unmerged"):
        model.prefetch(["a/d"])
        assert model.cache.wait(10)
        assert model.cache.stats().tiers[0].laid_out_bytes == need("a/b/c") + need("e/g")
        shutil.rmtree(folder)
        with pytest.raises(LoraTreeError):
            model.activate("e/f")
        assert model.cache.stats().tiers[0].in_use_bytes == need("a/b/c", "e/g")
    assert torch.equal(model.base(inputs()), expected)
    assert model.cache.stats().tiers[0].in_use_bytes == need("a/b/c")
    model.deactivate()
    assert model.cache.stats().tiers[0].in_use_bytes == 0


def test_what_was_read_before_comes_under_the_budget_and_the_tree_reads_through_the_cache(
    folder: Path,
) -> None:
    tree = lt.load(folder)
    flat = tree.flatten("a/b/c")
    assert tree["a/b/c"].loaded is not None
    model = lt.attach(tree, base(), host_budget=need("a/b/c"))
    assert tree["a/b/c"].loaded is None
    for path in RANKS:
        assert torch.equal(
            tree.flatten(path).modules["0"].A, lt.load(folder).flatten(path).modules["0"].A
        )
        assert tree[path].loaded is None
        assert model.cache.stats().tiers[0].held_bytes <= need("a/b/c")
    assert flat.modules["0"].A.isfinite().all()
    model.detach()
    assert model.cache.stats().tiers[0].held_bytes == 0
    assert tree.adapter("a") is tree["a"].loaded


def test_values_that_only_memory_has_are_the_trees_and_never_dropped(folder: Path) -> None:
    tree = lt.load(folder)
    tree.add("mine", adapter=adapter("e/g"))
    tree.update("e", adapter=adapter("e", seed=5))
    model = lt.attach(tree, base(), host_budget=need("a/b"))
    mine, e = tree["mine"].loaded, tree["e"].loaded
    for path in ("mine", "a/b", "e/f", "a/d", "e"):
        model.activate(path)
        model.deactivate()
    assert tree.adapter("mine") is mine
    assert tree.adapter("e") is e


def test_trained_factors_are_never_dropped_saved_or_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    model = attached(folder, need("a/b") * 2 + 200)
    (group,) = model.trainable("a/b")
    with model.using("a/b", mode="unmerged"):
        model.base(inputs()).square().sum().backward()
        with torch.no_grad():
            for parameter in group["params"]:
                parameter += parameter.grad
    model.trainable()
    kept = model.tree["a/b"].loaded
    for path in ("e/f", "a/d", "e"):
        model.activate(path)
        model.deactivate()
    assert model.tree.adapter("a/b") is kept
    model.activate("a/b", mode="unmerged")
    trained = model.base(inputs())
    model.deactivate()
    model.tree.save(folder)
    with pytest.warns(lt.StaleWarning, match="a/b/c"):
        assert torch.equal(value(folder, "a/b", mode="unmerged"), trained)
    assert model.tree.adapter("a/b") is kept


def beside_what_once_trained(folder: Path, budget: int) -> lt.TreeModel:
    """a/d runs beside the weights; a could train once, and is frozen."""
    model = attached(folder, budget)
    model.trainable("a")
    model.trainable()
    model.activate("a/d", mode="unmerged")
    return model


def test_what_comes_back_needs_no_more_room_though_it_once_trained(folder: Path) -> None:
    model = beside_what_once_trained(folder, 453)
    expected = model.base(inputs())
    with model.using("a", mode="unmerged"):
        laid = model.cache.stats().tiers[0].laid_out_bytes
        assert laid + need("a/d") > 453 - need("a/d"), "there is no room to lay it out again"
        model.base(inputs())
    assert torch.equal(model.base(inputs()), expected)


def test_what_a_with_comes_back_to_has_the_numbers_of_a_training_inside(folder: Path) -> None:
    model = beside_what_once_trained(folder, 4000)
    before = model.base(inputs())
    with model.using("e", mode="unmerged"):
        for parameter in model.trainable("a")[0]["params"]:
            with torch.no_grad():
                parameter += 1
        model.trainable()
    after = model.base(inputs())
    assert not torch.allclose(before, after)
    model.activate("a/d", mode="unmerged")
    assert torch.equal(model.base(inputs()), after)
    with model.using("e", mode="unmerged"):
        model.trainable("a")
    assert model.base(inputs()).requires_grad, "and it trains where it was frozen before"


def test_nothing_stays_laid_out_of_a_path_that_trains(folder: Path) -> None:
    model = lt.attach(lt.load(folder), base())
    model.trainable("a/b/c")
    for _ in range(5):
        with model.using("a/b/c", mode="unmerged"):
            model.base(inputs()).sum().backward()
            assert model.cache.stats().tiers[0].laid_out_bytes == need("a/b")
    assert model.cache.stats().tiers[0].laid_out_bytes == 0


def test_factors_that_were_read_in_inference_mode_can_be_trained_on(folder: Path) -> None:
    model = attached(folder, 4000)
    with torch.inference_mode():
        model.activate("a/b")
        model.deactivate()
    model.trainable("a/b/c")
    with model.using("a/b/c", mode="unmerged"):
        model.base(inputs()).sum().backward()
    assert all(p.grad is not None for p in model.factors.of("a/b/c"))


def test_a_key_value_mark_outlives_eviction(folder: Path) -> None:
    """Read again from the same content it is the same behaviour, and a key/value cache of it is
    still good.
    """
    model = attached(folder, need("a/b/c") * 2, eviction=Lru)
    marks = []
    for _ in range(2):
        model.activate("a/b/c", mode="unmerged")
        marks.append(model._stage.side_hooks._forward_guard.number)  # type: ignore[union-attr]
        model.deactivate()
        for path in ("e/g", "a/d", "e/f", "e/g"):
            model.activate(path)
            model.deactivate()
        assert "a/b/c" not in cached(model)
    assert marks[0] == marks[1] is not None


# ---------------------------------------------------------------------- prefetch
def test_a_prefetched_lineage_is_served_from_the_cache(folder: Path) -> None:
    model = attached(folder, 4000)
    model.prefetch(["a/b/c", "e/f"])
    assert model.cache.wait(10)
    shutil.rmtree(folder)
    model.activate("a/b/c")
    model.activate("e/f")
    stats = model.cache.stats()
    assert (stats.requests, stats.served, stats.prefetched, stats.waited_s) == (2, 2, 5, 0.0)
    with pytest.raises(PathError, match="no node 'a/x'"):
        model.prefetch("a/x")


def test_what_a_prefetch_could_not_load_is_told_by_the_call_that_needs_it(folder: Path) -> None:
    model = attached(folder, 4000)
    whole, expected = weights(folder, "a/b").read_bytes(), value(folder, "a")
    weights(folder, "a/b").write_bytes(whole[:-10])
    model.prefetch(["a/b/c"])
    assert model.cache.wait(10)
    assert cached(model) == {"a", "a/b/c"}
    model.activate("a")
    with pytest.raises(LoraTreeError, match=r"^a/b: .*zoo/a/b"):
        model.activate("a/b/c")
    assert torch.equal(model.base(inputs()), expected)
    weights(folder, "a/b").write_bytes(whole)
    model.activate("a/b/c")
    assert model.cache.stats().tiers[0].failures == 2


def test_a_prefetch_evicts_nothing_that_is_in_use_and_leaves_out_what_has_no_room(
    folder: Path,
) -> None:
    model = attached(folder, need("a/b/c") + BYTES["a/d"])
    model.activate("a/b/c")
    model.prefetch(["a/d", "e/g"])
    assert model.cache.wait(10)
    assert cached(model) == {"a", "a/b", "a/b/c", "a/d"}


def test_a_request_waits_for_a_prefetch_that_is_under_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def slow(source: object, *how: object) -> lt.Adapter:
        reads.append(str(source.where))  # type: ignore[attr-defined]
        begun.set()
        assert go_on.wait(10)
        return plain(source, *how)  # type: ignore[arg-type]

    model = attached(folder, 4000)
    source_type = type(model.tree["a"].source)
    plain = source_type.load  # type: ignore[union-attr]
    monkeypatch.setattr(source_type, "load", slow)
    model.prefetch(["a"])
    assert begun.wait(10)
    timer = threading.Timer(0.05, go_on.set)
    timer.start()
    model.activate("a")
    assert len(reads) == 1
    assert model.cache.wait(10)


# -------------------------------------------------------------------- files under a running process
def test_a_file_that_changed_is_refused_and_what_is_loaded_is_served(folder: Path) -> None:
    model = attached(folder, 4000)
    model.activate("a/b")
    expected = model.base(inputs())
    other = zoo(folder.parent / "other")
    tree = lt.load(other)
    for path in ("a", "a/b", "a/d"):
        tree.update(path, adapter=adapter(path, seed=1))
    tree.save(other)
    for path in ("a/b", "a/d"):
        shutil.copy(weights(other, path), weights(folder, path))
    model.deactivate()
    model.activate("a/b")
    assert torch.equal(model.base(inputs()), expected)
    with pytest.raises(UnlockedError, match=r"a/d: .*not the files that tree.lock speaks of"):
        model.activate("a/d")
    assert "a/d" not in cached(model)
    assert torch.equal(model.base(inputs()), expected)


def test_a_stale_node_is_served_with_a_warning(folder: Path) -> None:
    tree = lt.load(folder)
    tree.update("a", adapter=adapter("a", seed=1))
    tree.save(folder)
    with pytest.warns(lt.StaleWarning, match="a/b"):
        tree = lt.load(folder)
    model = lt.attach(tree, base(), host_budget=4000)
    model.activate("a/b")


@pytest.mark.parametrize("damage", ["truncated", "gone", "garbage", "config gone"])
def test_a_broken_load_is_not_cached_and_nothing_of_it_is_used(folder: Path, damage: str) -> None:
    model = attached(folder, 4000)
    model.activate("e/f", mode="unmerged")
    expected = model.base(inputs())
    file = weights(folder, "a/b") if damage != "config gone" else folder / "a/b/adapter_config.json"
    whole, seen = file.read_bytes(), file.stat()
    if damage in ("truncated", "garbage"):
        file.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else whole[::-1])
        os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    else:
        file.unlink()
    refused = (
        FormatError if "gone" in damage else UnlockedError
    )  # not what the lock speaks of: said first
    for _ in range(2):
        with pytest.raises(refused, match=r"^a/b: .*zoo/a/b"):
            model.activate("a/b/c")
        assert torch.equal(model.base(inputs()), expected)
        assert "a/b" not in cached(model)
        stats = model.cache.stats().tiers[0]
        assert stats.in_use_bytes == need("e/f")
    file.write_bytes(whole)
    model.activate("a/b/c")
    assert torch.equal(model.base(inputs()), value(folder, "a/b/c"))


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error_and_not_a_signal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header was read and the buffer is there; then the rest of the file goes."""
    model = attached(folder, 4000)
    plain = Shelf.take

    def cut(self: Shelf, nbytes: int) -> Tensor:
        os.truncate(weights(folder, "a"), weights(folder, "a").stat().st_size - 8)
        return plain(self, nbytes)

    monkeypatch.setattr(Shelf, "take", cut)
    with pytest.raises((FormatError, UnlockedError), match=r"^a: "):
        model.activate("a")
    stats = model.cache.stats().tiers[0]
    assert (stats.held_bytes, stats.nodes, stats.failures) == (0, 0, 1)


def test_files_are_hashed_when_first_read_and_again_only_where_they_look_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes: list[str] = []
    plain = hashing_room.content
    monkeypatch.setattr(
        hashing_room, "content", lambda *of: hashes.append(found := plain(*of)) or found
    )
    monkeypatch.setattr(
        source_room, "_TICK_NS", -(10**18)
    )  # files of a moment ago may change within one tick of the clock
    tree = lt.load(folder)
    node = tree["a"].source
    assert node is not None
    first = node.load()
    again = node.load()
    assert torch.equal(first.modules["0"].A, again.modules["0"].A)
    assert len(hashes) == 1
    data = bytearray(weights(folder, "a").read_bytes())
    data[-1] ^= 1
    weights(folder, "a").write_bytes(data)
    with pytest.raises(UnlockedError):
        node.load()
    assert len(hashes) == 2


def test_files_of_a_moment_ago_are_hashed_every_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writes within one tick of a coarse clock leave one time."""
    now = time.time_ns()
    monkeypatch.setattr(source_room, "_identity", lambda files: ((1, 1, 1, now, now),) * 2)
    node = lt.load(folder)["a"].source
    assert node is not None
    node.load()
    data = bytearray(weights(folder, "a").read_bytes())
    data[-1] ^= 1
    weights(folder, "a").write_bytes(data)
    with pytest.raises(UnlockedError):
        node.load()


def test_read_only_media_serve(folder: Path) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for p in [*folder.rglob("*"), folder]:
        p.chmod(p.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        model = attached(folder, need("a/b/c") * 2)
        for path in (*RANKS, *RANKS):
            model.activate(path)
            model.deactivate()
    finally:
        for p in [folder, *folder.rglob("*")]:
            p.chmod(p.stat().st_mode | stat.S_IWUSR)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_policy_itself_is_refused_where_its_maker_is_asked_for(folder: Path) -> None:
    with pytest.raises(
        SpecError,
        match=r"(?s)eviction: expected a class or a factory.*"
        r"got an instance of Lru\n  eviction=Lru",
    ):
        lt.attach(
            lt.load(folder), nn.Sequential(nn.Linear(4, 3)), host_budget="1MiB", eviction=Lru()
        )  # type: ignore[arg-type]


def test_an_interrupt_at_the_beginning_of_a_load_leaves_the_node_to_be_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached(folder, "1MiB")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "lora_tree.cache.loader.Reservation",
            lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()),
        )
        model.activate("a")
    done = threading.Thread(target=lambda: model.activate("a"), daemon=True)
    done.start()
    done.join(30)
    assert not done.is_alive()
    assert model.active == "a"


def test_a_model_that_is_detached_while_a_node_is_read_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached(folder, "1MiB")
    plain = source_room.FolderSource.load

    def load(self: source_room.FolderSource, *args: object) -> lt.Adapter:
        read = plain(self, *args)  # type: ignore[arg-type]
        model.cache.close()
        return read

    monkeypatch.setattr(source_room.FolderSource, "load", load)
    with pytest.raises(StateError, match=r"^a: the model was detached while it was being loaded"):
        model.activate("a")
    assert (model.active, model.cache.stats().tiers[0].held_bytes) == ("", 0)


# ---------------------------------------------------------------------- one packed buffer
def test_an_adapter_in_a_file_is_one_buffer(folder: Path) -> None:
    read = lt.Adapter.load(folder / "a/b")
    buffer = buffer_of(read)
    assert buffer is not None
    assert buffer.numel() == held_bytes(read) == BYTES["a/b"]
    assert pack(read, lambda n: pytest.fail("packed already")) is read


def test_the_buffer_of_an_adapter_is_known_until_its_memory_is_taken(folder: Path) -> None:
    read = lt.Adapter.load(folder / "e")
    first = buffer_of(read)
    assert first is not None
    assert buffer_of(read) is first, "it is looked for once"
    vacate(read)
    empty = buffer_of(read)
    assert empty is not None
    assert empty.numel() == 0


def test_packing_and_moving_change_no_number() -> None:
    draw = torch.Generator().manual_seed(0)
    experts = lt.LowRank(
        torch.randn(3, 2, 5, generator=draw),
        torch.randn(4, 3, 2, generator=draw).permute(1, 0, 2),
        layout=lt.Layout("parameter"),
    )
    plain = lt.LowRank(
        torch.randn(2, 5).to(torch.bfloat16),
        torch.randn(4, 2),
        0.5,
        torch.randn(4),
        lt.Layout("linear"),
    )
    mine = lt.Adapter({"x": experts, "y": plain}, unchanged={"y.bias": torch.randn(4)})
    assert buffer_of(mine) is None
    sizes: list[int] = []
    packed = pack(mine, lambda n: sizes.append(n) or torch.empty(n, dtype=torch.uint8))  # type: ignore[func-returns-value]
    buffer = buffer_of(packed)
    assert buffer is not None
    assert [buffer.numel()] == sizes
    there = packed.with_tensors(over(buffer.clone()))
    for other in (packed, there):
        for name, was in mine.modules.items():
            now = other.modules[name]
            assert all(torch.equal(a, b) for a, b in zip(was.tensors, now.tensors, strict=True))
            assert (now.scale, now.layout) == (was.scale, was.layout)
        assert torch.equal(other.unchanged["y.bias"], mine.unchanged["y.bias"])
    assert buffer_of(there) is not None
    assert buffer_of(there).data_ptr() != buffer.data_ptr()  # type: ignore[union-attr]


def test_the_caller_makes_the_one_buffer_that_is_read_into(folder: Path) -> None:
    made: list[Tensor] = []

    def allocate(nbytes: int) -> Tensor:
        made.append(torch.full((nbytes,), 255, dtype=torch.uint8))
        return made[-1]

    mine = lt.load(folder)["e"].source.load(allocate)  # type: ignore[union-attr]
    plain = lt.Adapter.load(folder / "e")
    assert len(made) == 1
    assert all(
        torch.equal(a, b)
        for name in plain.modules
        for a, b in zip(mine.modules[name].tensors, plain.modules[name].tensors, strict=True)
    )
    assert all(
        t.untyped_storage().data_ptr() == made[0].data_ptr()
        for v in mine.modules.values()
        for t in v.tensors
    )


# ------------------------------------------------------------------ a device with memory of its own
def test_two_tiers_keep_their_own_budgets_and_the_host_serves_what_left_the_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    link = HostLink()
    monkeypatch.setattr("lora_tree.model.link_to", lambda base: link)
    everything, tight = sum(BYTES.values()), 2 * need("a/b/c")
    model = lt.attach(lt.load(folder), base(), host_budget=everything, device_budget=tight)
    expected = {path: value(folder, path) for path in RANKS}
    link.transfers = 0  # the models that computed these sent their adapters too
    rng = random.Random(2)
    for i in range(80):
        if i == 40:
            assert {node for path in RANKS for node in lineage(path)} == set(RANKS)
            shutil.rmtree(folder)
        path = rng.choice(sorted(RANKS))
        model.activate(path)
        assert torch.equal(model.base(inputs()), expected[path])
        host, device = model.cache.stats().tiers
        assert device.held_bytes <= tight
        assert host.held_bytes <= everything
    assert (host.loads, host.evictions) == (len(RANKS), 0)
    assert device.loads == link.transfers > len(RANKS)
    assert device.evictions > 0
    assert host.in_use_bytes == 0
    assert device.in_use_bytes == need(path)


def test_a_host_smaller_than_one_node_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_tree.model.link_to", lambda base: HostLink())
    model = lt.attach(lt.load(folder), base(), host_budget=BYTES["a/b"] - 1, device_budget=4000)
    model.activate("a/d")
    with pytest.raises(BudgetError, match=r"host_budget is 251 B\n  host_budget=252 "):
        model.activate("a/b")


def test_a_hold_of_before_a_move_takes_no_pin_of_one_made_after_it(folder: Path) -> None:
    tree = lt.load(folder)
    cache = Cache(tree, Budgets(device_bytes=sum(BYTES.values())), link=HostLink())
    before = cache.hold(["a"])
    cache.follow(HostLink())
    after = cache.hold(["a"])
    before.release()
    assert cache.stats().tiers[-1].in_use_bytes == BYTES["a"]
    after.release()
    after.release()
    assert cache.stats().tiers[-1].in_use_bytes == 0


# ---------------------------------------------------------------------- who goes first
def test_the_policy_is_one_replaceable_object(folder: Path) -> None:
    class Newest:
        """Lets go of what came last."""

        def __init__(self) -> None:
            self.order: list[object] = []

        def used(self, nodes: object) -> None:
            self.order += [key for key, _ in nodes if key not in self.order]  # type: ignore[attr-defined]

        def gone(self, key: object) -> None:
            self.order.remove(key)

        def victim(self, idle: object) -> object:
            return next((key for key in reversed(self.order) if idle(key)), None)  # type: ignore[operator]

    model = attached(folder, BYTES["a"] + BYTES["a/d"] + BYTES["e/f"] + BYTES["e"], eviction=Newest)
    for path in ("a/d", "e/f", ""):
        model.activate(path)
    model.activate("a/b")
    assert cached(model) == {"a", "a/d", "a/b"}


@pytest.mark.parametrize("policy", [Lru, Frequency])
def test_an_ancestor_never_goes_before_what_lies_below_it(policy: type[Lru]) -> None:
    rng, order = random.Random(3), policy()
    held: set[str] = set()
    for _ in range(500):
        path = rng.choice(sorted(RANKS))
        nodes = lineage(path)
        held |= set(nodes)
        order.used([(node, 8) for node in nodes])
        while len(held) > 4:
            victim = order.victim(lambda key, mine=nodes: key not in mine)  # type: ignore[misc]
            assert isinstance(victim, str)
            assert not [node for node in held if node.startswith(f"{victim}/")], (
                f"{victim} before what is below it"
            )
            order.gone(victim)
            held.discard(victim)


def test_frequency_forgets_old_favourites_and_stays_small() -> None:
    order = Frequency(remembered=10)
    for _ in range(100):
        order.used([("old", 8)])
    for i in range(5000):
        order.used([(i % 50, 8), ("new", 8)])
        victim = order.victim(lambda key, i=i: key not in (i % 50, "new"))  # type: ignore[misc]
        if i < 5 or victim is None:
            continue
        order.gone(victim)
        if victim == "old":
            break
    assert victim == "old"
    assert len(order._heap) <= 64 + 4 * 60
    assert len(order._uses) <= 10


def test_nothing_of_a_detached_model_stays(folder: Path) -> None:
    model = attached(folder, 4000)
    model.activate("a")
    model.detach()
    assert model.cache.stats().tiers[0].held_bytes == 0
    with pytest.raises(StateError):
        model.prefetch("a")
    second = lt.attach(model.tree, base(), host_budget=4000)
    second.activate("a")


def test_budgets_are_values() -> None:
    assert Budgets.of(None, None, environment={}) == Budgets()
    assert not Budgets().bounded


def test_stats_are_a_frozen_value(folder: Path) -> None:
    model = attached(folder, 4000)
    before = model.cache.stats()
    with warnings.catch_warnings():
        model.activate("a/b")
    assert before.requests == 0
    after = model.cache.stats()
    assert after.requests == 1
    assert after.tiers[0].loaded_bytes == need("a/b")
    assert 0 < after.tiers[0].slowest_s <= after.tiers[0].load_s <= after.waited_s
    with pytest.raises(AttributeError):
        after.requests = 2  # type: ignore[misc]
    assert isinstance(model.base, nn.Module)
