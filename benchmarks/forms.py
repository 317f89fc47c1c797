"""The forms of a routed sum at one site: the time of each, the cost rule's estimate, and its
choice.

    python -m benchmarks.forms             on this processor, with torch's number of threads
    python -m benchmarks.forms --seconds 5

The rule's constants (`lora_tree.engine.cost`) were fitted to one kind of processor. Run this on
another: where the choice is far from the fastest, the constants do not fit. Rounds are interleaved,
and a tenth of them is faster than the time shown, since a busy machine only ever adds to it.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

import torch
from torch import nn

import lora_tree as lt
from lora_tree.engine.batch import Batch
from lora_tree.engine.cost import machine
from lora_tree.engine.forms import FORMS, SumForm
from lora_tree.engine.owed import Owed
from lora_tree.sites import find_site

__all__ = ["FormTimes", "measured"]

# (rows, distinct paths, nodes on the second level, tokens a row)
BATCHES = [(8, 8, 2, 1), (8, 8, 2, 16), (8, 8, 2, 128), (64, 8, 2, 16), (64, 64, 8, 1)]
SHAPES = [(1024, 1024), (1024, 2816), (2048, 2048)]
RANK = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FormTimes:
    """One batch at one site: form → seconds, as timed and as estimated."""

    title: str
    timed: dict[str, float]
    estimated: dict[str, float]

    @property
    def chosen(self) -> str:
        """The form that the cost rule takes."""
        return min(self.estimated, key=lambda name: self.estimated[name])

    @property
    def over_fastest(self) -> float:
        """The chosen form's time as a multiple of the fastest one's."""
        return self.timed[self.chosen] / min(self.timed.values())

    def __str__(self) -> str:
        told = []
        for name, seconds in self.timed.items():
            told.append(f"{name} {1e3 * seconds:.2f} ({1e3 * self.estimated[name]:.2f})")
        return f"{self.title}: {self.chosen} {self.over_fastest:.2f} × | {', '.join(told)} ms"


@torch.no_grad()
def measured(batch: tuple[int, int, int, int], shape: tuple[int, int], seconds: float) -> FormTimes:
    """Time every form for about so many seconds; on a CPU none of them is "segmented"."""
    rows, paths, middle, tokens = batch
    into, out = shape
    owed = _owed(rows, paths, middle, into, out)
    forms: dict[str, SumForm] = {}
    for name, ways in FORMS.items():
        if name != "segmented":
            way = next(way for way in ways if way.suits(owed, tokens))
            forms[name] = way(owed)
    x, y = torch.randn(rows, tokens, into), torch.randn(rows, tokens, out)
    rounds: dict[str, list[float]] = {name: [] for name in forms}
    end = time.perf_counter() + seconds
    while len(rounds["nodes"]) < 3 or time.perf_counter() < end:
        for name, form in forms.items():
            target = y.clone()
            start = time.perf_counter()
            form.add(target, x, spare=True)
            rounds[name].append(time.perf_counter() - start)
    timed = {name: quantiles(took, n=10)[0] for name, took in rounds.items()}
    estimated = {}
    for name, form in forms.items():
        estimated[name] = form.cost(owed, tokens).seconds(machine(CPU))
    title = f"{rows} rows over {paths} paths, {tokens} tokens a row, {into} → {out}"
    return FormTimes(title, timed, estimated)


def _owed(rows: int, paths: int, middle: int, into: int, out: int) -> Owed:
    """Return what shuffled rows owe at a Linear, in a tree 1 → middle → paths."""
    tree = lt.AdapterTree()
    torch.manual_seed(0)
    nodes = ["r", *(f"r/m{i}" for i in range(middle))]
    nodes += [f"r/m{i * middle // paths}/l{i:02}" for i in range(paths)]
    for path in nodes:
        value = lt.LowRank(torch.randn(RANK, into), torch.randn(out, RANK))
        tree.add(path, adapter=lt.Adapter({"0": value}))
    routed = tree.leaves() * (rows // paths)
    random.Random(0).shuffle(routed)
    batch = Batch.of(tree, routed)
    site = find_site(nn.Sequential(nn.Linear(into, out)), "0")
    values = [adapter.modules["0"] for path in batch.nodes if (adapter := tree.adapter(path))]
    return Owed(site, values, batch, torch.float32, CPU)


def main(arguments: Sequence[str]) -> None:
    """Print a line for each batch and shape: the choice, its time over the fastest, all forms."""
    seconds = float(arguments[arguments.index("--seconds") + 1]) if arguments else 2.0
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{capability}, {torch.get_num_threads()} threads; timed (estimated)")
    for batch in BATCHES:
        for shape in SHAPES:
            print(measured(batch, shape, seconds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
