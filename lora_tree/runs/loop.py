"""A training run: a plain loop over many nodes, that resumes to the same bits after any stop.

    step n ─→ its rows        a slice of one sequence, drawn from the seed
              its dropout     torch's generator, seeded from (seed, n)
              its rates       a function of n
              factors, state  the steps before it left them in checkpoint-n, whole or not at all

So a checkpoint is factors and the optimiser's state (`run_checkpoints.py`), and nothing that is
random has to be kept.

`refusals.py` refuses a run before it changes anything; `identity.py` says which runs are the same;
`place.py` finds the checkpoints in the folder, and sets those of finished runs aside; `step.py`
takes one step; `run_losses.py` keeps the losses; `resume.py` reads a checkpoint's numbers back;
`run_notes.py` describes how the run trains, and `recording.py` records its steps.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import DivergedError, FormatError, SpecError, listing
from ..folder.past.run_records import NodeOutcome, PathMetric, RunRecord, RunState, read_run
from ..lowrank import draw_again
from ..model import TreeModel
from ..provenance import DataFile, SaveNote, TrainedWith
from ..storage import as_path
from ..training.diverged import Start
from ..training.levels import weight_decays
from ..training.sampling import PathSampler
from ..tree import AdapterTree
from .forecast import NodeForecast, becoming_stale, choose_nodes, forecast_nodes
from .held_back import Verdict, hold_back, loss_of_rows, reweigh_leaves
from .identity import first_difference, refuse_other_run, run_identity
from .place import ABOUT, LastCheckpoint, find_last_checkpoint, set_aside
from .preferences import are_preferences
from .recording import Recorder
from .refusals import (
    check_drawable,
    check_names,
    check_preferences,
    check_weights,
    refuse_encoder,
)
from .resume import is_unchanged_since, resume_state
from .rows import Row
from .run_checkpoints import RunCheckpoints
from .run_losses import RunLosses
from .run_notes import RunNotes
from .settings import Settings
from .step import StepLosses, take_step
from .watching import HeldOut, RunWatch, held_out_identity, held_out_rows

__all__ = ["Run"]


class Run:
    """A run over a tree, resumed where its folder has a checkpoint of it.

    Args:
        model: of the tree; its base takes ``input_ids`` and ``attention_mask`` and returns
            ``logits``, as those of transformers do.
        rows: see `read_rows`. Those that go through no node that trains are left out.
        settings: how it trains.
        folder: of this run's checkpoints; made where missing.
        nodes: paths or patterns of the nodes that train; none: the nodes that rows name.
        with_ancestors: the nodes above those train as well.
        keep: checkpoints that stay: the last ones, and from two on the best one, by its loss on
            the rows held back.
        data: the files that the rows came from, for `training`.
        max_length: tokens that were kept of a row, likewise.
        held_out: how the run is watched on rows that it does not train on, and when a node stops.
        records: the tree's folder, or its tree.yaml: the run is recorded there, for
            `lora_tree.run_records`. None: nowhere.
        by: the command, or the name of the program, for the record.
        fresh: begin from new factors of the same shapes, drawn from torch's own generator as those
            of a new node are; else from the present ones.

    Attributes:
        nodes: the nodes that train, in the order of the tree.
        prefers: the rows are preferences, and each node is compared with its parent.
        rows, held_back: the rows that are trained on, and those that are not.
        trained: for each node that trains, the factors it begins from, and its ancestors.
        outdated: the nodes that become stale: they were trained on nodes that are about to change.
        was_over: the run had finished before, and the tree has its nodes: no step is left.
        aside: the finished run that was in the folder and was set aside, in its new place; None if
            there was none.

    Raises:
        SpecError: no row goes through a node that trains; or the folder has the checkpoint of an
            unfinished run with other settings, nodes or rows; or the base has an encoder.
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
        keep: int = 1,
        data: Sequence[DataFile] = (),
        max_length: int | None = None,
        held_out: HeldOut | None = None,
        records: str | os.PathLike[str] | None = None,
        by: str = "Run",
        fresh: bool = False,
    ) -> None:
        self.model, self.settings, self.folder = model, settings, as_path(folder)
        self._records, self._by = records, by
        self._recorder: Recorder | None = None
        self._checkpoints = RunCheckpoints(self.folder, keep)
        tree = model.tree
        refuse_encoder(model)
        self.nodes = choose_nodes(model, rows, nodes, with_ancestors=with_ancestors)
        check_names(settings, self.nodes, tree)
        check_weights(tree, self.nodes)
        if fresh:
            check_drawable(tree, self.nodes)
        through = _rows_through(rows, self.nodes, tree)
        self.prefers = are_preferences(through)
        if self.prefers:
            check_preferences(through, self.nodes, settings, tree)
        self.rows, self.held_back = hold_back(through, settings.hold_back)
        self.left_out = len(rows) - len(through)
        if not self.rows:
            raise SpecError(
                f"no row goes through {listing(self.nodes)}",
                "the path of a row is the node it is for",
            )
        watched: Sequence[Row] = ()
        watching = None
        if held_out is not None:
            watched = held_out_rows(held_out, self.held_back, model, self.nodes, self.prefers)
            watching = held_out_identity(held_out, watched)
        self._notes = RunNotes(
            tree,
            self.nodes,
            settings,
            self.folder,
            data=list(data),
            max_length=max_length,
            watched=None if held_out is None else held_out.noted,
            prefers=self.prefers,
        )
        before = find_last_checkpoint(self.folder)
        self._identity = run_identity(
            settings, self.nodes, self.rows, held_out=watching, fresh=fresh, before=before
        )
        # Refuse before `trainable` changes the model: a run that can't begin leaves no trace.
        if before is not None and not before.is_finished:
            refuse_other_run(before, self._identity)
        groups = model.trainable(*self.nodes, dropout=settings.dropout)
        self._rates = {path: settings.lr_of.get(path, settings.lr) for path in self.nodes}
        decays = _decays(settings, tree, self._rates)
        for group in groups:
            group["weight_decay"] = decays[group["name"]]
            group["clip_norm"] = settings.clip_norm
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        model.follow(self.optimizer)
        # Made before a checkpoint is loaded: the forecast is about the tree as the user knows it.
        self.trained: list[NodeForecast] = forecast_nodes(tree, self.nodes, self.rows)
        if fresh:
            self.trained = [replace(forecast, is_new=True) for forecast in self.trained]
        self.outdated = becoming_stale(tree, self.nodes)
        # A copy to go back to if the run diverges: the tree must not keep factors that are NaN.
        self._start = Start(model.factors)
        self._watch: RunWatch | None = None
        if held_out is not None:
            self._watch = RunWatch(model, held_out, watched, self.nodes, settings)
        self._diverged: DivergedError | None = None
        self._measured: float | None = None
        self._losses = RunLosses()
        self.was_over = False
        self.aside: LastCheckpoint | None = None
        self.done = 0 if before is None else self._resume(before)
        # A run that goes on, or that is over, has its new factors already.
        if fresh and (before is None or self.aside is not None):
            self._draw_again()

    def steps(self, *, save_every: int | None = None) -> Iterator[StepLosses]:
        """Take the steps that are left, one for each value asked for.

        A checkpoint is written after every ``save_every`` steps, but not after the last one: a
        caller that stops, early or at the end, calls `save`.

        Raises:
            DivergedError: a step made factors or losses that are not finite; names nodes, step and
                losses. The factors get back the values that they had when this object was made,
                and checkpoints of earlier steps stay.

        >>> # for step in run.steps(save_every=50): print(step.number, step.losses)
        """
        settings, model = self.settings, self.model
        # The order is drawn for the whole run at once. So a resumed run goes on with exactly the
        # rows that it would have had.
        order = self._order()
        model.train()
        self._begin_record()
        try:
            measured: list[PathMetric] = []
            if self._watch is not None and not self._watch.began:
                measured = self._evaluate(self._watch)
            while self.done < settings.steps:
                self._check_sound()
                step = self._step(order)
                self.done += 1
                self._losses.note(step.losses)
                if self._recorder is not None:
                    self._recorder.note(step.nodes)
                if self._watch is not None:
                    self._watch.patience.note_moved(metric.node for metric in step.nodes)
                    if self._watch.is_due(self.done):
                        measured += self._evaluate(self._watch)
                if self._all_stopped_at is not None:
                    self.done = settings.steps  # no node trains any more: no step is left
                if save_every and self.done % save_every == 0 and self.done < settings.steps:
                    self.save()
                step, measured = replace(step, held_out=tuple(measured)), []
                yield step
        finally:
            # Reached as well where the caller leaves the loop early and drops the generator.
            model.eval()
            self._end_record()

    @property
    def taken(self) -> int:
        """Steps that were taken: fewer than `done` if every node stopped before the last one."""
        stopped_at = self._all_stopped_at
        return self.done if stopped_at is None else stopped_at

    def save(self) -> Path:
        """Write a checkpoint, which appears whole or not at all; then delete superfluous ones.

        Raises:
            DivergedError: the run has diverged.
            FolderError: the folder can't be written.
            FormatError: PEFT has no way to write a node.
        """
        self._check_sound()
        self._measured = self._measure()
        # The record is synced first: a checkpoint of step 50 implies that all lines up to step 50
        # are on the disk.
        if self._recorder is not None:
            self._recorder.sync()
        about = self._collect_about(saved=False)
        return self._checkpoints.save(self.done, about, self.model, self.optimizer, self._watch)

    def kept(self) -> dict[Path, float | None]:
        """Return the checkpoints in the run's folder with their losses on the rows held back."""
        return self._checkpoints.kept()

    @property
    def compares_checkpoints(self) -> bool:
        """True if the best checkpoint stays, which the rows held back decide."""
        return self._checkpoints.are_compared

    def _measure(self) -> float | None:
        """Return the loss on the rows held back, if a checkpoint is to be chosen by it."""
        if not self.compares_checkpoints or not self.held_back:
            return None
        settings = self.settings
        return loss_of_rows(self.model, self.held_back, batch=settings.batch, beta=settings.beta)

    def finish(self) -> None:
        """Note that the tree was saved with this run's nodes, so that the run is not resumed again.

        Raises:
            FolderError: the folder can't be written, or has no checkpoint of the last step.
        """
        self._checkpoints.tell(self.done, self._collect_about(saved=True))
        if self._recorder is not None:
            self._recorder.end("finished", self.taken, self.outcomes(), self.outdated)

    def reweigh_leaves(self) -> list[Verdict]:
        """Give each leaf that does worse than its parent on held-back rows the best smaller weight.

        Call it after the last step, before the tree is saved. Nothing trains any more after it.
        """
        self._check_sound()
        self.model.trainable()
        settings = self.settings
        return reweigh_leaves(
            self.model, self.held_back, self.nodes, batch=settings.batch, beta=settings.beta
        )

    @property
    def first(self) -> dict[str, float]:
        """Path → its loss in the first step that had rows of it, resumed ones included."""
        return self._losses.first

    @property
    def last(self) -> dict[str, float]:
        """Path → its loss in the last step that had rows of it, resumed ones included."""
        return self._losses.last

    def losses(self) -> dict[str, tuple[float, float]]:
        """Return each node's first and last loss, in nats per token.

        A node's loss is the mean over the paths that go through it.
        """
        return self._losses.of_nodes(self.model.tree, self.nodes)

    @property
    def watched_on(self) -> int:
        """The number of held-out rows on which the run is measured."""
        return 0 if self._watch is None else self._watch.rows

    @property
    def record(self) -> RunRecord | None:
        """The record of this run so far; None if none is kept, or no step was taken."""
        if self._recorder is None:
            return None
        folder = self._recorder.folder
        return read_run(int(folder.name), folder)

    def outcomes(self) -> dict[str, NodeOutcome]:
        """Return what became of each node so far."""
        losses = self.losses()
        found = {}
        for node in self.nodes:
            first, last = losses.get(node, (None, None))
            course = None if self._watch is None else self._watch.patience.courses[node]
            if course is None:
                found[node] = NodeOutcome(first, last)
                continue
            found[node] = NodeOutcome(
                first, last, course.before, course.now, course.best_step, course.stopped_at
            )
        return found

    @property
    def training(self) -> TrainedWith | None:
        """Return the run's rows and settings, for the note of a save; None without ``data``."""
        return self._notes.training

    def note(self, by: str) -> SaveNote:
        """Return the note of the save that puts this run's nodes into the tree.

        Args:
            by: the command, or the name of the program.
        """
        return self._notes.of_save(by, self.losses())

    # ------------------------------------------------------------------ private
    def _begin_record(self) -> None:
        # A run that was over has its record already, and takes no step.
        if self._records is None or self.was_over:
            return
        about = {**self._identity, "checkpoints": self._notes.relative_folder}
        self._recorder = Recorder(
            self._records, about, self._notes.facts, by=self._by, done=self.done
        )

    def _end_record(self) -> None:
        if self._recorder is None:
            return
        state: RunState = "trained" if self.done == self.settings.steps else "stopped"
        if self._diverged is not None:
            state = "diverged"
        self._recorder.end(state, self.taken, self.outcomes())

    @property
    def _all_stopped_at(self) -> int | None:
        return None if self._watch is None else self._watch.patience.all_stopped_at

    def _evaluate(self, watch: RunWatch) -> list[PathMetric]:
        lines = watch.evaluate(self.done)
        if self._recorder is not None:
            self._recorder.note(lines)
        return lines

    def _step(self, order: Sequence[int]) -> StepLosses:
        """Take the next step, on its rows through the nodes that have not stopped."""
        settings, done = self.settings, self.done
        start = done * settings.rows_a_step
        rows = [self.rows[i] for i in order[start : start + settings.rows_a_step]]
        frozen = set() if self._watch is None else self._watch.patience.stopped
        if frozen:
            moving = set(self.nodes) - frozen
            rows = _rows_through(rows, moving, self.model.tree)
            if not rows:
                return StepLosses(done + 1, {}, 0)
        try:
            return take_step(
                self.model, self.optimizer, rows, settings, self._rates, done=done, frozen=frozen
            )
        except DivergedError as error:
            self._diverged = error
            self._start.restore()
            raise

    def _collect_about(self, *, saved: bool) -> dict[str, Any]:
        """Return the content of run.json."""
        about = {**self._identity, "step": self.done, "saved": saved}
        about["losses"] = self._losses.plain()
        if self._measured is not None:
            about["measured"] = self._measured
        if self._watch is not None:
            about["watch"] = self._watch.plain()
        training = self.training
        if training is not None:
            # Not a part of the identity: a file of rows may be moved between two resumes.
            about["training"] = training.model_dump(mode="json")
        return about

    def _check_sound(self) -> None:
        if self._diverged is not None:
            raise DivergedError(
                self._diverged.what, "this run is over: make another Run, with other settings"
            )

    def _order(self) -> list[int]:
        """Return the index of each row that the whole run takes, in order, drawn from the seed."""
        settings = self.settings
        sampler = PathSampler(
            [row.path for row in self.rows],
            temperature=settings.temperature,
            seed=settings.seed,
            length=settings.steps * settings.rows_a_step,
        )
        return list(sampler)

    def _resume(self, before: LastCheckpoint) -> int:
        """Go on from a checkpoint, or set it aside; return how many steps are done."""
        is_same = first_difference(before.about, self._identity) is None
        if is_same and before.is_saved and is_unchanged_since(self.model, self.nodes, before):
            # The tree has exactly these numbers, so there is nothing to load and no step to take.
            self._resume_measures(before)
            self.was_over = True
            return before.step
        # A run that is the same and finished, but not saved, ended between its last checkpoint and
        # the save of the tree. It is loaded below, so that the caller saves the tree now. Any other
        # finished run is set aside.
        if before.is_finished and (before.is_saved or not is_same):
            folder = set_aside(before)
            self.aside = LastCheckpoint(folder, before.about, before.step)
            return 0
        # No run of these settings can be so far: the file was written by hand or another version.
        if before.step > self.settings.steps:
            raise FormatError(
                f"{before.folder / ABOUT}: step is {before.step}, "
                f"expected a number up to {self.settings.steps}"
            )
        resume_state(self.model, self.optimizer, before.folder)
        self._resume_measures(before)
        return before.step

    def _draw_again(self) -> None:
        """Draw new factors for the nodes that train; a run that diverges restores the old ones."""
        for node in self.nodes:
            adapter = self.model.tree.adapter(node)
            assert adapter is not None  # it trains
            # In the order of a new node's drawing, so that the same seed gives the same adapter.
            for _, value in sorted(adapter.modules.items()):
                draw_again(value)

    def _resume_measures(self, before: LastCheckpoint) -> None:
        self._losses.resume(before.about, {"", *self.model.tree})
        if self._watch is not None:
            self._watch.resume(before.about, before.folder)


# ---------------------------------------------------------------------- private
def _decays(settings: Settings, tree: AdapterTree, rates: Mapping[str, float]) -> dict[str, float]:
    by_depth = settings.decay_by_depth
    if settings.weight_decay is not None:
        by_depth = [settings.weight_decay]
    return weight_decays(tree, list(rates), rates, by_depth=by_depth, of_node=settings.decay_of)


def _rows_through(rows: Sequence[Row], nodes: Collection[str], tree: AdapterTree) -> list[Row]:
    """Return the rows whose path goes through a node that trains."""
    training = set(nodes)
    paths = {row.path for row in rows}
    # The lineage is looked up once for each path, because there are far fewer paths than rows.
    through = {path for path in paths if not training.isdisjoint(tree.lineage(path))}
    return [row for row in rows if row.path in through]
