"""Initialise factors: A is random, B is zero, so the product is zero until it trains.

A has the distribution of ``kaiming_uniform_(a=√5)``, as in PEFT: uniform in ±1 / √in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .value import LowRank

__all__ = ["draw_again", "draw_uniform"]


def draw_uniform(A: Tensor) -> None:
    """Fill A, (\\*batch, r, in), in place from torch's global generator."""
    # Not kaiming_uniform_ itself: it would take a batch of matrices for a convolution's kernel.
    bound = 1 / math.sqrt(A.shape[-1])
    nn.init.uniform_(A, -bound, bound)


@torch.no_grad()
def draw_again(value: LowRank) -> None:
    """Initialise the factors of a value again, in place, because they are parameters that train."""
    draw_uniform(value.A)
    value.B.zero_()
    if value.bias is not None:
        value.bias.zero_()
