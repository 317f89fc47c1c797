"""A compiled kernel is launched again without Triton, as long as nothing differs that it was
compiled for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_tree.engine.kernels.pointers import Pointers

pytest.importorskip("triton", reason="Triton has no build for this platform")

from lora_tree.engine.kernels import relaunch
from lora_tree.engine.kernels.relaunch import LaunchPlan, Relaunch


class Compiled:
    """Stands for a kernel that Triton has compiled."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, log: list[tuple[str, Any]]) -> None:
        self._log = log

    def run(self, *arguments: Any) -> None:
        self._log.append(("run", arguments))


class Kernel:
    """Stands for a kernel as Triton decorates it."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Compiled:
            self.log.append(("asked", (grid, *arguments, options)))
            return Compiled(self.log)

        return launch

    @property
    def ways(self) -> list[str]:
        return [way for way, _ in self.log]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Let launches go to the host's memory; the value says whether a profiler looks on."""
    profiler = {"looks": False}
    monkeypatch.setattr(relaunch, "_can_skip_triton", lambda device: True)
    monkeypatch.setattr(relaunch, "_is_observed", lambda: profiler["looks"])
    monkeypatch.setattr(relaunch, "_stream_of", lambda: lambda device: 7)
    monkeypatch.setattr(relaunch, "_has_several", lambda: False)
    return profiler


def plan(kind: str = "kind") -> LaunchPlan:
    return LaunchPlan((2, 3, 4), (5, 6), ("constant",), kind, {"num_warps": 4})


def aligned(size: int = 8) -> Tensor:
    return torch.zeros(size)  # torch's memory begins at a multiple of 64 bytes


def test_the_second_launch_does_not_ask_and_passes_addresses() -> None:
    kernel, x, lists, table = Kernel(), aligned(), aligned(), aligned()
    launch, mine = Relaunch(kernel), plan()
    for _ in range(2):
        launch.bind(mine, Pointers.to(lists))(Pointers.to(table), x)
    other = aligned()
    launch.bind(mine, Pointers.to(lists))(Pointers.to(table), other)
    assert kernel.ways == ["asked", "run", "run"]
    grid, *arguments = kernel.log[0][1]
    assert grid == (2, 3, 4)
    assert arguments[:3] == [x, lists, table]
    assert arguments[3:] == [5, 6, "constant", {"num_warps": 4}]
    last = (lists.data_ptr(), table.data_ptr(), 5, 6, "constant")
    head = (2, 3, 4, 7, "function", "metadata", None, None, None)
    assert kernel.log[1][1] == (*head, x.data_ptr(), *last)
    assert kernel.log[2][1] == (*head, other.data_ptr(), *last)


def test_another_plan_of_the_kind_does_not_ask_and_another_kind_does() -> None:
    kernel, x = Kernel(), aligned()
    launch, nothing = Relaunch(kernel), Pointers.to(aligned())
    for kind in ("one", "one", "other", "other", "one"):
        launch.bind(plan(kind), nothing)(nothing, x)
    assert kernel.ways == ["asked", "run", "asked", "run", "run"]


def test_an_address_that_is_no_multiple_of_sixteen_bytes_asks() -> None:
    kernel, x = Kernel(), aligned()
    launch, nothing, mine = Relaunch(kernel), Pointers.to(aligned()), plan()
    odd = aligned(9)[1:]
    launch.bind(mine, nothing)(nothing, odd)
    launch.bind(mine, nothing)(nothing, x)  # what was compiled for odd addresses is not kept
    launch.bind(mine, nothing)(nothing, x)
    launch.bind(mine, nothing)(nothing, odd)
    launch.bind(mine, Pointers.to(odd))(nothing, x)
    launch.bind(mine, nothing)(Pointers.to(odd), x)
    assert kernel.ways == ["asked", "asked", "run", "asked", "asked", "asked"]


def test_a_profiler_is_told_of_every_launch(as_on_a_gpu: dict[str, bool]) -> None:
    kernel, x = Kernel(), aligned()
    launch, nothing, mine = Relaunch(kernel), Pointers.to(aligned()), plan()
    launch.bind(mine, nothing)(nothing, x)
    as_on_a_gpu["looks"] = True
    launch.bind(mine, nothing)(nothing, x)
    as_on_a_gpu["looks"] = False
    launch.bind(mine, nothing)(nothing, x)
    assert kernel.ways == ["asked", "asked", "run"]
