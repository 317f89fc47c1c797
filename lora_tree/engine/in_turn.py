"""Forms that run one product after the other: for each node, or for each distinct path.

nodes     a product per node over the rows below it: every factor is read once, an ancestor's
          for all its rows
paths     a product per distinct path, the factors on it side by side
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..lowrank import LowRank
from .cost import Cost
from .owed import Owed, RowSubset
from .sum_form import SumForm, disjoint_layers

__all__ = ["EachPathForm", "NodesForm"]


@dataclass(frozen=True, eq=False)
class _Product:
    """One product.

    Args:
        rows: its rows.
        value: returns its increment, made anew if its factors train.
        each: the rows' coefficients; None: they are in the value's scale, the same for all rows.
    """

    rows: RowSubset
    value: Callable[[], LowRank]
    each: Tensor | None = None


class _InTurn(SumForm):
    """Products, one after the other."""

    def __init__(self, owed: Owed) -> None:
        super().__init__(owed)
        self._products = self._made()
        self._layers: list[tuple[list[_Product], RowSubset]] = []
        for layer in disjoint_layers(self._products, lambda product: product.rows.rows):
            rows: list[int] = []
            for product in layer:
                rows += product.rows.rows
            self._layers.append((layer, owed.rows(rows)))

    @abstractmethod
    def _made(self) -> list[_Product]: ...

    def _add_in_place(self, out: Tensor, x: Tensor) -> Tensor:
        # One product after the other writes its rows, a row's in the order of the sum.
        for product in self._products:
            value = product.value()
            low = self._down(product.rows.of(x), value, product.each)
            if product.rows.slice is None:
                delta = self._up(low, value.B).to(out.dtype)
                out.index_add_(0, product.rows.index, delta, alpha=value.scale)
                continue
            # Rows that lie side by side: the second product adds itself to them.
            target = out[product.rows.slice]
            new = self.site.onto(target, low, value.B.to(low.dtype), scale=value.scale, spare=True)
            if new.data_ptr() != target.data_ptr():
                target.copy_(new)
        return out

    def _add(self, out: Tensor, x: Tensor) -> Tensor:
        """Add a layer at a time.

        Within a layer no row stands twice, so autograd sees one operation that takes all rows of
        the layer apart, and one that puts them back.
        """
        for products, rows in self._layers:
            deltas = []
            taken = torch.split(rows.of(x), [len(product.rows) for product in products])
            for product, mine in zip(products, taken, strict=True):
                value = product.value()
                delta = self._up(self._down(mine, value, product.each), value.B)
                deltas.append(delta if value.scale == 1.0 else delta * value.scale)
            out = rows.added(out, torch.cat(deltas), spare=False)
        return out


class NodesForm(_InTurn):
    """A product per node over the rows below it."""

    def _made(self) -> list[_Product]:
        owed = self.owed
        products = []
        for value, (rows, coefficients) in zip(owed.values, owed.batch.by_node, strict=True):
            each = None
            # One coefficient for all rows goes into the scale, and costs nothing in a forward.
            if len(set(coefficients)) == 1:
                value = value.scaled(coefficients[0])
            else:
                each = owed.numbers(coefficients)
            moved = owed.held(partial(value.to, device=owed.device, dtype=owed.dtype))
            products.append(_Product(owed.rows(rows), moved, each))
        return products

    @classmethod
    def cost(cls, owed: Owed, tokens: int) -> Cost:
        total = Cost()
        for value, (rows, _) in zip(owed.values, owed.batch.by_node, strict=True):
            total += owed.cost(rows, value.rank, tokens)
        return total


class EachPathForm(_InTurn):
    """A product per distinct path."""

    def _made(self) -> list[_Product]:
        products = []
        for rows, coefficients in self.owed.batch.by_kind:
            products.append(_Product(self.owed.rows(rows), self._stacked(coefficients)))
        return products

    def _stacked(self, coefficients: Sequence[float]) -> Callable[[], LowRank]:
        return self.owed.held(partial(self.owed.stacked, coefficients))

    @classmethod
    def cost(cls, owed: Owed, tokens: int) -> Cost:
        total = Cost()
        for rows, coefficients in owed.batch.by_kind:
            total += owed.cost(rows, owed.rank(coefficients), tokens)
        return total
