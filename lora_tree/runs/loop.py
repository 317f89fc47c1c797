"""A training run: a plain loop over many nodes, that resumes to the same bits after any kind of stop.

    step n ─→ its rows        a slice of one sequence, drawn from the seed
              its dropout     torch's generator, seeded from (seed, n)
              its rates       a function of n
              factors, state  what the steps before it left: in checkpoint-n, whole or not there

So a checkpoint is factors and the optimiser's state, and nothing that is random has to be kept.

    run/checkpoint-40/factors.safetensors      what trains, bit for bit
                      nodes/fr/legal/…         the same as PEFT adapters, to be promoted
                      optimizer.safetensors
                      run.json                 step, settings, nodes, and a hash of the rows
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DivergedError, FolderError, FormatError, SpecError, listing
from ..folder import disk
from ..formats import strict_json
from ..formats.safetensors import read_tensors, render_tensors
from ..integrations.checkpoint import appearing, load_factors, put_back, retire, save_factors
from ..model import TreeModel
from ..storage import as_path
from ..training.diverged import Start, check_finite_step
from ..training.losses import path_loss, token_counts
from ..training.sampling import PathSampler
from .rows import Row, padded
from .settings import Settings

__all__ = ["Run", "Step"]

STATE, ABOUT = "optimizer.safetensors", "run.json"
_NAME = re.compile(r"checkpoint-([0-9]+)\Z")


@dataclass(frozen=True)
class Step:
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
        nodes: paths or patterns of what trains; none: every node with an adapter that a row goes through.

    Raises:
        SpecError: no row goes through what trains; or the folder's checkpoint is of other settings, nodes or rows.
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
    ) -> None:
        self.model, self.settings, self.folder = model, settings, as_path(folder)
        groups = model.trainable(*(nodes or _gone_through(model, rows)), dropout=settings.dropout)
        self.nodes = [group["name"] for group in groups]
        for what, named in (("lr_of", settings.lr_of), ("weights", settings.weights)):
            strange = [path for path in named if path not in (self.nodes if what == "lr_of" else ["", *model.tree])]
            if strange:
                raise SpecError(f"{what} names {strange[0]!r}; what trains: {listing(self.nodes)}")
        training = set(self.nodes)
        self.rows = [row for row in rows if training & set(model.tree.lineage(row.path))]
        self.left_out = len(rows) - len(self.rows)
        if not self.rows:
            raise SpecError(f"no row goes through {listing(self.nodes)}", "the path of a row is the node it is for")
        self._rates = {path: settings.lr_of.get(path, settings.lr) for path in self.nodes}
        options = {"weight_decay": settings.weight_decay, "clip_norm": settings.clip_norm}
        self.optimizer = torch.optim.AdamW([{**group, **options} for group in groups], lr=settings.lr)
        model.follow(self.optimizer)
        self._about = {
            "version": 1,
            "settings": settings.plain(),
            "nodes": self.nodes,
            "rows": _digest(self.rows),
        }
        self._start = Start(model.factors)
        self._diverged: DivergedError | None = None
        self.done = self._resume()

    def steps(self, *, save_every: int | None = None) -> Iterator[Step]:
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
                    step = self._step([self.rows[i] for i in order[start : start + settings.rows_a_step]])
                except DivergedError as error:
                    self._diverged = error
                    self._start.restore()
                    raise
                self.done += 1
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
            about = json.dumps({**self._about, "step": self.done}, indent=2, sort_keys=True)
            disk.write(stage / name / ABOUT, about.encode())
        for step, old in _checkpoints(self.folder):
            if step < self.done:
                retire(old)
        return self.folder / name

    # ------------------------------------------------------------------ private
    def _check_sound(self) -> None:
        if self._diverged is not None:
            raise DivergedError(self._diverged.what, "this run is over: make another Run, with other settings")

    def _order(self) -> list[int]:
        settings = self.settings
        sampler = PathSampler(
            [row.path for row in self.rows],
            temperature=settings.temperature,
            seed=settings.seed,
            length=settings.steps * settings.rows_a_step,
        )
        return list(sampler)

    def _step(self, rows: Sequence[Row]) -> Step:
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
        return Step(self.done + 1, losses, sum(counts.values()))

    def _state(self) -> dict[str, Tensor]:
        state: dict[int, dict[str, Any]] = self.optimizer.state_dict()["state"]
        return {f"{i}.{name}": t.detach().cpu() for i, of in state.items() for name, t in of.items()}

    def _resume(self) -> int:
        put_back(self.folder)
        found = _checkpoints(self.folder)
        if not found:
            return 0
        _, newest = found[-1]
        about = strict_json.loads(disk.read(newest / ABOUT), str(newest / ABOUT))
        for what, mine in self._about.items():
            if about.get(what) != mine:
                raise SpecError(
                    f"{newest}: of a run with other {what}: {_differing(about.get(what), mine)}",
                    "go on with what it was, or name another folder for this run",
                )
        step = about.get("step")
        if not isinstance(step, int) or not 0 <= step <= self.settings.steps:
            raise FormatError(f"{newest / ABOUT}: step is {step!r}, expected a number up to {self.settings.steps}")
        state, _ = read_tensors(newest / STATE, str(newest / STATE))
        known: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            index, _, part = name.partition(".")
            known.setdefault(int(index), {})[part] = tensor
        load_factors(self.model, newest)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": known, "param_groups": groups})
        self.model.follow(self.optimizer)
        return step


def _gone_through(model: TreeModel, rows: Sequence[Row]) -> list[str]:
    """The nodes with an adapter, or one to be made, that rows go through."""
    tree = model.tree
    nodes = {node for path in {row.path for row in rows} for node in tree.lineage(path)}
    chosen = [node for node in tree.paths() if node in nodes and (tree[node].has_adapter or tree[node].fresh)]
    if not chosen:
        raise SpecError("the rows go through no node with an adapter", 'give rows a path: "path": "fr"')
    return chosen


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints in a run's folder, in order."""
    if not folder.is_dir():
        if folder.exists():
            raise FolderError(f"{folder}: is no folder", "name a folder for the run's checkpoints")
        return []
    with disk.named("list it", folder):
        names = [(match, folder / name) for name in os.listdir(folder) if (match := _NAME.match(name))]
    return sorted((int(match[1]), path) for match, path in names)


def _digest(rows: Sequence[Row]) -> str:
    """SHA-256 of what is learnt, row by row."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(json.dumps([row.path, row.ids, row.labels]).encode())
    return hashed.hexdigest()


def _differing(theirs: Any, mine: Any) -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = sorted(k for k in {*theirs, *mine} if theirs.get(k) != mine.get(k))
        return "; ".join(f"{k} was {theirs.get(k)!r} and is {mine.get(k)!r}" for k in keys)
    return f"was {theirs!r} and is {mine!r}"


def _mixed(seed: int, step: int) -> int:
    """A seed of a step's own."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:8], "little") >> 1
