"""Four forms of one sum, at one site:  out_row += Σ_n c(row, n) · scale_n · B_n A_n x_row

    nodes     a product per node over the rows below it: every factor is read once, an ancestor's for all its rows
    paths     a product per distinct path, the factors on it side by side: one batched product where every path has as
              many rows (eight rows, eight paths), else one after the other
    grouped   a grouped product per depth over the nodes there (`torch.nn.functional.grouped_mm`)
    matrix    the factors of all nodes side by side: two dense products, with the coefficients on the narrow result

They agree to rounding. Rows that do not lie side by side are taken out of the input and added back in their places, at
this site: that costs a copy of their inputs and of what is added to them. A row that owes nothing is never written to,
and a coefficient of 0 is never multiplied with a number that might be infinite.

All are plain autograd. Where nobody records, results are added in place; factors that don't train are laid out once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from ..lowrank import LowRank
from ..sites.linear import LinearSite
from ..sites.site import recorded
from .cost import Cost
from .owed import Owed, RowSubset
from .unpromised import grouped_product
from .upload import uploaded

__all__ = ["FORMS", "SumForm"]

T = TypeVar("T")

AT_ONCE = 1 << 20
"""Numbers of scattered rows that a CPU takes out at once; more would leave its cache, one path's at a time does not."""
STRIDE_BYTES = 16
"""What the rows of a grouped product's operands have to be multiples of."""


class SumForm(ABC):
    """One way to add up one site's sum."""

    def __init__(self, owed: Owed) -> None:
        self.owed = owed
        self.site = owed.site
        self._biased = [i for i, value in enumerate(owed.values) if value.bias is not None]

    @classmethod
    def suits(cls, owed: Owed, tokens: int) -> bool:
        """Whether this way can, and should, be taken here; where not, the next one in `FORMS` is."""
        return True

    @classmethod
    @abstractmethod
    def cost(cls, owed: Owed, tokens: int) -> Cost:
        """What it costs with ``tokens`` inputs a row."""

    def add(self, out: Tensor, x: Tensor, *, spare: bool) -> Tensor:
        """``out`` plus what its rows owe.

        Args:
            out: (rows, …), in a dtype that holds the sum.
            x: (rows, …), the site's input; in the side path's dtype or wider, unless it is ids.
            spare: nobody else holds ``out``, it may be written over.
        """
        silent = not (recorded(out, x) or (self.owed.live and torch.is_grad_enabled()))
        out = self._add_in_place(out if spare else out.clone(), x) if silent else self._add(out, x)
        return self._add_bias(out) if self._biased else out

    @abstractmethod
    def _add(self, out: Tensor, x: Tensor) -> Tensor:
        """A new tensor, for autograd."""

    @abstractmethod
    def _add_in_place(self, out: Tensor, x: Tensor) -> Tensor:
        """``out``, written over."""

    def _down(self, x: Tensor, value: LowRank, each: Tensor | None) -> Tensor:
        """The first product, times the rows' coefficients."""
        low = self.site.down(x, value.A.to(x.dtype) if x.is_floating_point() else value.A)
        return (
            low if each is None else low * each.to(low.dtype).view(-1, *(1 for _ in low.shape[1:]))
        )

    def _up(self, low: Tensor, B: Tensor) -> Tensor:
        return self.site.up(low, B.to(low.dtype))

    def _add_bias(self, out: Tensor) -> Tensor:
        """What `lora_bias` adds, row by row."""
        owed, adapted = self.owed, self.owed.batch.adapted
        coefficients, total = owed.batch.coefficients(adapted), []
        for i in self._biased:
            bias = owed.values[i].to(device=owed.device, dtype=owed.dtype).bias
            assert bias is not None
            total.append(
                owed.numbers(coefficients[:, i] * owed.values[i].scale)[:, None] * bias
            )  # (rows, out)
        delta = self.site.along_channels(torch.stack(total).sum(0), out.ndim)
        return owed.rows(adapted).added(
            out, delta.expand(len(adapted), *out.shape[1:]), spare=False
        )


# ---------------------------------------------------------------------- one product after the other
@dataclass(frozen=True, eq=False)
class _Product:
    """One product: its rows, its value, and the rows' coefficients where these differ."""

    rows: RowSubset
    value: Callable[[], LowRank]
    each: Tensor | None = None


class _LoopForm(SumForm):
    """Products, one after the other, in layers: within a layer no row stands twice."""

    def __init__(self, owed: Owed) -> None:
        super().__init__(owed)
        self._parts = self._made()
        self._layers = [
            (layer, owed.rows(_rows(layer)))
            for layer in _disjoint(self._parts, lambda p: p.rows.rows)
        ]

    @abstractmethod
    def _made(self) -> list[_Product]: ...

    def _add_in_place(self, out: Tensor, x: Tensor) -> Tensor:
        for part in self._parts:
            value = part.value()
            low = self._down(part.rows.of(x), value, part.each)
            if part.rows.slice is None:
                out.index_add_(
                    0, part.rows.index, self._up(low, value.B).to(out.dtype), alpha=value.scale
                )
                continue
            target = out[part.rows.slice]
            new = self.site.onto(target, low, value.B.to(low.dtype), scale=value.scale, spare=True)
            if new.data_ptr() != target.data_ptr():
                target.copy_(new)
        return out

    def _add(self, out: Tensor, x: Tensor) -> Tensor:
        """A layer at a time: autograd is told of one operation that takes rows apart, and one that puts them back."""
        for parts, rows in self._layers:
            deltas = []
            taken = torch.split(rows.of(x), [len(part.rows) for part in parts])
            for part, mine in zip(parts, taken, strict=True):
                value = part.value()
                delta = self._up(self._down(mine, value, part.each), value.B)
                deltas.append(delta if value.scale == 1.0 else delta * value.scale)
            out = rows.added(out, torch.cat(deltas), spare=False)
        return out


class NodesForm(_LoopForm):
    """A product per node over the rows below it."""

    def _made(self) -> list[_Product]:
        return [self._part(i, *of) for i, of in enumerate(self.owed.batch.by_node)]

    def _part(self, i: int, rows: tuple[int, ...], coefficients: tuple[float, ...]) -> _Product:
        owed, alike = self.owed, len(set(coefficients)) == 1
        value = owed.values[i].scaled(coefficients[0]) if alike else owed.values[i]
        moved = owed.held(lambda: value.to(device=owed.device, dtype=owed.dtype))
        return _Product(owed.rows(rows), moved, None if alike else owed.numbers(coefficients))

    @classmethod
    def cost(cls, owed: Owed, tokens: int) -> Cost:
        of = zip(owed.batch.by_node, owed.values, strict=True)
        return sum((owed.cost(rows, value.rank, tokens) for (rows, _), value in of), Cost())


class EachPathForm(_LoopForm):
    """A product per distinct path, one after the other."""

    def _made(self) -> list[_Product]:
        return [self._part(rows, coefficients) for rows, coefficients in self.owed.batch.by_kind]

    def _part(self, rows: tuple[int, ...], coefficients: tuple[float, ...]) -> _Product:
        return _Product(
            self.owed.rows(rows), self.owed.held(lambda: self.owed.stacked(coefficients))
        )

    @classmethod
    def cost(cls, owed: Owed, tokens: int) -> Cost:
        return sum(
            (owed.cost(rows, owed.rank(c), tokens) for rows, c in owed.batch.by_kind), Cost()
        )


# ---------------------------------------------------------------------- all at once
class AllPathsForm(SumForm):
    """One batched product over the distinct paths, where every path has as many rows."""

    def __init__(self, owed: Owed) -> None:
        super().__init__(owed)
        self._rows = owed.rows([row for rows, _ in owed.batch.by_kind for row in rows])
        self._factors = owed.held(self._made)

    @classmethod
    def suits(cls, owed: Owed, tokens: int) -> bool:
        kinds = owed.batch.by_kind
        if not isinstance(owed.site, LinearSite) or len({len(rows) for rows, _ in kinds}) != 1:
            return False
        numbers = len(owed.batch) * tokens * max(owed.values[0].shape[-2:])
        whole = [row for rows, _ in kinds for row in rows] == list(range(len(owed.batch)))
        return whole or owed.device.type != "cpu" or numbers <= AT_ONCE

    @classmethod
    def cost(cls, owed: Owed, tokens: int) -> Cost:
        kinds = owed.batch.by_kind
        rows = [row for rows, _ in kinds for row in rows]
        return owed.cost(rows, max(owed.rank(c) for _, c in kinds), tokens, copies=len(kinds))

    def _made(self) -> tuple[Tensor, Tensor]:
        """(paths, R, in) and (paths, R, out)."""
        return _side_by_side(
            self.owed, [coefficients for _, coefficients in self.owed.batch.by_kind]
        )

    def _low(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The narrow products (paths, inputs, R), and what takes them up."""
        A, B = self._factors()
        taken = self._rows.of(x)
        return torch.bmm(taken.reshape(len(A), -1, taken.shape[-1]), A.to(x.dtype).mT), B

    def _add(self, out: Tensor, x: Tensor) -> Tensor:
        low, B = self._low(x)
        if self._rows.whole:
            return torch.baddbmm(_cut(out, B), low.to(out.dtype), B.to(out.dtype)).view(out.shape)
        return self._rows.added(out, torch.bmm(low, B.to(low.dtype)), spare=False)

    def _add_in_place(self, out: Tensor, x: Tensor) -> Tensor:
        low, B = self._low(x)
        if self._rows.whole and out.is_contiguous():
            _cut(out, B).baddbmm_(low.to(out.dtype), B.to(out.dtype))
            return out
        return self._rows.added(out, torch.bmm(low, B.to(low.dtype)), spare=True)


class GroupedForm(SumForm):
    """A grouped product per layer of nodes; for paths, the layers are the depths of the tree."""

    def __init__(self, owed: Owed) -> None:
        super().__init__(owed)
        layers = _disjoint(range(len(owed.values)), lambda node: owed.batch.by_node[node][0])
        self._layers = [self._layer(nodes) for nodes in layers]

    @classmethod
    def suits(cls, owed: Owed, tokens: int) -> bool:
        on_cpu = owed.device.type == "cpu"
        dtypes = (torch.float32, torch.bfloat16, torch.float16) if on_cpu else (torch.bfloat16,)
        aligned = all(
            n * owed.dtype.itemsize % STRIDE_BYTES == 0 for n in owed.values[0].shape[-2:]
        )
        able = grouped_product() is not None
        return able and isinstance(owed.site, LinearSite) and owed.dtype in dtypes and aligned

    @classmethod
    def cost(cls, owed: Owed, tokens: int) -> Cost:
        cost = NodesForm.cost(owed, tokens)
        if owed.device.type == "cpu":  # where the grouped product is a loop over its groups
            return cost
        return replace(cost, calls=6.0 * len(_disjoint(owed.batch.by_node, lambda node: node[0])))

    def _layer(self, nodes: list[int]) -> _NodeLayer:
        owed, multiple = self.owed, STRIDE_BYTES // self.owed.dtype.itemsize
        of = [owed.batch.by_node[node] for node in nodes]
        alone = [[float(i == node) for i in range(len(owed.values))] for node in nodes]
        coefficients = [c for _, each in of for c in each]
        ends = list(accumulate(len(rows) for rows, _ in of))
        return _NodeLayer(
            owed.rows([row for rows, _ in of for row in rows]),
            uploaded(torch.tensor(ends, dtype=torch.int32, device="cpu"), owed.device),
            owed.held(lambda: _side_by_side(owed, alone, multiple=multiple)),
            None if set(coefficients) == {1.0} else owed.numbers(coefficients),
        )

    def _add(self, out: Tensor, x: Tensor, *, spare: bool = False) -> Tensor:
        product = grouped_product()
        assert product is not None  # or this form does not suit
        for layer in self._layers:
            taken = layer.rows.of(x)
            offsets = layer.ends * (taken.numel() // (len(layer.rows) * taken.shape[-1]))
            A, B = (factor.to(x.dtype) for factor in layer.factors())
            low = product(taken.reshape(-1, taken.shape[-1]), A.mT, offs=offsets)
            if layer.each is not None:
                low = (low.view(len(layer.rows), -1) * layer.each.to(low.dtype)[:, None]).view(
                    low.shape
                )
            out = layer.rows.added(out, product(low, B, offs=offsets), spare=spare)
        return out

    def _add_in_place(self, out: Tensor, x: Tensor) -> Tensor:
        return self._add(out, x, spare=True)


@dataclass(frozen=True, eq=False)
class _NodeLayer:
    """Nodes of which no two have a row in common: their rows, where in these each node's end, factors, coefficients."""

    rows: RowSubset
    ends: Tensor
    factors: Callable[[], tuple[Tensor, Tensor]]
    each: Tensor | None


class MatrixForm(SumForm):
    """The factors of all nodes side by side, and a matrix of coefficients on the narrow result."""

    def __init__(self, owed: Owed) -> None:
        super().__init__(owed)
        self._rows = owed.rows(owed.batch.adapted)
        self._value = owed.held(lambda: owed.stacked([1.0] * len(owed.values)))
        column = [i for i, value in enumerate(owed.values) for _ in range(value.rank)]
        coefficients = owed.batch.coefficients(owed.batch.adapted)[:, column]  # (rows, Σr)
        coefficients = coefficients.repeat(
            1, math.prod(owed.values[0].shape[:-2])
        )  # once for each group
        self._mine = uploaded(coefficients != 0, owed.device)
        plain = bool(((coefficients == 0) | (coefficients == 1)).all())
        self._coefficients = None if plain else owed.numbers(coefficients)

    @classmethod
    def cost(cls, owed: Owed, tokens: int) -> Cost:
        rank = sum(value.rank for value in owed.values)
        narrow = 4 * len(owed.batch.adapted) * tokens * rank * owed.dtype.itemsize
        return owed.cost(owed.batch.adapted, rank, tokens) + Cost(2, narrow)

    def _low(self, x: Tensor, value: LowRank) -> Tensor:
        low = self._down(self._rows.of(x), value, None)
        low = torch.where(self.site.along_channels(self._mine, low.ndim), low, low.new_zeros(()))
        if self._coefficients is None:
            return low
        return low * self.site.along_channels(self._coefficients.to(low.dtype), low.ndim)

    def _add(self, out: Tensor, x: Tensor, *, spare: bool = False) -> Tensor:
        value = self._value()
        low = self._low(x, value)
        if self._rows.whole:
            return self.site.onto(out, low, value.B.to(low.dtype), scale=1.0, spare=spare)
        return self._rows.added(out, self._up(low, value.B), spare=spare)

    def _add_in_place(self, out: Tensor, x: Tensor) -> Tensor:
        return self._add(out, x, spare=True)


FORMS: Mapping[str, tuple[type[SumForm], ...]] = {
    "nodes": (NodesForm,),
    "paths": (AllPathsForm, EachPathForm),
    "grouped": (GroupedForm, NodesForm),
    "matrix": (MatrixForm,),
}
"""The forms by name, each with the ways to do it: the first that suits a site is taken there."""


# ---------------------------------------------------------------------- helpers
def _disjoint(parts: Sequence[T], rows_of: Callable[[T], Iterable[int]]) -> list[list[T]]:
    """Parts in layers, as few as a first fit finds, none of which has a row twice."""
    layers: list[tuple[list[T], set[int]]] = []
    for part in parts:
        rows = set(rows_of(part))
        free = next((layer for layer in layers if layer[1].isdisjoint(rows)), None)
        if free is None:
            layers.append(([part], rows))
        else:
            free[0].append(part)
            free[1].update(rows)
    return [parts for parts, _ in layers]


def _rows(parts: Iterable[_Product]) -> list[int]:
    return [row for part in parts for row in part.rows.rows]


def _side_by_side(
    owed: Owed, sums: Sequence[Sequence[float]], *, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Some sums of the values, one beside the other: (sums, R, in) and (sums, R, out), B turned over and scaled.

    Sums of a smaller rank are filled up with zeros, all to a multiple of ``multiple``. Every factor is copied once.
    """
    rank = -(-max(owed.rank(c) for c in sums) // multiple) * multiple
    into, out = owed.values[0].shape[-1], owed.values[0].shape[-2]
    values = [v.to(device=owed.device, dtype=owed.dtype) for v in owed.values]
    zeros = values[0].A.new_zeros(())
    A, B = [], []
    for coefficients in sums:
        for value, c in zip(values, coefficients, strict=True):
            if c:
                A.append(value.A)
                B.append(value.B.mT if value.scale * c == 1.0 else value.B.mT * (value.scale * c))
        if missing := rank - owed.rank(coefficients):
            A.append(zeros.expand(missing, into))
            B.append(zeros.expand(missing, out))
    return torch.cat(A).view(len(sums), rank, into), torch.cat(B).view(len(sums), rank, out)


def _cut(out: Tensor, B: Tensor) -> Tensor:
    """(rows, …, out) as (paths, inputs, out)."""
    return out.reshape(len(B), -1, out.shape[-1])
