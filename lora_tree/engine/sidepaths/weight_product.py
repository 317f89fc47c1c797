"""WeightProduct: a product with a weight, repeated with the two factors, one after the other.

    linear(x, W)                       linear(linear(x, right), left)
    x @ W,  bmm(x, W)                  (x @ left) @ right
    W @ x                              left @ (right @ x)
    grouped_mm(x, W, offs)             grouped_mm(grouped_mm(x, left, offs), right, offs)
    einsum("ti,eoi->teo", x, W)        einsum("teR,eoR->teo", einsum("ti,eRi->teR", x, right), left)

The function is the one that the module called, so the factors are multiplied in the module's own
grouping: with one expert's tokens, with one expert for each token, or with all experts and the
offsets at which their tokens end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .weight_view import FactorPair

__all__ = ["WeightProduct", "multiplies", "product_of"]

STRIDE_BYTES = 16
"""A row of a grouped product's operands has to take a multiple of this."""

Half = Callable[[Tensor, FactorPair], Tensor]
Axes = Callable[[int], tuple[int, int] | None]


@dataclass(frozen=True, eq=False)
class WeightProduct:
    """A product with one weight, in two halves.

    Args:
        x: the other operand.
        down: x and the factors → the narrow product.
        up: the narrow product and the factors → the delta of the result.
        features: the axis of the ranks in the narrow product, and of the features in the result.
        scale: the number that multiplies the product.
        moved: answers `follow` if the product changes the order of axes; None: it keeps the order.
        keeps_axes: the result has the axes of ``x``, but for the length of ``features``.
    """

    x: Tensor
    down: Half
    up: Half
    features: int = -1
    scale: float = 1.0
    moved: Axes | None = None
    keeps_axes: bool = True

    def follow(self, axis: int) -> tuple[int, int] | None:
        """Return where an axis of x, from the end, is in the narrow product and in the result; None
        if the product sums over it.
        """
        if self.moved is not None:
            return self.moved(axis)
        return None if axis == self.features else (axis, axis)


def multiplies(name: str) -> bool:
    """Return whether a function of that name multiplies with a weight in a way that is known."""
    return name in _PRODUCTS


def product_of(
    name: str, func: Any, at: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> WeightProduct | None:
    """Return a call as a product with the weight among its arguments; None if it is no such
    product.

    Args:
        name: of the function.
        func: the function.
        at: which argument is the weight.
        args, kwargs: all arguments.
    """
    return _PRODUCTS[name](func, at, args, kwargs)


Made = WeightProduct | None


def _linear(func: Any, at: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Made:
    if at != 1:
        return None
    return WeightProduct(
        args[0],
        down=lambda x, factors: F.linear(x, factors.right),
        up=lambda low, factors: F.linear(low, factors.left),
    )


def _matmul(func: Any, at: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Made:
    return _times(args[0], args[1], at)


def _rmatmul(func: Any, at: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Made:
    return _times(args[1], args[0], 1 - at)


def _added(func: Any, at: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Made:
    """Return the product in `addmm` or `baddbmm`, which add a bias to it."""
    if at == 0:
        return None
    return _times(args[1], args[2], at - 1, scale=kwargs.get("alpha", 1.0))


def _times(left: Any, right: Any, at: int, *, scale: float = 1.0) -> Made:
    if at == 1:
        return WeightProduct(
            left,
            down=lambda x, factors: x @ factors.left,
            up=lambda low, factors: low @ factors.right,
            scale=scale,
        )
    x = right
    return WeightProduct(
        x,
        down=lambda x, factors: factors.right @ x,
        up=lambda low, factors: factors.left @ low,
        features=-2 if x.ndim > 1 else -1,
        scale=scale,
    )


def _grouped(func: Any, at: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Made:
    """Return a product with several experts, each with successive tokens of its own."""
    x, weight, *more = args
    offs = kwargs.get("offs", more[0] if more else None)
    if at != 1 or offs is None or weight.ndim != 3 or x.ndim != 2:
        return None

    def down(x: Tensor, factors: FactorPair) -> Tensor:
        return func(x, _padded(factors.left, -1), offs=offs)  # type: ignore[no-any-return]

    def up(low: Tensor, factors: FactorPair) -> Tensor:
        return func(low, _padded(factors.right, -2), offs=offs)  # type: ignore[no-any-return]

    return WeightProduct(x, down, up)


def _padded(factor: Tensor, axis: int) -> Tensor:
    """Return a factor with its rank filled up with zeros to one that a grouped product takes."""
    missing = -factor.shape[axis] % (STRIDE_BYTES // factor.element_size())
    if not missing:
        return factor
    return F.pad(factor, (0, missing) if axis == -1 else (0, 0, 0, missing))


def _einsum(func: Any, at: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Made:
    equation, *operands = args
    inputs, arrow, out = str(equation).replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow or "." in inputs or len(letters) != 2 or len(operands) != 2:
        return None
    x, input_letters, weight_letters = operands[2 - at], letters[2 - at], letters[at - 1]
    batch, row, column = weight_letters[:-2], weight_letters[-2], weight_letters[-1]
    rank = next(c for c in "rRzZqQ" if c not in equation)
    of_left, of_right = batch + row + rank, batch + rank + column
    # The axis that is summed over decides which factor comes first.
    down_factor, up_factor = operator.attrgetter("right"), operator.attrgetter("left")
    summed, first, second = column, of_right, of_left
    if row in input_letters and row not in out:
        summed, first, second = row, of_left, of_right
        down_factor, up_factor = up_factor, down_factor
    elif column not in input_letters or column in out:
        return None
    low = "".join(dict.fromkeys(input_letters.replace(summed, "") + batch)) + rank

    def moved(axis: int) -> tuple[int, int] | None:
        letter = input_letters[axis]
        if letter not in low or letter not in out:
            return None
        return low.index(letter) - len(low), out.index(letter) - len(out)

    return WeightProduct(
        x,
        down=lambda x, factors: torch.einsum(
            f"{input_letters},{first}->{low}", x, down_factor(factors)
        ),
        up=lambda narrow, factors: torch.einsum(
            f"{low},{second}->{out}", narrow, up_factor(factors)
        ),
        moved=moved,
        keeps_axes=False,
    )


_PRODUCTS: dict[str, Callable[[Any, int, Sequence[Any], Mapping[str, Any]], Made]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), _matmul),
    "__rmatmul__": _rmatmul,
    **dict.fromkeys(("addmm", "baddbmm"), _added),
    # torch's own, and the one that transformers registers for where torch's can't run.
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),
    "einsum": _einsum,
}
