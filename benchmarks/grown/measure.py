"""Measures of the adapters that come back: their error and their held-out bits.

error   √ mean over adapters of ‖ΔW' − ΔW‖² / ‖ΔW‖², from dense matrices
bits    − mean log2 p(next byte), the mean over the adapters, each on its own held-out text
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import lora_tree as lt

from .zoo import Leaf

__all__ = ["held_out_bits", "relative_error"]


def relative_error(found: Mapping[str, lt.Adapter], flat: lt.AdapterTree) -> float:
    """Return the root mean square over adapters of the relative error of their increments."""
    squares = []
    for path in flat.paths():
        wanted, got = flat.flatten(path).modules, found[path].modules
        lost = norm = 0.0
        for module, value in wanted.items():
            dense = _dense(value)
            here = got.get(module)
            difference = dense if here is None else dense - _dense(here)
            lost += float(difference.square().sum())
            norm += float(dense.square().sum())
        squares.append(lost / norm)
    return math.sqrt(mean(squares))


def _dense(value: lt.LowRank) -> Tensor:
    return value.scale * (value.B.double() @ value.A.double())


@torch.no_grad()
def held_out_bits(base: Any, found: Mapping[str, lt.Adapter], leaves: Sequence[Leaf]) -> float:
    """Return the mean over the adapters of the bits per byte on the text of each."""
    tree = lt.AdapterTree()
    for name, adapter in found.items():
        tree.add(name, adapter=adapter)
    model = lt.attach(tree, base)
    try:
        rows: list[Tensor] = []
        paths: list[str] = []
        for leaf in leaves:
            rows += leaf.held_out.unbind()
            paths += [leaf.name] * len(leaf.held_out)
        of_leaf: dict[str, list[float]] = {}
        for at in range(0, len(rows), 32):
            part, names = torch.stack(rows[at : at + 32]), paths[at : at + 32]
            with model.route(names, batch_first=True):
                logits = model(input_ids=part[:, :-1]).logits
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), part[:, 1:], reduction="none"
            )
            for name, loss in zip(names, losses.mean(1).tolist(), strict=True):
                of_leaf.setdefault(name, []).append(loss / math.log(2))
        return mean(mean(losses) for losses in of_leaf.values())
    finally:
        model.detach()
