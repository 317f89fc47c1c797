"""Where copies of the base's own weights go, by the kind of memory and the room in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_tree.engine.switching import copy_place
from lora_tree.engine.switching.copy_place import (
    Copies,
    CopyPlace,
    can_copy_on_device,
    copies_on_device,
)

GIB = 1 << 30


class Weight:
    """A weight on a device that this machine need not have."""

    def __init__(self, device: str, gib: float) -> None:
        self.device, self._numel = torch.device(device), int(gib * GIB) // 2

    def numel(self) -> int:
        return self._numel

    def element_size(self) -> int:
        return 2


@pytest.fixture
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    # 16 GiB, of which 3 are free and one more is reserved by torch and not used.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 8 * GIB)


@pytest.mark.usefixtures("_card")
@pytest.mark.parametrize(
    ("place", "gib", "beside"),
    [
        ("auto", 2, True),  # 3 free + 1 unused − an eighth of 16
        ("auto", 2.1, False),
        ("device", 9, True),
        ("host", 1, False),
        ("log", 1, False),
        ("none", 1, False),
    ],
)
def test_auto_leaves_an_eighth_of_the_device_free(
    place: CopyPlace, gib: float, beside: bool
) -> None:
    weights: Any = [Weight("cuda:0", gib / 2), Weight("cuda:0", gib / 2)]
    assert can_copy_on_device(place, weights) is beside


@pytest.mark.usefixtures("_card")
def test_one_device_without_room_sends_all_copies_to_the_host() -> None:
    weights: Any = [Weight("cuda:0", 1), Weight("cuda:1", 3)]
    assert can_copy_on_device("auto", weights[:1])
    assert not can_copy_on_device("auto", weights)


@pytest.mark.parametrize("place", ["auto", "device", "host", "log", "none"])
def test_memory_of_the_host_is_no_device(place: CopyPlace) -> None:
    assert not can_copy_on_device(place, [torch.zeros(2)])


def test_without_memory_there_is_no_copy_and_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.ones(4), torch.zeros(2, dtype=torch.bfloat16)]
    copies = copies_on_device(weights)
    assert copies is not None
    for weight, copy in zip(weights, copies, strict=True):
        assert torch.equal(copy, weight)
        assert copy.dtype == weight.dtype
        assert copy.data_ptr() != weight.data_ptr()

    def full(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory left\nand much more")

    monkeypatch.setattr(copy_place, "_copy", full)
    with pytest.warns(RuntimeWarning, match=r"no room on the device for 20 B .*\(no memory left\)"):
        assert copies_on_device(weights) is None


def test_the_kind_names_every_place_that_has_bytes() -> None:
    assert Copies("auto").kind == "none"
    both = Copies("auto", device_bytes=1, host_bytes=2, log_bytes=4)
    assert (both.kind, both.nbytes) == ("device+log+host", 7)
