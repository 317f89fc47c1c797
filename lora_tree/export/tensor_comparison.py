"""Compare one merged weight with its expected sum, element by element.

    room(u) = u (n + 1) (|W₀| + |W| + Σ|B||A|) + 4 max(u, factors' own) Σ|B||A|

bounds the rounding error of each element if every node is added separately in a dtype of unit
roundoff u, with the products and the factors rounded too. An element that is further off is not a
rounding of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .merge_guess import Fit
from .node_search import sides_of
from .writes import Write

__all__ = [
    "NARROW",
    "TensorComparison",
    "WeightPart",
    "compare_tensor",
    "rounding_unit",
    "same_bits",
]

BLOCK_NUMBERS = 1 << 21
NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TensorComparison:
    """The comparison of one weight.

    Args:
        fit: its inner products with the increments.
        error: ‖got − expected‖ / ‖expected − base‖.
        worst: dtype → the largest |got − expected| / room; first the coarser of the two stored
            dtypes, then those that are coarser still.
    """

    fit: Fit
    error: float
    worst: Mapping[torch.dtype, float]


@dataclass(frozen=True)
class WeightPart:
    """The scale, the weight and the rank of a node's increments of one weight."""

    scale: float
    weight: float
    rank: int


def compare_tensor(
    write: Write, parts: Sequence[WeightPart], name: str, old: Tensor, new: Tensor
) -> TensorComparison:
    """Compare a weight with its sum, one block of rows at a time, in fp64."""
    before, after = write.site.rows(old), write.site.rows(new)
    sides = [sides_of(write, value) for value in write.values]
    count = len(sides)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for i, (left, right) in enumerate(sides):
        for k, (other_left, other_right) in enumerate(sides):
            gram[i, k] = ((left.mT @ other_left) * (right @ other_right.mT)).sum()
    stored = max((old.dtype, new.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    factors = max(rounding_unit(value.A.dtype, value.B.dtype) for value in write.values)
    worst = {stored: 0.0}
    for dtype in NARROW:
        if torch.finfo(dtype).eps > torch.finfo(stored).eps:
            worst[dtype] = 0.0
    along = torch.zeros(count, dtype=torch.float64)
    change_square = noise = rest_square = 0.0
    for batch, part in _blocks(before):
        base, got = before[batch, part].double(), after[batch, part].double()
        change = got - base
        want, size = torch.zeros_like(base), torch.zeros_like(base)
        for i, (left, right) in enumerate(sides):
            top, side = left[batch, part], right[batch]
            along[i] += ((top.mT @ change) * side).sum()
            want += top @ side
            size += top.abs() @ side.abs()
        rest = change - want
        change_square += float(change.square().sum())
        rest_square += float(rest.square().sum())
        for dtype in worst:
            unit = rounding_unit(dtype)
            # Every partial sum may have been rounded, and so may the factors and the products.
            room = unit * (count + 1) * (base.abs() + got.abs() + size)
            room += 4 * max(unit, factors) * size + torch.finfo(dtype).tiny
            worst[dtype] = max(worst[dtype], float((rest.abs() / room).max()))
            if dtype == stored:
                noise += float(room.square().sum())
    fit = Fit(
        name,
        tuple(write.nodes),
        tuple(part.scale for part in parts),
        tuple(part.weight for part in parts),
        tuple(part.rank for part in parts),
        gram,
        along,
        change_square,
        noise,
    )
    return TensorComparison(fit, math.sqrt(rest_square) / (math.sqrt(fit.expected) or 1.0), worst)


def _blocks(rows: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the blocks of (batch, rows, cols) as (index of the matrix, slice of its rows)."""
    step = max(BLOCK_NUMBERS // max(rows.shape[-1], 1), 1)
    for batch in range(rows.shape[0]):
        for start in range(0, rows.shape[-2], step):
            yield batch, slice(start, start + step)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same bits: a NaN equals itself, −0.0 is not 0.0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8),
        other.contiguous().reshape(-1).view(torch.uint8),
    )


def rounding_unit(*dtypes: torch.dtype) -> float:
    """Return the largest relative error of one rounding."""
    return max(torch.finfo(dtype).eps for dtype in dtypes) / 2
