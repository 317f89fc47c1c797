"""New factors: A is drawn, B is zero, so the product is nothing until it trains.

A has the distribution of ``kaiming_uniform_(a=√5)``, as in PEFT: uniform up to 1 / √in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .value import LowRank

__all__ = ["draw_again", "draw_uniform"]


def draw_uniform(A: Tensor) -> None:
    """Fill A, (\\*batch, r, in), in place from torch's global generator."""
    # Of each matrix: kaiming_uniform_ would take a batch for a kernel.
    bound = 1 / math.sqrt(A.shape[-1])
    nn.init.uniform_(A, -bound, bound)


@torch.no_grad()
def draw_again(value: LowRank) -> None:
    """Make the factors of a value new ones, in place: they are parameters that train."""
    draw_uniform(value.A)
    value.B.zero_()
    if value.bias is not None:
        value.bias.zero_()
