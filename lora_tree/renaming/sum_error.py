"""Bound the relative error of a sum of increments whose own relative errors are known.

    ‖V_i − D_i‖ = ε_i ‖D_i‖      V_i is in the adapter, D_i the increment that it stands for
    ‖D_i‖ ≤ ‖V_i‖ / (1 − ε_i)
    ‖Σ V_i − Σ D_i‖ ≤ lost = Σ ε_i ‖V_i‖ / (1 − ε_i)      ‖Σ D_i‖ ≥ ‖Σ V_i‖ − lost

Increments of one place may nearly cancel. Then the error of their sum is larger than each of
theirs, and if it may be as large as the sum itself, it has no bound: it is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import SpecError
from ..lowrank import LowRank, concat

__all__ = ["error_of_sum"]


def error_of_sum(parts: Sequence[tuple[LowRank, float]]) -> float:
    """Return an upper bound on the relative error of the sum of some increments.

    Args:
        parts: each increment and its relative error; not empty.

    >>> import torch
    >>> x = LowRank(torch.eye(1, 4), torch.eye(3, 1))
    >>> round(error_of_sum([(x, 0.1), (x.scaled(2.0), 0.0)]), 3)
    0.038
    >>> error_of_sum([(x, 0.1), (x.scaled(-1.0), 0.0)])
    inf
    """
    if len(parts) == 1 or not any(error for _, error in parts):
        return parts[0][1]
    if not all(0.0 <= error < 1.0 for _, error in parts):
        return math.inf
    lost = 0.0
    try:
        for value, error in parts:
            if error:
                lost += error * value.norm() / (1.0 - error)
        least = concat([value for value, _ in parts]).norm() - lost
    except SpecError:
        # Factors that are not finite, or have no numbers, have no norm. The verb that needs their
        # numbers says so; here it means that the error is not known.
        return math.inf
    return lost / least if least > 0.0 else math.inf
