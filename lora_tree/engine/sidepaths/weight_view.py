"""WeightView: a tensor that a forward made of a site's weight, and the factors cut in the same way.

    W           (experts, out, in)       left (experts, out, r)   right (experts, r, in)
    W[e].T      (in, out)                right[e].T               left[e].T

Modules cut their weights up before they multiply: they take one expert's, or a copy for every
token, transpose it, split it. Each of these steps is applied to the factors as well. So the product
of the two factors always equals the delta of the tensor that the forward holds, and is never
computed.

Law: a view of the weight that can't be made of the factors is refused, by the name of the function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...lowrank import LowRank
from ...sites import Site
from ..rows.row_layout import AXIS_ORDERS, axis_order

__all__ = ["FactorPair", "WeightView", "is_view", "views_of"]


@dataclass(frozen=True, eq=False)
class FactorPair:
    """A delta as two factors, cut as the weight was.

    Args:
        left: (*batch, rows, r).
        right: (*batch, r, cols).
        bias: (rows,), or (rows of the batch, rows), or None.
    """

    left: Tensor
    right: Tensor
    bias: Tensor | None = None

    def over(self, change: Callable[[Tensor], Tensor]) -> FactorPair:
        """Return the factors with ``change`` applied to both."""
        return FactorPair(change(self.left), change(self.right), self.bias)

    def to(self, dtype: torch.dtype) -> FactorPair:
        """Return the factors in a dtype; the bias keeps its own."""
        return self.over(lambda factor: factor.to(dtype))

    @property
    def mT(self) -> FactorPair:
        """The factors of the transpose."""
        return FactorPair(self.right.mT, self.left.mT, self.bias)


Step = Callable[[FactorPair], FactorPair]
Given = Sequence[Any]


@dataclass(frozen=True, eq=False)
class WeightView:
    """A tensor made of a site's weight.

    Args:
        site: the site of the weight.
        steps: what was done to the weight, in order, as functions of its factors.
    """

    site: Site
    steps: tuple[Step, ...] = ()

    def of(self, value: LowRank, bias: Tensor | None) -> FactorPair:
        """Return an increment's factors and a bias, cut like this tensor."""
        weight = self.site.weight
        assert weight is not None
        left, right = self.site.sides_of(value)
        if weight.ndim == 2:
            left, right = left[0], right[0]
        factors = FactorPair(left, right, bias)
        for step in self.steps:
            factors = step(factors)
        return factors

    def then(self, step: Step) -> WeightView:
        """Return the view with one more step."""
        return replace(self, steps=(*self.steps, step))


Made = list[tuple[Tensor, WeightView]] | None


def is_view(name: str) -> bool:
    """Return whether a function of that name may make a view of a weight."""
    return name in _VIEWS


def views_of(view: WeightView, name: str, weight: Tensor, given: Sequence[Any], out: Any) -> Made:
    """Return the tensors that a function made of a weight, each with its view; None if one of them
    is not a product of views of the factors.

    Args:
        view: of the weight that the function was given.
        name: of the function.
        weight: the tensor that it was given.
        given: its other arguments.
        out: its result.
    """
    return _VIEWS[name](view, weight, name, given, out)


# ---------------------------------------------------------------------- one function each
def _same(view: WeightView, weight: Tensor, name: str, given: Given, out: Any) -> Made:
    return [(out, view)]


def _turned(view: WeightView, weight: Tensor, name: str, given: Given, out: Any) -> Made:
    """Swap the last two axes."""
    order = axis_order(name, weight.ndim, given)
    if order != [*range(weight.ndim - 2), weight.ndim - 1, weight.ndim - 2]:
        return None
    return [(out, view.then(lambda factors: factors.mT))]


def _item(view: WeightView, weight: Tensor, name: str, given: Given, out: Any) -> Made:
    """Take one expert, some experts, an expert for each token, or some rows of a matrix."""
    (index,) = given
    if isinstance(index, tuple):
        if len(index) != 1:
            return None
        (index,) = index
    return _indexed(view, weight, index, out)


def _index_select(view: WeightView, weight: Tensor, name: str, given: Given, out: Any) -> Made:
    dim, index = given
    return None if dim % weight.ndim else _indexed(view, weight, index, out)


def _indexed(view: WeightView, weight: Tensor, index: Any, out: Tensor) -> Made:
    if weight.ndim == 3:
        return [(out, view.then(lambda factors: factors.over(lambda t: t[index])))]
    if isinstance(index, slice) and weight.ndim == 2:
        return [(out, view.then(_rows_step(index)))]
    return None


def _rows_step(rows: slice) -> Step:
    """Return the step that keeps some rows of a matrix."""

    def step(factors: FactorPair) -> FactorPair:
        bias = None if factors.bias is None else factors.bias[..., rows]
        return FactorPair(factors.left[..., rows, :], factors.right, bias)

    return step


def _pieces(view: WeightView, weight: Tensor, name: str, given: Given, out: Any) -> Made:
    """Return the pieces of `chunk`, `split` or `unbind`, which are successive on one axis."""
    piece_views = []
    start = 0
    for piece in out:
        if piece.ndim < weight.ndim:  # unbind, or a loop over the experts
            if piece.shape != weight.shape[1:]:
                return None
            made = _indexed(view, weight, start, piece)
            start += 1
        else:
            made = _cut(view, weight, piece, start)
            start += next((p for p, w in zip(piece.shape, weight.shape, strict=True) if p != w), 0)
        if made is None:
            return None
        piece_views += made
    return piece_views


def _cut(view: WeightView, weight: Tensor, piece: Tensor, start: int) -> Made:
    """Return a piece that is shorter on one axis: some experts, rows or columns."""
    differ = [i for i, (p, w) in enumerate(zip(piece.shape, weight.shape, strict=True)) if p != w]
    if not differ:
        return [(piece, view)]
    where = slice(start, start + piece.shape[differ[0]])
    if len(differ) > 1:
        return None
    from_end = weight.ndim - differ[0]
    if from_end == 1:
        return [(piece, view.then(lambda f: FactorPair(f.left, f.right[..., where], f.bias)))]
    if from_end == 2:
        return [(piece, view.then(_rows_step(where)))]
    return [(piece, view.then(lambda factors: factors.over(lambda t: t[where])))]


def _reshaped(view: WeightView, weight: Tensor, name: str, given: Given, out: Any) -> Made:
    """Return a matrix (experts · rows, in) as one matrix for each expert."""
    if out.shape == weight.shape:
        return [(out, view)]
    if weight.ndim != 2 or out.ndim != 3 or out.shape[-1] != weight.shape[-1]:
        return None
    experts, rows = out.shape[:2]

    def step(factors: FactorPair) -> FactorPair:
        left = factors.left.reshape(experts, rows, -1)
        return FactorPair(left, factors.right.expand(experts, -1, -1), None)

    return [(out, view.then(step))]


_VIEWS: dict[str, Callable[[WeightView, Tensor, str, Given, Any], Made]] = {
    **dict.fromkeys(
        ("to", "type_as", "contiguous", "clone", "float", "half", "bfloat16", "type"), _same
    ),
    **dict.fromkeys(AXIS_ORDERS, _turned),
    "__getitem__": _item,
    "index_select": _index_select,
    **dict.fromkeys(("chunk", "split", "unbind", "__iter__"), _pieces),
    **dict.fromkeys(("view", "reshape", "unflatten"), _reshaped),
}
