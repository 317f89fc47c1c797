"""Windows of bytes, plain training loops over them, and bits per byte on held-out text.

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
from ..training.levels import Over, over_of, weight_decays
from ..training.losses import path_loss
from .bytelevel import END

__all__ = ["as_one_row", "bits_per_byte", "evenly_spread", "train_base", "train_tree"]


def as_one_row(documents: Sequence[bytes]) -> Tensor:
    """Return all documents in one row of tokens, END after each. (tokens,)"""
    end = torch.tensor([END])
    pieces: list[Tensor] = []
    for document in documents:
        # A copy: frombuffer warns of bytes, which torch could not write to.
        tokens = torch.frombuffer(bytearray(document), dtype=torch.uint8).long()
        pieces += [tokens, end]
    return torch.cat(pieces)


def evenly_spread(tokens: Tensor, *, windows: int, length: int) -> Tensor:
    """Return at most ``windows`` windows, evenly spread over all tokens. (≤ windows, length)"""
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
    """Train the whole model on random windows of one row of tokens.

    Args:
        model: of transformers.
        tokens: (tokens,).
        steps, batch, length: of the optimiser, windows in each, tokens in a window.
        lr: learning rate at its height.
        seed: of the windows.
        tick: called after every step.
    """
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
    over: Over = "auto",
    decay_by_depth: Sequence[float] | None = None,
    decay_of: Mapping[str, float] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Train some nodes at once: every row trains those on its own path.

    Args:
        model: of the tree.
        nodes: the ones that train.
        streams: domain → (the path of its rows, its tokens). Every row draws its domain, each with
            the same probability.
        steps, batch, length: of the optimiser, rows in each, bytes in a row.
        over: "rows", "paths" or "auto": the mean that the loss is, see `lora_tree.runs.Settings`.
        decay_by_depth: weight decay at depth 0, 1, …; None: see `lora_tree.weight_decays`.
        decay_of: node → its own weight decay, which comes first.
        tick: called after every step.
    """
    rates = dict.fromkeys(nodes, lr)
    decays = weight_decays(model.tree, nodes, rates, by_depth=decay_by_depth, of_node=decay_of)
    groups = []
    for group in model.trainable(*nodes):
        groups.append({**group, "clip_norm": 1.0, "weight_decay": decays[group["name"]]})
    mean = over_of(over, nodes)
    # Each group has its own decay, which overrides this one.
    optimiser, schedule = _optimiser(groups, steps, lr, weight_decay=0.0)
    # After `follow`, a step moves no node without rows, and clips each node separately.
    model.follow(optimiser)
    model.train()
    path_of, tokens = zip(*streams.values(), strict=True)
    for rows, which in islice(_windows(tokens, batch=batch, length=length, seed=seed), steps):
        paths = [path_of[i] for i in which]
        with model.route(paths, batch_first=True):
            logits = model(input_ids=rows[:, :-1]).logits
            loss = path_loss(logits, rows[:, 1:], paths, over=mean, shift=False)
            torch.autograd.backward(loss.total)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        tick()
    model.eval()
    model.trainable()  # nothing trains any more: the factors are the tree's adapters now


def _windows(
    streams: Sequence[Tensor], *, batch: int, length: int, seed: int
) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield rows (batch, length + 1), and the stream from which each was drawn, without end."""
    # With a separate generator the windows depend on the seed alone, not on how many numbers torch
    # has drawn before, such as those of new factors.
    draw = torch.Generator().manual_seed(seed)
    while True:
        which = torch.randint(len(streams), (batch,), generator=draw).tolist()
        rows = []
        for i in which:
            start = int(torch.randint(len(streams[i]) - length, (1,), generator=draw))
            # One token more than is read: each is the label of the one before it.
            rows.append(streams[i][start : start + length + 1])
        yield torch.stack(rows), which


def _optimiser(parameters: Any, steps: int, lr: float, *, weight_decay: float) -> tuple[Any, Any]:
    """Return AdamW and a schedule: a warm-up, then a cosine."""
    optimiser = torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
    )
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        # The rate begins above zero (s + 1), or the first step would move nothing.
        lambda s: min((s + 1) / warm_up, 0.02 + 0.49 * (1 + math.cos(math.pi * s / steps))),
    )
    return optimiser, schedule


@torch.no_grad()
def bits_per_byte(model: Any, windows: Tensor, *, at_once: int = 16) -> float:
    """Return the mean over every token but the first of each window. windows: (n, length)"""
    # Weighted by rows: the last part may have fewer of them.
    losses = [_loss(model, rows) * len(rows) for rows in torch.split(windows, at_once)]
    return float(torch.stack(losses).sum()) / len(windows) / math.log(2)


def _loss(model: Any, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows[:, :-1]).logits  # (batch, length, vocabulary)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
