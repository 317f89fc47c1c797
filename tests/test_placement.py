"""Where things live: adapters and factors where the base is, pristine copies where there is room.

No GPU is needed: a device with memory of its own is played, by a link that copies within host
memory and counts, and by a host that is said to be such a device.
"""

from __future__ import annotations

import gc
import warnings
from functools import partial

import pytest
import torch
from oracle import random_adapter
from torch import Tensor, nn

import lora_tree as lt
from benchmarks.host_link import HostLink
from lora_tree.cache.link import Arrived
from lora_tree.combining import combine
from lora_tree.engine.rows import batch as batch_module
from lora_tree.engine.switching import copy_place
from lora_tree.errors import BudgetError, SpecError
from lora_tree.training.factors import Factors

PATHS = ("a", "a/b", "a/c", "d")


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).requires_grad_(False)


adapter = partial(random_adapter, {"0": (5, 6), "2": (4, 5)})


def forest() -> lt.AdapterTree:
    tree = lt.AdapterTree()
    for seed, path in enumerate(PATHS):
        tree.add(path, adapter=adapter(seed))
    return tree


class Counting(HostLink):
    """The link, and the buffers that were sent over it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Tensor] = []

    def send(self, adapter: lt.Adapter, again: lt.Adapter | None = None) -> Arrived:
        arrived = super().send(adapter, again)
        assert arrived.buffer is not None
        self.sent.append(arrived.buffer)
        return arrived


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Counting:
    made = Counting()
    monkeypatch.setattr("lora_tree.model.link_to", lambda base: made)
    return made


# ---------------------------------------------------------------------- adapters in memory
def test_an_adapter_in_memory_is_sent_once_whatever_is_done_with_it(link: Counting) -> None:
    model = lt.attach(forest(), base())
    x = torch.randn(4, 6)
    for _ in range(3):
        for mode in ("merged", "unmerged"):
            for path in PATHS:
                model.activate(path, mode=mode)  # type: ignore[arg-type]
                model.base(x)
        for paths in (["a/b", "a/c", "d", ""], ["d", "", "a", "a/b"]):
            with model.route(paths):
                model.base(x)
    assert len(link.sent) == len(PATHS)
    assert model.cache.stats().tiers[-1].loads == len(PATHS)


def test_what_is_computed_with_is_what_was_sent(link: Counting) -> None:
    model = lt.attach(forest(), base())
    bare = model.base(x := torch.randn(4, 6))
    model.activate("a", mode="unmerged")
    assert not torch.equal(model.base(x), bare)
    model.activate("")
    for buffer in link.sent:  # poison: from now on what was sent is zeros
        buffer.zero_()
    for mode in ("merged", "unmerged"):
        model.activate("a/b", mode=mode)  # type: ignore[arg-type]  # b is sent now, a was zeroed
        model.activate("")
    link.sent[-1].zero_()
    model.activate("a/b")
    torch.testing.assert_close(model.base(x), bare)


def test_the_device_budget_bounds_what_is_sent_and_what_left_is_sent_again(link: Counting) -> None:
    nbytes = (
        4 * 64
    )  # four factors, each in a part of the buffer that begins at a multiple of 64 bytes
    model = lt.attach(forest(), base(), device_budget=3 * nbytes)
    for path in ("a/b", "a/c", "d", "a/b"):
        model.activate(path)
        assert model.cache.stats().tiers[-1].held_bytes <= 3 * nbytes
    assert len(link.sent) > len(PATHS)
    with pytest.raises(BudgetError, match=r"device_budget"):
        lt.attach(forest(), base(), device_budget=nbytes).activate("a/b")


def test_the_copy_of_an_adapter_goes_with_it(link: Counting) -> None:
    tree = forest()
    model = lt.attach(tree, base(), device_budget="1MiB")
    model.activate("d")
    model.deactivate()
    tree.remove("d")
    gc.collect()
    model.activate("a")
    model.deactivate()
    assert model.cache.stats().tiers[-1].nodes == 1


def test_what_trains_is_not_sent(link: Counting) -> None:
    model = lt.attach(forest(), base())
    model.trainable("a/b")
    model.activate("a/b", mode="unmerged")
    loss = model.base(torch.randn(4, 6)).sum()
    loss.backward()
    assert len(link.sent) == 1, "a is sent, a/b is a parameter"
    assert all(parameter.grad is not None for parameter in model.factors.of("a/b"))


def test_after_a_move_of_the_base_adapters_go_where_it_is_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    links: list[Counting] = []
    home = ["here"]

    def link_to(base: nn.Module) -> Counting:
        links.append(Counting())
        return links[-1]

    monkeypatch.setattr("lora_tree.model.link_to", link_to)
    monkeypatch.setattr("lora_tree.cache.pinning.link_to", link_to)
    monkeypatch.setattr("lora_tree.cache.pinning._device_of", lambda base: home[0])
    model = lt.attach(forest(), base())
    model.activate("a")
    home[0] = "there"
    model.activate("d")
    model.activate("a")
    model.activate("a")
    assert [len(link.sent) for link in links] == [1, 2]


# ---------------------------------------------------------------------- factors that train
def test_factors_that_train_are_made_where_their_module_is() -> None:
    factors = Factors()
    owned = factors.own(
        "a", adapter(0), places={"0": torch.device("meta"), "2": torch.device("cpu")}
    )
    assert {name: value.device.type for name, value in owned.modules.items()} == {
        "0": "meta",
        "2": "cpu",
    }
    assert {p.device.type for p in factors.parameters()} == {"meta", "cpu"}


def test_factors_that_train_follow_their_module_and_stay_the_same_parameters() -> None:
    factors = Factors()
    owned = factors.own("a", adapter(0), torch.float64)
    before = factors.of("a")
    again = factors.own(
        "a", owned, torch.float64, {"0": torch.device("cpu"), "2": torch.device("cpu")}
    )
    assert again is owned
    assert all(x is y for x, y in zip(before, factors.of("a"), strict=True))
    assert [p.dtype for p in before] == [torch.float64] * 4


def test_a_sum_over_devices_lies_where_its_first_term_does() -> None:
    here = adapter(0)
    there = here.to(device="meta")
    for scale in (1.0, 2.0):
        both = combine([(there, 1.0), (here, scale)])
        assert {value.device.type for value in both.modules.values()} == {"meta"}
        assert both.ranks == {"0": 4, "2": 4}


# ---------------------------------------------------------------------- a new batch
def test_a_new_batch_sends_its_lists_of_rows_once_for_all_sites(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    names = [str(i) for i in range(12)]
    deep = nn.Sequential(*(nn.Linear(6, 6) for _ in names)).requires_grad_(False)
    tree = lt.AdapterTree(defaults=dict(r=2, target_modules=names))
    for path in PATHS:
        tree.add(path)
    model = lt.attach(tree, deep)
    sent: list[int] = []
    real = batch_module.uploaded

    def counted(numbers: Tensor, device: torch.device) -> Tensor:
        sent.append(numbers.numel())
        return real(numbers, device)

    monkeypatch.setattr(batch_module, "uploaded", counted)
    for strategy in ("nodes", "paths", "grouped", "matrix"):
        sent.clear()
        with model.route(["a/b", "d", "a/c", "a", ""], strategy=strategy):  # type: ignore[arg-type]
            model.base(torch.randn(5, 3, 6))
        assert 0 < len(sent) < len(names), f"{strategy}: not one for each of twelve sites"


# ---------------------------------------------------------------------- pristine
@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The host plays a device with memory of its own, and with so much room."""
    room = {"bytes": 1 << 30}
    for module in ("copy_place", "pristine"):
        monkeypatch.setattr(
            f"lora_tree.engine.switching.{module}.has_own_memory", lambda device: True
        )
    monkeypatch.setattr(copy_place, "_room_bytes", lambda device: room["bytes"])
    return room


BYTES = 4 * (6 * 5 + 5 * 4)


def test_on_a_cpu_every_place_is_the_host() -> None:
    for place in ("auto", "device", "host"):
        model = lt.attach(forest(), base(), pristine=place)  # type: ignore[arg-type]
        assert (model.pristine.kind, model.pristine.nbytes) == ("none", 0)
        model.activate("a")
        assert (model.pristine.kind, model.pristine.host_bytes) == ("host", BYTES)


def test_auto_takes_the_device_where_there_is_room_for_all_and_the_host_where_there_is_not(
    card: dict[str, int],
) -> None:
    for room, kind in ((BYTES, "device"), (BYTES - 1, "host")):
        card["bytes"] = room
        model = lt.attach(forest(), base())
        model.activate("a")
        assert (model.pristine.requested, model.pristine.kind, model.pristine.nbytes) == (
            "auto",
            kind,
            BYTES,
        )


@pytest.mark.parametrize(("place", "kind"), [("device", "device"), ("host", "host")])
def test_a_place_asked_for_is_taken_whatever_auto_would_take(
    card: dict[str, int], place: str, kind: str
) -> None:
    card["bytes"] = 0 if place == "device" else 1 << 30
    model = lt.attach(forest(), base(), pristine=place)  # type: ignore[arg-type]
    model.activate("a")
    assert model.pristine.kind == kind


@pytest.mark.parametrize("place", ["auto", "device"])
def test_out_of_memory_on_the_device_falls_to_the_host_with_a_warning(
    card: dict[str, int], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    real, failed = copy_place._copy, []

    def short(parameter: Tensor, device: torch.device) -> Tensor:
        if len(failed) < 2:  # the second copy on the device finds no room
            failed.append(parameter)
            if len(failed) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
        return real(parameter, device)

    monkeypatch.setattr(copy_place, "_copy", short)
    own = base()
    bare = {name: value.clone() for name, value in own.state_dict().items()}
    model = lt.attach(forest(), own, pristine=place)  # type: ignore[arg-type]
    with pytest.warns(
        RuntimeWarning, match=r"no room on the device for 200 B .*CUDA out of memory.*on the host"
    ):
        model.activate("a")
    assert model.pristine.kind == "host"
    plain = base()
    lt.attach(forest(), plain).activate("a")
    assert all(
        torch.equal(value, plain.state_dict()[name]) for name, value in own.state_dict().items()
    )
    model.activate("")
    assert all(torch.equal(value, bare[name]) for name, value in own.state_dict().items())


def test_without_memory_anywhere_the_model_is_what_it_was(
    card: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = base()
    bare = {name: value.clone() for name, value in own.state_dict().items()}
    model = lt.attach(forest(), own)

    def none_left(parameter: Tensor, device: torch.device) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(copy_place, "_copy", none_left)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(torch.OutOfMemoryError):
                model.activate("a")
    assert (model.active, model.state.value, model.pristine.nbytes) == ("", "bare", 0)
    assert all(torch.equal(value, bare[name]) for name, value in own.state_dict().items())
    model.activate("a")
    assert model.active == "a"


def test_the_watch_compares_all_weights_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(i) for i in range(12)]
    deep = nn.Sequential(*(nn.Linear(6, 6) for _ in names)).requires_grad_(False)
    tree = lt.AdapterTree(defaults=dict(r=2, target_modules=names))
    tree.add("a")
    tree.add("b")
    model = lt.attach(tree, deep)
    model.activate("a")
    compared: list[int] = []
    real = torch.equal
    monkeypatch.setattr(torch, "equal", lambda x, y: compared.append(x.numel()) or real(x, y))  # type: ignore[func-returns-value]
    model.activate("b")
    assert len(compared) == 1, "one wait for a device, not one a weight"


def test_a_place_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match=r"'auto', 'device', 'log', 'host', 'none', got 'disk'"):
        lt.attach(forest(), base(), pristine="disk")  # type: ignore[arg-type]


def test_a_module_that_refers_to_the_one_around_it_is_looked_at_once() -> None:
    own = base()
    own[1].around = own  # type: ignore[assignment]  # a cycle, which torch's own walk over modules allows
    model = lt.attach(forest(), own)
    plain = base()
    model.activate("a")
    lt.attach(forest(), plain).activate("a")
    assert torch.equal(own[0].weight, plain[0].weight)
