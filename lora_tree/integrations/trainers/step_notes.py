"""Record a TreeTrainer's run in the tree's folder, as `lora-tree train` records its own.

Every step waits for its losses and gradient norms to be read from the device, which a Trainer does
only where it logs. All ranks count together, and one writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ...folder.past.run_records import NodeMetric, PathMetric, RunState
from ...folder.reading.tree_place import place_of
from ...provenance import seen_from
from ...runs.recording import Recorder
from ...training.sharded import full
from .path_losses import PathMeans

if TYPE_CHECKING:
    from ..transformers import TreeTrainer

__all__ = ["StepNotes"]

_TOLD = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
)
"""The arguments that a record keeps, so that runs can be compared."""


class StepNotes(TrainerCallback):  # type: ignore[misc]
    """A callback that records the steps of a trainer.

    Args:
        trainer: of the tree.
        zoo: the tree's folder, or its tree.yaml; it must exist.

    Raises:
        FolderError: it is not there.
    """

    def __init__(self, trainer: TreeTrainer, zoo: str | os.PathLike[str]) -> None:
        self._place = place_of(zoo)
        self._trainer, self._zoo = trainer, zoo
        self.means = PathMeans()
        self._recorder: Recorder | None = None
        self._norms: dict[str, float] = {}
        self._rates: dict[str, float] = {}
        self._began_s = 0.0
        self._from_step: int | None = None

    # ------------------------------------------------------------------ the Trainer's events
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._from_step = state.global_step
        if not state.is_world_process_zero:
            return
        settings = {"steps": state.max_steps, **{name: getattr(args, name) for name in _TOLD}}
        folder = seen_from(self._place.folder, args.output_dir)
        about = {
            "version": 1,
            "settings": settings,
            "nodes": self._nodes,
            "checkpoints": folder,
        }
        more = {"unit": "nats per token"}
        self._recorder = Recorder(self._zoo, about, more, by="TreeTrainer", done=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began_s = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self._trainer.optimizer
        groups = optimizer.param_groups
        self._rates = {group["name"]: float(group["lr"]) for group in groups}
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        norms: list[Tensor] = []
        for group in groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            norms.append(full(nn.utils.get_total_norm(gradients)).float().to(args.device) / scale)
        self._norms = dict(zip(self._rates, torch.stack(norms).tolist(), strict=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Every rank takes part, since it may have rows of a path that no other rank has.
        losses = self.means.take(args.device)
        if self._recorder is None:
            return
        time_s = time.perf_counter() - self._began_s
        self._recorder.note(self._lines(state.global_step, losses, time_s))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # `eval_on_start` evaluates a resumed run at a step that was evaluated before.
        step, began = state.global_step, self._from_step
        if self._recorder is None or began is None or (step == began and began > 0):
            return
        measured = self._trainer.path_losses.items()
        self._recorder.note([PathMetric(step, path, *both) for path, both in measured])

    def end(self, state: RunState) -> None:
        """Record how a training ended; called once per training."""
        self._from_step = None
        if self._recorder is not None:
            done = self._trainer.state.global_step
            self._recorder.end(state, done, self._trainer.node_outcomes())

    # ------------------------------------------------------------------ private
    @property
    def _nodes(self) -> list[str]:
        model = self._trainer.tree_model
        return [path for path in model.tree.paths() if path in model.factors.training_paths]

    def _lines(self, step: int, losses: Mapping[str, float], time_s: float) -> list[NodeMetric]:
        tree, counts = self._trainer.tree_model.tree, self._trainer.counts
        stopping = self._trainer.stopping
        stopped = set() if stopping is None else stopping.stopped
        lines = []
        for node in self._nodes:
            through = [path for path in losses if path and node in tree.coefficients(path)]
            tokens = sum(counts.get(path, 0) for path in through)
            if tokens == 0 or node in stopped:
                continue
            loss = sum(losses[path] * counts[path] for path in through) / tokens
            lines.append(
                NodeMetric(step, node, loss, tokens, self._norms[node], self._rates[node], time_s)
            )
        return lines
