"""What is done beside the hash of a file: the adapter is sent and its plan is made before the hash
is known, nothing computes with it before, and a wrong hash leaves no trace of either.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import BYTES, RANKS, inputs, weights, zoo
from oracle import net as base
from test_segmented import launched, modules

import lora_tree as lt
from benchmarks.host_link import HostLink
from lora_tree.cache.link import Arrived
from lora_tree.cache.pack import is_vacated
from lora_tree.cache.reservation import Reservation
from lora_tree.engine.plan import Plan
from lora_tree.engine.planner import Planner
from lora_tree.engine.unmerged import Unmerged
from lora_tree.errors import BaseMismatch, UnlockedError
from lora_tree.folder.adapters import hashing, pieces
from lora_tree.folder.adapters.hashing import ContentHash
from lora_tree.formats import safetensors as reader

__all__ = ["launched", "modules"]  # fixtures

Events = list[str]


class Told(HostLink):
    """Writes down what is sent."""

    def __init__(self, events: Events) -> None:
        super().__init__()
        self.events, self.arrived = events, list[Arrived]()

    def send(self, adapter: lt.Adapter, again: lt.Adapter | None = None) -> Arrived:
        self.events.append("sent")
        self.arrived.append(super().send(adapter, again))
        return self.arrived[-1]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """What happened, in order: every file is hashed by a thread, however small it is."""
    monkeypatch.setattr(hashing, "LARGE", 1)
    monkeypatch.setattr(hashing, "processors", lambda: 8)
    monkeypatch.setattr(reader, "PART", 40)
    told: Events = []

    def tell(owner: type, name: str, event: str) -> None:
        plain: Any = getattr(owner, name)

        def telling(self: object, *args: Any, **more: Any) -> Any:
            told.append(event)
            made = plain(self, *args, **more)
            if event == "laid out" and made is None:
                told.pop()  # it would have taken room
            return made

        monkeypatch.setattr(owner, name, telling)

    tell(ContentHash, "content", "hash")
    tell(ContentHash, "pieces", "hash")
    tell(Planner, "_made", "plan")
    tell(Unmerged, "_laid_out", "laid out")
    tell(Unmerged, "run", "run")
    return told


@pytest.fixture
def link(events: Events, monkeypatch: pytest.MonkeyPatch) -> Told:
    made = Told(events)
    monkeypatch.setattr("lora_tree.model.link_to", lambda base: made)
    return made


@pytest.fixture(params=["whole", "by pieces"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nodes whose lock has the hash of their pieces, or not."""
    monkeypatch.setattr(pieces, "PIECE", 64)
    monkeypatch.setattr(hashing, "threads_for", lambda nbytes: 3)
    with monkeypatch.context() as at_save:
        at_save.setattr(hashing, "LARGE", 1 if request.param == "by pieces" else 1 << 40)
        made = zoo(tmp_path / "zoo")
    is_told = '"pieces"' in (made / "tree.lock").read_text()
    assert is_told == (request.param == "by pieces")
    return made


def outputs(folder: Path, path: str) -> torch.Tensor:
    plain = base()
    lt.attach(lt.load(folder), plain).activate(path, mode="unmerged")
    return plain(inputs())


def damage(file: Path) -> bytes:
    """Change a number of a file; return what the file was."""
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return whole


def test_a_file_is_sent_and_its_path_laid_out_before_the_hash_is_known(
    folder: Path, link: Told, launched: list[str]
) -> None:
    wanted = outputs(folder, "e")
    model = lt.attach(lt.load(folder), base(), host_budget="1MiB", device_budget="1MiB")
    del link.events[:]
    model.activate("e", mode="unmerged")
    assert link.events == ["sent", "plan", "laid out", "hash", "run"]
    torch.testing.assert_close(model.base(inputs()), wanted)


def test_of_a_lineage_each_is_sent_beside_its_hash_and_the_last_completes_the_plan(
    folder: Path, link: Told, launched: list[str]
) -> None:
    wanted = outputs(folder, "a/b/c")
    model = lt.attach(lt.load(folder), base(), host_budget="1MiB", device_budget="1MiB")
    del link.events[:]
    model.activate("a/b/c", mode="unmerged")
    assert link.events == ["sent", "hash"] * 2 + ["sent", "plan", "laid out", "hash", "run"]
    torch.testing.assert_close(model.base(inputs()), wanted)


def test_on_a_cpu_the_plan_is_made_beside_the_hash(folder: Path, events: Events) -> None:
    wanted = outputs(folder, "e")
    model = lt.attach(lt.load(folder), base(), host_budget="1MiB")
    del events[:]
    model.activate("e", mode="unmerged")
    # The factors of one node are used where they lie.
    assert events == ["plan", "laid out", "hash", "run"]
    torch.testing.assert_close(model.base(inputs()), wanted)
    model.deactivate()
    del events[:]
    model.activate("a/b", mode="unmerged")
    # Those of several are stacked, which takes room, and a load must not wait for that.
    assert events == ["hash", "plan", "hash", "laid out", "run"]
    model.deactivate()
    del events[:]
    model.activate("a/d", mode="merged")
    assert events[:2] == ["plan", "hash"]


@pytest.mark.parametrize("where", ["host", "device"])
def test_after_a_wrong_hash_nothing_of_the_file_is_left(
    folder: Path,
    events: Events,
    where: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link: Told | None = None
    if where == "device":
        link = request.getfixturevalue("link")
        request.getfixturevalue("launched")
    wanted = outputs(folder, "e")
    more = {"device_budget": "1MiB"} if link else {}
    model = lt.attach(lt.load(folder), base(), host_budget="1MiB", **more)  # type: ignore[arg-type]
    whole = damage(weights(folder, "e"))
    bare = model.base(inputs())
    made: list[weakref.ref[Any]] = []
    plain = Planner._made

    def noted(self: Planner, *args: Any) -> Plan:
        plan = plain(self, *args)
        made.extend([weakref.ref(plan), weakref.ref(plan.adapters[0])])
        return plan

    monkeypatch.setattr(Planner, "_made", noted)
    if link is not None:
        link.arrived.clear()
    for _ in range(2):
        del events[:]
        with pytest.raises(UnlockedError, match=r"not the files that tree.lock speaks of"):
            model.activate("e", mode="unmerged")
        assert "plan" in events
        assert "run" not in events
        assert torch.equal(model.base(inputs()), bare)
        for tier in model.cache.stats().tiers:
            assert (tier.nodes, tier.held_bytes) == (0, 0)
        while link is not None and link.arrived:
            assert is_vacated(link.arrived.pop().adapter)
        gc.collect()
        assert [ref() for ref in made] == [None] * len(made), "nothing keeps its numbers alive"
    weights(folder, "e").write_bytes(whole)
    model.activate("e", mode="unmerged")
    torch.testing.assert_close(model.base(inputs()), wanted)


def test_what_came_back_to_the_device_is_vacated_again_if_the_file_has_changed(
    folder: Path, link: Told, launched: list[str]
) -> None:
    model = lt.attach(lt.load(folder), base(), host_budget=BYTES["a/b"], device_budget=BYTES["a/b"])
    model.activate("e", mode="unmerged")
    first = link.arrived[-1].adapter
    model.deactivate()
    model.activate("e/g" if BYTES["e/g"] <= BYTES["a/b"] else "a", mode="unmerged")
    model.deactivate()
    assert is_vacated(first) or model.cache.stats().tiers[1].nodes == 2
    model.cache._loader.tiers[0].clear()
    model.cache._loader.top.discard_unpinned(model.tree["e"].source.key)  # type: ignore[union-attr]
    damage(weights(folder, "e"))
    with pytest.raises(UnlockedError):
        model.activate("e", mode="unmerged")
    assert is_vacated(link.arrived[-1].adapter)


def test_without_room_for_it_beside_the_hash_it_is_sent_when_the_hash_is_known(
    folder: Path, link: Told, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = outputs(folder, "e")
    monkeypatch.setattr(Reservation, "try_resize", lambda self, nbytes: False)
    model = lt.attach(lt.load(folder), base(), host_budget="1MiB", device_budget="1MiB")
    del link.events[:]
    model.activate("e", mode="unmerged")
    assert link.events == ["hash", "sent", "plan", "laid out", "run"]
    torch.testing.assert_close(model.base(inputs()), wanted)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, BaseMismatch])
def test_an_error_beside_the_hash_is_met_again_and_an_interrupt_leaves_nothing(
    folder: Path,
    link: Told,
    launched: list[str],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    model = lt.attach(lt.load(folder), base(), host_budget="1MiB", device_budget="1MiB")
    plain, calls = Planner._made, list[int]()

    def made(self: Planner, *args: Any) -> Plan:
        calls.append(1)
        if len(calls) == 1:
            raise error("beside the hash")
        return plain(self, *args)

    monkeypatch.setattr(Planner, "_made", made)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            model.activate("e", mode="unmerged")
        for tier in model.cache.stats().tiers:
            assert (tier.nodes, tier.held_bytes, tier.failures) == (0, 0, 1)
        assert is_vacated(link.arrived[-1].adapter)
    model.activate("e", mode="unmerged")
    assert len(calls) == 2


def test_the_prefetch_of_a_file_sends_it_beside_its_hash(folder: Path, link: Told) -> None:
    model = lt.attach(lt.load(folder), base(), host_budget="1MiB", device_budget="1MiB")
    del link.events[:]
    model.prefetch(["a", "e"])
    assert model.cache.wait(20)
    assert link.events == ["sent", "hash"] * 2
    for path in RANKS:
        model.activate(path, mode="unmerged")
        torch.testing.assert_close(model.base(inputs()), outputs(folder, path))


def test_what_is_read_again_is_the_same_behaviour_as_what_was_prepared_beside_its_hash(
    folder: Path, link: Told, launched: list[str]
) -> None:
    model = lt.attach(lt.load(folder), base(), host_budget=BYTES["a/b"], device_budget=BYTES["a/b"])
    marks = []
    for path in ("e", "a", "a/d", "e"):
        model.activate(path, mode="unmerged")
        marks.append(model._stage.current.placed.plan.mark)
        model.deactivate()
        # Otherwise a kept plan would have the adapter come back as the same object.
        model._planner.forget()
        model._stage.side_hooks.forget()
        gc.collect()
    assert link.events.count("hash") > 3, "files as young as these are hashed at every read"
    assert marks[0] == marks[-1]
    assert len(set(marks)) == 3
