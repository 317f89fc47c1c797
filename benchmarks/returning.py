"""The host's work to bring an adapter back to a device: from the host's tier to an active path.

    224 sites, rank 16, bf16; eleven paths in turn, and a device budget for six
    time     processor time of `activate(path, mode="unmerged")` alone, without a forward
    device   host memory: sending is a copy, and kernels count as available but do not run

On a GPU the transfer runs beside this work, and the path is active when both are done. Run it with
``python -m benchmarks.returning``.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from unittest import mock

import lora_tree as lt
from lora_tree.cache.link import Arrived
from lora_tree.cache.pack import held_bytes, pack

from .host_link import HostLink
from .small_layers import SITES, small_adapter, small_base

__all__ = ["Returned", "returned"]

PATHS, HELD = 11, 6
KERNELS = ("routing.segmented", "routing.routed", "routing.path_form", "unmerged")


class Returned(HostLink):
    """A link that records the times of the adapters that return over it."""

    def __init__(self) -> None:
        super().__init__()
        self.laid_out_bytes = 0
        self.seconds: list[float] = []
        self.before: list[float] = []
        self.begun = 0.0

    def send(self, adapter: lt.Adapter, again: lt.Adapter | None = None) -> Arrived:
        """Copy a packed adapter, and record the time from the call of `activate` to here."""
        self.before.append(time.process_time() - self.begun)
        return super().send(adapter, again)


def returned(depth: int, *, sites: int = SITES, rounds: int = 3) -> Returned:
    """Bring each of the paths back in turn, and return the times.

    Args:
        depth: the number of adapters of a path; all of them come back.
        sites: the number of the base's sites.
        rounds: how often each path comes back.
    """
    link = Returned()
    base = small_base(sites)
    tree, leaves, nbytes = lt.AdapterTree(), [], 0
    for i in range(PATHS):
        path = f"n{i}"
        for _ in range(depth):
            node = pack(small_adapter(sites), link.allocate)
            tree.add(path, adapter=node)
            nbytes, leaf, path = held_bytes(node), path, f"{path}/n"
        leaves.append(leaf)
    with ExitStack() as stack:
        stack.enter_context(mock.patch("lora_tree.model.link_to", return_value=link))
        for name in KERNELS:
            module = f"lora_tree.engine.{name}.routes"
            stack.enter_context(mock.patch(module, return_value=True))
        model = lt.attach(tree, base, device_budget=HELD * nbytes * depth)
        for path in leaves:
            model.activate(path, mode="unmerged")
        link.before.clear()
        for path in leaves * rounds:
            link.begun = time.process_time()
            model.activate(path, mode="unmerged")
            link.seconds.append(time.process_time() - link.begun)
        link.laid_out_bytes = model.cache.stats().tiers[-1].laid_out_bytes
        model.detach()
    return link


def main() -> None:
    """Print a line for paths of one node and of three."""
    for depth in (1, 3):
        seen = returned(depth)
        taken = 1e3 * statistics.median(seen.seconds)
        # Each adapter of a path is sent; the first of them begins the transfer.
        before = 1e3 * statistics.median(seen.before[::depth])
        print(
            f"paths of {depth}: {taken:.2f} ms of the host, {before:.2f} ms of them before the "
            f"first copy; {seen.laid_out_bytes} bytes laid out"
        )


if __name__ == "__main__":
    main()
