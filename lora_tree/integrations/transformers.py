"""TreeTrainer: ``transformers.Trainer`` over many nodes at once, each as it would train alone.

    rows: path, input_ids, labels ─→ route ─→ forward ─→ Σ over paths of the path's own mean
                                       └──── stays open for backward: checkpointed layers run again

    the Trainer, for all parameters at once      here, for every node
    one learning rate, decay and clip norm       its group's own; ``max_grad_norm`` clips each node
                                                 by itself
    a mean over all tokens                       a mean over each path's tokens, over ranks and
                                                 micro-batches
    a step for everything                        no step for a node without rows

Its files are written by `trainers/checkpoints.py`, and `trainers/path_evaluation.py` evaluates. All
three are mix-ins: their overrides call super(), so that ``class Mine(TreeTrainer, OtherTrainer)``
has both.
Written against the Trainer of transformers 5:
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/trainer.py
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..blend import spelled
from ..errors import MissingExtra, SpecError, listing
from ..folder import NodeOutcome
from ..model import TreeModel
from ..training.diverged import BASE_LABEL
from ..training.every_rank import joined
from ..training.levels import Over, over_of, several_levels, weight_decays
from ..training.losses import path_loss, token_counts
from ..training.sampling import PathSampler
from ..training.sharded import full
from .trainers.arguments import (
    check_base_methods,
    checked_model,
    refuse_arguments,
    whole_groups,
    without_unused_search,
)
from .trainers.finite_steps import FiniteSteps, StepInputs
from .trainers.held_rows import held_rows
from .trainers.node_stopping import NodeStopping
from .trainers.path_evaluation import PathEvaluation
from .trainers.path_losses import PathMeans
from .trainers.row_paths import PathCollator, paths_of
from .trainers.step_notes import StepNotes

# isort: split
# After the imports from trainers/, which refuse with the name of the extra if this is missing.
from transformers import Trainer, TrainerCallback
from transformers.utils import find_labels

# An older Trainer clips all nodes together in the middle of its loop, which nothing can override.
if not hasattr(Trainer, "_clip_grad_norm"):
    raise MissingExtra("TreeTrainer needs transformers 5", "pip install 'lora_tree[train]'")

__all__ = ["TreeTrainer"]


class TreeTrainer(PathEvaluation):
    """A ``transformers.Trainer`` over a `TreeModel`.

    Args:
        model: as `attach` returned it, after a call of `TreeModel.trainable`.
        args: ``TrainingArguments``. ``max_grad_norm`` is the ``clip_norm`` of every node whose
            group has none.
        groups: as `trainable` returned them, with ``lr``, ``weight_decay``, ``clip_norm`` as
            wanted; options that a group lacks come from ``args``. None: they do for every node.
        path_weights: path → its weight in the loss; 1 where it is not named.
        loss: "rows": the mean over all tokens; "paths": the sum of each path's own mean; "auto":
            rows where several levels of the tree train, else paths.
        decay_by_depth: weight decay at depth 0, 1, …, the last one also below, for groups that say
            nothing. None: ``args.weight_decay``; where that is 0, see `lora_tree.weight_decays`.
        hold_back: the share of each path's rows that is not trained on, rounded down. When training
            has ended, a leaf that does worse on them than its parent keeps only the part of its
            weight, from 0 to 1, that has the least loss: see ``verdicts``. None: 0.05 where several
            levels of the tree train, else 0.
        temperature: draw rows path by path with it, as `PathSampler` does; None: as the Trainer
            draws them.
        path_column: the column that holds a row's path, ``""`` for the bare base.
        patience: stop a node after so many evaluations in succession that were no better, and bring
            it back to its best one; its siblings go on, and at the end every node is brought back.
        records: the tree's folder, or its tree.yaml: every step is noted there, for
            `lora_tree.run_records`. None: nowhere.
        save_to: where the tree is saved when training has ended; None: only where `save_model`
            says.
        **trainer: any other argument of the Trainer.

    Attributes:
        verdicts: on the leaves that were judged, after `train`.

    Raises:
        SpecError: a bare base, or an argument that would not hold node by node.
        StateError: nothing trains.
    """

    loss_is_scaled_for_ga = True  # a path's mean is over the whole step already
    data_collator: Any
    optimizer: Any
    _signature_columns: Any

    def __init__(
        self,
        model: TreeModel | None = None,
        args: Any = None,
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        path_weights: Mapping[str, float] | None = None,
        loss: Over = "auto",
        decay_by_depth: Sequence[float] | None = None,
        hold_back: float | None = None,
        temperature: float | None = None,
        path_column: str = "path",
        patience: int | None = None,
        records: str | os.PathLike[str] | None = None,
        save_to: str | os.PathLike[str] | None = None,
        **trainer: Any,
    ) -> None:
        self.tree_model = checked_model(model)
        has_data = trainer.get("train_dataset") is not None
        self._groups = whole_groups(self.tree_model, groups, needed=has_data)
        self.path_column, self.save_to = path_column, save_to
        for path in path_weights or ():
            self.tree_model.tree.coefficients(path)
        self.path_weights = {spelled(path): weight for path, weight in (path_weights or {}).items()}
        names = [str(group["name"]) for group in self._groups]
        self._over = over_of(loss, names)
        self._decay_by_depth = decay_by_depth
        refuse_arguments(args, trainer)
        if has_data:
            if hold_back is None and not several_levels(names):
                hold_back = 0.0
            trainer["train_dataset"], self._held = held_rows(
                trainer["train_dataset"], path_column, self.tree_model.tree, hold_back
            )
        check_base_methods(self.tree_model, args)
        if self.tree_model.factors.sharded:
            # The caller has sharded the model, and Accelerate must not wrap or shard it once more.
            # This mark of transformers 5 says so. It is set on the TreeModel itself, which would
            # otherwise pass it on to the base; the base's own mark says how the base was loaded.
            object.__setattr__(self.tree_model, "is_distributed_loading_by_transformers", True)
        with _saving_state(args, self.tree_model.factors.sharded):
            super().__init__(model=model, args=args, **trainer)
        if self.args.n_gpu > 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise SpecError(
                "TreeTrainer trains on one device a process; not under DataParallel, "
                "Accelerate's FSDP or DeepSpeed",
                "start a process for each GPU: torchrun --nproc-per-node=…; "
                "fully_shard the TreeModel before for FSDP2",
            )
        # The Trainer has set this from the base's forward. The loss is computed and scaled here.
        self.model_accepts_loss_kwargs = True
        base: Any = self.tree_model.base
        config = getattr(base, "config", None)
        if self.args.label_names is None:
            # The Trainer asked the TreeModel, whose forward takes anything.
            self.label_names = find_labels(type(base)) or ["labels"]
        if config is not None:
            # A Trainer does this with a base that it gets itself.
            base.config.use_cache = getattr(self.args, "use_cache", False)
        self._whole_rows = bool(getattr(config, "is_encoder_decoder", False))
        self.data_collator = PathCollator(self.data_collator, path_column)
        self._sampler = self._sampler_of(temperature)
        if self._sampler is not None:
            self.add_callback(_Epochs(self._sampler))
        self._counts: Mapping[str, int] | None = None  # path → its tokens in the step that runs
        self._means = PathMeans()
        self._step_inputs = StepInputs(
            self.tree_model, lambda inputs: self._of_the_base(self._prepare_inputs(inputs))[0]
        )
        self.add_callback(FiniteSteps(self._step_inputs, lambda: self._means.sums))
        # Added before the callback that stops nodes: that one evaluates again, and the losses of
        # the first evaluation are the ones to record.
        if records is not None:
            self.notes = StepNotes(self, records)
            self.add_callback(self.notes)
        if patience is not None:
            self.stopping = NodeStopping(self, patience)
            self.add_callback(self.stopping)

    @property
    def counts(self) -> Mapping[str, int]:
        """Path → its learnt tokens in the step that runs, over micro-batches and ranks."""
        return self._counts or {}

    def node_outcomes(self) -> dict[str, NodeOutcome]:
        """Return what became of each node on the evaluation's rows; empty without ``patience``."""
        return {} if self.stopping is None else self.stopping.outcomes()

    def _sampler_of(self, temperature: float | None) -> PathSampler | None:
        if temperature is None:
            return None
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        paths = paths_of(self.train_dataset, self.path_column, self.tree_model.tree)
        return PathSampler(paths, temperature=temperature, seed=seed)

    # ------------------------------------------------------------------ data
    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the base takes, and the path: the Trainer drops all others."""
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if not fresh:
            return
        wanted = [
            *inspect.signature(self.tree_model.base.forward).parameters,
            *self.label_names,
            self.path_column,
        ]
        known = self._signature_columns
        self._signature_columns += [column for column in wanted if column not in known]

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self._sampler is not None:
            return self._sampler
        return super()._get_train_sampler(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of one step; count their tokens by path, over all ranks."""
        # A GradScaler that met an overflow skipped the last step and left its gradients. The rows
        # behind them must not count for this step.
        self.tree_model.zero_grad()
        batches, items = super().get_batch_samples(*args, **kwargs)
        rows = [
            (batch["labels"], batch[self.path_column]) for batch in batches if "labels" in batch
        ]
        self._counts = token_counts(self.tree_model.tree, rows, shift=not self._whole_rows)
        self._means.count(self._counts)
        if self.notes is not None:
            self.notes.means.count(self._counts)
        return batches, items

    # ------------------------------------------------------------------ a step
    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run one micro-batch, forward and backward, every row by its own path."""
        inputs = self._without_paths(inputs)
        self._step_inputs.note(inputs, self._paths)
        # The Trainer runs backward inside, so that checkpointed layers run again in this route.
        with self.tree_model.route(self._paths):
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Return a micro-batch's loss; while training, the part that it adds to the step's loss."""
        inputs, labels = self._of_the_base(inputs)
        outputs = model(**inputs)
        if not isinstance(outputs, Mapping):
            # A module of the user's own may return its logits, alone or first.
            outputs = {"logits": outputs if isinstance(outputs, Tensor) else outputs[0]}
        take = self._training_loss if torch.is_grad_enabled() else self._evaluation_loss
        loss = take(outputs["logits"], labels)
        return (loss, outputs) if return_outputs else loss

    def _of_the_base(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """Return the inputs that the base is called with, and the labels.

        Raises:
            SpecError: the batch has no labels.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise SpecError(
                f"a batch has no labels; it has {listing(inputs)}",
                "TreeTrainer learns labels token by token",
            )
        base: Any = self.tree_model.base
        if self._whole_rows and "decoder_input_ids" not in inputs:
            # The base would make these from the labels, which it does not get here.
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels)
        return inputs, labels

    def _training_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        counts, weights = self._counts, dict(self.path_weights)
        if counts is not None:
            # Only weights of paths in this step: `path_loss` refuses if all are of other paths.
            weights = {path: weight for path, weight in weights.items() if path in counts}
        shift = not self._whole_rows
        parts = path_loss(
            logits,
            labels,
            self._paths,
            counts=counts,
            weights=weights,
            over=self._over,
            shift=shift,
        )
        self._means.add(parts.by_path)
        if self.notes is not None:
            self.notes.means.add(parts.by_path)
        loss: Tensor = parts.total
        if not loss.requires_grad:
            # No row here goes through a node that trains. Backward must run all the same, and give
            # every factor a gradient: under data parallelism the other ranks wait for it.
            trained = [p for p in self.tree_model.factors.parameters() if p.requires_grad]
            loss = joined(loss, trained)
        return loss

    # ------------------------------------------------------------------ the optimiser
    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Return an optimiser that steps each node as an optimiser over that node alone would.

        Raises:
            SpecError: ``args.optim`` names an optimiser that makes its own groups.
        """
        if self.optimizer is None:
            made, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.model
            )
            # The Trainer hands GaLore, LOMO and similar optimisers the model through these keys.
            own_groups = {"params", "model", "optimizer_dict"} & set(options)
            is_optimizer = isinstance(made, type) and issubclass(made, torch.optim.Optimizer)
            if own_groups or not is_optimizer:
                raise SpecError(
                    f"{made}: an optimiser that makes its own groups does not train node by node"
                )
            shared: dict[str, Any] = {}
            if self.args.max_grad_norm:
                shared["clip_norm"] = self.args.max_grad_norm
            decays = self._decays()
            groups = []
            for group in self._groups:
                decay = decays[str(group["name"])]
                groups.append({**shared, "weight_decay": decay, **group})
            self.optimizer = made(groups, **options)
        # Accelerate wraps the optimiser. Its steps are seen only at the one inside.
        self.tree_model.follow(getattr(self.optimizer, "optimizer", self.optimizer))
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def _decays(self) -> dict[str, float]:
        """Return every node's weight decay, where its group says nothing."""
        by_depth = self._decay_by_depth
        if by_depth is None and self.args.weight_decay:
            by_depth = [self.args.weight_decay]
        rates = {}
        for group in self._groups:
            rates[str(group["name"])] = float(group.get("lr", self.args.learning_rate))
        return weight_decays(self.tree_model.tree, list(rates), rates, by_depth=by_depth)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        built: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        return without_unused_search(built, self.args)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Return the norm of all gradients, for the log; each node is clipped as it steps."""
        norm = self._get_grad_norm(model)
        return full(norm) if isinstance(norm, Tensor) else norm

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Sum gradients over ranks once a step, not once a micro-batch, where factors are sharded.

        The Trainer's own method reads the plan by which transformers sharded a model when it loaded
        it. This model was sharded by its user and has no such plan.
        """
        sharded: Any = self.tree_model
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)

    # ------------------------------------------------------------------ the log
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with ``loss/<path>`` and ``learning_rate/<node>``.

        Rates are added only where they differ.
        """
        # Only the log of a step has both; evaluations and the end of training are logged, too.
        if "loss" in logs and "learning_rate" in logs:
            logs = dict(logs)
            for path, mean in self._means.take(self.args.device).items():
                logs[f"loss/{path or BASE_LABEL}"] = mean
            logs.update(self._rates())
        super().log(logs, *args, **kwargs)

    def _rates(self) -> dict[str, float]:
        groups = self.optimizer.param_groups
        rates = {f"learning_rate/{group['name']}": float(group["lr"]) for group in groups}
        return rates if len(set(rates.values())) > 1 else {}


@contextmanager
def _saving_state(args: Any, sharded: bool) -> Iterator[None]:
    """Let a trainer of a sharded model be made, though its checkpoints hold the optimiser's state.

    The Trainer refuses that, because it has no file for such a state. `TreeCheckpoints` has one.
    """
    if args is None or not sharded:
        yield
        return
    only_model, args.save_only_model = args.save_only_model, True
    try:
        yield
    finally:
        args.save_only_model = only_model


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """A callback that sets the sampler's epoch: a resumed loader, which skips batches, may not."""

    def __init__(self, sampler: PathSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sampler.set_epoch(int(state.epoch or 0))
