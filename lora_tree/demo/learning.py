"""Windows of bytes, the plainest training loop over them, and bits per byte on what was held out.

bits per byte = − mean log2 p(next byte | the bytes before it in its window)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .bytelevel import END

__all__ = ["bits_per_byte", "spread", "stream", "train"]


def stream(documents: Sequence[bytes]) -> Tensor:
    """All documents in one row of tokens, END after each. (tokens,)"""
    parts = [torch.frombuffer(bytearray(d), dtype=torch.uint8).long() for d in documents]
    end = torch.tensor([END])
    return torch.cat([piece for part in parts for piece in (part, end)])


def spread(tokens: Tensor, *, windows: int, length: int) -> Tensor:
    """At most ``windows`` windows, evenly spread over all tokens. (≤ windows, length)"""
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    picks = torch.linspace(0, len(whole) - 1, min(windows, len(whole))).round().long()
    return whole[picks]


def train(
    model: Any,
    parameters: Any,
    streams: Sequence[Tensor],
    *,
    steps: int,
    batch: int,
    length: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.0,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """AdamW with a warm-up and a cosine, on random windows; every row draws its stream first, all alike.

    Args:
        model: called as ``model(input_ids=…)``, with ``logits`` in what it returns.
        parameters: what is trained: parameters, or parameter groups.
        streams: rows of tokens, each longer than ``length``.
        tick: called after every step.
    """
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm_up, 0.02 + 0.49 * (1 + math.cos(math.pi * s / steps)))
    )
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    model.train()
    for _ in range(steps):
        which = torch.randint(len(streams), (batch,), generator=draw).tolist()
        starts = [int(torch.randint(len(streams[i]) - length, (1,), generator=draw)) for i in which]
        rows = torch.stack([streams[i][s : s + length + 1] for i, s in zip(which, starts, strict=True)])
        torch.autograd.backward(_loss(model, rows))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        tick()
    model.eval()


@torch.no_grad()
def bits_per_byte(model: Any, windows: Tensor, *, at_once: int = 16) -> float:
    """The mean over every token but the first of each window. windows: (n, length)"""
    losses = [_loss(model, rows) * len(rows) for rows in torch.split(windows, at_once)]
    return float(torch.stack(losses).sum()) / len(windows) / math.log(2)


def _loss(model: Any, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows[:, :-1]).logits  # (batch, length, vocabulary)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
