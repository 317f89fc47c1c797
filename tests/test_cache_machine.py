"""Any history of requests, pins, prefetches, training and failures, under any budget, against a
model without one.

What is evicted is overwritten at once, so that a buffer used after that shows; the results are
compared bit for bit.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from cached import BYTES, RANKS, cached, inputs, poison, resident_bytes, weights, zoo
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracle import lineage
from oracle import net as base

import lora_tree as lt
from lora_tree.cache import Frequency, Lru, shelf
from lora_tree.errors import BudgetError, FolderError, FormatError, StateError

PATHS = st.sampled_from(sorted(RANKS))
MODES = st.sampled_from(["merged", "unmerged"])
LARGEST = sum(BYTES[node] for node in lineage("a/b/c"))


class Caching(RuleBasedStateMachine):
    """`free` is a second model, of the same folder and without a budget, which gets the same
    calls.
    """

    @initialize(
        budget=st.integers(LARGEST // 2, 6 * LARGEST),
        eviction=st.sampled_from([Lru, Frequency]),
        shelved=st.booleans(),
    )
    def start(self, budget: int, eviction: type[Lru], shelved: bool) -> None:
        self.undo = ExitStack()
        patch = self.undo.enter_context(pytest.MonkeyPatch.context())
        if shelved:
            patch.setattr(
                shelf, "PAGED", 1
            )  # memory goes from hand to hand, as that of large adapters does
        self.evicted = poison(patch)
        self.folder = zoo(Path(self.undo.enter_context(tempfile.TemporaryDirectory())) / "zoo")
        self.budget = budget
        self.free = lt.attach(lt.load(self.folder), base())
        for path in RANKS:
            self.free.tree.adapter(path)
        self.model = lt.attach(lt.load(self.folder), base(), host_budget=budget, eviction=eviction)
        self.blocks: list[ExitStack] = []
        self.trained: set[str] = set()
        self.broken: dict[str, bytes] = {}

    def teardown(self) -> None:
        if not hasattr(self, "undo"):
            return
        while self.blocks:
            self.leave()
        self.undo.close()

    # ------------------------------------------------------------------ what may fail
    def both(self, needed: set[str], call: object, *, laid: int) -> bool:
        """Do the same to both models; False where the one with a budget had a reason not to."""
        assert callable(call)
        before, unread = (
            self.model.active,
            needed & self.broken.keys() - cached(self.model) - self.trained,
        )
        used = set(self.model.nodes_in_use()) | needed
        try:
            call(self.model)
        except BudgetError:
            least = sum(BYTES[node] for node in used - self.trained) + laid
            assert least + self.model.cache.stats().tiers[0].laid_out_bytes > self.budget
        except (FormatError, FolderError) as error:
            assert any(str(error).startswith(f"{node}: ") for node in unread), error
        else:
            assert not unread
            call(self.free)
            return True
        assert self.model.active == before
        return False

    @rule(path=PATHS, mode=MODES)
    def activate(self, path: str, mode: str) -> None:
        frozen = {node for node in lineage(path) if node not in self.model.factors.training_paths}
        if mode == "merged" and frozen != set(lineage(path)):
            with pytest.raises((StateError, BudgetError, FormatError, FolderError)):
                self.model.activate(path)
            return
        laid = sum(BYTES[node] for node in frozen) if mode == "unmerged" else 0
        self.both(set(lineage(path)), lambda model: model.activate(path, mode=mode), laid=laid)

    @rule()
    def deactivate(self) -> None:
        self.both(set(), lambda model: model.deactivate(), laid=0)

    @precondition(lambda self: len(self.blocks) < 3)
    @rule(path=PATHS)
    def enter(self, path: str) -> None:
        block = ExitStack()
        laid = sum(BYTES[node] for node in lineage(path))
        enter = lambda model: block.enter_context(model.using(path, mode="unmerged"))  # noqa: E731
        if self.both(set(lineage(path)), enter, laid=laid):
            self.blocks.append(block)

    @precondition(lambda self: len(self.blocks) < 3)
    @rule(paths=st.lists(st.sampled_from(["", *sorted(RANKS)]), min_size=3, max_size=3))
    def enter_a_batch(self, paths: list[str]) -> None:
        block, needed = ExitStack(), {node for path in paths for node in lineage(path)}
        enter = lambda model: block.enter_context(model.route(paths, strategy="nodes"))  # noqa: E731
        if self.both(needed, enter, laid=sum(BYTES[node] for node in needed)):
            self.blocks.append(block)

    @precondition(lambda self: self.blocks)
    @rule()
    def leave(self) -> None:
        """What was there before comes back, whatever has become of its files, and needs no more
        room than it had.
        """
        self.blocks.pop().close()

    @rule(paths=st.lists(PATHS, max_size=4))
    def prefetch(self, paths: list[str]) -> None:
        self.model.prefetch(paths)
        if len(paths) % 2:
            assert self.model.cache.wait(10)

    @rule(path=PATHS, rank=st.sampled_from([None, 1]))
    def flatten(self, path: str, rank: int | None) -> None:
        assert self.model.cache.wait(10)
        if not set(lineage(path)) & self.broken.keys():
            self.evicted.spared = (
                True  # flatten holds what it reads until it is done, in the cache or not
            )
            try:
                mine = self.model.tree.flatten(path, rank).modules["0"]
            except BudgetError:
                return
            finally:
                self.evicted.spared = False
            other = self.free.tree.flatten(path, rank).modules["0"]
            assert all(torch.equal(a, b) for a, b in zip(mine.tensors, other.tensors, strict=True))

    # ------------------------------------------------------------------ training
    @rule(path=PATHS, step=st.sampled_from([0.5, -0.25]))
    def train(self, path: str, step: float) -> None:
        self.model.cache.wait(10)
        if path in self.broken or self.model.state is lt.State.MERGED or self.blocks:
            return

        def begin(model: lt.TreeModel) -> None:
            groups = model.trainable(path)
            with torch.no_grad():
                for parameter in groups[0]["params"]:
                    parameter += step
            model.trainable()

        laid = sum(BYTES[node] for node in self.model.nodes_in_use()) * 2
        if self.both({path}, begin, laid=laid):
            self.trained.add(path)
            self.activate_again()

    def activate_again(self) -> None:
        """What runs now was laid out before the step."""
        for model in (self.model, self.free):
            model.deactivate()

    # ------------------------------------------------------------------ failures
    @rule(path=PATHS, keep=st.integers(0, 200))
    def damage(self, path: str, keep: int) -> None:
        assert self.model.cache.wait(10)
        file = weights(self.folder, path)
        self.broken.setdefault(path, file.read_bytes() if file.exists() else b"")
        if keep > 150:
            file.unlink(missing_ok=True)
        else:
            file.write_bytes(self.broken[path][:keep])

    @precondition(lambda self: self.broken)
    @rule()
    def repair(self) -> None:
        assert self.model.cache.wait(10)
        for path, whole in self.broken.items():
            weights(self.folder, path).write_bytes(whole)
        self.broken.clear()

    # ------------------------------------------------------------------ what always holds
    @invariant()
    def budgets_hold(self) -> None:
        if hasattr(self, "model"):
            assert self.model.cache.stats().tiers[0].held_bytes <= self.budget

    @invariant()
    def what_is_in_use_is_there_and_is_right(self) -> None:
        if not hasattr(self, "model"):
            return
        assert set(self.model.nodes_in_use()) - self.trained <= cached(self.model)
        try:
            mine = self.model.base(inputs())
        except BudgetError:
            assert (
                self.model.state is lt.State.ROUTED
            )  # what a batch lays out is known only when it runs
            return
        assert torch.equal(mine, self.free.base(inputs()))

    @invariant()
    def the_books_balance(self) -> None:
        if hasattr(self, "model") and self.model.cache.wait(10):
            tier = self.model.cache.stats().tiers[0]
            mine = resident_bytes(self.model)
            assert mine >= sum(BYTES[node] for node in cached(self.model))
            assert tier.held_bytes == mine + tier.laid_out_bytes
            used = set(self.model.nodes_in_use()) - self.trained
            assert tier.in_use_bytes == sum(BYTES[node] for node in used)
            assert tier.loads == len(self.evicted) + tier.nodes


TestCaching = Caching.TestCase
TestCaching.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
