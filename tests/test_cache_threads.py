"""Several threads that ask, prefetch and let go, with slow and failing files: nobody hangs, and no
adapter is torn.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from cached import BYTES, RANKS, adapter, inputs, resident_bytes, zoo
from oracle import lineage
from oracle import net as base
from torch import Tensor

import lora_tree as lt
from lora_tree.cache import shelf
from lora_tree.errors import BudgetError, FormatError
from lora_tree.folder.adapters.source import FolderSource

SECONDS = 4.0


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> lt.TreeModel:
    """Every third load fails, half of them after the buffer was made; all take a while."""
    chance, plain = random.Random(0), FolderSource.load

    def load(self: FolderSource, *how: object) -> lt.Adapter:
        fate = chance.random()
        time.sleep(fate * 0.003)
        if fate < 0.15:
            raise FormatError(f"{self.folder}: injected")
        read = plain(self, *how)  # type: ignore[arg-type]
        time.sleep(fate * 0.003)
        if fate < 0.3:
            for value in read.modules.values():
                value.A.fill_(float("nan"))
            raise OSError("injected, after it was read")
        return read

    tree = lt.load(zoo(tmp_path / "zoo"))
    monkeypatch.setattr(FolderSource, "load", load)
    monkeypatch.setattr(
        shelf, "PAGED", 1
    )  # memory goes from hand to hand, as that of large adapters does
    largest = sum(BYTES[node] for node in lineage("a/b/c"))
    return lt.attach(tree, base(), host_budget=3 * largest)


def test_threads_that_request_prefetch_and_release(model: lt.TreeModel) -> None:
    whole = {path: adapter(path) for path in RANKS}
    free_tree = lt.AdapterTree()
    for path in RANKS:
        free_tree.add(path, adapter=whole[path])
    free = lt.attach(free_tree, base())
    expected = {}
    for path in RANKS:
        free.activate(path, mode="unmerged")
        expected[path] = free.base(inputs())
    until, wrong, done = (
        time.monotonic() + SECONDS,
        [],
        dict.fromkeys(("request", "read", "prefetch", "failed"), 0),
    )

    def work(seed: int, kind: str) -> None:
        rng = random.Random(seed)
        while time.monotonic() < until:
            path = rng.choice(sorted(RANKS))
            try:
                if kind == "request":
                    with model.using(path, mode="unmerged"):
                        if not torch.equal(model.base(inputs()), expected[path]):
                            wrong.append(f"{path}: another output")
                elif kind == "read":
                    read = model.tree.adapter(path)
                    assert read is not None
                    for name, value in read.modules.items():
                        if not torch.equal(value.A, whole[path].modules[name].A):
                            wrong.append(f"{path}: torn")
                else:
                    model.prefetch([path])
                    time.sleep(0.001)
                done[kind] += 1
            except (FormatError, OSError, BudgetError):
                done["failed"] += 1
            except BaseException as error:
                wrong.append(f"{kind}: {error!r}")
                raise
            held = model.cache.stats().tiers[0]
            if held.held_bytes > (held.budget_bytes or 0):
                wrong.append(f"{held.held_bytes} held")

    kinds = ["request", "request", "read", "read", "prefetch"]
    threads = [threading.Thread(target=work, args=each, daemon=True) for each in enumerate(kinds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 20)
    assert not any(thread.is_alive() for thread in threads), "somebody hangs"
    assert not wrong, wrong[:3]
    assert all(done.values()), done
    assert model.cache.wait(20)
    tier = model.cache.stats().tiers[0]
    assert tier.in_use_bytes == 0
    assert tier.failures
    assert tier.evictions
    assert tier.held_bytes == tier.laid_out_bytes + resident_bytes(model)


def test_many_threads_that_need_one_node_read_it_once(
    model: lt.TreeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []

    def load(self: FolderSource, *how: object) -> lt.Adapter:
        reads.append(self.folder)
        time.sleep(0.05)
        return adapter("e/g")

    monkeypatch.setattr(FolderSource, "load", load)
    found: list[lt.Adapter | None] = []
    threads = [
        threading.Thread(target=lambda: found.append(model.tree.adapter("e/g"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(reads) == 1
    assert len(set(map(id, found))) == 1


def test_a_request_waits_for_room_that_a_load_under_way_will_give(
    model: lt.TreeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being loaded in the background can't be evicted yet; in a moment it can."""
    reserved, plain = threading.Event(), shelf.Shelf.take

    def take(self: shelf.Shelf, nbytes: int) -> Tensor:
        if nbytes == BYTES["e"]:
            reserved.set()
            time.sleep(0.1)
        return plain(self, nbytes)

    monkeypatch.undo()
    monkeypatch.setattr(shelf.Shelf, "take", take)
    tight = lt.attach(model.tree, base(), host_budget=BYTES["a"] + BYTES["a/b"])
    model.detach()
    tight.prefetch(["e"])
    assert reserved.wait(10)
    tight.activate("a/b")
    assert tight.cache.stats().tiers[0].evictions == 1
