"""On one GPU: the kernels of routed sums alone, over the seven sites of one layer of 8B, in bf16.

A small kernel before each pair stands for the base's own, and its time is subtracted. All launches
are captured in a CUDA graph, so that the host's time does not count. Each launch uses another
layer's factors, so that no cache holds them.
"""

from __future__ import annotations

import importlib
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_tree.engine.kernels import (
    FactorTable,
    Segments,
    Tiling,
    group_of,
    routed_kernels,
    routes,
    segment_numbers,
)

from .common import Result, Timing
from .gpu import NO_DEVICE
from .sizes import FULL, Size

__all__ = ["run"]

DTYPE = torch.bfloat16
RANK = 16
SITES = ((4096, 4096, 2), (4096, 1024, 2), (4096, 14336, 2), (14336, 4096, 1))
"""(in, out) of a layer's sites, and how many there are of each."""

LEAVES, MIDDLE = 64, 8


@dataclass(frozen=True)
class Work:
    """A batch to time.

    Args:
        what: its name in the table.
        kinds: what its rows owe: a coefficient for every node.
        tokens: tokens per row.
        layers: the number of layers, each with its own factors.
    """

    what: str
    kinds: Sequence[Sequence[float]]
    tokens: int
    layers: int


def run(size: Size = FULL) -> list[Result]:
    """Return a table for each batch; without a GPU, none, and print one line on stderr."""
    if not torch.cuda.is_available():
        sys.stderr.write(NO_DEVICE.replace("gpu", "kernels") + "\n")
        return []
    device = torch.device("cuda", torch.cuda.current_device())
    assert routes(device)
    path = [(1.0, 1.0, 1.0)]
    rows = _rows()
    works = [
        Work("a path of three, 1 input", path, 1, 12),
        Work("a path of three, 1,024 inputs", path, 1024, 12),
        Work("64 rows over 64 paths, 1 token a row", rows, 1, 6),
        Work("64 rows over 64 paths, 16 tokens a row", rows, 16, 6),
        Work("64 rows over 64 paths, 128 tokens a row", rows, 128, 2),
    ]
    name = torch.cuda.get_device_name(device)
    return [_one(work, max(size.repeats, 5), device, name) for work in works]


def _rows() -> list[tuple[float, ...]]:
    """Return what 64 rows owe in a tree 1 → 8 → 64, in shuffled order."""
    found = []
    for leaf in range(LEAVES):
        owed = [0.0] * (1 + MIDDLE + LEAVES)
        owed[0] = owed[1 + leaf * MIDDLE // LEAVES] = owed[1 + MIDDLE + leaf] = 1.0
        found.append(tuple(owed))
    random.Random(0).shuffle(found)
    return found


def _one(work: Work, repeats: int, device: torch.device, name: str) -> Result:
    group = group_of(work.tokens, len(work.kinds))
    sizes, numbers = segment_numbers(work.kinds, range(len(work.kinds)), group)
    segments = Segments(sizes, numbers.to(device))
    tiling = Tiling.of(sizes, work.tokens, DTYPE)
    kernels, count = routed_kernels(), len(work.kinds[0])
    before = torch.zeros(1, device=device)
    inputs = len(work.kinds) * work.tokens
    alone = _timed([lambda: before.add_(1.0)] * work.layers, repeats)
    # These names exist only where Triton is installed.
    direct = importlib.import_module("lora_tree.engine.kernels.direct")
    pairs, singles, floors = _Sum(repeats), _Sum(repeats), _Sum(repeats)
    is_direct = False
    for into, out, times in SITES:
        x = torch.randn(inputs, into, device=device, dtype=DTYPE)
        y = torch.randn(inputs, out, device=device, dtype=DTYPE)
        held, calls, direct_calls = [], [], []
        for _ in range(work.layers):
            factors, memory = _factors(count, into, out, device)
            held.append(memory)
            table = FactorTable.of(factors, device)

            def pair(x: Tensor = x, y: Tensor = y, table: FactorTable = table) -> None:
                before.add_(1.0)
                low = kernels.shrink(x, segments, table, 0, tiling)
                kernels.expand(low, y, y, segments, table, 1, tiling)

            calls.append(pair)
            is_direct = direct.is_direct(segments, table, tiling)
            if is_direct:
                launch = direct.bound_direct(x, y, segments, table, tiling)

                def single(
                    x: Tensor = x,
                    y: Tensor = y,
                    launch: Any = launch,
                    table: FactorTable = table,
                ) -> None:
                    before.add_(1.0)
                    launch(table.to_shrink, x, y)

                direct_calls.append(single)
        pairs.add(_timed(calls, repeats), times, alone)
        if is_direct:
            singles.add(_timed(direct_calls, repeats), times, alone)
        nbytes = held[0].nbytes + x.nbytes + 2 * y.nbytes
        source = torch.empty(work.layers, nbytes // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copies: list[Callable[[], object]] = []
        for here, there in zip(source, target, strict=True):
            copies.append(partial(there.copy_, here))
        floors.add(_timed(copies, repeats), times)
    result = Result(f"kernels of one layer: {work.what}; r={RANK}, bf16; {name}")
    result.timings = {"shrink and expand": pairs.timing, "floor: as many bytes": floors.timing}
    if is_direct:
        result.timings["in one launch"] = singles.timing
    result.facts["kernels / floor"] = pairs.timing.ms / floors.timing.ms
    return result


def _factors(
    count: int, into: int, out: int, device: torch.device
) -> tuple[list[tuple[Tensor, Tensor, float]], Tensor]:
    """Return factors of some nodes in one piece of memory, and the memory."""
    each = RANK * (into + out)
    memory = torch.randn(count, each, device=device, dtype=DTYPE) * 0.02
    found = []
    for mine in memory:
        A = mine[: RANK * into].view(RANK, into)
        B = mine[RANK * into :].view(out, RANK)
        found.append((A, B, 0.5))
    return found, memory


class _Sum:
    """Milliseconds of a layer, round by round."""

    def __init__(self, repeats: int) -> None:
        self._rounds = [0.0] * repeats

    def add(self, rounds: Sequence[float], times: int, less: Sequence[float] = ()) -> None:
        """Add a site's time, less the median of ``less``, as often as the layer has such a site."""
        taken_off = statistics.median(less) if less else 0.0
        for i, took in enumerate(rounds):
            self._rounds[i] += times * (took - taken_off)

    @property
    def timing(self) -> Timing:
        return Timing(tuple(self._rounds))


def _timed(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return milliseconds of a call on the device, for each replay of a graph of all calls."""
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    found = []
    for _ in range(repeats):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / len(calls))
    return found
