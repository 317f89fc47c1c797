"""Check TreeTrainer's arguments before the Trainer uses them.

Law: an argument that can't hold node by node is refused here, with the reason; nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import SpecError, StateError, agreeing, listing
from ...model import TreeModel

__all__ = [
    "check_base_methods",
    "checked_model",
    "refuse_arguments",
    "whole_groups",
    "without_unused_search",
]


def checked_model(model: Any) -> TreeModel:
    """Return the model, which must be a `TreeModel`.

    Raises:
        SpecError: it is the base, or there is none.
    """
    if not isinstance(model, TreeModel):
        got = "no model" if model is None else type(model).__name__
        raise SpecError(
            f"TreeTrainer was given {got}, not a TreeModel: the factors that train belong to that, "
            "and a trainer of the base would neither move nor save them",
            "model = lora_tree.attach(tree, base); groups = model.trainable(…); "
            "TreeTrainer(model, …)",
        )
    return model


def whole_groups(
    model: TreeModel, groups: Sequence[Mapping[str, Any]] | None, *, needed: bool
) -> list[Mapping[str, Any]]:
    """Return a group for each node that trains, in the order of the tree.

    Args:
        model: its trainable nodes count.
        groups: as the caller gave them; None: one for each node, without options.
        needed: there are rows to train on.

    Raises:
        StateError: nothing trains, and something should.
        SpecError: the groups name other nodes than those that train.
    """
    training = [path for path in model.tree.paths() if path in model.factors.training_paths]
    if not training and needed:
        raise StateError("no node trains", "groups = model.trainable('fr/legal', …) first")
    if groups is None:
        return [{"name": path, "params": model.factors.of(path)} for path in training]
    named = [str(group.get("name")) for group in groups]
    # Groups of an earlier call of `trainable` may be of other nodes. If they are of the same nodes
    # with other parameters, `TreeModel.follow` refuses them.
    if sorted(named) != sorted(training):
        raise SpecError(
            f"groups are of {listing(named)}, and {listing(training)} "
            f"{agreeing(len(training), 'trains', 'train')}",
            "give the groups that model.trainable(…) returned last",
        )
    return list(groups)


def refuse_arguments(args: Any, trainer: Mapping[str, Any]) -> None:
    """Refuse arguments that the Trainer would accept but that would not hold node by node.

    Raises:
        SpecError: there are some; the error names them.
    """
    # model_init would make a bare base; compute_loss_func replaces the loss by path.
    wrong = [name for name in ("model_init", "compute_loss_func") if trainer.get(name) is not None]
    # Label smoothing is a part of the Trainer's loss, which is replaced; torch.compile would trace
    # one path's side paths and run them for every path; the Trainer would push a model, not a tree.
    for name in ("label_smoothing_factor", "torch_compile", "push_to_hub"):
        if getattr(args, name, None):
            wrong.append(name)
    if wrong:
        raise SpecError(
            f"TreeTrainer takes no {listing(wrong)}",
            "losses are taken path by path, side paths run as hooks, and what is saved is a tree: "
            "see docs/training-reference.md",
        )


def check_base_methods(model: TreeModel, args: Any) -> None:
    """Check that the base has the methods that the arguments will ask of it.

    Raises:
        SpecError: names the argument.
    """
    # transformers 5.23 has renamed the method; the earlier name is an alias until 6.
    checkpointing = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    needed = {
        "activation_checkpointing": checkpointing,
        "gradient_checkpointing": checkpointing,
        "neftune_noise_alpha": ("get_input_embeddings",),
    }
    for argument, names in needed.items():
        has_one = any(hasattr(model, name) for name in names)
        if getattr(args, argument, None) and not has_one:
            raise SpecError(
                f"{argument}: {type(model.base).__name__} has no {' or '.join(names)}",
                f"leave {argument} out, or give the base that method",
            )


def without_unused_search(accelerator: dict[str, Any], args: Any) -> dict[str, Any]:
    """Return Accelerate's arguments without DDP's search for unused parameters.

    The search walks the graph at every step. It is not needed: every factor is in every rank's
    backward. If the user has set the argument, it stays.
    """
    if args.ddp_find_unused_parameters is None:
        for handler in accelerator.get("kwargs_handlers", ()):
            if hasattr(handler, "find_unused_parameters"):
                handler.find_unused_parameters = False
    return accelerator
