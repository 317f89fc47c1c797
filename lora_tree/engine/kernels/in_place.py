"""Add a batch's sum to outputs in place, in as little of the host's time as possible.

    many rows, or many inputs       shrink ─▶ expand
    one row of few inputs           direct; while a graph is captured, shrink ─▶ expand

Only the addresses of inputs, outputs and factors differ between calls and sites of one shape.
Everything else is worked out once for a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeAlias

import torch
from torch import Tensor

from .direct import bound_direct, is_direct
from .expand import bound_expand
from .factor_table import FactorTable
from .relaunch import BoundLaunch
from .segments import Segments
from .shrink import bound_shrink
from .tiling import Tiling

__all__ = ["bound_in_place"]

_Run: TypeAlias = Callable[[Tensor, Tensor, FactorTable], None]
"""(inputs, outputs, factors) → None."""

_LOADED: set[Hashable] = set()
"""The kinds of pairs that were launched before, so that their kernels are compiled already."""


def bound_in_place(
    x: Tensor, out: Tensor, segments: Segments, table: FactorTable, tiling: Tiling
) -> _Run:
    """Return the launches that add a batch's sum to outputs, for all tensors like these and all
    tables of one kind; they take the inputs, the outputs and the table.

    Args:
        x: (rows · tokens, in), row by row.
        out: (rows · tokens, out), row by row.
        segments: of the batch.
        table: the factors.
        tiling: of the batch.
    """
    key = "in place", x.dtype, out.dtype, tiling, table.kind
    found: _Run | None = segments.plans.get(key)
    if found is None:
        found = segments.plans[key] = _bind(x, out, segments, table, tiling)
    return found


def _bind(x: Tensor, out: Tensor, segments: Segments, table: FactorTable, tiling: Tiling) -> _Run:
    pair = _Pair(x, out, segments, table, tiling)
    if not is_direct(segments, table, tiling):
        return pair
    kind = x.device, x.dtype, out.dtype, tiling, table.kind
    return _DirectOrPair(bound_direct(x, out, segments, table, tiling), pair, kind)


class _Pair:
    """`shrink` and `expand`; the arguments are those of `bound_in_place`."""

    __slots__ = ("_expand", "_shrink")

    def __init__(
        self, x: Tensor, out: Tensor, segments: Segments, table: FactorTable, tiling: Tiling
    ) -> None:
        self._shrink = bound_shrink(x, segments, table, 0, tiling)
        self._expand = bound_expand(self._shrink.low, out, out, segments, table, 1, tiling)

    def __call__(self, x: Tensor, out: Tensor, table: FactorTable) -> None:
        low = self._shrink(x, table)
        self._expand(table.to_expand, low, out, out)


class _DirectOrPair:
    """The launch of `direct`, or while a graph is captured the pair.

    Args:
        direct: adds the sum in one launch.
        pair: adds it in two.
        kind: identifies the kernels of the pair.
    """

    __slots__ = ("_direct", "_kind", "_pair")

    def __init__(self, direct: BoundLaunch, pair: _Pair, kind: Hashable) -> None:
        self._direct, self._pair, self._kind = direct, pair, kind

    def __call__(self, x: Tensor, out: Tensor, table: FactorTable) -> None:
        if _is_captured(out):
            self._pair(x, out, table)
            return
        if self._kind not in _LOADED:
            # Kernels can't be compiled while a graph is captured. A caller runs the model before it
            # captures, and that run has to leave the pair compiled, too.
            self._pair(x, torch.zeros_like(out), table)
            _LOADED.add(self._kind)
        self._direct(table.to_shrink, x, out)


def _is_captured(tensor: Tensor) -> bool:
    """Return whether launches for a tensor go into a graph now."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
