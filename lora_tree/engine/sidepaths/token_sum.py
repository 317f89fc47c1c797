"""Add shares to a product with a weight, token by token.

    out_token += Σ_n c(row of the token, n) · scale_n · B_n A_n x_token

This is the form called ``matrix``: two products with the factors of all nodes side by side, and
the coefficients of each token's row on the narrow result.

Law: the numbers of a token whose row owes nothing are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...lowrank import LowRank
from ..rows.row_layout import RowLayout
from .shares import RowTable, Share
from .side import product_dtype
from .weight_product import WeightProduct
from .weight_view import FactorPair

__all__ = ["add_shares"]


def add_shares(
    out: Tensor,
    product: WeightProduct,
    shares: Iterable[Share],
    *,
    cut: Callable[[LowRank, Tensor | None], FactorPair],
    dropped: Callable[[Tensor], Tensor],
    layout: RowLayout | None,
) -> Tensor | None:
    """Return ``out`` plus the shares, in its dtype; None if a share needs the rows of the product's
    input, and they are not known.

    Args:
        out: the result of the product with the weight alone.
        product: does the same product with factors.
        shares: what is added.
        cut: an increment and a bias → its factors, cut as the weight of the product is.
        dropped: applies the dropout of nodes that train.
        layout: where the rows are in the product's input.
    """
    total, x = out, product.x
    is_dropped = False
    for share in shares:
        if share.live and not is_dropped:
            x, is_dropped = dropped(x), True  # once, so that all nodes that train see one mask
        table, rows = share.table, None
        if table is not None:
            rows = _TokenRows.of(product, layout)
            if rows is None:
                return None
        factors = cut(share.value, share.value.bias if table is None else table.bias)
        wide = product_dtype(torch.promote_types(factors.left.dtype, x.dtype), x.device)
        low = product.down(x.to(wide), factors.to(wide))
        if table is not None and rows is not None:
            low = rows.times(low, table)
        # Autocast may have made the narrow product narrower.
        delta = product.up(low, factors.to(low.dtype))
        added = torch.add(total, delta, alpha=share.value.scale * product.scale)
        if factors.bias is not None and rows is not None:
            added = added + rows.place(factors.bias, added.ndim)
        elif factors.bias is not None:
            added = added + factors.bias * (share.value.scale * product.scale)
        if table is not None and table.owes is not None and rows is not None:
            added = torch.where(rows.place(table.owes, added.ndim), added, total.to(added.dtype))
        total = added
    return total if total.dtype == out.dtype else total.to(out.dtype)


@dataclass(frozen=True, eq=False)
class _TokenRows:
    """The rows of a product's tokens, to look tables up with.

    Args:
        rows: (tokens,) int64.
        low_axis, out_axis: where the tokens are in the narrow product, and in the result.
        features: the axis beside them that counts the rank, or the features.
    """

    rows: Tensor
    low_axis: int
    out_axis: int
    features: int

    @staticmethod
    def of(product: WeightProduct, layout: RowLayout | None) -> _TokenRows | None:
        """Return the rows of a product's input; None if they are not known, or the product sums
        over them.
        """
        if layout is None:
            return None
        at = layout.place()
        axes = product.follow(at - len(layout.axes))
        if axes is None:
            return None
        return _TokenRows(layout.rows(at, product.x.device), *axes, product.features)

    def times(self, low: Tensor, table: RowTable) -> Tensor:
        """Return a narrow product times the coefficients of each token's row.

        Ranks that the row does not owe are masked, not multiplied by zero: another path's product
        may be infinite.
        """
        rank = low.shape[self.features]
        is_owed = self._at(_filled_up(table.is_owed, rank), low.ndim, self.low_axis)
        low = torch.where(is_owed, low, low.new_zeros(()))
        if table.coefficients is None:
            return low
        coefficients = self._at(_filled_up(table.coefficients, rank), low.ndim, self.low_axis)
        return low * coefficients.to(low.dtype)

    def place(self, numbers: Tensor, ndim: int) -> Tensor:
        """Return each token's row of a (rows, features or 1) table, in a shape that broadcasts with
        the result.
        """
        return self._at(numbers, ndim, self.out_axis)

    def _at(self, numbers: Tensor, ndim: int, axis: int) -> Tensor:
        each = numbers[self.rows]  # (tokens, features)
        shape = [1] * ndim
        shape[axis], shape[self.features] = each.shape
        if axis % ndim > self.features % ndim:
            each = each.mT
        return each.reshape(shape)


def _filled_up(numbers: Tensor, rank: int) -> Tensor:
    """Return a table with columns of zeros up to ``rank``, as factors are filled up with zeros."""
    missing = rank - numbers.shape[1]
    return F.pad(numbers, (0, missing)) if missing else numbers
