"""The files of a ``transformers.Trainer`` that trains a tree.

    the Trainer's                        here
    checkpoint-N with the whole model    checkpoint-N with the factors that train, and each node
                                         as a PEFT adapter; it appears whole or not at all
    ``save_model``: one model            the tree, as a folder

Law: a folder named checkpoint-N is whole. It is written under another name and renamed at the end,
and renamed again before it is deleted.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import sort_checkpoints

from ...errors import DivergedError, SpecError
from ...folder.past.run_records import RunState
from ...model import TreeModel
from ...runs.checkpoint_factors import load_factors, save_factors
from ...runs.checkpoint_place import put_back, retire, staged_checkpoint
from ...training.diverged import Start
from ...training.rank_names import ranks
from .sharded_state import load_state, save_state

__all__ = ["TreeCheckpoints"]


class TreeCheckpoints(Trainer):  # type: ignore[misc]
    """The part of `TreeTrainer` that writes and reads files."""

    tree_model: TreeModel
    save_to: str | os.PathLike[str] | None
    stopping: Any = None  # a NodeStopping, if nodes may stop
    notes: Any = None  # a StepNotes, if steps are noted
    _stage: Path | None = None  # the folder in which a checkpoint is being written

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; at the end save the tree where ``save_to`` says.

        Raises:
            DivergedError: a step made factors or losses that are not finite. Nothing of it was
                saved, and the factors are those of the start again.
        """
        named = args[0] if args else kwargs.get("resume_from_checkpoint")
        if self.args.should_save:
            # Done before the Trainer looks for its last checkpoint: a process that was killed while
            # it replaced one may have left it under another name.
            if isinstance(named, str | os.PathLike):
                put_back(Path(named).parent)
            else:
                put_back(Path(self.args.output_dir))
        _wait_for_ranks()
        start = Start(self.tree_model.factors)
        ended: RunState = "stopped"
        try:
            out = super().train(*args, **kwargs)
            self._end_training()
            ended = "trained"
            if self.save_to is not None:
                self.save_model(os.fspath(self.save_to))
                ended = "finished"
        except DivergedError:
            ended = "diverged"
            start.restore()
            raise
        finally:
            if self.notes is not None:
                self.notes.end(ended)
        return out

    def _end_training(self) -> None:
        """Do the work between the last step and the save; here there is none."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the tree as a folder, atomically as a whole; one process writes.

        Args:
            output_dir: where; None: ``save_to``.

        Raises:
            SpecError: neither was given.
            FolderError: as `AdapterTree.save`.
        """
        # The Trainer calls this method for a checkpoint, too, and marks the call.
        if _internal_call and output_dir is not None:
            save_factors(self.tree_model, Path(output_dir), writes=self.args.should_save)
            if self.args.should_save and self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
            if self.args.should_save and self.stopping is not None:
                self.stopping.save(Path(output_dir))
            return
        where = output_dir if output_dir is not None else self.save_to
        if where is None:
            raise SpecError(
                "save_model has no folder: checkpoints lie in output_dir, and a tree can't",
                "save_model('zoo/')",
            )
        # All ranks enter, because gathering a sharded factor is a collective operation.
        with self.tree_model.gathered() as tree:
            if self.args.should_save:
                tree.save(where, note="TreeTrainer")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as the Trainer does, into a folder that gets its name when it is complete."""
        parent, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        with staged_checkpoint(
            parent, name, writes=self.args.should_save, meet=_wait_for_ranks
        ) as stage:
            self._stage = stage
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._stage = None
            best = self.state.best_model_checkpoint
            # The Trainer has noted the temporary name, and written it into its state.
            if best is not None and Path(best).parent == stage:
                self.state.best_model_checkpoint = str(parent / name)
                if self.args.should_save:
                    self.state.save_to_json(str(stage / name / "trainer_state.json"))
        if self.args.should_save:
            self._retire_old_checkpoints(parent)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.tree_model.factors.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        writes = self.args.should_save
        save_state(optimizer, self.lr_scheduler, Path(output_dir), writes=writes)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.tree_model.factors.sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # Accelerate wraps the optimiser; the state is that of the one inside.
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        load_state(optimizer, self.lr_scheduler, Path(checkpoint))

    def _retire_old_checkpoints(self, parent: Path) -> None:
        """Delete the checkpoints beyond ``save_total_limit``, in the Trainer's place.

        The Trainer would look for them in the temporary folder, which holds only the new one. And
        it deletes in place: if it is killed meanwhile, half a checkpoint keeps its name.
        """
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        checkpoints = sort_checkpoints(str(parent), use_mtime=True)
        kept = {checkpoints[-1]}  # to resume from
        if self.state.best_model_checkpoint is not None:
            kept.add(str(Path(self.state.best_model_checkpoint)))
        others = [checkpoint for checkpoint in checkpoints if checkpoint not in kept]
        too_many = max(len(checkpoints) - max(limit, len(kept)), 0)
        for checkpoint in others[:too_many]:
            retire(Path(checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage) if self._stage is not None else str(super()._get_output_dir(trial))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_factors(self.tree_model, Path(resume_from_checkpoint))
        if self.stopping is not None:
            self.stopping.resume(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_factors(self.tree_model, Path(self.state.best_model_checkpoint))


def _wait_for_ranks() -> None:
    """Wait for all ranks: one writes, and the others must not run ahead of it."""
    if ranks() > 1:
        dist.barrier()
