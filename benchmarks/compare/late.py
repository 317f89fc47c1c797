"""A leaf that comes later, with a part of its data: what it gains, and what it costs the others.

parent          the group of the leaf, trained without it
leaf            a new node on that group; everything above it is frozen
leaf, fitted    the same at the weight that does best on rows held back, as `lora-tree train`
                keeps it
flat            an adapter of its own, from scratch
pooled, on      the pooled adapter, trained on with the leaf's rows; the other leaves lose by it
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import lora_tree as lt
from lora_tree.demo.learning import bits_per_byte, evenly_spread, train_tree
from lora_tree.runs.held_back import PARTS

from .runs import Say, Text, best_setting, opened, quiet, trained
from .systems import FULL, SYSTEMS, Setting, Size, System

__all__ = ["LateLeaf", "late_leaf"]


@dataclass(frozen=True)
class LateLeaf:
    """One leaf that came late.

    Args:
        share: of its data.
        bits: system → bits per byte on the leaf.
        others: what the other leaves lose to "pooled, on", the mean and the most.
    """

    leaf: str
    share: float
    bits: dict[str, float]
    others: tuple[float, float]


def late_leaf(size: Size = FULL, *, say: Say = quiet) -> list[LateLeaf]:
    """Return what came out for the first leaf of every group, and every share of its data."""
    text = opened(size, say=say)
    systems = {system.name: system for system in SYSTEMS["equal rank on a path"]}
    settings = {name: best_setting(text, systems[name]) for name in ("pooled", "tree", "flat")}
    firsts: dict[str, str] = {}
    for leaf in text.paths:
        firsts.setdefault(leaf.partition("/")[0], leaf)
    found = []
    for leaf in firsts.values():
        rest = {name: tokens for name, tokens in text.streams().items() if name != leaf}
        held = {name: rows for name, rows in text.held_out.items() if name != leaf}
        pooled, before = trained(
            text, systems["pooled"], settings["pooled"], 1, rest, held_out=held
        )
        tree, _ = trained(text, systems["tree"], settings["tree"], 1, rest, held_out=held)
        for share in size.shares:
            tokens = text.streams()[leaf]
            tokens = tokens[: max(int(share * len(tokens)), 10 * size.length)]
            cut = len(tokens) * 9 // 10
            kept = evenly_spread(tokens[cut:], windows=size.windows, length=size.length)
            bits = _on_the_tree(text, tree, leaf, tokens[:cut], kept, settings["tree"], systems)
            flat = System("flat", 0, 0, systems["flat"].leaf, over="paths")
            only = {leaf: text.held_out[leaf]}
            _, own = trained(text, flat, settings["flat"], 1, {leaf: tokens}, held_out=only)
            bits["flat"] = own[0]
            after = _pooled_on(text, pooled, leaf, tokens, settings["pooled"])
            bits["pooled, on"] = after.pop(leaf)
            lost = [bit - was for bit, was in zip(after.values(), before, strict=True)]
            found.append(LateLeaf(leaf, share, bits, (mean(lost), max(lost))))
            say(f"{leaf}, {share:g}: {found[-1]}")
    return found


def _on_the_tree(
    text: Text,
    tree: lt.AdapterTree,
    leaf: str,
    tokens: Tensor,
    kept: Tensor,
    setting: Setting,
    systems: dict[str, System],
) -> dict[str, float]:
    """Train a new leaf on the frozen tree, and take it out again."""
    path, group = f"all/{leaf}", f"all/{leaf.partition('/')[0]}"
    rank = systems["tree"].leaf
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
    """Train the pooled adapter on with one leaf's rows, measure every leaf, and put it back."""
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
