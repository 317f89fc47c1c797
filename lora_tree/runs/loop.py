"""A training run: a plain loop over many nodes, that resumes to the same bits after any kind of stop.

    step n ─→ its rows        a slice of one sequence, drawn from the seed
              its dropout     torch's generator, seeded from (seed, n)
              its rates       a function of n
              factors, state  what the steps before it left: in checkpoint-n, whole or not there

So a checkpoint is factors and the optimiser's state, and nothing that is random has to be kept.

    run/checkpoint-40/factors.safetensors      what trains, bit for bit
                      nodes/fr/legal/…         the same as PEFT adapters, to be promoted
                      optimizer.safetensors
                      run.json                 step, settings, nodes, losses, and a hash of the rows

Which checkpoint is gone on from, and what becomes of a finished run: `place.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DivergedError, FolderError, FormatError, SpecError, listing
from ..folder import disk
from ..formats.safetensors import read_tensors, render_tensors
from ..integrations.checkpoint import (
    FACTORS,
    ancestors_now,
    ancestors_then,
    appearing,
    load_factors,
    retire,
    save_factors,
)
from ..model import TreeModel
from ..storage import as_path
from ..system.reading import is_file
from ..training.diverged import Start, check_finite_step
from ..training.losses import path_loss, token_counts
from ..training.sampling import PathSampler
from .forecast import NodeForecast, becoming_stale, chosen, losses_of, what_trains
from .place import (
    ABOUT,
    LastCheckpoint,
    checkpoints,
    differing,
    last_of,
    refuse_other,
    render_about,
    set_aside,
)
from .rows import Row, padded
from .settings import Settings

__all__ = ["Run", "StepLosses"]

STATE = "optimizer.safetensors"


@dataclass(frozen=True)
class StepLosses:
    """What one step of the optimiser came to.

    Args:
        number: how many are done.
        losses: path → mean loss over its tokens in this step, in nats.
        tokens: learnt in it.
    """

    number: int
    losses: Mapping[str, float]
    tokens: int


class Run:
    """A run over a tree, resumed where its folder has a checkpoint of it.

    Args:
        model: of the tree; its base takes ``input_ids`` and ``attention_mask`` and returns ``logits``, as those of
            transformers do.
        rows: see `read_rows`. Those that go through no node that trains are left out.
        settings: how it trains.
        folder: of this run's checkpoints; made where missing.
        nodes: paths or patterns of what trains; none: the nodes that rows name.
        with_ancestors: the nodes above those train as well.

    Attributes:
        nodes: what trains, in the order of the tree.
        trained: the same, with what each begins from and stands on.
        outdated: the nodes that become stale, since they were trained on what is about to change.
        first, last: path → its loss in the first and the last step that had rows of it, resumed ones included.
        was_over: the run had finished before, and the tree has its nodes: no step is left.
        aside: where the finished run is now that was there before this one; None: there was none.

    Raises:
        SpecError: no row goes through what trains; or the folder has the checkpoint of an unfinished run with other
            settings, nodes or rows; or the base has an encoder.
        FolderError, FormatError: the folder or its checkpoint can't be read.
        PathError: a path or pattern matches no node.
    """

    def __init__(
        self,
        model: TreeModel,
        rows: Sequence[Row],
        settings: Settings,
        folder: str | os.PathLike[str],
        *,
        nodes: Sequence[str] = (),
        with_ancestors: bool = False,
    ) -> None:
        self.model, self.settings, self.folder = model, settings, as_path(folder)
        tree = model.tree
        if getattr(getattr(model.base, "config", None), "is_encoder_decoder", False):
            raise SpecError(
                f"{type(model.base).__name__} has an encoder and a decoder; "
                "a run trains models that go on from what they read",
                "train it with lora_tree.integrations.transformers.TreeTrainer and a collator for such models",
            )
        self.nodes = chosen(model, rows, nodes, with_ancestors=with_ancestors)
        for what, named in (("lr_of", settings.lr_of), ("weights", settings.weights)):
            strange = [
                path
                for path in named
                if path not in (self.nodes if what == "lr_of" else ["", *tree])
            ]
            if strange:
                raise SpecError(f"{what} names {strange[0]!r}; what trains: {listing(self.nodes)}")
        through = {
            path
            for path in {row.path for row in rows}
            if not set(self.nodes).isdisjoint(tree.lineage(path))
        }
        self.rows = [row for row in rows if row.path in through]
        self.left_out = len(rows) - len(self.rows)
        if not self.rows:
            raise SpecError(
                f"no row goes through {listing(self.nodes)}",
                "the path of a row is the node it is for",
            )
        self._about = {
            "version": 1,
            "settings": settings.plain(),
            "nodes": self.nodes,
            "rows": _digest(self.rows),
        }
        before = last_of(self.folder)
        if before is not None and not before.is_finished:
            refuse_other(before, self._about)
        groups = model.trainable(*self.nodes, dropout=settings.dropout)
        self._rates = {path: settings.lr_of.get(path, settings.lr) for path in self.nodes}
        options = {"weight_decay": settings.weight_decay, "clip_norm": settings.clip_norm}
        self.optimizer = torch.optim.AdamW(
            [{**group, **options} for group in groups], lr=settings.lr
        )
        model.follow(self.optimizer)
        self.trained: list[NodeForecast] = what_trains(tree, self.nodes, self.rows)
        self.outdated = becoming_stale(tree, self.nodes)
        self._start = Start(model.factors)
        self._diverged: DivergedError | None = None
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.was_over = False
        self.aside: LastCheckpoint | None = None
        self.done = 0 if before is None else self._resume(before)

    def steps(self, *, save_every: int | None = None) -> Iterator[StepLosses]:
        """Take the steps that are left, one for each value asked for.

        A checkpoint is written after every ``save_every`` steps; whoever stops early calls `save`.

        Raises:
            DivergedError: a step made factors or losses that are not finite; names nodes, step and losses. What trains
                is again what it was when this object was made, and checkpoints of earlier steps stay.

        >>> # for step in run.steps(save_every=50): print(step.number, step.losses)
        """
        settings, model = self.settings, self.model
        order = self._order()
        model.train()
        try:
            while self.done < settings.steps:
                self._check_sound()
                start = self.done * settings.rows_a_step
                try:
                    step = self._step(
                        [self.rows[i] for i in order[start : start + settings.rows_a_step]]
                    )
                except DivergedError as error:
                    self._diverged = error
                    self._start.restore()
                    raise
                self.done += 1
                self.first = {**step.losses, **self.first}
                self.last.update(step.losses)
                if save_every and self.done % save_every == 0 and self.done < settings.steps:
                    self.save()
                yield step
        finally:
            model.eval()

    def save(self) -> Path:
        """Write a checkpoint, which appears whole or not at all; older ones of this run go when it is there.

        Raises:
            DivergedError: the run has diverged.
            FolderError: the folder can't be written.
            FormatError: PEFT has no way to write a node.
        """
        self._check_sound()
        name = f"checkpoint-{self.done}"
        with disk.named("make it", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with appearing(self.folder, name, writes=True, meet=lambda: None) as stage:
            save_factors(self.model, stage / name)
            disk.write(stage / name / STATE, render_tensors(self._state(), {"format": "pt"}))
            disk.write(stage / name / ABOUT, render_about(self._told(saved=False)))
        for step, old in checkpoints(self.folder):
            if step < self.done:
                retire(old)
        return self.folder / name

    def finish(self) -> None:
        """Note that the tree was saved with what this run came to: the next run in this folder begins anew.

        Raises:
            FolderError: the folder can't be written, or has no checkpoint of the last step.
        """
        file = self.folder / f"checkpoint-{self.done}" / ABOUT
        if not is_file(file):
            raise FolderError(f"{file.parent}: no checkpoint of the last step", "save() first")
        disk.replace(file, render_about(self._told(saved=True)))

    def losses(self) -> dict[str, tuple[float, float]]:
        """Node → its first and last loss: the mean over the paths that go through it, in nats per token."""
        tree = self.model.tree
        first, last = (losses_of(tree, self.nodes, by_path) for by_path in (self.first, self.last))
        return {node: (first[node], last[node]) for node in first}

    # ------------------------------------------------------------------ private
    def _told(self, *, saved: bool) -> dict[str, Any]:
        """The content of run.json."""
        losses = {"first": self.first, "last": self.last}
        return {**self._about, "step": self.done, "losses": losses, "saved": saved}

    def _check_sound(self) -> None:
        if self._diverged is not None:
            raise DivergedError(
                self._diverged.what, "this run is over: make another Run, with other settings"
            )

    def _order(self) -> list[int]:
        settings = self.settings
        sampler = PathSampler(
            [row.path for row in self.rows],
            temperature=settings.temperature,
            seed=settings.seed,
            length=settings.steps * settings.rows_a_step,
        )
        return list(sampler)

    def _step(self, rows: Sequence[Row]) -> StepLosses:
        settings, model = self.settings, self.model
        device = next(model.base.parameters()).device
        micro = [rows[i : i + settings.batch] for i in range(0, len(rows), settings.batch)]
        batches = [(padded(part, device=device), [row.path for row in part]) for part in micro]
        counts = token_counts(model.tree, [(batch["labels"], paths) for batch, paths in batches])
        weights = {path: w for path, w in settings.weights.items() if path in counts}
        losses: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            group["lr"] = self._rates[group["name"]] * settings.rate_at(self.done)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_mixed(settings.seed, self.done))
            for batch, paths in batches:
                labels = batch.pop("labels")
                with model.route(paths):
                    logits: Tensor = model(**batch).logits
                    loss = path_loss(logits, labels, paths, counts=counts, weights=weights)
                    torch.autograd.backward(loss.total)
                for path, part in loss.by_path.items():
                    losses[path] = losses.get(path, 0.0) + float(part)
            self.optimizer.step()
            self.optimizer.zero_grad()
        check_finite_step(model.factors, losses, step=self.done + 1)
        return StepLosses(self.done + 1, losses, sum(counts.values()))

    def _state(self) -> dict[str, Tensor]:
        state: dict[int, dict[str, Any]] = self.optimizer.state_dict()["state"]
        return {
            f"{i}.{name}": t.detach().cpu() for i, of in state.items() for name, t in of.items()
        }

    def _resume(self, before: LastCheckpoint) -> int:
        """Go on from a checkpoint, or set it aside; return how many steps are done."""
        is_same = differing(before.about, self._about) is None
        if is_same and before.is_saved and self._is_what_it_left(before):
            self._remember(before)
            self.was_over = True
            return before.step
        if before.is_finished and (before.is_saved or not is_same):
            folder = set_aside(before)
            self.aside = LastCheckpoint(folder, before.about, before.step)
            return 0
        if before.step > self.settings.steps:
            raise FormatError(
                f"{before.folder / ABOUT}: step is {before.step}, expected a number up to {self.settings.steps}"
            )
        self._take(before)
        return before.step

    def _take(self, before: LastCheckpoint) -> None:
        """Put a checkpoint's numbers into the factors and the optimiser."""
        file = before.folder / STATE
        state, _ = read_tensors(file, str(file))
        known: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            index, _, part = name.partition(".")
            known.setdefault(int(index), {})[part] = tensor
        load_factors(self.model, before.folder)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": known, "param_groups": groups})
        self.model.follow(self.optimizer)
        self._remember(before)

    def _remember(self, before: LastCheckpoint) -> None:
        """Take over the losses that a checkpoint tells of."""
        losses = before.about.get("losses")
        for name, mine in (("first", self.first), ("last", self.last)):
            told = losses.get(name) if isinstance(losses, Mapping) else None
            for path, loss in told.items() if isinstance(told, Mapping) else ():
                if path in ("", *self.model.tree) and isinstance(loss, (int, float)):
                    mine[path] = float(loss)

    def _is_what_it_left(self, before: LastCheckpoint) -> bool:
        """The nodes, and those above them, are what they were when the run that finished was saved."""
        file = before.folder / FACTORS
        left, _ = read_tensors(file, str(file))
        now = {
            name: p.detach().cpu()
            for name, p in self.model.factors.named_parameters()
            if p.requires_grad
        }
        if left.keys() != now.keys() or not all(
            torch.equal(tensor, now[name]) for name, tensor in left.items()
        ):
            return False
        for node in self.nodes:
            then, above = ancestors_then(before.folder, node), ancestors_now(self.model.tree, node)
            if list(then.values()) != list(above.values()):
                return False
        return True


def _digest(rows: Sequence[Row]) -> str:
    """SHA-256 of what is learnt, row by row."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(json.dumps([row.path, row.ids, row.labels]).encode())
    return hashed.hexdigest()


def _mixed(seed: int, step: int) -> int:
    """A seed of a step's own."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:8], "little") >> 1
