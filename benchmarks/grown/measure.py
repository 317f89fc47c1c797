"""Measures of the shrunk adapters: their error and their held-out bits.

error   √ mean over adapters of ‖ΔW' − ΔW‖² / ‖ΔW‖², from dense matrices
bits    − mean log2 p(next byte), the mean over the adapters, each on its own held-out text
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import lora_tree as lt

from .zoo import Leaf

__all__ = ["held_out_bits", "input_moments", "relative_error"]


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


@torch.no_grad()
def input_moments(
    base: Any, modules: Iterable[str], leaves: Sequence[Leaf], length: int
) -> dict[str, Tensor]:
    """Return E[x xᵀ], (in, in), of the inputs of some modules.

    The inputs come from the beginnings of the leaves' training texts.

    Args:
        length: of a row, in bytes.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0.0) + rows.mT @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    hooks = [base.get_submodule(n).register_forward_pre_hook(keep(n)) for n in modules]
    try:
        rows = torch.stack([leaf.train[:length] for leaf in leaves])
        for at in range(0, len(rows), 32):
            base(input_ids=rows[at : at + 32])
    finally:
        for each in hooks:
            each.remove()
    return {name: total / counts[name] for name, total in sums.items()}
