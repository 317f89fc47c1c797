"""Forms that run few products over all rows at once.

paths     one batched product over the distinct paths, if all have the same number of rows (eight
          rows on eight paths); or over the rows, if these are not many more than the paths
grouped   a grouped product per depth over the nodes there (`torch.nn.functional.grouped_mm`)
matrix    the factors of all nodes side by side: two dense products, with the coefficients on
          the narrow result
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from ...lowrank import LowRank
from ..unpromised import grouped_product
from ..upload import uploaded
from .owed import Owed, RowSubset
from .path_stacks import PathStacks
from .sum_form import SumForm, disjoint_layers

__all__ = ["AllPathsForm", "GroupedForm", "MatrixForm"]

AT_ONCE = 1 << 20
"""The most numbers of scattered rows that a CPU gathers at once. More would not fit into its cache;
the rows of one path at a time do."""

MOST_COPIES = 2
"""Each row gets a copy of its path's factors if a path has at most this many rows on average."""

STRIDE_BYTES = 16
"""A row of a grouped product's operands has to take a multiple of this."""


class AllPathsForm(SumForm):
    """One batched product over the distinct paths, or over the rows.

    All its parts must have the same number of rows. If the paths do not, each row is a part and
    has a copy of its path's factors: that is still faster than a product for each path
    (`python -m benchmarks.forms`).
    """

    def __init__(self, owed: Owed) -> None:
        super().__init__(owed)
        self._parts = _parts(owed)
        self._rows = owed.rows(_rows_of(self._parts))
        self._stacks: PathStacks | None = None
        if not owed.live:
            if self._parts is owed.batch.by_kind:
                self._stacks = owed.path_stacks
            else:
                sums = [coefficients for _, coefficients in self._parts]
                self._stacks = owed.stacks(sums)

    @classmethod
    def suits(cls, owed: Owed, tokens: int) -> bool:
        if not owed.site.is_product:
            return False
        kinds, parts = owed.batch.by_kind, _parts(owed)
        # Factors that train are put side by side again in each step; copying them for each row on
        # top of that would cost too much.
        if parts is not kinds and (owed.live or len(parts) > MOST_COPIES * len(kinds)):
            return False
        in_order = _rows_of(parts) == list(range(len(owed.batch)))
        if in_order or owed.device.type != "cpu":
            return True
        numbers = len(owed.batch) * tokens * max(owed.values[0].shape[-2:])
        return numbers <= AT_ONCE

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return (parts, R, in) and (parts, R, out)."""
        if self._stacks is not None:
            return self._stacks.A, self._stacks.B.mT
        return _side_by_side(self.owed, [coefficients for _, coefficients in self._parts])

    def _low(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the narrow products (parts, inputs, R), and B as (parts, R, out)."""
        A, B = self._factors()
        taken = self._rows.of(x)
        by_part = taken.reshape(len(A), -1, taken.shape[-1])
        return torch.bmm(by_part, A.to(x.dtype).mT), B

    def _add(self, out: Tensor, x: Tensor) -> Tensor:
        low, B = self._low(x)
        if self._rows.is_whole:
            wide = torch.baddbmm(_by_part(out, B), low.to(out.dtype), B.to(out.dtype))
            return wide.view(out.shape)
        return self._rows.added(out, torch.bmm(low, B.to(low.dtype)), spare=False)

    def _add_in_place(self, out: Tensor, x: Tensor) -> Tensor:
        low, B = self._low(x)
        # `_by_part` copies a tensor that is not contiguous, and the sum would go into the copy.
        if self._rows.is_whole and out.is_contiguous():
            _by_part(out, B).baddbmm_(low.to(out.dtype), B.to(out.dtype))
            return out
        return self._rows.added(out, torch.bmm(low, B.to(low.dtype)), spare=True)


@dataclass(frozen=True, eq=False)
class _NodeLayer:
    """Nodes that share no row.

    Args:
        rows: their rows, one node's after the other's.
        ends: the offset in ``rows`` at which each node's rows end.
        factors: returns (nodes, R, in) and (nodes, R, out).
        coefficients: the rows' coefficients; None: all are 1.
    """

    rows: RowSubset
    ends: Tensor
    factors: Callable[[], tuple[Tensor, Tensor]]
    coefficients: Tensor | None


class GroupedForm(SumForm):
    """A grouped product per layer of nodes; for paths, the layers are the depths of the tree."""

    def __init__(self, owed: Owed) -> None:
        super().__init__(owed)
        by_node = owed.batch.by_node
        layers = disjoint_layers(range(len(owed.values)), lambda node: by_node[node][0])
        self._layers = [self._layer(nodes) for nodes in layers]

    @classmethod
    def suits(cls, owed: Owed, tokens: int) -> bool:
        if grouped_product() is None or not owed.site.is_product:
            return False
        dtypes = [torch.bfloat16]
        if owed.device.type == "cpu":
            dtypes += [torch.float32, torch.float16]
        out, into = owed.values[0].shape[-2:]
        itemsize = owed.dtype.itemsize
        aligned = out * itemsize % STRIDE_BYTES == 0 and into * itemsize % STRIDE_BYTES == 0
        return owed.dtype in dtypes and aligned

    def _layer(self, nodes: list[int]) -> _NodeLayer:
        owed = self.owed
        rows: list[int] = []
        coefficients: list[float] = []
        counts = []
        alone = []
        for node in nodes:
            node_rows, node_coefficients = owed.batch.by_node[node]
            rows += node_rows
            coefficients += node_coefficients
            counts.append(len(node_rows))
            alone.append([float(i == node) for i in range(len(owed.values))])
        ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device="cpu")
        multiple = STRIDE_BYTES // owed.dtype.itemsize
        return _NodeLayer(
            owed.rows(rows),
            uploaded(ends, owed.device),
            owed.held(partial(_side_by_side, owed, alone, multiple=multiple)),
            None if set(coefficients) == {1.0} else owed.numbers(coefficients),
        )

    def _add(self, out: Tensor, x: Tensor, *, spare: bool = False) -> Tensor:
        product = grouped_product()
        assert product is not None  # or this form does not suit
        for layer in self._layers:
            taken = layer.rows.of(x)
            inputs = taken.numel() // (len(layer.rows) * taken.shape[-1])  # per row
            offsets = layer.ends * inputs
            A, B = (factor.to(x.dtype) for factor in layer.factors())
            low = product(taken.reshape(-1, taken.shape[-1]), A.mT, offs=offsets)
            if layer.coefficients is not None:
                by_row = low.view(len(layer.rows), -1) * layer.coefficients.to(low.dtype)[:, None]
                low = by_row.view(low.shape)
            out = layer.rows.added(out, product(low, B, offs=offsets), spare=spare)
        return out

    def _add_in_place(self, out: Tensor, x: Tensor) -> Tensor:
        return self._add(out, x, spare=True)


class MatrixForm(SumForm):
    """The factors of all nodes side by side, and a matrix of coefficients on the narrow result."""

    def __init__(self, owed: Owed) -> None:
        super().__init__(owed)
        self._rows = owed.rows(owed.batch.adapted)
        self._value = owed.held(owed.stacking([1.0] * len(owed.values)))
        # A node's coefficient is repeated for each of the node's ranks, and that row of
        # coefficients for each group.
        column: list[int] = []
        for i, value in enumerate(owed.values):
            column += [i] * value.rank
        coefficients = owed.batch.coefficients(owed.batch.adapted)[:, column]  # (rows, Σr)
        coefficients = coefficients.repeat(1, math.prod(owed.values[0].shape[:-2]))
        self._is_owed = uploaded(coefficients != 0, owed.device)
        plain = bool(((coefficients == 0) | (coefficients == 1)).all())
        self._coefficients = None if plain else owed.numbers(coefficients)

    def _low(self, x: Tensor, value: LowRank) -> Tensor:
        low = self._down(self._rows.of(x), value, None)
        # Masked, not multiplied by zero: another path's product may be infinite.
        is_owed = self.site.along_channels(self._is_owed, low.ndim)
        low = torch.where(is_owed, low, low.new_zeros(()))
        if self._coefficients is None:
            return low
        return low * self.site.along_channels(self._coefficients.to(low.dtype), low.ndim)

    def _add(self, out: Tensor, x: Tensor, *, spare: bool = False) -> Tensor:
        value = self._value()
        low = self._low(x, value)
        if self._rows.is_whole:
            return self.site.onto(out, low, value.B.to(low.dtype), scale=1.0, spare=spare)
        return self._rows.added(out, self._up(low, value.B), spare=spare)

    def _add_in_place(self, out: Tensor, x: Tensor) -> Tensor:
        return self._add(out, x, spare=True)


# ---------------------------------------------------------------------- helpers
_Parts: TypeAlias = Sequence[tuple[tuple[int, ...], tuple[float, ...]]]
"""(rows, what each of them owes to each node), for each part of a batch."""


def _parts(owed: Owed) -> _Parts:
    """Return parts with equally many rows: the paths, or else each row that owes anything."""
    batch = owed.batch
    if len({len(rows) for rows, _ in batch.by_kind}) == 1:
        return batch.by_kind
    return [((row,), batch.kinds[batch.of_row[row]]) for row in batch.adapted]


def _rows_of(parts: _Parts) -> list[int]:
    """Return the rows of all parts, one part's after the other's."""
    found: list[int] = []
    for rows, _ in parts:
        found += rows
    return found


def _side_by_side(
    owed: Owed, sums: Sequence[Sequence[float]], *, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Return sums of the values, one beside the other: (sums, R, in) and (sums, R, out).

    B is transposed and multiplied by the scales. Every factor is copied once.

    Args:
        owed: the values.
        sums: a coefficient for each value, for each sum.
        multiple: R is a multiple of this. Sums of a smaller rank are filled up with zeros.
    """
    rank = -(-max(owed.rank(c) for c in sums) // multiple) * multiple
    into, out = owed.values[0].shape[-1], owed.values[0].shape[-2]
    values = [v.to(device=owed.device, dtype=owed.dtype) for v in owed.values]
    zeros = values[0].A.new_zeros(())
    A, B = [], []
    for coefficients in sums:
        for value, coefficient in zip(values, coefficients, strict=True):
            if not coefficient:
                continue
            scale = value.scale * coefficient
            A.append(value.A)
            B.append(value.B.mT if scale == 1.0 else value.B.mT * scale)
        if missing := rank - owed.rank(coefficients):
            A.append(zeros.expand(missing, into))
            B.append(zeros.expand(missing, out))
    return torch.cat(A).view(len(sums), rank, into), torch.cat(B).view(len(sums), rank, out)


def _by_part(out: Tensor, B: Tensor) -> Tensor:
    """Return (rows, …, out) as (parts, inputs, out)."""
    return out.reshape(len(B), -1, out.shape[-1])
