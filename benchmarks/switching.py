"""The host's work in a merged switch on a device, before and after the launch that writes.

    224 sites in a Llama of 32 layers, paths three nodes deep, siblings in turn
    time     processor time from `activate(path)` to the launch, and from there to its return
    device   host memory: kernels count as available, and do nothing
    pristine copies beside the weights, or undo logs

On a GPU the device waits during the work before the launch, and runs during the work after it.
Run it with ``python -m benchmarks.switching``.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from torch import Tensor

import lora_tree as lt

from .setting import SIBLING, START, base, tree
from .sizes import FULL

__all__ = ["Switched", "switched"]

SIZE = replace(FULL, hidden=32, layers=32, repeats=50)


@dataclass
class Switched:
    """Processor time in seconds, one number for each switch.

    Args:
        before: from the call to the launch.
        after: from the launch to the return.
        laid_out: how many launches from copies were laid out; a kept launch is run again instead.
    """

    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    laid_out: int = 0


class _NoLaunch:
    """A launch that writes nothing, and records when it was called."""

    def __init__(self, note: Callable[[], None]) -> None:
        self._note = note

    def run(self) -> None:
        self._note()


class _NoKernel:
    """A kernel of undo logs that writes nothing, and records when it was called."""

    def __init__(self, note: Callable[[], None]) -> None:
        self._note = note

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: self._note()


def _no_samples(tensors: Sequence[Tensor], steps: Sequence[int]) -> Callable[[], Tensor]:
    """Return a sampler that returns the same numbers every time."""
    return lambda: torch.zeros(64 * len(tensors), dtype=torch.int16)


def switched(
    layers: int = SIZE.layers, *, repeats: int = SIZE.repeats, logged: bool = False
) -> Switched:
    """Switch between two siblings, and return the times.

    Args:
        layers: the number of the base's layers, with seven sites each.
        repeats: how many switches are counted.
        logged: whether to use undo logs, which need Triton, instead of copies.
    """
    size = replace(SIZE, layers=layers)
    model = base(size, torch.bfloat16)
    adapters = tree(model, size, dtype=torch.bfloat16)
    seen = Switched()
    launched: list[float] = []

    def note() -> None:
        launched.append(time.process_time())

    def lay_out(parts: Sequence[object]) -> _NoLaunch:
        seen.laid_out += 1
        return _NoLaunch(note)

    with ExitStack() as stack:
        stack.enter_context(
            mock.patch("lora_tree.engine.switching.merged.usable", return_value=True)
        )
        stack.enter_context(
            mock.patch("lora_tree.engine.switching.watch.usable", return_value=True)
        )
        stack.enter_context(mock.patch("lora_tree.engine.switching.merged.merge_launch", lay_out))
        stack.enter_context(
            mock.patch("lora_tree.engine.switching.watch.sample_launch", _no_samples)
        )
        if logged:
            stack.enter_context(
                mock.patch("lora_tree.engine.switching.pristine.logs", return_value=True)
            )
            stack.enter_context(
                mock.patch("lora_tree.engine.switching.tile_log.logs", return_value=True)
            )
            kernel = "lora_tree.engine.kernels.undo.rewrite_logged"
            stack.enter_context(mock.patch(kernel, _NoKernel(note)))
        attached = lt.attach(adapters, model, pristine="log" if logged else "auto")
        # Make the copies, and everything that is kept between switches.
        for path in (START, SIBLING, START, SIBLING):
            attached.activate(path)
        for i in range(repeats):
            launched.clear()
            start = time.process_time()
            attached.activate((START, SIBLING)[i % 2])
            end = time.process_time()
            seen.before.append(launched[0] - start)
            seen.after.append(end - launched[-1])
        attached.detach()
    return seen


def main() -> None:
    """Print the medians."""
    for what, logged in (("copies", False), ("undo logs", True)):
        if logged and importlib.util.find_spec("triton") is None:
            continue
        seen = switched(logged=logged)
        before, after = 1e3 * statistics.median(seen.before), 1e3 * statistics.median(seen.after)
        print(
            f"siblings, {what}: {before:.2f} ms of the host before the launch, "
            f"{after:.2f} ms after it"
        )


if __name__ == "__main__":
    main()
