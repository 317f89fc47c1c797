"""Early stopping node by node under TreeTrainer; the rule itself is in `training.patience`.

    the Trainer evaluates    every node is judged by the paths through it; the ones that stop are
                             brought back, which may take two evaluations more for each
    before a step            gradients of stopped nodes are dropped: no momentum, no decay
    a checkpoint             courses in node_stopping.json, factors to come back to beside it
    training ends            every other node is brought back to its best, before the tree is saved

Rows of a node that stopped are still drawn and run: the sampler is the Trainer's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ...errors import FormatError, SpecError
from ...folder import NodeOutcome, disk
from ...formats import strict_json
from ...formats.safetensors import read_tensors, render_tensors
from ...system.reading import is_file
from ...training.patience import NodePatience, PathLosses

if TYPE_CHECKING:
    from ..transformers import TreeTrainer

__all__ = ["NodeStopping"]

COURSES, BEST_FACTORS = "node_stopping.json", "best.safetensors"


class NodeStopping(TrainerCallback):  # type: ignore[misc]
    """A callback that stops nodes of a trainer early.

    Args:
        trainer: of the tree; its arguments ask for evaluations.
        patience: evaluations in succession without improving after which a node stops.

    Raises:
        SpecError: the arguments ask for no evaluation, or for something that would undo this.
    """

    def __init__(self, trainer: TreeTrainer, patience: int) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise SpecError(f"patience must be a whole number from 1, got {patience!r}")
        _check_arguments(trainer)
        self._trainer = trainer
        model = trainer.tree_model
        nodes = [path for path in model.tree.paths() if path in model.factors.training_paths]
        self._rule = NodePatience(model.factors, model.tree, nodes, patience)
        self._trains = False
        self._resumes = False  # until the first step after a resumption

    @property
    def stopped(self) -> set[str]:
        """The nodes that no longer train."""
        return self._rule.stopped

    def outcomes(self) -> dict[str, NodeOutcome]:
        """Return what became of each node on the evaluation's rows so far."""
        found = {}
        for node, one in self._rule.courses.items():
            found[node] = NodeOutcome(
                before=one.before, after=one.now, best_step=one.best_step, stopped_at=one.stopped_at
            )
        return found

    # ------------------------------------------------------------------ the Trainer's events
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trains = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._resumes = False
        tree, stopped = self._trainer.tree_model.tree, self._rule.stopped
        moving: set[str] = set()
        for path, count in (self._trainer.counts or {}).items():
            if count and path:
                moving.update(tree.coefficients(path))
        self._rule.note_moved(node for node in self._rule.courses if node in moving - stopped)
        for node in stopped:
            for parameter in self._rule.factors.of(node):
                parameter.grad = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A user may evaluate before training, and after it. And `eval_on_start` evaluates a resumed
        # run at a step that was evaluated before, which must not count twice.
        if not self._trains or self._resumes:
            return
        stopped = self._rule.judge(state.global_step, self._known(), self._measured)
        if stopped:
            self._trainer.log({f"stopped/{node}": float(state.global_step) for node in stopped})
        if self._rule.all_stopped_at is not None:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trains = False
        self._rule.settle(state.global_step, self._measured)
        self._rule.note_now(self._measured(""))

    # ------------------------------------------------------------------ in a checkpoint
    def save(self, checkpoint: Path) -> None:
        """Write the courses of all nodes, and the factors to which they may come back."""
        disk.write(checkpoint / COURSES, json.dumps(self._rule.plain(), indent=2).encode())
        best = self._rule.best_factors()
        if best:
            disk.write(checkpoint / BEST_FACTORS, render_tensors(best, {"format": "pt"}))

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            FolderError, FormatError: a file of it can't be read.
        """
        file, factors = checkpoint / COURSES, checkpoint / BEST_FACTORS
        state = strict_json.loads(disk.read_file(file), str(file))
        best = read_tensors(factors, str(factors))[0] if is_file(factors) else {}
        try:
            self._rule.take(state, best)
        except (AttributeError, TypeError) as error:
            raise FormatError(
                f"{file}: not the state of a run with patience: {error!r}",
                "resume from an earlier checkpoint",
            ) from error
        self._resumes = True

    # ------------------------------------------------------------------ private
    def _measured(self, node: str) -> PathLosses:
        """Evaluate all rows again, for any node: the Trainer has no loader of a part of them."""
        trainer: Any = self._trainer
        loader = trainer.get_eval_dataloader()
        trainer.evaluation_loop(loader, "Evaluation", True, metric_key_prefix="again")
        return self._known()

    def _known(self) -> PathLosses:
        """Return the last evaluation's losses, without those of blends, which have no one node."""
        tree = self._trainer.tree_model.tree
        losses: Mapping[str, tuple[float, int]] = self._trainer.path_losses
        return {path: both for path, both in losses.items() if path == "" or path in tree}


def _check_arguments(trainer: Any) -> None:
    args = trainer.args
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        raise SpecError(
            "patience counts evaluations, and the arguments ask for none",
            'TrainingArguments(…, eval_strategy="steps", eval_steps=20)',
        )
    if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, Mapping):
        raise SpecError("patience needs one eval_dataset", "give its rows as one data set")
    if args.load_best_model_at_end:
        raise SpecError(
            "patience brings each node back to its own best, and load_best_model_at_end all nodes "
            "to one checkpoint",
            "leave one of them out",
        )
    if trainer.tree_model.factors.sharded:
        raise SpecError("patience does not work with sharded factors", "leave it out")
