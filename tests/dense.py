"""Small adapters of every layout, the same values with other factors, and their dense matrices."""

from __future__ import annotations

import math
from dataclasses import replace

import oracle
import torch
from torch import Tensor

import lora_tree as lt


def draw(
    seed: int,
    rank: int,
    *,
    out: int = 6,
    into: int = 8,
    batch: tuple[int, ...] = (),
    scale: float = 0.7,
) -> lt.LowRank:
    """A small increment; another seed, another value."""
    return oracle.low_rank(out, into, rank, seed=seed, batch=batch, scale=scale)


def conv(seed: int, rank: int = 2) -> lt.LowRank:
    """An increment of a convolution with kernel 3 over 4 channels."""
    return replace(draw(seed, rank, out=5, into=12), layout=lt.Layout("conv", (3,)))


def zoo_of(seed: int, *, rank: int = 2, without: str = "") -> lt.Adapter:
    """An adapter with experts, a convolution, an embedding and two linear modules."""
    modules = {
        "q_proj": draw(7 * seed, rank),
        "c_attn": draw(7 * seed + 1, rank, out=8, into=6),
        "embed": replace(draw(7 * seed + 2, rank, out=4, into=9), layout=lt.Layout("embedding")),
        "conv": conv(7 * seed + 3, rank),
        "block.mlp": replace(draw(7 * seed + 4, rank, batch=(3,)), layout=lt.Layout("parameter")),
    }
    modules.pop(without, None)
    return lt.Adapter(modules, base="org/model")


def dense(value: lt.LowRank) -> Tensor:
    """ΔW in float64, and a bias as one more column."""
    whole = oracle.dense(value)
    if value.bias is None:
        return whole
    column = value.bias.double() * value.scale
    return torch.cat([whole.reshape(-1, whole.shape[-1]), column[:, None]], dim=-1)


def denses(adapter: lt.Adapter) -> dict[str, Tensor]:
    """Module → its ΔW in float64."""
    return {name: dense(value) for name, value in adapter.modules.items()}


def gauged(adapter: lt.Adapter, seed: int) -> lt.Adapter:
    """The same value with other factors, (B R) (R⁻¹ A), and another scale; in float64."""

    def turned(value: lt.LowRank) -> lt.LowRank:
        g = torch.Generator().manual_seed(seed)
        shape = (*value.shape[:-2], value.rank, value.rank)
        # Orthogonal times a spread that is bounded: a gauge that is nearly singular would measure
        # itself.
        Q = torch.linalg.qr(torch.randn(shape, generator=g).double())[0]
        R = Q * torch.linspace(0.5, 2.0, value.rank).double()
        A = torch.linalg.solve(R, value.A.double())
        B = (value.B.double() @ R) * (value.scale / math.pi)
        return replace(value, A=A, B=B, scale=math.pi)

    return adapter.map(turned)
