"""A leaf that comes later, with a part of its data: what it gains, and what it costs the others.

parent          the group of the leaf, trained without it
leaf            a new node on that group, of the rank that leaves have; all above it is frozen
leaf, fitted    the same, at the weight that does best on held-back rows
wide leaf       a new node of the rank that flat has, fitted likewise
flat            a separate adapter, from scratch
pooled, on      the pooled adapter, trained further with the leaf's rows; other leaves lose by it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import lora_tree as lt
from lora_tree.demo.learning import bits_per_byte, evenly_spread, train_tree
from lora_tree.runs.held_back import PARTS

from .kept import NOWHERE, Kept, mark
from .runs import Say, Text, best_setting, opened, quiet, trained
from .systems import FULL, SYSTEMS, Setting, Size, System

__all__ = ["LateLeaf", "late_leaf"]


@dataclass(frozen=True)
class LateLeaf:
    """One leaf that came late.

    Args:
        share: the share of its data.
        bits: system → bits per byte on the leaf.
        others: the loss of the other leaves by "pooled, on": mean and maximum.
    """

    leaf: str
    share: float
    bits: dict[str, float]
    others: tuple[float, float]


def late_leaf(size: Size = FULL, *, kept: Kept = NOWHERE, say: Say = quiet) -> list[LateLeaf]:
    """Return the results for the first leaf of every group, and every share of its data."""
    text = opened(size, kept=kept, say=say)
    systems = {system.name: system for system in SYSTEMS["equal rank on a path"]}
    settings = {name: best_setting(text, systems[name]) for name in ("pooled", "tree", "flat")}
    firsts: dict[str, str] = {}
    for leaf in text.paths:
        firsts.setdefault(leaf.partition("/")[0], leaf)
    found = []
    for leaf in firsts.values():
        before = _Before(text, systems, settings, leaf)
        for share in size.shares:
            about = before.about(share)
            made = text.kept.result(about, partial(_late, before, share))
            rank = systems["flat"].leaf
            made["bits"]["wide leaf"] = text.kept.result(
                {**about, "wide": rank}, partial(_wide, before, share, rank)
            )
            found.append(LateLeaf(leaf, share, made["bits"], (made["mean"], made["most"])))
            say(f"{leaf}, {share:g}: {found[-1]}")
    return found


@dataclass
class _Before:
    """The systems trained without a leaf; each is trained at its first use."""

    text: Text
    systems: Mapping[str, System]
    settings: Mapping[str, Setting]
    leaf: str

    def about(self, share: float) -> dict[str, Any]:
        """Return the inputs of a late leaf's result, as plain data."""
        settings = {name: asdict(setting) for name, setting in self.settings.items()}
        ranks = {name: (s.root, s.group, s.leaf) for name, s in self.systems.items()}
        return self.text.about(
            self.settings["tree"],
            1,
            late=self.leaf,
            share=share,
            settings=settings,
            ranks=ranks,
            trained_on=mark(self.text.streams()),
            measured_on=mark(self.text.held_out),
        )

    @cached_property
    def pooled(self) -> tuple[lt.AdapterTree, list[float]]:
        """The pooled adapter, and the bits of the other leaves."""
        return self._trained("pooled")

    @cached_property
    def tree(self) -> lt.AdapterTree:
        """The tree without the leaf."""
        return self._trained("tree")[0]

    def _trained(self, name: str) -> tuple[lt.AdapterTree, list[float]]:
        streams = self.text.streams()
        rest = {leaf: tokens for leaf, tokens in streams.items() if leaf != self.leaf}
        held = {leaf: rows for leaf, rows in self.text.held_out.items() if leaf != self.leaf}
        return trained(self.text, self.systems[name], self.settings[name], 1, rest, held_out=held)


def _split(text: Text, leaf: str, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return a share of a leaf's tokens: all of it, its part to train on, and windows held back."""
    size = text.size
    tokens = text.streams()[leaf]
    tokens = tokens[: max(int(share * len(tokens)), 10 * size.length)]
    cut = len(tokens) * 9 // 10
    kept = evenly_spread(tokens[cut:], windows=size.windows, length=size.length)
    return tokens, tokens[:cut], kept


def _wide(known: _Before, share: float, rank: int) -> float:
    """Train a leaf of a rank on the tree, and return its bits at the weight that does best."""
    text, leaf = known.text, known.leaf
    _, part, kept = _split(text, leaf, share)
    bits = _on_the_tree(text, known.tree, leaf, part, kept, known.settings["tree"], rank)
    return bits["leaf, fitted"]


def _late(known: _Before, share: float) -> dict[str, Any]:
    """Train a leaf with a share of its data in every way."""
    text, leaf = known.text, known.leaf
    tokens, part, kept = _split(text, leaf, share)
    tree, systems, settings = known.tree, known.systems, known.settings
    bits = _on_the_tree(text, tree, leaf, part, kept, settings["tree"], systems["tree"].leaf)
    flat = System("flat", 0, 0, systems["flat"].leaf, over="paths")
    only = {leaf: text.held_out[leaf]}
    _, own = trained(text, flat, settings["flat"], 1, {leaf: tokens}, held_out=only)
    bits["flat"] = own[0]
    pooled, before = known.pooled
    after = _pooled_on(text, pooled, leaf, tokens, settings["pooled"])
    bits["pooled, on"] = after.pop(leaf)
    lost = [bit - was for bit, was in zip(after.values(), before, strict=True)]
    return {"bits": bits, "mean": mean(lost), "most": max(lost)}


def _on_the_tree(
    text: Text,
    tree: lt.AdapterTree,
    leaf: str,
    tokens: Tensor,
    kept: Tensor,
    setting: Setting,
    rank: int,
) -> dict[str, float]:
    """Train a new leaf on the frozen tree, and take it out again."""
    path, group = f"all/{leaf}", f"all/{leaf.partition('/')[0]}"
    torch.manual_seed(1)
    tree.add(path, r=rank, lora_alpha=2.0 * rank)
    model = lt.attach(tree, text.base)
    _train(text, model, [path], {leaf: (path, tokens)}, setting)
    rows = text.held_out[leaf]
    bits = {"parent": _bits(text, model, group, rows), "leaf": _bits(text, model, path, rows)}
    on_kept = {}
    for part in PARTS:
        on_kept[part] = _bits(text, model, {path: part, group: 1 - part}, kept)
    best = min(on_kept, key=on_kept.__getitem__)
    bits["leaf, fitted"] = _bits(text, model, {path: best, group: 1 - best}, rows)
    model.detach()
    tree.remove(path)
    return bits


def _pooled_on(
    text: Text, tree: lt.AdapterTree, leaf: str, tokens: Tensor, setting: Setting
) -> dict[str, float]:
    """Train the pooled adapter further with one leaf's rows, measure all, and restore it."""
    start: Any = tree.adapter("all")
    model = lt.attach(tree, text.base)
    _train(text, model, ["all"], {leaf: ("all", tokens)}, setting)
    bits = {name: _bits(text, model, "all", rows) for name, rows in text.held_out.items()}
    model.detach()
    tree.update("all", adapter=start)
    return bits


def _train(text: Text, model: Any, nodes: list[str], streams: Any, setting: Setting) -> None:
    size = text.size
    train_tree(
        model,
        nodes,
        streams,
        steps=size.steps,
        batch=size.batch,
        length=size.length,
        lr=setting.rate,
        seed=1,
    )


def _bits(text: Text, model: Any, path: Any, rows: Tensor) -> float:
    with model.using(path):
        return bits_per_byte(text.base, rows)
