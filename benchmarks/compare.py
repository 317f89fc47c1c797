"""Does a tree pay? The same rows, learned by one pooled adapter, flat adapters and a tree.

    bare            the base alone
    pooled          one adapter for all leaves
    flat            one adapter for each leaf
    tree            one for each group, one for each leaf on it
    tree + root     one for all, one for each group, one for each leaf

Leaves are packages of the Python standard library, the base is the demo's, trained on its top-level
modules. Every system sees the same rows in the same order, so as many tokens, from each leaf alike;
ranks are chosen so that either all systems have as many trained parameters, or all have the same
rank on a path, which is what serving costs. Learning rates are tried out for each system, on all
the data, on a seed and on a part of the training text of their own. Held-out bits per byte decide:
the mean over the leaves, over seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from torch import Tensor

import lora_tree as lt
from lora_tree.demo.bytelevel import TARGETS, new_base
from lora_tree.demo.corpus import Domain, find_corpus
from lora_tree.demo.learning import as_one_row, bits_per_byte, evenly_spread, train_base, train_tree

__all__ = [
    "FULL",
    "SMALL",
    "SYSTEMS",
    "Outcome",
    "Size",
    "System",
    "compare",
    "markdown",
    "tree_of",
]


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    hidden: int
    layers: int
    base_steps: int
    steps: int
    batch: int
    windows: int
    seeds: int
    rates: tuple[float, ...]
    leaves: int = 99
    length: int = 128
    base_batch: int = 8


FULL = Size(
    hidden=192,
    layers=4,
    base_steps=480,
    steps=120,
    batch=8,
    windows=16,
    seeds=3,
    rates=(3e-3, 8e-3),
)
SMALL = Size(
    hidden=32, layers=1, base_steps=2, steps=2, batch=4, windows=1, seeds=2, rates=(5e-3,), leaves=4
)


@dataclass(frozen=True)
class System:
    """One way to share adapters: the ranks of the root, of a group and of a leaf; 0 for none."""

    name: str
    root: int
    group: int
    leaf: int

    def parameters(self, groups: int, leaves: int) -> int:
        """Trained parameters, in units of one rank of one adapter."""
        return self.root + groups * self.group + leaves * self.leaf

    @property
    def on_path(self) -> int:
        """The rank that a leaf is served with."""
        return self.root + self.group + self.leaf


# Three groups and eight leaves: 88 = 8·11 = 3·8 + 8·8 = 8 + 3·8 + 8·7
SYSTEMS: Mapping[str, tuple[System, ...]] = {
    "equal parameters": (
        System("pooled", 88, 0, 0),
        System("flat", 0, 0, 11),
        System("tree", 0, 8, 8),
        System("tree + root", 8, 8, 7),
    ),
    "equal rank on a path": (
        System("pooled", 16, 0, 0),
        System("flat", 0, 0, 16),
        System("tree", 0, 8, 8),
        System("tree + root", 5, 5, 6),
    ),
}
DATA = {"all the data": 1, "a tenth of it for every second leaf": 10}


@dataclass
class Outcome:
    """One system in one comparison."""

    comparison: str
    data: str
    system: System
    rate: float
    parameters: int
    bits: list[float] = field(default_factory=list)  # seed → mean over leaves
    of_leaves: list[list[float]] = field(default_factory=list)  # seed → leaf


def compare(
    size: Size = FULL, *, say: Callable[[str], object] = lambda text: None
) -> tuple[list[str], list[Outcome]]:
    """The leaves, and what came out; the bare base first."""
    _, leaves = find_corpus(children=3)
    crowded = {g for g in map(_group, leaves) if sum(_group(leaf) == g for leaf in leaves) > 1}
    leaves = [leaf for leaf in leaves if _group(leaf) in crowded][: size.leaves]
    base = _base(size)
    say("base trained")
    held_out = {
        d.path: evenly_spread(as_one_row(d.held_out), windows=size.windows, length=size.length)
        for d in leaves
    }
    bare = [bits_per_byte(base, rows) for rows in held_out.values()]
    outcomes = [Outcome("", "", System("bare", 0, 0, 0), 0.0, 0, [mean(bare)], [bare])]
    known: dict[tuple[System, str], Outcome] = {}
    rates: dict[System, float] = {}
    for data, (comparison, systems) in product(DATA, SYSTEMS.items()):
        for system in systems:
            made = known.get((system, data))
            if made is None:
                if system not in rates:
                    rates[system] = _rate(base, system, leaves, size)
                rate = rates[system]
                made = Outcome(comparison, data, system, rate, 0)
                for seed in range(1, size.seeds + 1):
                    tree = tree_of(system, [leaf.path for leaf in leaves])
                    streams = {
                        leaf.path: as_one_row(_some(leaf.train, DATA[data], i))
                        for i, leaf in enumerate(leaves)
                    }
                    bits = _run(base, tree, streams, held_out, rate, seed, size)
                    made.bits.append(mean(bits))
                    made.of_leaves.append(bits)
                made.parameters = sum(
                    a.numel for p in tree.paths() if (a := tree.adapter(p)) is not None
                )
                known[system, data] = made
                say(f"{comparison}, {data}: {system.name}: {mean(made.bits):.3f} at {rate:g}")
            outcomes.append(
                Outcome(
                    comparison, data, system, made.rate, made.parameters, made.bits, made.of_leaves
                )
            )
    return [leaf.path for leaf in leaves], outcomes


def tree_of(system: System, leaves: Sequence[str]) -> lt.AdapterTree:
    """Make the tree of a system: ``all``, groups, leaves; a node of rank 0 has no adapter."""
    tree = lt.AdapterTree(defaults={"target_modules": TARGETS})
    for path, rank in _nodes(system, leaves).items():
        if rank:
            tree.add(path, r=rank, lora_alpha=2.0 * rank)
        else:
            tree.add(path, group=True)
    return tree


def markdown(leaves: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """A table for each comparison and amount of data."""
    bare, *others = outcomes
    text = [
        f"{len(leaves)} leaves: {', '.join(leaves)}. The bare base: {bare.bits[0]:.3f} bits per "
        "byte.\n"
    ]
    seen = dict.fromkeys((o.comparison, o.data) for o in others)
    for comparison, data in seen:
        text.append(f"\n### {comparison}, {data}\n\n")
        text.append(
            "| system | ranks: root, group, leaf | trained parameters | rank on a path | bits per "
            "byte | ± | rate |\n"
        )
        text.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n")
        mine = [o for o in others if (o.comparison, o.data) == (comparison, data)]
        best = min(mean(o.bits) for o in mine)
        for o in mine:
            s, bits = o.system, mean(o.bits)
            told = f"**{bits:.3f}**" if bits == best else f"{bits:.3f}"
            spread_ = stdev(o.bits) if len(o.bits) > 1 else 0.0
            ranks = f"{s.root or '–'}, {s.group or '–'}, {s.leaf or '–'}"
            text.append(
                f"| {s.name} | {ranks} | {o.parameters:,} | {s.on_path} | {told} | {spread_:.3f} | "
                f"{o.rate:g} |\n"
            )
    return "".join(text)


# ---------------------------------------------------------------------- one run
def _base(size: Size) -> Any:
    torch.manual_seed(0)
    corpus, _ = find_corpus()
    base = new_base(hidden=size.hidden, layers=size.layers, window=size.length)
    tokens = as_one_row(corpus.train)
    train_base(
        base,
        tokens,
        steps=size.base_steps,
        batch=size.base_batch,
        length=size.length,
        lr=3e-3,
        seed=0,
    )
    return base


def _run(
    base: Any,
    tree: lt.AdapterTree,
    streams: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor],
    rate: float,
    seed: int,
    size: Size,
) -> list[float]:
    """Bits per byte of every leaf after training."""
    torch.manual_seed(seed)
    model = lt.attach(tree, base)
    path_of = {
        leaf: next(p for p in tree.leaves() if p in ("all", f"all/{leaf}")) for leaf in streams
    }
    train_tree(
        model,
        [path for path in tree.paths() if tree.adapter(path) is not None],
        {leaf: (path_of[leaf], tokens) for leaf, tokens in streams.items()},
        steps=size.steps,
        batch=size.batch,
        length=size.length,
        lr=rate,
        seed=seed,
    )
    bits = []
    for leaf, rows in held_out.items():
        with model.using(path_of[leaf]):
            bits.append(bits_per_byte(base, rows))
    model.detach()
    return bits


def _rate(base: Any, system: System, leaves: Sequence[Domain], size: Size) -> float:
    """Return the learning rate that does best on the last tenth of the text, trained without it."""
    if len(size.rates) == 1:
        return size.rates[0]
    streams, kept = {}, {}
    for leaf in leaves:
        tokens = as_one_row(leaf.train)
        cut = len(tokens) * 9 // 10
        streams[leaf.path] = tokens[:cut]
        kept[leaf.path] = evenly_spread(tokens[cut:], windows=size.windows // 2, length=size.length)
    paths = [leaf.path for leaf in leaves]
    tried = {
        r: mean(_run(base, tree_of(system, paths), streams, kept, r, 0, size)) for r in size.rates
    }
    return min(tried, key=tried.__getitem__)


def _nodes(system: System, leaves: Sequence[str]) -> dict[str, int]:
    nodes = {"all": system.root}
    if system.group or system.leaf:
        nodes |= {f"all/{leaf.partition('/')[0]}": system.group for leaf in leaves}
        nodes |= {f"all/{leaf}": system.leaf for leaf in leaves}
    return nodes


def _group(leaf: Domain) -> str:
    return leaf.path.partition("/")[0]


def _some(documents: Sequence[bytes], part: int, leaf: int) -> Sequence[bytes]:
    """All documents, or for every second leaf a part of each."""
    return [d[: len(d) // part] for d in documents] if leaf % 2 else documents


def main(
    small: Annotated[
        bool, typer.Option("--small", help="A toy size: that it runs, not what comes out.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Every seed and leaf.")] = False,
) -> None:
    """Train everything and print the tables; about half an hour on two cores."""
    transformers.utils.logging.disable_progress_bar()
    console = Console(stderr=True, highlight=False)
    leaves, outcomes = compare(SMALL if small else FULL, say=console.print)
    told = (
        json.dumps([asdict(o) for o in outcomes], indent=2)
        if as_json
        else markdown(leaves, outcomes)
    )
    sys.stdout.write(told + "\n")


if __name__ == "__main__":
    typer.run(main)
