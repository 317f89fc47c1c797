"""Decay by the number of rows, beside decay by depth: does partial pooling want it?

Each rule multiplies the defaults of a node by a factor. n is the bytes that train a node, m the
geometric mean of n over the nodes of its depth.

    by depth            1           the defaults
    half of it          1/2
    by rows             m / n       a node with few rows shrinks more
    by rows, bounded    m / n from 1/4 to 4
    by its root         √(m / n)
    leaves by rows      m / n for leaves, 1 for groups
    leaves by its root  √(m / n) for leaves, 1 for groups
    the other way       √(n / m)    if it does as well, the rules above say nothing

Half of the leaves have a tenth of their data. Rules are chosen here, so bits are measured on a
tenth of the training text that is not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import mean

import torch
from torch import Tensor

from lora_tree.demo.learning import evenly_spread
from lora_tree.spec import at_depth
from lora_tree.training.levels import SHRINKAGE

from .kept import NOWHERE, Kept
from .runs import Say, Text, measured, opened, quiet
from .systems import FULL, SYSTEMS, Setting, Size

__all__ = ["RULES", "decay_rules"]

Rule = Callable[[float, int], float]
"""(m / n, depth) → the factor on a node's decay."""

RULES: Mapping[str, Rule] = {
    "by depth": lambda few, depth: 1.0,
    "half of it": lambda few, depth: 0.5,
    "by rows": lambda few, depth: few,
    "by rows, bounded": lambda few, depth: min(max(few, 0.25), 4.0),
    "by its root": lambda few, depth: few**0.5,
    "leaves by rows": lambda few, depth: few if depth == 2 else 1.0,
    "leaves by its root": lambda few, depth: few**0.5 if depth == 2 else 1.0,
    "the other way": lambda few, depth: few**-0.5,
}
SEEDS = (11, 12)
MOST = 0.5  # of a factor in a step


def decay_rules(
    size: Size = FULL, *, kept: Kept = NOWHERE, say: Say = quiet
) -> list[tuple[str, list[float]]]:
    """Return each rule's bits per byte, the mean over leaves, seed by seed."""
    text = opened(size, kept=kept, say=say)
    streams, held = _split(text)
    system = next(s for s in SYSTEMS["equal rank on a path"] if s.name == "tree")
    setting = Setting(max(size.rates), SHRINKAGE)
    found = []
    for name, rule in RULES.items():
        parts = shrinkages(streams, rule)
        bits = []
        for seed in SEEDS:
            own, _ = measured(
                text, system, setting, seed, streams, held_out=held, shrinkage_of=parts
            )
            bits.append(mean(own))
        found.append((name, bits))
        say(f"{name}: {' '.join(f'{bit:.4f}' for bit in bits)}")
    return found


def shrinkages(streams: Mapping[str, Tensor], rule: Rule) -> dict[str, float]:
    """Return node → the part of its factors that decays in a step."""
    count: dict[str, int] = {}
    for leaf, tokens in streams.items():
        group = leaf.partition("/")[0]
        for node in ("all", f"all/{group}", f"all/{leaf}"):
            count[node] = count.get(node, 0) + len(tokens)
    found = {}
    for node, own in count.items():
        depth = node.count("/")
        peers = [other for path, other in count.items() if path.count("/") == depth]
        middle = math.exp(mean(math.log(other) for other in peers))
        found[node] = min(at_depth(SHRINKAGE, node) * rule(middle / own, depth), MOST)
    return found


def _split(text: Text) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return training tokens, a tenth of them for every second leaf, and windows held back."""
    streams, held = {}, {}
    for i, (leaf, tokens) in enumerate(text.streams().items()):
        cut = len(tokens) * 9 // 10
        held[leaf] = evenly_spread(tokens[cut:], windows=text.size.windows, length=text.size.length)
        streams[leaf] = tokens[:cut]
        if i % 2:
            pieces = torch.split(tokens[:cut], 8000)
            streams[leaf] = torch.cat([piece[: len(piece) // 10] for piece in pieces])
    return streams, held
