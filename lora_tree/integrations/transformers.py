"""TreeTrainer: many nodes trained at once in ``transformers.Trainer``, each as it would train alone.

    rows: path, input_ids, labels ─→ route ─→ forward ─→ Σ over paths of the mean over the path's own tokens
                                       └──── stays open for backward, where checkpointed layers run again

    what the Trainer does for all parameters      what is done here for every node
    one learning rate, decay and clip norm        its group's own; ``max_grad_norm`` clips each node by itself
    a mean over all tokens                        a mean over each path's tokens, over ranks and micro-batches
    a step for everything                         no step for a node without rows
    checkpoint-N with the whole model             checkpoint-N with what trains, and each node as a PEFT adapter
    ``save_model``: one model                     the tree, as a folder

A mix-in: it overrides, and calls on, so that ``class Mine(TreeTrainer, OtherTrainer)`` has both. Written against the
Trainer of transformers 5: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/trainer.py
"""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..blend import spelled
from ..errors import DivergedError, MissingExtra, SpecError, listing
from ..extras import need
from ..model import TreeModel
from ..training.diverged import BASE_LABEL, Start, check_finite_step
from ..training.every_rank import joined
from ..training.losses import path_loss, ranks, token_counts
from ..training.sampling import PathSampler
from ..training.sharded import full
from .checkpoint import appearing, load_factors, put_back, retire, save_factors
from .given import check_asked, checked_model, refuse_arguments, whole_groups
from .row_paths import PathCollator, PathTotals, paths_of

for _needed in ("transformers", "accelerate"):
    need(_needed, extra="train", what="TreeTrainer")

from transformers import Trainer, TrainerCallback  # noqa: E402
from transformers.trainer_utils import sort_checkpoints  # noqa: E402
from transformers.utils import find_labels  # noqa: E402

if not hasattr(
    Trainer, "_clip_grad_norm"
):  # an older one would clip all nodes together, whatever is said here
    raise MissingExtra("TreeTrainer needs transformers 5", "pip install 'lora_tree[train]'")

__all__ = ["TreeTrainer"]


class TreeTrainer(Trainer):  # type: ignore[misc]
    """A ``transformers.Trainer`` over a `TreeModel`.

    Args:
        model: what `attach` returned, after `TreeModel.trainable` said what trains.
        args: ``TrainingArguments``. ``max_grad_norm`` is every node's ``clip_norm`` where its group has none.
        groups: what `trainable` returned, with ``lr``, ``weight_decay``, ``clip_norm`` as wanted; what a group does not
            say is as ``args`` say. None: as ``args`` say for every node.
        path_weights: path → its weight in the loss; 1 where it is not named.
        temperature: draw rows path by path with it, as `PathSampler` does; None: as the Trainer draws them.
        path_column: where a row of the data says its path, ``""`` for the bare base.
        save_to: where the tree is saved when training has ended; None: only where `save_model` says.
        **trainer: whatever else the Trainer takes.

    Raises:
        SpecError: a bare base, or an argument that would not hold node by node.
        StateError: nothing trains.
    """

    loss_is_scaled_for_ga = True
    data_collator: Any
    optimizer: Any
    _signature_columns: Any
    _stage: Path | None = None

    def __init__(
        self,
        model: TreeModel | None = None,
        args: Any = None,
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        path_weights: Mapping[str, float] | None = None,
        temperature: float | None = None,
        path_column: str = "path",
        save_to: str | os.PathLike[str] | None = None,
        **trainer: Any,
    ) -> None:
        self.tree_model = checked_model(model)
        self._groups = whole_groups(
            self.tree_model, groups, needed=trainer.get("train_dataset") is not None
        )
        self.path_column, self.save_to = path_column, save_to
        for path in path_weights or ():
            self.tree_model.tree.coefficients(path)
        self.path_weights = {spelled(path): weight for path, weight in (path_weights or {}).items()}
        refuse_arguments(args, trainer)
        check_asked(self.tree_model, args)
        if (
            self.tree_model.factors.sharded
        ):  # by its owner: Accelerate must not wrap or shard it again
            # its own attribute, since the base's says whether the base was sharded as it was loaded
            object.__setattr__(self.tree_model, "is_distributed_loading_by_transformers", True)
        super().__init__(model=model, args=args, **trainer)
        if self.args.n_gpu > 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise SpecError(
                "TreeTrainer trains on one device a process; not under DataParallel, Accelerate's FSDP or DeepSpeed",
                "start a process for each GPU: torchrun --nproc-per-node=…; fully_shard the TreeModel before for FSDP2",
            )
        self.model_accepts_loss_kwargs = (
            True  # whatever the base says: the loss is taken, and scaled, here
        )
        base: Any = self.tree_model.base
        if self.args.label_names is None:
            self.label_names = find_labels(type(base)) or ["labels"]
        if getattr(base, "config", None) is not None:
            base.config.use_cache = getattr(
                self.args, "use_cache", False
            )  # as a Trainer given the base does
        self._whole_rows = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
        self.data_collator = PathCollator(self.data_collator, path_column)
        self._sampler: PathSampler | None = None
        if temperature is not None:
            seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
            paths = paths_of(self.train_dataset, path_column, self.tree_model.tree)
            self._sampler = PathSampler(paths, temperature=temperature, seed=seed)
            self.add_callback(_Epochs(self._sampler))
        self.add_callback(_Finite(self))
        self._paths: list[Any] = []
        self._counts: Mapping[str, int] | None = None
        self._learnt: dict[str, Tensor] = {}
        self._steps: Counter[str] = Counter()
        self._totals: PathTotals | None = None
        self._tables: list[Tensor] = []

    # ------------------------------------------------------------------ data
    def _set_signature_columns_if_needed(self) -> None:
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if fresh:
            more = [
                *inspect.signature(self.tree_model.base.forward).parameters,
                *self.label_names,
                self.path_column,
            ]
            self._signature_columns += [
                column for column in more if column not in self._signature_columns
            ]

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return (
            super()._get_train_sampler(*args, **kwargs) if self._sampler is None else self._sampler
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one step; their tokens are counted path by path, over all ranks."""
        self.tree_model.zero_grad()  # after a step that a GradScaler skipped, its rows must not count for this one
        batches, items = super().get_batch_samples(*args, **kwargs)
        rows = [
            (batch["labels"], batch[self.path_column]) for batch in batches if "labels" in batch
        ]
        self._counts = token_counts(self.tree_model.tree, rows, shift=not self._whole_rows)
        self._steps.update(path for path, count in self._counts.items() if count)
        return batches, items

    def _without_paths(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of the base; their rows' paths are kept."""
        if self.path_column not in inputs:
            raise SpecError(
                f"a batch has no {self.path_column!r}; it has {listing(inputs)}",
                "collate rows that have one, and leave it in the batch",
            )
        self._paths = list(inputs[self.path_column])
        return {key: value for key, value in inputs.items() if key != self.path_column}

    # ------------------------------------------------------------------ a step
    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """One micro-batch, forward and backward, every row by its own path."""
        inputs = self._without_paths(inputs)
        with self.tree_model.route(self._paths):
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Σ over paths of weight · mean over the path's own tokens, of the whole step while training."""
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise SpecError(
                f"a batch has no labels; it has {listing(inputs)}",
                "TreeTrainer learns labels token by token",
            )
        base = self.tree_model.base
        if self._whole_rows and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator]
        outputs, shift = model(**inputs), not self._whole_rows
        if not isinstance(
            outputs, Mapping
        ):  # a module of your own may return its logits, alone or first
            outputs = {"logits": outputs if isinstance(outputs, Tensor) else outputs[0]}
        logits = outputs["logits"]
        if torch.is_grad_enabled():
            counts = self._counts
            weights = {
                path: weight
                for path, weight in self.path_weights.items()
                if counts is None or path in counts
            }
            parts = path_loss(
                logits, labels, self._paths, counts=counts, weights=weights, shift=shift
            )
            for path, part in parts.by_path.items():
                self._learnt[path] = self._learnt.get(path, torch.zeros_like(part)) + part
            loss = parts.total
            if not loss.requires_grad:  # no row here goes through a node that trains
                loss = joined(
                    loss, [p for p in self.tree_model.factors.parameters() if p.requires_grad]
                )
        else:
            assert self._totals is not None
            table = self._totals.table(logits, labels, self._paths, shift=shift)
            self._tables.append(table)
            loss = table[:, 1].sum() / table[:, 2].sum().clamp(min=1)
        return (loss, outputs) if return_outputs else loss

    # ------------------------------------------------------------------ the optimiser
    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """An optimiser over the nodes' groups, which moves each as one over it alone would."""
        if self.optimizer is None:
            made, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.model
            )
            if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)) or {
                "params",
                "model",
                "optimizer_dict",
            } & set(options):
                raise SpecError(
                    f"{made}: an optimiser that makes its own groups does not train node by node"
                )
            shared: dict[str, Any] = {"weight_decay": self.args.weight_decay}
            if self.args.max_grad_norm:
                shared["clip_norm"] = self.args.max_grad_norm
            self.optimizer = made([{**shared, **group} for group in self._groups], **options)
        self.tree_model.follow(getattr(self.optimizer, "optimizer", self.optimizer))
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Every factor is in every rank's backward, so data parallelism need not look for those that are not."""
        built: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        for handler in built.get("kwargs_handlers", ()):
            if self.args.ddp_find_unused_parameters is None and hasattr(
                handler, "find_unused_parameters"
            ):
                handler.find_unused_parameters = False
        return built

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The norm of all gradients, for the log: each node is clipped by itself, as the optimiser steps."""
        norm = self._get_grad_norm(model)
        return full(norm) if isinstance(norm, Tensor) else norm

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Where the model is sharded: all but the last micro-batch of a step."""
        sharded: Any = self.tree_model
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)

    # ------------------------------------------------------------------ evaluation
    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """One batch without gradients, every row by its own path."""
        inputs = self._without_paths(inputs)
        if ignore_keys is None:
            config = getattr(self.tree_model.base, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        with self.tree_model.route(self._paths):
            out = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys=ignore_keys
            )
        while self._tables and self._totals is not None:
            self._totals.add(self.accelerator.gather_for_metrics(self._tables.pop()))
        return out

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with ``eval_loss/<path>`` for every path; ``eval_loss`` is their weighted sum."""
        self._totals = PathTotals(self.tree_model.tree)
        out = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        means, self._totals = self._totals.means(), None
        if means:
            out.metrics[f"{prefix}_loss"] = sum(
                self.path_weights.get(path, 1.0) * mean for path, mean in means.items()
            )
            out.metrics.update(
                {f"{prefix}_loss/{path or BASE_LABEL}": mean for path, mean in means.items()}
            )
        return out

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with ``loss/<path>`` and, where they differ, ``learning_rate/<node>``."""
        if "loss" in logs and "learning_rate" in logs:
            logs = {**logs, **self._by_path(), **self._rates()}
        super().log(logs, *args, **kwargs)

    def _by_path(self) -> dict[str, float]:
        """Each path's mean loss over the steps since the last log in which it had tokens, over all ranks."""
        paths = sorted(self._steps)  # the same on every rank, since the counts are
        if not paths:
            return {}
        sums = torch.stack(
            [
                self._learnt.get(path, torch.zeros(())).double().to(self.args.device)
                for path in paths
            ]
        )
        if ranks() > 1:
            dist.all_reduce(sums)
        means = {
            f"loss/{path or BASE_LABEL}": s / self._steps[path]
            for path, s in zip(paths, sums.tolist(), strict=True)
        }
        self._learnt.clear()
        self._steps.clear()
        return means

    def _rates(self) -> dict[str, float]:
        groups = self.optimizer.param_groups
        rates = {f"learning_rate/{group['name']}": float(group["lr"]) for group in groups}
        return rates if len(set(rates.values())) > 1 else {}

    # ------------------------------------------------------------------ files
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; when it has ended, the tree is saved where ``save_to`` says.

        Raises:
            DivergedError: a step made factors or losses that are not finite. Nothing of it was saved, and what trains
                is again what it was before.
        """
        named = args[0] if args else kwargs.get("resume_from_checkpoint")
        if self.args.should_save:
            put_back(
                Path(named).parent
                if isinstance(named, str | os.PathLike)
                else Path(self.args.output_dir)
            )
        _meet()
        start = Start(self.tree_model.factors)
        try:
            out = super().train(*args, **kwargs)
        except DivergedError:
            start.restore()
            raise
        if self.save_to is not None:
            self.save_model(os.fspath(self.save_to))
        return out

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the tree as a folder, atomically as a whole; one process writes.

        Args:
            output_dir: where; None: ``save_to``.

        Raises:
            SpecError: neither was given.
            FolderError: as `AdapterTree.save`.
        """
        if _internal_call and output_dir is not None:  # a checkpoint
            save_factors(self.tree_model, Path(output_dir), writes=self.args.should_save)
            if self.args.should_save and self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
            return
        where = output_dir if output_dir is not None else self.save_to
        if where is None:
            raise SpecError(
                "save_model has no folder: checkpoints lie in output_dir, and a tree can't",
                "save_model('zoo/')",
            )
        with self.tree_model.gathered() as tree:
            if self.args.should_save:
                tree.save(where)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's, in a folder that appears when everything is in it."""
        parent, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        with appearing(parent, name, writes=self.args.should_save, meet=_meet) as stage:
            self._stage = stage
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._stage = None
            best = self.state.best_model_checkpoint
            if best is not None and Path(best).parent == stage:
                self.state.best_model_checkpoint = str(parent / name)
                if self.args.should_save:
                    self.state.save_to_json(str(stage / name / "trainer_state.json"))
        if self.args.should_save:
            self._retire_all_but_some(parent)

    def _retire_all_but_some(self, parent: Path) -> None:
        """Delete what the Trainer would delete; its own way leaves the name on what is half deleted."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        there = sort_checkpoints(str(parent), use_mtime=True)
        kept = {there[-1]}  # to resume from
        if self.state.best_model_checkpoint is not None:
            kept.add(str(Path(self.state.best_model_checkpoint)))
        may_go = [checkpoint for checkpoint in there if checkpoint not in kept]
        for checkpoint in may_go[: max(len(there) - max(limit, len(kept)), 0)]:
            retire(Path(checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage) if self._stage is not None else str(super()._get_output_dir(trial))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_factors(self.tree_model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_factors(self.tree_model, Path(self.state.best_model_checkpoint))


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler its epoch: a resumed loader, which skips batches, does not always hand it on."""

    def __init__(self, sampler: PathSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sampler.set_epoch(int(state.epoch or 0))


class _Finite(TrainerCallback):  # type: ignore[misc]
    """Stops a run that has diverged, before the Trainer logs, evaluates or saves."""

    def __init__(self, trainer: TreeTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_finite_step(
            self._trainer.tree_model.factors, self._trainer._learnt, step=state.global_step
        )


def _meet() -> None:
    if ranks() > 1:
        dist.barrier()
