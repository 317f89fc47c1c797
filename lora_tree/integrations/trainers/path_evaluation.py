"""The evaluation of a `TreeTrainer`: each row by its own path, and a loss for each path.

    a batch: path, input_ids, labels ─→ route ─→ the Trainer's forward ─→ path → (sum, tokens)
    over all batches and ranks       ─→ eval_loss/<path>, and eval_loss, their weighted sum
    rows held back, after training   ─→ the same, with leaves served at parts of their weight

By the last line leaves are judged (`held_rows.py`). It is the Trainer's own evaluation, so its
collator, its devices and its ranks are those of the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...blend import Blend
from ...errors import SpecError, listing
from ...runs import Verdict
from ...training.diverged import BASE_LABEL
from ...training.patience import PathLosses
from .checkpoints import TreeCheckpoints
from .held_rows import HeldRows
from .path_losses import PathTotals

__all__ = ["PathEvaluation"]


class PathEvaluation(TreeCheckpoints):
    """The part of `TreeTrainer` that evaluates."""

    path_column: str
    path_weights: Mapping[str, float]
    _groups: Sequence[Mapping[str, Any]]
    _held: HeldRows | None = None  # the rows by which leaves are judged
    _whole_rows: bool  # the base has an encoder: its labels are not shifted

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.verdicts: list[Verdict] = []
        self.path_losses: PathLosses = {}  # of the last evaluation
        self._paths: list[Any] = []  # of the rows of the batch that runs
        self._totals: PathTotals | None = None  # while an evaluation runs
        self._tables: list[Tensor] = []  # of the batch that runs, until all ranks have gathered it
        # path → the blend that serves its rows, while leaves are judged
        self._instead: Mapping[str, Blend] = {}
        super().__init__(*args, **kwargs)

    def _without_paths(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs of the base; keep their rows' paths."""
        if self.path_column not in inputs:
            raise SpecError(
                f"a batch has no {self.path_column!r}; it has {listing(inputs)}",
                "collate rows that have one, and leave it in the batch",
            )
        self._paths = list(inputs[self.path_column])
        return {key: value for key, value in inputs.items() if key != self.path_column}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Run one batch without gradients, every row by its own path."""
        inputs = self._without_paths(inputs)
        if ignore_keys is None:
            # The Trainer has no default for a base without a config, and would gather all outputs.
            config = getattr(self.tree_model.base, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        with self.tree_model.route([self._instead.get(path, path) for path in self._paths]):
            out = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys=ignore_keys
            )
        while self._tables and self._totals is not None:
            # `gather_for_metrics` drops the rows that pad the last batch.
            self._totals.add(self.accelerator.gather_for_metrics(self._tables.pop()))
        return out

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the Trainer does, with ``eval_loss/<path>`` for every path.

        ``eval_loss`` is the weighted sum of these.
        """
        self._totals = PathTotals(self.tree_model.tree)
        out = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        means, self.path_losses = self._totals.means(), self._totals.losses()
        self._totals = None
        if means:
            out.metrics[f"{prefix}_loss"] = sum(
                self.path_weights.get(path, 1.0) * mean for path, mean in means.items()
            )
            for path, mean in means.items():
                out.metrics[f"{prefix}_loss/{path or BASE_LABEL}"] = mean
        return out

    def _end_training(self) -> None:
        """Judge leaves by the rows held back."""
        if self._held is not None:
            names = [str(group["name"]) for group in self._groups]
            self.verdicts = self._held.verdicts(self.tree_model.tree, names, self._losses_of)

    def _losses_of(self, rows: Any, instead: Mapping[str, Blend]) -> dict[str, float]:
        """Return the loss of each path's rows when the blend in ``instead`` serves them."""
        prefix = "held_back"
        self._instead = instead
        try:
            out = self.evaluation_loop(
                self.get_eval_dataloader(rows),
                description="Held-back rows",
                prediction_loss_only=True,
                metric_key_prefix=prefix,
            )
        finally:
            self._instead = {}
        # A path whose rows learn no token has no loss.
        means = {path: out.metrics.get(f"{prefix}_loss/{path}") for path in instead}
        return {path: mean for path, mean in means.items() if mean is not None}

    def _evaluation_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        assert self._totals is not None
        table = self._totals.table(logits, labels, self._paths, shift=not self._whole_rows)
        self._tables.append(table)
        return table[:, 1].sum() / table[:, 2].sum().clamp(min=1)
