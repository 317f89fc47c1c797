"""The forms of a routed sum at one site: the time of each, and the one that `auto` takes.

    python -m benchmarks.forms             on this processor, with torch's number of threads
    python -m benchmarks.forms --seconds 5

Factors are laid out before the timed rounds; "laid out" is the time that this took. Times are
processor time, so other work on the machine counts for little. Rounds are interleaved, and the time
shown is the first decile: a tenth of the rounds is faster.
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
from lora_tree.engine.routing.forms import FORMS, SumForm, form_for
from lora_tree.engine.routing.owed import Owed
from lora_tree.engine.rows.batch import Batch
from lora_tree.errors import plural
from lora_tree.sites import find_site

__all__ = ["FormTimes", "measured"]

# (rows, distinct paths, nodes on the second level, tokens a row)
BATCHES = [
    (8, 8, 2, 1),
    (8, 8, 2, 16),
    (8, 8, 2, 64),
    (8, 8, 2, 128),
    (64, 8, 2, 16),
    (64, 64, 8, 1),
    # Rows that don't divide evenly among the paths.
    (8, 5, 2, 1),
    (52, 8, 2, 1),
    (52, 8, 2, 8),
]
SHAPES = [(1024, 1024), (1024, 2816), (2048, 2048)]
RANK = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FormTimes:
    """One batch at one site.

    Args:
        title: names the setting.
        timed: form → seconds; ``auto`` is the library's own choice.
        laid_out: form → seconds that its layout took.
    """

    title: str
    timed: dict[str, float]
    laid_out: dict[str, float]

    @property
    def over_fastest(self) -> float:
        """The time of the form that `auto` takes, as a multiple of the fastest one's."""
        return self.timed["auto"] / min(self.timed.values())

    def __str__(self) -> str:
        told = []
        for name, seconds in self.timed.items():
            told.append(f"{name} {1e3 * seconds:.2f} ({1e3 * self.laid_out[name]:.2f})")
        return f"{self.title}: {self.over_fastest:.2f} × | {', '.join(told)} ms"


@torch.no_grad()
def measured(batch: tuple[int, int, int, int], shape: tuple[int, int], seconds: float) -> FormTimes:
    """Time every form for about ``seconds``; on a CPU "segmented" is left out."""
    rows, paths, middle, tokens = batch
    into, out = shape
    owed = _owed(rows, paths, middle, into, out)
    ways: dict[str, type[SumForm]] = {"auto": form_for(owed, tokens, trains=False)}
    for name, several in FORMS.items():
        if name != "segmented":
            ways[name] = next(way for way in several if way.suits(owed, tokens))
    forms: dict[str, SumForm] = {}
    laid_out = {}
    for name, way in ways.items():
        start = time.process_time()
        forms[name] = way(owed)
        laid_out[name] = time.process_time() - start
    x, y = torch.randn(rows, tokens, into), torch.randn(rows, tokens, out)
    rounds: dict[str, list[float]] = {name: [] for name in forms}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    while len(rounds["auto"]) < 3 or time.perf_counter() < end:
        # A new order each time, because a form leaves its factors in the processor's cache.
        for name in order.sample(sorted(forms), len(forms)):
            target = y.clone()
            start = time.process_time()
            forms[name].add(target, x, spare=True)
            rounds[name].append(time.process_time() - start)
    timed = {name: quantiles(took, n=10, method="inclusive")[0] for name, took in rounds.items()}
    a_row = f"{plural(tokens, 'token')} a row"
    title = f"{rows} rows over {paths} paths, {a_row}, {into} → {out}"
    return FormTimes(title, timed, laid_out)


def _owed(rows: int, paths: int, middle: int, into: int, out: int) -> Owed:
    """Return what shuffled rows owe at a Linear, in a tree 1 → middle → paths."""
    tree = lt.AdapterTree()
    torch.manual_seed(0)
    nodes = ["r", *(f"r/m{i}" for i in range(middle))]
    nodes += [f"r/m{i * middle // paths}/l{i:02}" for i in range(paths)]
    for path in nodes:
        value = lt.LowRank(torch.randn(RANK, into), torch.randn(out, RANK))
        tree.add(path, adapter=lt.Adapter({"0": value}))
    routed = (tree.leaves() * rows)[:rows]
    random.Random(0).shuffle(routed)
    batch = Batch.of(tree, routed)
    site = find_site(nn.Sequential(nn.Linear(into, out)), "0")
    values = [adapter.modules["0"] for path in batch.nodes if (adapter := tree.adapter(path))]
    return Owed(site, values, batch, torch.float32, CPU)


def main(arguments: Sequence[str]) -> None:
    """Print a line for each batch and shape: the chosen form over the fastest, then all forms."""
    seconds = float(arguments[arguments.index("--seconds") + 1]) if arguments else 2.0
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"{capability}, {torch.get_num_threads()} threads; auto over the fastest | timed (laid out)"
    )
    for batch in BATCHES:
        for shape in SHAPES:
            print(measured(batch, shape, seconds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
