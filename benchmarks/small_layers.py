"""A base of many small layers and adapters for it, to measure the host's work.

The layers are so small that their products take no time.
"""

from __future__ import annotations

import torch
from torch import nn

import lora_tree as lt

__all__ = ["SITES", "WIDTH", "small_adapter", "small_base"]

SITES, WIDTH, RANK = 224, 32, 16


def small_base(sites: int) -> nn.Sequential:
    """Return a frozen base of ``sites`` linear layers, in bf16."""
    base = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(sites)])
    return base.to(torch.bfloat16).requires_grad_(False)


def small_adapter(sites: int) -> lt.Adapter:
    """Return an adapter of all layers of `small_base`, in bf16."""
    modules = {}
    for i in range(sites):
        A, B = torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)
        modules[str(i)] = lt.LowRank(A.to(torch.bfloat16), B.to(torch.bfloat16), 0.5)
    return lt.Adapter(modules)
