"""The host's work for a forward beside the weights: hooks and launches, with kernels left out.

        224 sites, rank 16, bf16; inputs so small that a layer's own product takes no time
    path     one path of three nodes, 1 token
    batch    64 rows over 64 paths of three, 1 token a row: a second forward, and the first one
             with the work that a new batch costs
    device   host memory: launches run up to the call that would hand them to the driver

A forward on a GPU takes at least this long if it waits for its host. Run it with
``python -m benchmarks.hooks``.
"""

from __future__ import annotations

import importlib
import random
import statistics
import time
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import lora_tree as lt

from .small_layers import SITES, WIDTH, small_adapter, small_base

__all__ = ["hooked"]

MIDDLE, LEAVES = 8, 64
ON_DEVICE = (
    "routing.forms",
    "routing.path_form",
    "routing.routed",
    "routing.segmented",
    "unmerged",
)
"""Modules of the engine that ask whether kernels run."""


class Compiled:
    """A compiled kernel that does nothing."""

    function = packed_metadata = None

    @staticmethod
    def run(*arguments: Any) -> None:
        """Accept the arguments of a launch."""


def hooked(*, sites: int = SITES, rounds: int = 40) -> dict[str, float]:
    """Return the microseconds per site that each kind of forward adds to the bare one.

    They are medians; every kind runs once in every round.

    Args:
        sites: the number of the base's sites.
        rounds: how often every kind is timed.
    """
    base = small_base(sites)
    tree, leaves = _tree(sites)
    token = torch.randn(1, WIDTH).to(torch.bfloat16)
    rows = torch.randn(LEAVES, 1, WIDTH).to(torch.bfloat16)
    path, batch, other = [], [], []
    with ExitStack() as stack, torch.no_grad():
        _without_a_driver(stack)
        model = lt.attach(tree, base)
        for _ in range(rounds + 2):
            bare, bare_rows = _seconds(base, token), _seconds(base, rows)
            with model.using(leaves[0], mode="unmerged"):
                _seconds(base, token)  # installs the hooks and finds the launches
                path.append(_seconds(base, token) - bare)
            begun = time.process_time()
            with model.route(random.sample(leaves, LEAVES), batch_first=True):
                base(rows)
                other.append(time.process_time() - begun - bare_rows)
                batch.append(_seconds(base, rows) - bare_rows)
        model.detach()
    found = {}
    for name, seconds in (("path", path), ("batch", batch), ("another batch", other)):
        # The first two rounds warm up.
        found[name] = 1e6 * statistics.median(seconds[2:]) / sites
    return found


def _without_a_driver(stack: ExitStack) -> None:
    """Let every launch end in a compiled kernel that does nothing."""
    relaunch = importlib.import_module("lora_tree.engine.kernels.relaunch")
    for name in ON_DEVICE:
        module = f"lora_tree.engine.{name}.routes"
        stack.enter_context(mock.patch(module, _yes))
    changes: dict[str, Any] = {
        "_can_skip_triton": _yes,
        "_stream_of": lambda: lambda device: 0,
        "_has_several": lambda: False,
    }
    for name, change in changes.items():
        stack.enter_context(mock.patch.object(relaunch, name, change))
    ask = mock.patch.object(relaunch.Relaunch, "ask", _compiled)
    stack.enter_context(ask)


# Plain functions: a mock counts its calls, which takes longer than what is measured here.
def _yes(device: torch.device) -> bool:
    return True


def _compiled(*arguments: Any) -> type[Compiled]:
    return Compiled


def _tree(sites: int) -> tuple[lt.AdapterTree, list[str]]:
    """Return a tree 1 → 8 → 64 and its leaves."""
    tree = lt.AdapterTree()
    tree.add("n", adapter=small_adapter(sites))
    leaves = []
    for i in range(MIDDLE):
        tree.add(f"n/{i}", adapter=small_adapter(sites))
        for j in range(LEAVES // MIDDLE):
            leaf = f"n/{i}/{j}"
            tree.add(leaf, adapter=small_adapter(sites))
            leaves.append(leaf)
    return tree, leaves


def _seconds(base: nn.Module, x: Tensor) -> float:
    """Return the processor time of a forward."""
    begun = time.process_time()
    base(x)
    return time.process_time() - begun


def main() -> None:
    """Print a line for each kind of forward."""
    torch.set_num_threads(1)
    for name, taken in hooked().items():
        print(f"{name}: {taken:.1f} µs a site")


if __name__ == "__main__":
    main()
