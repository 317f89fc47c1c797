"""The share of a batch's rows at a site whose tokens a base's own router scatters.

All factors of the site's nodes side by side, (out, Σr) and (Σr, in), and a table of what each row
owes to each rank: (rows, Σr).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..sidepaths.shares import RowTable, Share
from ..upload import uploaded
from .owed import Owed

__all__ = ["share_of"]


def share_of(owed: Owed) -> Callable[[], Share]:
    """Return a function that returns what is owed at a site as one share.

    Raises:
        BudgetError: there is no room for it.
    """
    batch = owed.batch
    rows = range(len(batch))
    value = owed.held(owed.stacking([1.0] * len(owed.values)))
    coefficients = batch.coefficients(rows)  # (rows, nodes)
    column: list[int] = []
    for i, node_value in enumerate(owed.values):
        column += [i] * node_value.rank
    wide = coefficients[:, column]  # (rows, Σr)
    is_plain = bool(((wide == 0) | (wide == 1)).all())
    owes = None
    if len(batch.adapted) < len(batch):
        owes = uploaded((coefficients != 0).any(1, keepdim=True), owed.device)
    is_owed = uploaded(wide != 0, owed.device)
    table = RowTable(is_owed, None if is_plain else owed.numbers(wide), owes, None)

    def share() -> Share:
        return Share(value(), owed.live, replace(table, bias=_row_bias(owed, coefficients)))

    return share


def _row_bias(owed: Owed, coefficients: Tensor) -> Tensor | None:
    """Return (rows, out), the biases that `lora_bias` trained, for each row."""
    total = None
    for i, value in enumerate(owed.values):
        if value.bias is None:
            continue
        bias = value.bias.to(device=owed.device, dtype=owed.dtype)
        node_bias = owed.numbers(coefficients[:, i] * value.scale)[:, None] * bias
        total = node_bias if total is None else total + node_bias
    return total
