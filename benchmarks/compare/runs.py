"""Training of the systems on the same rows, and their bits per byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import lora_tree as lt
from lora_tree.demo.bytelevel import new_base
from lora_tree.demo.corpus import Domain, find_corpus
from lora_tree.demo.learning import as_one_row, bits_per_byte, evenly_spread, train_base, train_tree

from .corpora import find_manuals, find_packages
from .kept import NOWHERE, Kept, mark
from .systems import FULL, SYSTEMS, Outcome, Setting, Size, System, tree_of

__all__ = [
    "DATA",
    "Say",
    "Text",
    "best_setting",
    "compare",
    "curve",
    "measured",
    "opened",
    "path_of",
    "quiet",
    "trained",
]

DATA = {"all the data": 1, "a tenth of it for every second leaf": 10}
Say = Callable[[str], object]


def quiet(text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Text:
    """A base, and the leaves that are trained over it.

    Args:
        held_out: leaf → windows of tokens, (windows, length).
        kept: where results of runs are kept.
    """

    base: Any
    leaves: tuple[Domain, ...]
    held_out: Mapping[str, Tensor]
    size: Size
    kept: Kept = NOWHERE

    @property
    def paths(self) -> list[str]:
        """The leaves by name."""
        return [leaf.path for leaf in self.leaves]

    def streams(self, part: int = 1) -> dict[str, Tensor]:
        """Return each leaf's training tokens: all of them, and a part for every second leaf."""
        found = {}
        for i, leaf in enumerate(self.leaves):
            documents = leaf.train
            if i % 2 and part > 1:
                documents = tuple(text[: len(text) // part] for text in documents)
            found[leaf.path] = _one_row(documents)
        return found

    def about(self, setting: Setting, seed: int, **others: Any) -> dict[str, Any]:
        """Return the inputs of a run, as plain data."""
        size = self.size
        return {
            "base": mark(self.base.state_dict()),
            "steps": size.steps,
            "batch": size.batch,
            "length": size.length,
            "setting": asdict(setting),
            "seed": seed,
            **others,
        }


@lru_cache(maxsize=64)  # every run of every system takes the same rows
def _one_row(documents: tuple[bytes, ...]) -> Tensor:
    return as_one_row(documents)


def opened(size: Size, *, manuals: bool = False, kept: Kept = NOWHERE, say: Say = quiet) -> Text:
    """Train the base and find the leaves; there are none without manual pages."""
    leaves = find_manuals(size.leaves) if manuals else find_packages(size.leaves)
    torch.manual_seed(0)
    base = new_base(hidden=size.hidden, layers=size.layers, window=size.length)
    if leaves:
        corpus, _ = find_corpus()
        tokens = as_one_row(corpus.train)
        how: dict[str, Any] = {
            "steps": size.base_steps,
            "batch": size.base_batch,
            "length": size.length,
            "lr": 3e-3,
            "seed": 0,
        }
        about = {**how, "hidden": size.hidden, "layers": size.layers, "rows": mark({"": tokens})}
        kept.weights(about, base, lambda: train_base(base, tokens, **how))
        say("base trained")
    held_out = {}
    for leaf in leaves:
        tokens = as_one_row(leaf.held_out)
        held_out[leaf.path] = evenly_spread(tokens, windows=size.windows, length=size.length)
    return Text(base, tuple(leaves), held_out, size, kept)


def path_of(tree: lt.AdapterTree, leaf: str) -> str:
    """Return the node that serves a leaf: its own, or the pooled one."""
    return f"all/{leaf}" if f"all/{leaf}" in tree else "all"


def trained(
    text: Text,
    system: System,
    setting: Setting,
    seed: int,
    streams: Mapping[str, Tensor],
    *,
    held_out: Mapping[str, Tensor] | None = None,
    shrinkage_of: Mapping[str, float] | None = None,
) -> tuple[lt.AdapterTree, list[float]]:
    """Train a system, and return its tree and the bits per byte of every leaf.

    Args:
        shrinkage_of: node → the part that decays in a step; None takes the setting's, by depth.
    """
    size = text.size
    torch.manual_seed(seed)
    tree = tree_of(system, list(streams))
    model = lt.attach(tree, text.base)
    train_tree(
        model,
        [path for path in tree.paths() if tree[path].has_adapter],
        {leaf: (path_of(tree, leaf), tokens) for leaf, tokens in streams.items()},
        steps=size.steps,
        batch=size.batch,
        length=size.length,
        lr=setting.rate,
        over=system.over,
        decay_by_depth=setting.decay_by_depth,
        decay_of={node: part / setting.rate for node, part in (shrinkage_of or {}).items()},
        seed=seed,
    )
    bits = []
    for leaf, rows in (held_out or text.held_out).items():
        with model.using(path_of(tree, leaf)):
            bits.append(bits_per_byte(text.base, rows))
    model.detach()
    return tree, bits


def measured(
    text: Text,
    system: System,
    setting: Setting,
    seed: int,
    streams: Mapping[str, Tensor],
    *,
    held_out: Mapping[str, Tensor] | None = None,
    shrinkage_of: Mapping[str, float] | None = None,
) -> tuple[list[float], int]:
    """Train a system unless its result is kept; return the bits of every leaf, and parameters."""
    held_out = held_out or text.held_out

    def run() -> dict[str, Any]:
        tree, bits = trained(
            text, system, setting, seed, streams, held_out=held_out, shrinkage_of=shrinkage_of
        )
        adapters: Sequence[Any] = [tree.adapter(path) for path in tree.paths()]
        count = sum(adapter.numel for adapter in adapters if adapter is not None)
        return {"bits": bits, "parameters": count}

    about = text.about(
        setting,
        seed,
        ranks=[system.root, system.group, system.leaf],
        over=system.over,
        trained_on=mark(streams),
        measured_on=mark(held_out),
    )
    if shrinkage_of is not None:
        about["shrinkage_of"] = dict(shrinkage_of)
    found = text.kept.result(about, run)
    return found["bits"], found["parameters"]


def compare(
    size: Size = FULL,
    *,
    manuals: bool = False,
    only: str = "",
    kept: Kept = NOWHERE,
    say: Say = quiet,
) -> tuple[list[str], list[Outcome]]:
    """Return the leaves and the outcomes, the bare base first; nothing if there are no leaves.

    Args:
        size: the amount of training and measuring.
        manuals: the leaves are manual pages.
        only: a part of a table's heading; other tables are left out.
        kept: where results of runs are kept.
        say: is called with each outcome, as a line.
    """
    text = opened(size, manuals=manuals, kept=kept, say=say)
    if not text.leaves:
        return [], []
    bare = [bits_per_byte(text.base, rows) for rows in text.held_out.values()]
    nothing = Setting(0.0, (0.0,))
    outcomes = [Outcome("", "", System("bare", 0, 0, 0), nothing, 0, [mean(bare)], [bare])]
    known: dict[tuple[System, str], Outcome] = {}
    chosen: dict[System, Setting] = {}
    for data, (comparison, systems) in product(DATA, SYSTEMS.items()):
        if only not in f"{comparison}, {data}":
            continue
        for system in systems:
            # A system of the same ranks may be in both comparisons.
            made = known.get((system, data))
            if made is None:
                if system not in chosen:
                    chosen[system] = best_setting(text, system)
                made = _seeds(text, system, chosen[system], data)
                known[system, data] = made
                seeds = " ".join(f"{bits:.4f}" for bits in made.bits)
                told = f"{seeds} at {made.setting.rate:g}, {made.setting.shrinkage}"
                say(f"{comparison}, {data}: {system.name}: {told}")
            outcomes.append(replace(made, comparison=comparison))
    return text.paths, outcomes


def curve(
    size: Size = FULL, *, kept: Kept = NOWHERE, say: Say = quiet
) -> list[tuple[int, str, float]]:
    """Return (steps, system, bits) of ever longer training: equal rank on a path, one seed."""
    text = opened(size, kept=kept, say=say)
    found = []
    for system in SYSTEMS["equal rank on a path"]:
        setting = best_setting(text, system)
        for steps in size.curve:
            longer = replace(text, size=replace(size, steps=steps))
            bits, _ = measured(longer, system, setting, 1, text.streams())
            found.append((steps, system.name, mean(bits)))
            say(f"{steps} steps: {system.name}: {mean(bits):.3f}")
    return found


def best_setting(text: Text, system: System) -> Setting:
    """Return the setting that does best on a tenth of the training text, held back from it."""
    size = text.size
    tries = system.settings(size.rates)
    if len(tries) == 1:
        return tries[0]
    streams, kept = {}, {}
    for leaf, tokens in text.streams().items():
        cut = len(tokens) * 9 // 10
        streams[leaf] = tokens[:cut]
        windows = max(size.windows // 2, 1)
        kept[leaf] = evenly_spread(tokens[cut:], windows=windows, length=size.length)
    found = {}
    for setting in tries:
        bits, _ = measured(text, system, setting, 0, streams, held_out=kept)
        found[setting] = mean(bits)
    return min(found, key=found.__getitem__)


def _seeds(text: Text, system: System, setting: Setting, data: str) -> Outcome:
    made = Outcome("", data, system, setting, 0)
    for seed in range(1, text.size.seeds + 1):
        bits, made.parameters = measured(text, system, setting, seed, text.streams(DATA[data]))
        made.bits.append(mean(bits))
        made.of_leaves.append(bits)
    return made
