"""The factors of every path of a batch side by side at one site, laid out once.

    A (paths, R, in)     a path's A's below each other, in the order of the sum
    B (paths, out, R)    its B's side by side, with their scales

A path whose rank is below R is filled up with zeros. Products for single paths and the batched
product over all paths read the same memory, so that a prompt and the single tokens after it share
one layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...lowrank import LowRank
from ...lowrank.layout import Layout
from ..ledger import Lender
from ..slab import Slab

__all__ = ["PathStacks"]


@dataclass(frozen=True, eq=False)
class PathStacks:
    """The factors of every path.

    Args:
        A: (paths, R, in).
        B: (paths, out, R).
        ranks: of each path, without the zeros.
        layout: of the increments.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    layout: Layout

    @classmethod
    def of(
        cls,
        values: Sequence[LowRank],
        sums: Sequence[Sequence[float]],
        dtype: torch.dtype,
        device: torch.device,
        lend: Lender,
    ) -> PathStacks:
        """Lay paths out.

        Args:
            values: the increments of all nodes.
            sums: a coefficient for each value, for each path.
            dtype: of the result.
            device: of the result.
            lend: returns memory for it.

        Raises:
            BudgetError: there is no room.
        """
        ranks = []
        for coefficients in sums:
            own_ranks = [v.A.shape[-2] for v, c in zip(values, coefficients, strict=True) if c]
            ranks.append(sum(own_ranks))
        paths, most = len(ranks), max(ranks)
        out, into = values[0].shape[-2:]
        down_bytes = Slab.padded_bytes(paths * most * into * dtype.itemsize)
        up_bytes = Slab.padded_bytes(paths * most * out * dtype.itemsize)
        slab = Slab(lend(down_bytes + up_bytes, device))
        A = slab.cut(dtype, (paths, most, into))
        B = slab.cut(dtype, (paths, out, most))
        moved_values = [_moved(value, dtype, device) for value in values]
        zeros = moved_values[0].A.new_zeros(())
        downs: list[Tensor] = []
        for path, (rank, coefficients) in enumerate(zip(ranks, sums, strict=True)):
            ups: list[Tensor] = []
            for value, coefficient in zip(moved_values, coefficients, strict=True):
                if not coefficient:
                    continue
                scale = value.scale * coefficient
                downs.append(value.A)
                # Multiplying by 1.0 would be one copy more.
                ups.append(value.B if scale == 1.0 else value.B * scale)
            if rank < most:
                downs.append(zeros.expand(most - rank, into))
                ups.append(zeros.expand(out, most - rank))
            torch.cat(ups, dim=-1, out=B[path])
        # One call for the A's of all paths takes half the time of one call for each.
        torch.cat(downs, out=A.view(-1, into))
        return cls(A, B, tuple(ranks), values[0].layout)

    def value(self, path: int) -> LowRank:
        """Return one path's factors as an increment of scale 1."""
        rank = self.ranks[path]
        return LowRank(self.A[path, :rank], self.B[path, :, :rank], layout=self.layout)


def _moved(value: LowRank, dtype: torch.dtype, device: torch.device) -> LowRank:
    """Return a value in a dtype on a device."""
    # Compared here first: `to` checks its arguments, which takes longer than a copy of small
    # factors.
    for factor in (value.A, value.B):
        if factor.dtype != dtype or factor.device != device:
            return value.to(dtype=dtype, device=device)
    return value
