"""SumForm: one way to add up the increments that the rows of a batch owe at one site.

    out_row += Σ_n c(row, n) · scale_n · B_n A_n x_row

A form is made once for a batch, when a site first runs, and lays out the factors that do not train.
All arithmetic is plain autograd. If nothing is recorded, results are added in place.

Law: a row that owes nothing is never written to, and a coefficient of 0 is never multiplied with a
number that might be infinite.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ...lowrank import LowRank
from ..sidepaths.side import recorded
from .owed import Owed

__all__ = ["SumForm", "disjoint_layers"]

T = TypeVar("T")


class SumForm(ABC):
    """One way to add up one site's sum.

    Args:
        owed: what the rows owe there.
    """

    widens: ClassVar[bool] = True
    """True: `add` needs its arguments in dtypes that hold the sum."""

    lays_out: ClassVar[bool] = True
    """True: making one computes something from the factors."""

    def __init__(self, owed: Owed) -> None:
        self.owed = owed
        self.site = owed.site
        self._biased = owed.biased

    @classmethod
    def suits(cls, owed: Owed, tokens: int) -> bool:
        """Return whether this form can, and should, be taken here; if not, the next is tried."""
        return True

    def add(self, out: Tensor, x: Tensor, *, spare: bool) -> Tensor:
        """Return ``out`` plus what its rows owe.

        Args:
            out: (rows, …), in a dtype that holds the sum; any if the form does not widen.
            x: (rows, …), the site's input; in the side path's dtype or wider, unless it is ids, or
                the form does not widen.
            spare: nothing else holds ``out``, it may be written over.
        """
        live = self.owed.live and torch.is_grad_enabled()
        if live or recorded(out, x):
            out = self._add(out, x)
        else:
            out = self._add_in_place(out if spare else out.clone(), x)
        # Biases are added last and separately: they are rare, and no product includes them.
        return self._add_bias(out) if self._biased else out

    @abstractmethod
    def _add(self, out: Tensor, x: Tensor) -> Tensor:
        """Return the sum as a new tensor, for autograd."""

    @abstractmethod
    def _add_in_place(self, out: Tensor, x: Tensor) -> Tensor:
        """Return the sum; ``out`` may be written over."""

    # ------------------------------------------------------------------ the two products
    def _down(self, x: Tensor, value: LowRank, each: Tensor | None) -> Tensor:
        """Return the product with A.

        Args:
            x: the inputs of some rows.
            value: the increment.
            each: the rows' coefficients, multiplied in here where the tensor is narrow; None: all
                are 1.
        """
        # Ids are looked up in A, so A keeps its dtype.
        A = value.A.to(x.dtype) if x.is_floating_point() else value.A
        low = self.site.down(x, A)
        if each is None:
            return low
        return low * each.to(low.dtype).view(-1, *[1] * (low.ndim - 1))

    def _up(self, low: Tensor, B: Tensor) -> Tensor:
        return self.site.up(low, B.to(low.dtype))

    def _add_bias(self, out: Tensor) -> Tensor:
        """Add the biases that `lora_bias` trained, row by row."""
        owed, adapted = self.owed, self.owed.batch.adapted
        coefficients = owed.batch.coefficients(adapted)
        total = []
        for i in self._biased:
            value = owed.values[i].to(device=owed.device, dtype=owed.dtype)
            assert value.bias is not None
            each = owed.numbers(coefficients[:, i] * value.scale)
            total.append(each[:, None] * value.bias)  # (rows, out)
        delta = self.site.along_channels(torch.stack(total).sum(0), out.ndim)
        wide = delta.expand(len(adapted), *out.shape[1:])
        return owed.rows(adapted).added(out, wide, spare=False)


def disjoint_layers(parts: Sequence[T], rows_of: Callable[[T], Iterable[int]]) -> list[list[T]]:
    """Return parts in layers that have each row at most once: as few layers as first fit finds.

    >>> disjoint_layers(["ab", "c", "b"], lambda part: map(ord, part))
    [['ab', 'c'], ['b']]
    """
    # First fit is not optimal in general. For nodes of paths it finds the depths of the tree.
    layers: list[tuple[list[T], set[int]]] = []
    for part in parts:
        rows = set(rows_of(part))
        for members, taken in layers:
            if taken.isdisjoint(rows):
                members.append(part)
                taken.update(rows)
                break
        else:
            layers.append(([part], rows))
    return [members for members, _ in layers]
