"""Rows that prefer one answer to another, learnt by DPO: a row's path is the policy, its parent the
reference.

    loss = −log σ( β · ( log π(chosen)/ρ(chosen) − log π(rejected)/ρ(rejected) ) )

    batch       chosen of every row, then rejected of every row
    ρ, first    each row by its parent, in one routed batch, without gradients
    π           each row by its path, in one routed batch

log π(answer) is the sum over the answer's tokens. Neither model uses dropout: the ratio of the two
would depend on the masks as much as on the answers. Rafailov et al., Direct Preference
Optimization, 2023, equation 7: https://arxiv.org/abs/2305.18290
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..errors import SpecError, agreeing, listing
from ..model import TreeModel
from ..training.losses import row_losses
from ..tree import AdapterTree
from .rows import Row, padded

__all__ = [
    "answers_of",
    "are_preferences",
    "check_references",
    "dpo_losses",
    "log_probabilities",
    "reference_of",
]


def are_preferences(rows: Sequence[Row]) -> bool:
    """Return whether rows are preferences.

    Raises:
        SpecError: some are, and some are not; names a row of each.
    """
    one = next((row for row in rows if row.rejected is not None), None)
    other = next((row for row in rows if row.rejected is None), None)
    if one is not None and other is not None:
        raise SpecError(
            f"{one.where} is a preference (chosen, rejected), and {other.where} is not",
            "one run takes one kind of rows: train them in two runs",
        )
    return one is not None


def reference_of(path: str) -> str:
    """Return the path of the reference for rows of a path: its parent.

    >>> reference_of("fr/legal"), reference_of("fr")
    ('fr', '')
    """
    return path.rpartition("/")[0]


def check_references(rows: Sequence[Row], nodes: Sequence[str], tree: AdapterTree) -> None:
    """Refuse preferences whose reference would train.

    Raises:
        SpecError: names a row, and the nodes that are in its reference.
    """
    for row in rows:
        reference = reference_of(row.path)
        above = tree.lineage(reference) if reference else []
        moving = [node for node in above if node in nodes]
        if moving:
            raise SpecError(
                f"{row.where}: {reference} is the reference for rows of {row.path}, and "
                f"{listing(moving)} {agreeing(len(moving), 'trains', 'train')}: "
                "the reference would move",
                "train stage after stage, each node against its parent as it is",
            )


def answers_of(rows: Sequence[Row]) -> list[Row]:
    """Return the answers of preferences as rows: every chosen one, then every rejected one."""
    return [*rows, *(row.rejected for row in rows if row.rejected is not None)]


def log_probabilities(model: TreeModel, rows: Sequence[Row]) -> Tensor:
    """Return log p(answer) of each row under the active path or route: (rows,), fp32 or wider."""
    inputs = padded(rows, device=next(model.base.parameters()).device)
    labels = inputs.pop("labels")
    return -row_losses(model(**inputs).logits, labels)[0]


def dpo_losses(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return the loss of each preference, (pairs,).

    Args:
        policy, reference: (2 · pairs,), the log-probabilities of the answers as `answers_of` orders
            them.
        beta: how much a ratio counts; a small one lets the policy move far from the reference.

    >>> import torch
    >>> dpo_losses(torch.zeros(4), torch.zeros(4), 0.1).tolist()
    [0.6931471824645996, 0.6931471824645996]
    """
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected))
