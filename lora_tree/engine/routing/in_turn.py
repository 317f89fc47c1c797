"""Forms that run one product after the other: for each node, or for each distinct path.

nodes     a product per node over the rows below it: every factor is read once and in place, an
          ancestor's for all its rows
paths     a product per distinct path, the factors on it side by side
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeAlias

import torch
from torch import Tensor

from ...lowrank import LowRank
from .owed import Owed, RowSubset
from .sum_form import SumForm, disjoint_layers

__all__ = ["EachPathForm", "NodesForm"]


@dataclass(frozen=True, eq=False)
class _Product:
    """One product.

    Args:
        rows: its rows.
        value: returns its increment, made again at each call if its factors train.
        coefficients: the rows' coefficients; None: they are in the value's scale, the same for all
            rows.
    """

    rows: RowSubset
    value: Callable[[], LowRank]
    coefficients: Tensor | None = None


class _InTurn(SumForm):
    """A form that runs its products one after the other."""

    @property
    @abstractmethod
    def _products(self) -> Sequence[_Product]:
        """The products; those of one row are in the order of the sum."""

    @cached_property
    def _layers(self) -> list[tuple[list[_Product], RowSubset]]:
        """The products in layers that have each row at most once, with the rows of each layer."""
        found = []
        for layer in disjoint_layers(self._products, lambda product: product.rows.rows):
            rows: list[int] = []
            for product in layer:
                rows += product.rows.rows
            found.append((layer, self.owed.rows(rows)))
        return found

    def _add_in_place(self, out: Tensor, x: Tensor) -> Tensor:
        # The products write their rows one after the other, those of one row in the sum's order.
        for product in self._products:
            value = product.value()
            low = self._down(product.rows.of(x), value, product.coefficients)
            if product.rows.slice is None:
                delta = self._up(low, value.B).to(out.dtype)
                out.index_add_(0, product.rows.index, delta, alpha=value.scale)
                continue
            # The rows are contiguous, so the product with B is added into them directly.
            self._add_onto(out[product.rows.slice], low, value.B, value.scale)
        return out

    def _add_onto(self, target: Tensor, low: Tensor, B: Tensor, scale: float) -> None:
        """Add the product with B to some rows of the output, in place."""
        new = self.site.onto(target, low, B.to(low.dtype), scale=scale, spare=True)
        if new.data_ptr() != target.data_ptr():
            target.copy_(new)

    def _add(self, out: Tensor, x: Tensor) -> Tensor:
        """Add a layer at a time.

        No row occurs twice in a layer, so autograd records one operation that splits the rows of
        the layer, and one that puts their results back.
        """
        for products, rows in self._layers:
            deltas = []
            taken = torch.split(rows.of(x), [len(product.rows) for product in products])
            for product, node_input in zip(products, taken, strict=True):
                value = product.value()
                delta = self._up(self._down(node_input, value, product.coefficients), value.B)
                deltas.append(delta if value.scale == 1.0 else delta * value.scale)
            out = rows.added(out, torch.cat(deltas), spare=False)
        return out


_Part: TypeAlias = tuple[tuple[int, int], Tensor, Tensor, float]
"""A product over rows that lie side by side: (start, end), A and B transposed, the scale."""


class NodesForm(_InTurn):
    """A product per node over the rows below it.

    Nothing is laid out: factors are read where they lie, if they are in the side path's dtype.
    """

    def __init__(self, owed: Owed) -> None:
        super().__init__(owed)
        self._values: list[Callable[[], LowRank]] = []
        for value in owed.values:
            moved = partial(value.to, device=owed.device, dtype=owed.dtype)
            self._values.append(owed.held(moved))
        self._kept: list[_Part] | None = None

    @cached_property
    def _products(self) -> Sequence[_Product]:
        owed = self.owed
        products = []
        for value, (rows, coefficients) in zip(self._values, owed.batch.by_node, strict=True):
            row_coefficients, made = None, value
            # One coefficient for all rows goes into the scale, and costs nothing in a forward.
            if len(set(coefficients)) == 1:
                made = partial(_scaled, value, coefficients[0])
            else:
                row_coefficients = owed.numbers(coefficients)
            products.append(_Product(owed.rows(rows), made, row_coefficients))
        return products

    @cached_property
    def _rows(self) -> RowSubset:
        """The rows in the order of the batch's runs."""
        return self.owed.rows(self.owed.batch.runs.order)

    def _add_in_place(self, out: Tensor, x: Tensor) -> Tensor:
        if not self.site.is_product:
            return super()._add_in_place(out, x)
        rows, parts = self._rows, self._parts(x.dtype)
        # In the batch's own order every run is a view of the input and of the output.
        taken = rows.of(x)
        own_rows = out.contiguous() if rows.is_whole else out.index_select(0, rows.index)
        tokens = own_rows.numel() // (len(rows) * own_rows.shape[-1])
        wide, target = taken.reshape(-1, taken.shape[-1]), own_rows.view(-1, own_rows.shape[-1])
        for (start, end), A, B, scale in parts:
            run_input = wide[start * tokens : end * tokens]
            run_output = target[start * tokens : end * tokens]
            low = torch.mm(run_input, A)
            if low.dtype == run_output.dtype == B.dtype:
                run_output.addmm_(low, B, alpha=scale)
            else:  # autocast made the product narrower than its factors
                self._add_onto(run_output, low, B.mT, scale)
        if not rows.is_whole:
            return out.index_copy_(0, rows.index, own_rows)
        return out if own_rows is out else out.copy_(own_rows)

    def _parts(self, dtype: torch.dtype) -> list[_Part]:
        """Return the products over runs of rows, with factors in a dtype."""
        if dtype == self.owed.dtype and self._kept is not None:
            return self._kept
        values = [value() for value in self._values]
        parts = []
        for start, end, node, coefficient in self.owed.batch.runs.parts:
            value = values[node]
            A, B = value.A.to(dtype), value.B.to(dtype)
            parts.append(((start, end), A.mT, B.mT, value.scale * coefficient))
        # These are views, so keeping them takes no memory. Making them takes a third of a forward
        # of single tokens.
        if dtype == self.owed.dtype and not self.owed.live:
            self._kept = parts
        return parts


class EachPathForm(_InTurn):
    """A product per distinct path."""

    def __init__(self, owed: Owed) -> None:
        super().__init__(owed)
        self._values: list[Callable[[], LowRank]] = []
        for path, (_, coefficients) in enumerate(owed.batch.by_kind):
            if owed.site.is_product and not owed.live:
                # The batched product over all paths (`AllPathsForm`) reads the same memory.
                value = owed.path_stacks.value(path)
                self._values.append(partial(_identity, value))
            else:
                self._values.append(owed.held(owed.stacking(coefficients)))

    @cached_property
    def _products(self) -> Sequence[_Product]:
        products = []
        for value, (rows, _) in zip(self._values, self.owed.batch.by_kind, strict=True):
            products.append(_Product(self.owed.rows(rows), value))
        return products


def _identity(value: LowRank) -> LowRank:
    return value


def _scaled(value: Callable[[], LowRank], coefficient: float) -> LowRank:
    return value().scaled(coefficient)
