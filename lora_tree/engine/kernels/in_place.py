"""Add a batch's sum to outputs in place, in as little of the host's time as possible.

    many rows, or many inputs       shrink ─▶ expand
    one row of few inputs           direct; while a graph is captured, shrink ─▶ expand

Only the addresses of inputs and outputs differ between calls. Everything else is worked out once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

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

_LOADED: set[Hashable] = set()
"""The kinds of pairs that were launched before, so that their kernels are compiled already."""


def bound_in_place(
    x: Tensor, out: Tensor, segments: Segments, table: FactorTable, tiling: Tiling
) -> Callable[[Tensor, Tensor], None]:
    """Return the launches that add a batch's sum to outputs, for all tensors like these; they
    take the inputs and the outputs.

    Args:
        x: (rows · tokens, in), row by row.
        out: (rows · tokens, out), row by row.
        segments: of the batch.
        table: the factors. If they move, the table has to be rewritten in place.
        tiling: of the batch.
    """
    pair = _Pair(x, segments, table, tiling)
    if not is_direct(segments, table, tiling):
        return pair
    kind = x.device, x.dtype, out.dtype, tiling, table.kind
    return _DirectOrPair(bound_direct(x, out, segments, table, tiling), pair, kind)


class _Pair:
    """`shrink` and `expand`.

    Args:
        x: an input.
        segments, table, tiling: as `bound_in_place` takes them.
    """

    __slots__ = ("_expand", "_of", "_shrink")

    def __init__(self, x: Tensor, segments: Segments, table: FactorTable, tiling: Tiling) -> None:
        self._of = segments, table, tiling
        self._shrink = bound_shrink(x, segments, table, 0, tiling)
        self._expand: BoundLaunch | None = None

    def __call__(self, x: Tensor, out: Tensor) -> None:
        low = self._shrink(x)
        expand = self._expand
        if expand is None:
            segments, table, tiling = self._of
            expand = self._expand = bound_expand(low, out, out, segments, table, 1, tiling)
        expand(low, out, out)


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

    def __call__(self, x: Tensor, out: Tensor) -> None:
        if _is_captured(out):
            self._pair(x, out)
            return
        if self._kind not in _LOADED:
            # Kernels can't be compiled while a graph is captured. A caller runs the model before it
            # captures, and that run has to leave the pair compiled, too.
            self._pair(x, torch.empty_like(out))
            _LOADED.add(self._kind)
        self._direct(x, out)


def _is_captured(tensor: Tensor) -> bool:
    """Return whether launches for a tensor go into a graph now."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
