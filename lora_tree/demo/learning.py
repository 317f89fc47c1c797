"""Windows of bytes, the plainest training loops over them, and bits per byte on what was held out.

bits per byte = − mean log2 p(next byte | the bytes before it in its window)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..model import TreeModel
from ..training.losses import path_loss
from .bytelevel import END

__all__ = ["as_one_row", "bits_per_byte", "evenly_spread", "train_base", "train_tree"]


def as_one_row(documents: Sequence[bytes]) -> Tensor:
    """All documents in one row of tokens, END after each. (tokens,)"""
    parts = [torch.frombuffer(bytearray(d), dtype=torch.uint8).long() for d in documents]
    end = torch.tensor([END])
    return torch.cat([piece for part in parts for piece in (part, end)])


def evenly_spread(tokens: Tensor, *, windows: int, length: int) -> Tensor:
    """At most ``windows`` windows, evenly spread over all tokens. (≤ windows, length)"""
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    picks = torch.linspace(0, len(whole) - 1, min(windows, len(whole))).round().long()
    return whole[picks]


def train_base(
    model: Any,
    tokens: Tensor,
    *,
    steps: int,
    batch: int,
    length: int,
    lr: float,
    seed: int,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """The whole model, on random windows of one row of tokens, each ``length`` long; ``tick`` after every step."""
    optimiser, schedule = _optimiser(model.parameters(), steps, lr, weight_decay=0.1)
    model.train()
    for rows, _ in islice(_windows([tokens], batch=batch, length=length, seed=seed), steps):
        torch.autograd.backward(_loss(model, rows))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        tick()
    model.eval()


def train_tree(
    model: TreeModel,
    nodes: Sequence[str],
    streams: Mapping[str, tuple[str, Tensor]],
    *,
    steps: int,
    batch: int,
    length: int,
    lr: float,
    seed: int,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Some nodes at once: every row trains those on its own path.

    Args:
        model: of the tree.
        nodes: what trains.
        streams: domain → the path that its rows go by, and its tokens; every row draws its domain, all alike.
        steps, batch, length: of the optimiser, rows in each, bytes in a row.
        tick: called after every step.
    """
    groups = [{**group, "clip_norm": 1.0} for group in model.trainable(*nodes)]
    optimiser, schedule = _optimiser(groups, steps, lr, weight_decay=0.0)
    model.follow(optimiser)
    model.train()
    of, tokens = zip(*streams.values(), strict=True)
    for rows, which in islice(_windows(tokens, batch=batch, length=length, seed=seed), steps):
        paths = [of[i] for i in which]
        with model.route(paths, batch_first=True):
            logits = model(input_ids=rows[:, :-1]).logits
            torch.autograd.backward(path_loss(logits, rows[:, 1:], paths, shift=False).total)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        tick()
    model.eval()
    model.trainable()


def _windows(
    streams: Sequence[Tensor], *, batch: int, length: int, seed: int
) -> Iterator[tuple[Tensor, list[int]]]:
    """Rows (batch, length + 1), and the stream from which each was drawn, for ever."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        which = torch.randint(len(streams), (batch,), generator=draw).tolist()
        starts = [int(torch.randint(len(streams[i]) - length, (1,), generator=draw)) for i in which]
        yield (
            torch.stack(
                [streams[i][s : s + length + 1] for i, s in zip(which, starts, strict=True)]
            ),
            which,
        )


def _optimiser(parameters: Any, steps: int, lr: float, *, weight_decay: float) -> tuple[Any, Any]:
    """AdamW, with a warm-up and a cosine."""
    optimiser = torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
    )
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min((s + 1) / warm_up, 0.02 + 0.49 * (1 + math.cos(math.pi * s / steps))),
    )
    return optimiser, schedule


@torch.no_grad()
def bits_per_byte(model: Any, windows: Tensor, *, at_once: int = 16) -> float:
    """The mean over every token but the first of each window. windows: (n, length)"""
    losses = [_loss(model, rows) * len(rows) for rows in torch.split(windows, at_once)]
    return float(torch.stack(losses).sum()) / len(windows) / math.log(2)


def _loss(model: Any, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows[:, :-1]).logits  # (batch, length, vocabulary)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
