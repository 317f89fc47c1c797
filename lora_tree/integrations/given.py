"""Checks of a trainer's arguments, before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SpecError, StateError, listing
from ..model import TreeModel

__all__ = ["check_asked", "checked_model", "refuse_arguments", "whole_groups"]


def checked_model(model: Any) -> TreeModel:
    if not isinstance(model, TreeModel):
        raise SpecError(
            f"TreeTrainer was given {'no model' if model is None else type(model).__name__}, not a TreeModel: "
            "the factors that train belong to that, and a trainer of the base would neither move nor save them",
            "model = lora_tree.attach(tree, base); groups = model.trainable(…); TreeTrainer(model, …)",
        )
    return model


def whole_groups(
    model: TreeModel, groups: Sequence[Mapping[str, Any]] | None, *, needed: bool
) -> list[Mapping[str, Any]]:
    """A group for each node that trains, in the order of the tree."""
    training = [path for path in model.tree.paths() if path in model.factors.training_paths]
    if not training and needed:
        raise StateError("no node trains", "groups = model.trainable('fr/legal', …) first")
    if groups is None:
        return [{"name": path, "params": model.factors.of(path)} for path in training]
    named = [group.get("name") for group in groups]
    if sorted(map(str, named)) != sorted(training):
        raise SpecError(
            f"groups are of {listing(map(str, named))}, and {listing(training)} train",
            "give the groups that model.trainable(…) returned last",
        )
    return list(groups)


def refuse_arguments(args: Any, trainer: Mapping[str, Any]) -> None:
    """What would be taken, and not hold node by node."""
    wrong = [name for name in ("model_init", "compute_loss_func") if trainer.get(name) is not None]
    wrong += [
        name
        for name in ("label_smoothing_factor", "torch_compile", "push_to_hub")
        if getattr(args, name, None)
    ]
    if wrong:
        raise SpecError(
            f"TreeTrainer takes no {listing(wrong)}",
            "losses are taken path by path, side paths run as hooks, and what is saved is a tree: see docs/training.md",
        )


def check_asked(model: TreeModel, args: Any) -> None:
    """Check that the base has what the arguments will ask of it.

    Raises:
        SpecError: names the argument.
    """
    checkpointing = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    needed = {
        "activation_checkpointing": checkpointing,
        "gradient_checkpointing": checkpointing,
        "neftune_noise_alpha": ("get_input_embeddings",),
    }
    for argument, names in needed.items():
        if getattr(args, argument, None) and not any(hasattr(model, name) for name in names):
            raise SpecError(
                f"{argument}: {type(model.base).__name__} has no {' or '.join(names)}",
                f"leave {argument} out, or give the base that method",
            )
