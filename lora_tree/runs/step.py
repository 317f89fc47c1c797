"""One step of a run: rows in, factors moved, the loss of each path out.

Law: the rows, the settings, the step's number, and the factors and the optimiser's state that the
earlier steps left determine a step. It reads no other random state, so a resumed run takes the same
steps.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..folder.past.run_records import NodeMetric, PathMetric
from ..model import TreeModel
from ..training.diverged import check_finite_step
from ..training.levels import over_of
from ..training.losses import PathLoss, path_loss, pooled_loss, token_counts
from .evaluation import inputs_of
from .frozen_cause import frozen_cause
from .preferences import (
    answers_of,
    are_preferences,
    dpo_losses,
    log_probabilities,
    reference_of,
)
from .rows import Row, padded
from .settings import Settings

__all__ = ["StepLosses", "take_step"]


@dataclass(frozen=True)
class StepLosses:
    """The outcome of one step of the optimiser.

    Args:
        number: how many steps are done.
        losses: path → mean loss over its tokens in this step, in nats; or over its preferences.
        tokens: learnt in it.
        nodes: the metrics of each node that had rows, in the order of the groups. Two steps are
            compared without them, since they contain the time that the step took.
        held_out: the losses on held-out rows that were measured since the step before.
    """

    number: int
    losses: Mapping[str, float]
    tokens: int
    nodes: tuple[NodeMetric, ...] = field(default=(), compare=False)
    held_out: tuple[PathMetric, ...] = ()


def take_step(
    model: TreeModel,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    settings: Settings,
    rates: Mapping[str, float],
    *,
    done: int,
    frozen: Collection[str] = (),
) -> StepLosses:
    """Move the factors by one step.

    Args:
        model: with the nodes of ``rates`` trainable.
        optimizer: over one parameter group per node, which the model follows.
        rows: of this step, ``settings.accumulate`` micro-batches of them.
        settings: of the run.
        rates: node → its learning rate at its height.
        done: how many steps were taken before this one.
        frozen: nodes among those of ``rates`` that do not move any more.

    Raises:
        DivergedError: a factor or a loss is no longer finite.
    """
    began_s = time.perf_counter()
    prefers = are_preferences(rows)
    counts = _counts(model, rows, prefers)
    batches = [rows[i : i + settings.batch] for i in range(0, len(rows), settings.batch)]
    device = next(model.base.parameters()).device
    shares = {
        "counts": counts,
        "weights": {path: weight for path, weight in settings.weights.items() if path in counts},
        "over": over_of(settings.loss, rates),
    }
    # Neither the policy nor its reference uses dropout.
    model.train(not prefers)
    # Set at each step from its number, not by a scheduler: a scheduler has state of its own, which
    # a checkpoint would have to keep.
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]] * settings.rate_at(done)
    losses: dict[str, float] = {}
    # Dropout draws from torch's global generator. It is seeded for this step, and the caller's
    # state of it is restored afterwards.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_seed_of(settings.seed, done))
        for micro_batch in batches:
            run = _prefer if prefers else _learn
            for path, part in run(model, micro_batch, settings, shares).by_path.items():
                losses[path] = losses.get(path, 0.0) + float(part)
        for group in optimizer.param_groups:
            if group["name"] in frozen:
                # The optimiser passes over a parameter without a gradient: no momentum, no decay.
                for parameter in group["params"]:
                    parameter.grad = None
        # Read before the step, in which a hook clips the gradients in place.
        norms = _grad_norms(optimizer)
        # AdamW clips nothing: each node is clipped by itself in a hook of `TreeModel.follow`.
        optimizer.step()
        optimizer.zero_grad()
    # After the step, not before: only the factors show that a finite gradient was too large.
    inputs = partial(_inputs_of_path, model, rows)
    check_finite_step(
        model.factors, losses, step=done + 1, cause=lambda lost: frozen_cause(model, lost, inputs)
    )
    time_s = time.perf_counter() - began_s
    metrics = []
    for group in optimizer.param_groups:
        node = group["name"]
        if node in frozen:
            continue
        through = [path for path in counts if path and node in model.tree.lineage(path)]
        count = sum(counts[path] for path in through)
        if count == 0:
            continue
        loss = sum(losses[path] * counts[path] for path in through) / count
        answers = [row for row in answers_of(rows) if row.path in through]
        tokens = sum(row.learnt for row in answers)
        metrics.append(
            NodeMetric(done + 1, node, loss, tokens, norms[node], float(group["lr"]), time_s)
        )
    total = sum(row.learnt for row in answers_of(rows))
    return StepLosses(done + 1, losses, total, tuple(metrics))


def _inputs_of_path(
    model: TreeModel, rows: Sequence[Row], path: str
) -> Iterator[Mapping[str, Any]]:
    for row in answers_of(rows):
        if row.path == path:
            yield inputs_of(model, [row])[0]


def _grad_norms(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return each node's norm of its gradients; they are read from the device at once."""
    norms: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        norms[group["name"]] = nn.utils.get_total_norm(gradients).float()
    device = optimizer.param_groups[0]["params"][0].device
    read = torch.stack([norm.to(device) for norm in norms.values()]).tolist()
    return dict(zip(norms, read, strict=True))


def _counts(model: TreeModel, rows: Sequence[Row], prefers: bool) -> dict[str, int]:
    """Return path → the number of its tokens, or preferences, over which its mean is in a step.

    They are counted before the first micro-batch, so that the split into micro-batches does not
    change the loss.
    """
    if prefers:
        return dict(Counter(row.path for row in rows))
    labels = padded(rows, device=torch.device("cpu"))["labels"]
    return token_counts(model.tree, [(labels, [row.path for row in rows])])


def _learn(
    model: TreeModel, rows: Sequence[Row], settings: Settings, shares: Mapping[str, Any]
) -> PathLoss:
    """Run forward and backward of some rows' tokens."""
    batch = padded(rows, device=next(model.base.parameters()).device)
    labels, paths = batch.pop("labels"), [row.path for row in rows]
    with model.route(paths):
        loss = path_loss(model(**batch).logits, labels, paths, **shares)
        # The route stays open for backward: checkpointed layers run forward again in it.
        torch.autograd.backward(loss.total)
    return loss


def _prefer(
    model: TreeModel, rows: Sequence[Row], settings: Settings, shares: Mapping[str, Any]
) -> PathLoss:
    """Run forward and backward of some preferences, each against its path's parent."""
    answers, paths = answers_of(rows), [row.path for row in rows]
    with torch.no_grad(), model.route([reference_of(answer.path) for answer in answers]):
        reference = log_probabilities(model, answers)
    with model.route([answer.path for answer in answers]):
        losses = dpo_losses(log_probabilities(model, answers), reference, settings.beta)
        pairs = torch.ones_like(losses, dtype=torch.int64)
        loss = pooled_loss(losses, pairs, paths, **shares)
        torch.autograd.backward(loss.total)
    return loss


def _seed_of(seed: int, step: int) -> int:
    """Return a step's own seed; 63 bits, because torch takes no more."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:8], "little") >> 1
