"""RowLayout: which axis of a tensor counts the rows of a batch, and in which order.

    (rows, tokens, features)     as a layer is given it        axes   [rows] [tokens] [features]
    .view(-1, features)          as experts are given it              [rows tokens] [features]
    [token_index]                the tokens sent to an expert         [the row of each] [features]

An axis is a product of parts, the outermost first, and one part of one axis is the rows. Reshaping
cuts and joins parts, transposing moves axes, an index takes tokens and makes a part that knows the
row of each of them. What these rules can't follow has no layout, and a site that needs one refuses
the tensor by name: a guess could send a row through another row's path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["AXIS_ORDERS", "AxisPart", "RowLayout", "axis_order"]

AXIS_ORDERS = ("transpose", "swapaxes", "permute", "t", "T", "mT")
"""The functions that return the axes of a tensor in another order."""


@dataclass(frozen=True, eq=False)
class AxisPart:
    """A factor of an axis.

    Args:
        size: its length.
        is_rows: it counts rows: the rows of the batch in order, or the rows in ``index``.
        index: (size,) int64, the row of each position.
    """

    size: int
    is_rows: bool = False
    index: Tensor | None = None

    def same(self, other: AxisPart) -> bool:
        """Return whether two parts have one size and the same rows."""
        kinds = self.size, self.is_rows
        return kinds == (other.size, other.is_rows) and self.index is other.index


Axis = tuple[AxisPart, ...]
Spread = tuple[int, int]


@dataclass(frozen=True, eq=False)
class RowLayout:
    """The rows of a batch in one tensor.

    Args:
        axes: the parts of every axis of the tensor.
        count: the rows of the batch, as the forward has them.
        spread: (repeat, tile): how often each declared row occurs in succession among them, and how
            often the whole batch is stacked.
    """

    axes: tuple[Axis, ...]
    count: int
    spread: Spread

    @staticmethod
    def of(shape: Sequence[int], axis: int = 0, spread: Spread = (1, 1)) -> RowLayout:
        """Return the layout of a tensor whose ``axis`` is the rows, in order.

        >>> RowLayout.of((2, 3, 4)).reshape((6, 4)).place()
        0
        """
        axes = []
        for i, size in enumerate(shape):
            axes.append((AxisPart(size, is_rows=i == axis),))
        return RowLayout(tuple(axes), shape[axis], spread)

    # ------------------------------------------------------------------ for side paths
    def place(self) -> int:
        """Return the axis that the rows are in."""
        for i, axis in enumerate(self.axes):
            if any(part.is_rows for part in axis):
                return i
        raise AssertionError("every layout has rows")

    @property
    def is_rows_first(self) -> bool:
        """True: the rows are in order and outermost, so that a view can give them an axis of their
        own.
        """
        for axis in self.axes:
            for part in axis:
                if part.is_rows:
                    return part.index is None
                if part.size > 1:
                    return False
        return False

    def rows(self, axis: int, device: torch.device) -> Tensor:
        """Return (the axis' length,) int64: the row of every position on the axis of the rows."""
        before = after = 1
        row_index = torch.empty(0, dtype=torch.int64, device=device)
        is_behind = False
        for part in self.axes[axis]:
            if part.is_rows:
                is_behind = True
                row_index = part.index if part.index is not None else _count(part.size, device)
            elif is_behind:
                after *= part.size
            else:
                before *= part.size
        if after > 1:
            row_index = row_index.repeat_interleave(after)
        return row_index.repeat(before) if before > 1 else row_index

    def like(self, other: RowLayout) -> bool:
        """Return whether two layouts have the rows at the same places, the last axis apart."""
        own_axes, other_axes = _joined(self.axes[:-1]), _joined(other.axes[:-1])
        if len(own_axes) != len(other_axes):
            return False
        for a, b in zip(own_axes, other_axes, strict=True):
            if len(a) != len(b) or not all(x.same(y) for x, y in zip(a, b, strict=True)):
                return False
        return True

    # ------------------------------------------------------------------ layouts of results
    def reshape(self, shape: Sequence[int]) -> RowLayout | None:
        """Return the layout of the same numbers in another shape; None if that cuts the rows."""
        waiting: list[AxisPart] = []
        for axis in reversed(self.axes):
            waiting += reversed(axis)
        axes: list[Axis] = []
        for size in shape:
            parts: list[AxisPart] = []
            missing = size
            while missing > 1:
                while waiting and waiting[-1].size == 1 and not waiting[-1].is_rows:
                    waiting.pop()
                if not waiting:
                    return None
                part = waiting.pop()
                if missing % part.size:
                    # The part is too long for the new axis: its outer factor goes here, the inner
                    # one waits for the next axis.
                    if part.is_rows or part.size % missing:
                        return None
                    waiting.append(AxisPart(part.size // missing))
                    part = AxisPart(missing)
                parts.append(part)
                missing //= part.size
            axes.append(tuple(parts))
        for part in waiting:
            if part.size > 1:
                return None
            if part.is_rows and axes:
                axes[0] = (part, *axes[0])  # a batch of one row
        made = self._with(axes)
        return made if made._has_rows else None

    def permute(self, order: Sequence[int]) -> RowLayout:
        """Return the layout of the axes in another order."""
        return self._with([self.axes[i] for i in order])

    def repeat(self, times: Sequence[int]) -> RowLayout | None:
        """Return the layout of the tensor tiled ``times`` along each axis."""
        extra = len(times) - len(self.axes)
        if extra < 0:
            return None
        axes: list[Axis] = [()] * extra + list(self.axes)
        return self._with([(AxisPart(n), *axis) for n, axis in zip(times, axes, strict=True)])

    def repeat_each(self, times: int, axis: int) -> RowLayout:
        """Return the layout with every position of an axis repeated in succession."""
        axes = list(self.axes)
        axes[axis] = (*axes[axis], AxisPart(times))
        return self._with(axes)

    def take(self, index: Tensor | slice, device: torch.device) -> RowLayout | None:
        """Return the layout of some positions of the first axis; None if that axis does not have
        the rows.

        Args:
            index: (positions,) int64 or bool, or a slice.
            device: of the tensor.
        """
        is_flat = isinstance(index, slice) or index.ndim == 1
        if not is_flat or self.place() != 0 or len(self.axes) < 2:
            return None
        rows = self.rows(0, device)[index]
        return self._with([(AxisPart(len(rows), is_rows=True, index=rows),), *self.axes[1:]])

    def with_last(self, size: int, axis: int = -1) -> RowLayout:
        """Return the layout with another number of features on an axis that does not have the
        rows.
        """
        axes = list(self.axes)
        axes[axis] = (AxisPart(size),)
        return self._with(axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        sizes = []
        for axis in self.axes:
            size = 1
            for part in axis:
                size *= part.size
            sizes.append(size)
        return tuple(sizes)

    @property
    def _has_rows(self) -> bool:
        return any(part.is_rows for axis in self.axes for part in axis)

    def _with(self, axes: Sequence[Axis]) -> RowLayout:
        return replace(self, axes=tuple(axes))


def _count(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, dtype=torch.int64, device=device)


def _joined(axes: Sequence[Axis]) -> list[list[AxisPart]]:
    """Return the parts of axes; adjacent parts that are not rows are multiplied into one, and those
    of size 1 are left out.
    """
    joined_axes = []
    for axis in axes:
        parts: list[AxisPart] = []
        for part in axis:
            if part.size == 1 and not part.is_rows:
                continue
            if parts and not part.is_rows and not parts[-1].is_rows:
                parts[-1] = replace(parts[-1], size=parts[-1].size * part.size)
            else:
                parts.append(part)
        joined_axes.append(parts)
    return joined_axes


def axis_order(name: str, ndim: int, given: Sequence[Any]) -> list[int]:
    """Return the order in which one of `AXIS_ORDERS` returns the axes of a tensor.

    Args:
        name: of the function.
        ndim: the axes of the tensor.
        given: its other arguments.

    >>> axis_order("transpose", 3, [0, -1]), axis_order("permute", 3, [(0, 2, 1)])
    ([2, 1, 0], [0, 2, 1])
    """
    order = list(range(ndim))
    if name in ("T", "t"):
        return order[::-1]
    if name == "permute":
        axes = given[0] if len(given) == 1 and isinstance(given[0], Sequence) else given
        return [axis % ndim for axis in axes]
    first, second = (axis % ndim for axis in (given or (-2, -1)))
    order[first], order[second] = second, first
    return order
