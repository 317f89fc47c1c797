"""Share: one increment for all tokens of a batch, and what each row owes to its ranks.

Tokens that a base's own router scattered over experts have no axis of rows, and those of one row
are not adjacent. So the factors of all nodes stand side by side, and a table of coefficients is
looked up by the row of each token (`token_sum.py`). Where all rows owe the same there is no table.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...lowrank import LowRank

__all__ = ["RowTable", "Share"]


@dataclass(frozen=True, eq=False)
class RowTable:
    """The debts of a batch's rows to the ranks of a value.

    Args:
        is_owed: (rows, Σr) bool, which ranks a row owes anything.
        coefficients: (rows, Σr); None: all are 0 or 1.
        owes: (rows, 1) bool, which rows owe anything; None: all do.
        bias: (rows, out), the biases of the nodes that a row owes; None: no node has one.
    """

    is_owed: Tensor
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
