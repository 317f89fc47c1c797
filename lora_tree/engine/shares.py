"""Share: one increment for all tokens of a batch, and what each row owes to its ranks.

Tokens that a base's own router scattered over experts have no axis of rows, and those of one row
are not adjacent. So the factors of all nodes stand side by side, and a table of coefficients is
looked up by the row of each token (`token_sum.py`). Where all rows owe the same there is no table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..lowrank import LowRank
from .owed import Owed
from .upload import uploaded

__all__ = ["RowTable", "Share", "share_of"]


@dataclass(frozen=True, eq=False)
class RowTable:
    """The debts of a batch's rows to the ranks of a value.

    Args:
        mine: (rows, Σr) bool, which ranks a row owes anything.
        coefficients: (rows, Σr); None: all are 0 or 1.
        owes: (rows, 1) bool, which rows owe anything; None: all do.
        bias: (rows, out), the biases of the nodes that a row owes; None: no node has one.
    """

    mine: Tensor
    coefficients: Tensor | None
    owes: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Share:
    """One increment that is added at a site.

    Args:
        value: the increment.
        live: it trains, so it sees dropout.
        table: what each row owes to its ranks; None: all rows owe all of it.
    """

    value: LowRank
    live: bool
    table: RowTable | None = None


def share_of(owed: Owed) -> Callable[[], Share]:
    """Return a function that returns what is owed at a site as one share.

    Raises:
        BudgetError: there is no room for it.
    """
    batch = owed.batch
    rows = range(len(batch))
    value = owed.held(owed.stacking([1.0] * len(owed.values)))
    each = batch.coefficients(rows)  # (rows, nodes)
    column: list[int] = []
    for i, one in enumerate(owed.values):
        column += [i] * one.rank
    wide = each[:, column]  # (rows, Σr)
    is_plain = bool(((wide == 0) | (wide == 1)).all())
    owes = None
    if len(batch.adapted) < len(batch):
        owes = uploaded((each != 0).any(1, keepdim=True), owed.device)
    mine = uploaded(wide != 0, owed.device)
    table = RowTable(mine, None if is_plain else owed.numbers(wide), owes, None)

    def share() -> Share:
        return Share(value(), owed.live, replace(table, bias=_row_bias(owed, each)))

    return share


def _row_bias(owed: Owed, each: Tensor) -> Tensor | None:
    """Return (rows, out), the biases that `lora_bias` trained, for each row."""
    total = None
    for i, value in enumerate(owed.values):
        if value.bias is None:
            continue
        bias = value.bias.to(device=owed.device, dtype=owed.dtype)
        mine = owed.numbers(each[:, i] * value.scale)[:, None] * bias
        total = mine if total is None else total + mine
    return total
