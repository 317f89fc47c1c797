"""Which frozen part of a lineage makes outputs that are not finite, where a run has diverged.

    (base) → fr → fr/legal, which trains         outputs of the base alone, then of fr

Factors of 1e27 are finite numbers, but what they add to an output is not. A loss over such a node
is NaN at the first step, the gradients make every factor NaN that trains, and these are what a
check of the factors finds. So the same inputs are run again without what trains.

Law: the first part whose outputs are not finite is named. Nodes from the first one that trains on
are never asked: their factors are what the step has broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import TreeModel

__all__ = ["frozen_cause", "inputs_of_path"]


def frozen_cause(
    model: TreeModel,
    paths: Iterable[str],
    inputs: Callable[[str], Iterable[Mapping[str, Any]]],
) -> str | None:
    """Return the first frozen node, or "" for the bare base, whose outputs are not finite; None if
    all outputs of what is frozen are.

    Args:
        model: of the tree, with nothing active.
        paths: those whose losses are not finite.
        inputs: path → the inputs that the base was called with for its rows.
    """
    for path in paths:
        found = _cause_of(model, path, list(inputs(path)))
        if found is not None:
            return found
    return None


@torch.no_grad()
def _cause_of(model: TreeModel, path: str, batches: Sequence[Mapping[str, Any]]) -> str | None:
    tree = model.tree
    if (path and path not in tree) or not batches:
        return None  # a blend's name, or no rows that can be run again
    moving = set(model.factors.training_paths)
    was_training = model.training
    model.eval()
    try:
        for node in ["", *tree.lineage(path)]:
            if node in moving:
                return None
            with model.using(node, mode="unmerged"):
                if not all(_is_finite(model(**each), each) for each in batches):
                    return node
    finally:
        model.train(was_training)
    return None


def _is_finite(outputs: Any, inputs: Mapping[str, Any]) -> bool:
    """Return whether the outputs at the tokens that count are finite."""
    if isinstance(outputs, Mapping):
        outputs = outputs["logits"]
    logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    # Some models have NaN at padding, which no loss reads.
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:2]:
        logits = logits[mask.to(logits.device).bool()]
    return bool(logits.isfinite().all())


def inputs_of_path(inputs: Mapping[str, Any], paths: Sequence[object], path: str) -> dict[str, Any]:
    """Return the inputs of a batch's rows with one path."""
    chosen = [i for i, each in enumerate(paths) if each == path]
    found = {}
    for name, value in inputs.items():
        is_by_row = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(paths)
        found[name] = value[chosen] if is_by_row else value
    return found
