"""Kernels in Triton, and the decision whether a device uses them.

    merge                      paths written into weights           `usable`
    undo                       the same in place, by undo log       `logs`
    sample                     the watch over written weights       `usable`
    shrink, expand, outer      a path for every row of a batch      `routes`
    direct                     one path for a few inputs            `routes`

A kernel is loaded when a device first needs it: Triton is slow to import, and some platforms have
none. It is tried once, on a small problem. If it can't be compiled (Triton needs a C compiler) or
its result is wrong, a warning says so, and stock operations do the same work on the device.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from .factor_table import FIELDS, FactorTable, can_route
from .log_part import BARE, NO_TERMS, SHARE, LaidTerms, LogMemory, LogPart
from .part import MergePart, MergeTerm, can_merge
from .segments import Segments, SegmentSizes, room_for, segment_numbers
from .tiling import Tiling, group_of

__all__ = [
    "BARE",
    "FIELDS",
    "NO_TERMS",
    "SHARE",
    "FactorTable",
    "InPlace",
    "LaidTerms",
    "Launch",
    "LogLaunch",
    "LogMemory",
    "LogPart",
    "MergePart",
    "MergeTerm",
    "RoutedKernels",
    "SegmentSizes",
    "Segments",
    "Tiling",
    "can_merge",
    "can_route",
    "group_of",
    "lay_terms",
    "log_height",
    "log_launch",
    "logs",
    "merge_launch",
    "room_for",
    "routed_kernels",
    "routes",
    "sample_launch",
    "segment_numbers",
    "usable",
]


InPlace: TypeAlias = Callable[[Tensor, Tensor, FactorTable], None]
"""(inputs, outputs, factors) → None: adds the sum for the inputs to the outputs, in place."""


class Launch(Protocol):
    """Many weights laid out for a kernel, by their addresses: it keeps no memory alive."""

    def run(self) -> None:
        """Write all of them; this returns before the device is done."""
        ...


class LogLaunch(Protocol):
    """Weights and their undo logs laid out for a kernel."""

    def run(self) -> list[bool]:
        """Rewrite them in place; return which had tiles without room. Those tiles are unchanged."""
        ...


def usable(device: torch.device) -> bool:
    """Return whether kernels run on a device.

    It has to be CUDA, Triton has to be installed, and a small problem has to come out right.
    """
    return device.type == "cuda" and _tried(device)


def routes(device: torch.device) -> bool:
    """Return whether the kernels of routed sums run on a device; a small problem is tried once."""
    return device.type == "cuda" and _tried(device) and _routes_tried(device)


def logs(device: torch.device) -> bool:
    """Return whether the kernel of undo logs runs on a device; a small weight is tried once."""
    return device.type == "cuda" and _tried(device) and _logs_tried(device)


@dataclass(frozen=True)
class RoutedKernels:
    """The launches of a routed sum; see the modules of their names."""

    shrink: Callable[[Tensor, Segments, FactorTable, int, Tiling], Tensor]
    expand: Callable[[Tensor, Tensor | None, Tensor, Segments, FactorTable, int, Tiling], None]
    outer: Callable[[Tensor, Tensor, Segments, FactorTable, int, Tiling], Tensor]
    in_place: Callable[[Tensor, Tensor, Segments, FactorTable, Tiling], InPlace]


@functools.cache
def routed_kernels() -> RoutedKernels:
    """Return the launches of routed sums, for devices for which `routes` is true."""
    names = ("shrink", "expand", "outer", "in_place")
    shrink, expand, outer, in_place = [
        importlib.import_module(f"{__name__}.{name}") for name in names
    ]
    return RoutedKernels(shrink.shrink, expand.expand, outer.outer, in_place.bound_in_place)


def merge_launch(parts: Sequence[MergePart]) -> Launch:
    """Lay out ``weight ← round_once(pristine + Σ scale · left @ right)`` for many weights.

    Weights of one kind share a launch.

    Args:
        parts: of devices for which `usable` is true; `can_merge` is true for each.
    """
    launch: Launch = importlib.import_module(f"{__name__}.merge").lay_out_parts(parts)
    return launch


def lay_terms(terms: Sequence[MergeTerm], batch: int) -> LaidTerms:
    """Lay the terms of a weight out for `log_launch`.

    Args:
        terms: of one dtype and layout, in the order of the sum; `can_merge` is true for them.
        batch: matrices of the weight.
    """
    lay: Callable[[Sequence[MergeTerm], int], LaidTerms]
    lay = importlib.import_module(f"{__name__}.undo").lay_out_terms
    return lay(terms, batch)


def log_launch(parts: Sequence[LogPart]) -> LogLaunch:
    """Lay parts of a switch by undo log out; weights of one kind share a launch.

    Args:
        parts: of devices for which `logs` is true.
    """
    launch: LogLaunch = importlib.import_module(f"{__name__}.undo").lay_out_logs(parts)
    return launch


def log_height(factors: torch.dtype) -> int:
    """Return the rows of a log's tile for factors of some dtype."""
    height: int = importlib.import_module(f"{__name__}.merge").ROWS[factors]
    return height


def sample_launch(tensors: Sequence[Tensor], steps: Sequence[int]) -> Callable[[], Tensor]:
    """Return a function that takes a sample of some tensors, as bits, in one launch.

    Args:
        tensors: on one device, laid out row by row.
        steps: for each tensor, the distance between the numbers that are sampled.
    """
    module = importlib.import_module(f"{__name__}.sample")
    take: Callable[[], Tensor] = module.lay_out_samples(tensors, steps)
    return take


@functools.cache
def _tried(device: torch.device) -> bool:
    # Looked for without an import, because a missing Triton is no reason to warn.
    if importlib.util.find_spec("triton") is None:
        return False

    def is_correct() -> bool:
        return bool(importlib.import_module(f"{__name__}.merge").is_merging_correct_on(device))

    return _is_correct(is_correct, device, "merged switches")


@functools.cache
def _routes_tried(device: torch.device) -> bool:
    return _is_correct(lambda: is_routing_correct_on(device), device, "batches of several paths")


@functools.cache
def _logs_tried(device: torch.device) -> bool:
    def is_correct() -> bool:
        return bool(importlib.import_module(f"{__name__}.undo").is_exact_on(device))

    return _is_correct(is_correct, device, "undo logs")


def _is_correct(attempt: Callable[[], bool], device: torch.device, work: str) -> bool:
    try:
        return attempt()
    except Exception as error:
        # A compiler, a driver and a cache folder may each fail with an error of their own, and
        # slower work is better than none.
        warnings.warn(
            f"Triton can't be used on {device} ({type(error).__name__}: {error!s:.200}): "
            f"{work} take stock operations, which are slower",
            RuntimeWarning,
            stacklevel=3,
        )
        return False


def is_routing_correct_on(device: torch.device) -> bool:
    """Return whether a small routed sum and its gradients come out right on a device."""
    kernels = routed_kernels()
    draw = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device="cpu").to(device, torch.bfloat16)

    factors = [(normal(8, 96), normal(160, 8), 0.5), (normal(8, 96), normal(160, 8), 2.0)]
    table = FactorTable.of(factors, device)
    sizes, numbers = segment_numbers([(1.0, 0.0), (0.5, 1.0), (0.0, 0.0)], [1, 2, 0], 16)
    segments, tiling = Segments(sizes, numbers.to(device)), Tiling.of(sizes, 1, torch.bfloat16)
    x, base = normal(3, 96), normal(3, 160)
    low = kernels.shrink(x, segments, table, 0, tiling)
    out = torch.empty_like(base)
    kernels.expand(low, base, out, segments, table, 1, tiling)
    grads = kernels.outer(low, base, segments, table, 1, tiling).float()
    exact, wanted = base.double(), torch.zeros(2, 160, 8, dtype=torch.float64, device=device)
    for row, owed in enumerate([(0.5, 1.0), (0.0, 0.0), (1.0, 0.0)]):
        for node, (A, B, scale) in enumerate(factors):
            narrow = A.double() @ x[row].double() * (owed[node] * scale)
            exact[row] += B.double() @ narrow
            wanted[node] += base[row, :, None].double() * narrow
    close = torch.isclose(out.double(), exact, rtol=2**-6, atol=0.5).all()
    # A single input has kernels of its own. Its row owes what the first one owes.
    sizes, numbers = segment_numbers([(0.5, 1.0)], [0], 1)
    segments, tiling = Segments(sizes, numbers.to(device)), Tiling.of(sizes, 1, torch.bfloat16)
    single = base[:1].clone()
    kernels.in_place(x[:1], single, segments, table, tiling)(x[:1], single, table)
    close &= torch.isclose(single.double(), exact[:1], rtol=2**-6, atol=0.5).all()
    close &= torch.isclose(grads.double(), wanted.flatten(), rtol=2**-6, atol=0.5).all()
    return bool(close) and torch.equal(out[1], base[1])
