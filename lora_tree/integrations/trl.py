"""trl's trainers over one path of a tree: the node is the policy, its parent is the reference.

    model.at("fr/legal")    the policy        its own node trains, those above it are frozen
    model.at("fr")          the reference     made by the trainer; one more view of the same base

trl clones the base for a reference, or puts a second adapter beside the first. Here both are path
models over one base: they share its weights, and the reference is the policy's parent, unchanged.
Losses, data, logs and arguments are trl's own. What differs are the files: a checkpoint holds the
factors and each node as a PEFT adapter, and what is saved at the end is a tree.

trl multiplies by the head's weight itself, so a node that adapts the head is refused. Written
against trl 1.16: https://github.com/huggingface/trl/tree/v1.16.0/trl/trainer
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..blend import spelled
from ..errors import MissingExtra, SpecError, StateError, agreeing, listing
from ..extras import need
from ..model import TreeModel
from ..path_model import PathModel

# Before trainers/ is imported, which would name an extra that does not bring trl.
need("trl", extra="trl", what="training with trl")

from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402

from .trainers.arguments import without_unused_search  # noqa: E402
from .trainers.checkpoints import TreeCheckpoints  # noqa: E402
from .trainers.finite_steps import FiniteSteps, StepInputs  # noqa: E402

# Before 1.16 the trainers computed log-probabilities from the logits, and their methods had other
# names.
if not hasattr(trl_utils, "add_fused_lm_head"):
    raise MissingExtra("lora_tree needs trl 1.16", "pip install 'lora_tree[trl]'")

__all__ = ["TreeDPOTrainer", "TreeGRPOTrainer", "TreeKTOTrainer", "TreeSFTTrainer"]

_NOT_TAKEN = {
    "push_to_hub": "a tree is saved, not a model: tree.save(folder)",
    "torch_compile": "side paths run as hooks",
    "sync_ref_model": "the reference is the parent, and does not move: train stage after stage",
    "use_liger_kernel": "it replaces forwards of the base's own class",
    "cast_lm_head_to_fp32": "it would cast the head of the base that all paths share",
    "use_vllm": "vLLM would get the base's weights without the path",
    "use_transformers_continuous_batching": "it casts the factors that train",
    "use_transformers_paged": "it casts the factors that train",
}
"""Argument → the reason why it can't be used over a path."""

_READ = ("input_ids", "attention_mask", "position_ids")
"""The part of a batch that a forward of the base needs."""


class PathCheckpoints(TreeCheckpoints):
    """The parts that trl's trainers over a path share: checks, files, and the reference.

    The files are those of a `TreeTrainer`.
    """

    def __init__(
        self,
        model: PathModel,
        *,
        save_to: str | os.PathLike[str] | None = None,
        **trainer: Any,
    ) -> None:
        policy = _checked_policy(model, type(self).__name__)
        for name in ("peft_config", "quantization_config"):
            if trainer.get(name) is not None:
                raise SpecError(
                    f"{name}: the policy is a node of the tree, and the base is there already",
                    "tree.add(path, r=…); load the base quantised before lora_tree.attach",
                )
        settings = trainer.get("args")
        _refuse(settings, type(self).__name__)
        self.tree_model: TreeModel = policy.tree_model
        self.save_to = save_to
        super().__init__(policy, **trainer)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise SpecError(
                f"{type(self).__name__} trains on one device a process; not under FSDP or "
                "DeepSpeed",
                "start a process for each GPU: torchrun --nproc-per-node=…",
            )
        self._step_inputs = StepInputs(self.tree_model, self._called_with)
        self.add_callback(FiniteSteps(self._step_inputs, path=spelled(policy.path)))

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run one micro-batch as trl does."""
        self._step_inputs.note(inputs)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def _called_with(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the base reads of a micro-batch; nothing of GRPO's, which are prompts."""
        own = {name: inputs[name] for name in _READ if name in inputs}
        return dict(self._prepare_inputs(own)) if "input_ids" in own else {}

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        built: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        return without_unused_search(built, self.args)


class TreeSFTTrainer(PathCheckpoints, SFTTrainer):  # type: ignore[misc]
    """trl's ``SFTTrainer`` over one path; packing and padding-free batches, too.

    Args:
        model: ``model.at(path)``, after a call of `TreeModel.trainable`.
        save_to: where the tree is saved when training has ended; None: only where ``save_model``
            says.
        **trainer: any other argument of trl's.

    Raises:
        SpecError: a base or a `TreeModel` instead of a path, or an argument that would not hold.
        StateError: nothing on the path trains, or it adapts the head.
    """


class TreeDPOTrainer(PathCheckpoints, DPOTrainer):  # type: ignore[misc]
    """trl's ``DPOTrainer`` over one path, with its parent as the reference.

    Args:
        model: ``model.at(path)``, after a call of `TreeModel.trainable`.
        ref_model: another ``model.at(path)``; None: the policy's parent.
        save_to: as for `TreeSFTTrainer`.
        **trainer: any other argument of trl's.

    Raises:
        SpecError, StateError: as `TreeSFTTrainer`; or the reference trains as well.
    """

    def __init__(
        self, model: PathModel, ref_model: PathModel | None = None, **trainer: Any
    ) -> None:
        reference = _reference(model, ref_model, type(self).__name__)
        super().__init__(model, ref_model=reference, **trainer)


class TreeKTOTrainer(PathCheckpoints, KTOTrainer):  # type: ignore[misc]
    """trl's ``KTOTrainer`` over one path, with its parent as the reference.

    Arguments and errors are those of `TreeDPOTrainer`.
    """

    def __init__(
        self, model: PathModel, ref_model: PathModel | None = None, **trainer: Any
    ) -> None:
        reference = _reference(model, ref_model, type(self).__name__)
        super().__init__(model, ref_model=reference, **trainer)


class TreeGRPOTrainer(PathCheckpoints, GRPOTrainer):  # type: ignore[misc]
    """trl's ``GRPOTrainer`` over one path; the reference, if ``beta`` asks for one, is its parent.

    Args:
        model, save_to, **trainer: as for `TreeSFTTrainer`.
        ref_model: another ``model.at(path)``; None: the policy's parent.

    Raises:
        SpecError, StateError: as `TreeDPOTrainer`.
    """

    def __init__(
        self, model: PathModel, ref_model: PathModel | None = None, **trainer: Any
    ) -> None:
        settings = trainer.get("args")
        beta = float(getattr(settings, "beta", 0.0))
        reference = None
        if beta or ref_model is not None:
            reference = _reference(model, ref_model, type(self).__name__)
        # GRPOTrainer takes no reference. With a beta above 0 it would load the base a second time,
        # by its name.
        with _without_beta(settings):
            super().__init__(model, **trainer)
        self.beta = beta
        if beta and reference is not None:
            if self.args.disable_dropout:
                trl_utils.disable_dropout_in_model(reference)
            trl_utils.add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)


@contextmanager
def _without_beta(settings: Any) -> Iterator[None]:
    """Set ``beta`` to 0 while a trainer is made, so that it makes no reference."""
    if settings is None:
        yield
        return
    beta, settings.beta = settings.beta, 0.0
    try:
        yield
    finally:
        settings.beta = beta


# ---------------------------------------------------------------------- checks
def _checked_policy(model: Any, trainer: str) -> PathModel:
    """Return the policy, a path model on which something trains.

    Raises:
        SpecError: it is something else.
        StateError: nothing on its path trains, or it adapts the head.
    """
    if not isinstance(model, PathModel):
        raise SpecError(
            f"{trainer} was given a {type(model).__name__}, not one path of a tree",
            'model = lora_tree.attach(tree, base); model.trainable("fr/legal"); '
            f'{trainer}(model.at("fr/legal"), …)',
        )
    if not model.factors.training_paths:
        raise StateError(
            f"nothing on {spelled(model.path) or 'the bare base'!r} trains",
            "model.trainable(…) first, with the path or a node above it",
        )
    model.get_output_embeddings()  # raises if the path adapts the head
    return model


def _reference(policy: Any, given: Any, trainer: str) -> PathModel:
    """Return the reference: the one given, or the policy's parent.

    Raises:
        SpecError: it is no path model; or the policy is a blend, which has no parent.
        StateError: a node that trains is in the reference as well.
    """
    checked = _checked_policy(policy, trainer)
    if given is None:
        if not isinstance(checked.path, str):
            raise SpecError(
                f"{spelled(checked.path)!r} is a blend, and has no parent to be the reference",
                'ref_model=model.at("fr")',
            )
        given = checked.tree_model.at(checked.path.rpartition("/")[0])
    if not isinstance(given, PathModel):
        raise SpecError(
            f"ref_model is a {type(given).__name__}, not a path of the tree",
            'ref_model=model.at("fr"), or leave it out for the parent',
        )
    moving = given.factors.training_paths
    if moving:
        raise StateError(
            f"{listing(moving)} {agreeing(len(moving), 'trains and is', 'train and are')} in the "
            "reference, which would move with the policy",
            "let nodes train that are in the policy alone: stage after stage",
        )
    given.get_output_embeddings()
    # A reference runs without dropout.
    given.eval()
    return given


def _refuse(settings: Any, trainer: str) -> None:
    """Refuse arguments that would not hold over a path.

    Raises:
        SpecError: names the argument, with the reason.
    """
    for name, reason in _NOT_TAKEN.items():
        if getattr(settings, name, None):
            raise SpecError(f"{trainer} takes no {name}: {reason}", f"leave {name} out")
    if getattr(settings, "padding_free", False) and "DPO" in trainer:
        # trl turns it off with a line in its log, and the user would wonder where the memory goes.
        raise SpecError(
            f"{trainer} takes no padding_free: trl has none for DPO at present",
            "leave padding_free out",
        )
