"""Relaunch: launch a kernel that Triton has compiled, without asking Triton for it again.

    first launch of a kind     Triton looks the kernel up, or compiles it, and launches it
    each launch after it       the compiled kernel is given its grid, addresses and integers

At every launch Triton inspects each argument to learn which compiled kernel suits it, and asks the
driver about each pointer. On the host of a GPU that took 40 to 80 µs, many times as long as the
launch itself, and a forward launches two kernels for every site.

A kernel is compiled for its constants, for the dtypes of its tensors, and for addresses that are
multiples of 16 bytes or are not. (For its integers too, unless it is declared with
``do_not_specialize``, as these kernels are.) A `LaunchPlan` stands for the first two, and the
addresses are looked at here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from .factor_table import FactorTable
from .part import on
from .pointers import Pointers
from .segments import Segments
from .tiles import TYPES, products
from .tiling import Tiling

__all__ = ["LaunchPlan", "Relaunch", "shared_constants"]

_VERSION = tuple([int(number) for number in triton.__version__.split(".")[:2]])
_IS_KNOWN = (3, 6) <= _VERSION < (4, 0)
"""Whether a compiled kernel takes all its arguments in the order of its signature."""

if _IS_KNOWN:
    from triton import knobs


@dataclass(eq=False)
class LaunchPlan:
    """The part of a launch that is the same for all sites of one shape, in one batch.

    Args:
        grid: of programs.
        numbers: the integers.
        constants: in the order of the signature.
        kind: tells the constants and the dtypes of the tensors.
        options: of its compilation, as ``num_warps``.
    """

    grid: tuple[int, int, int]
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]
    kind: Hashable
    options: Mapping[str, Any]
    compiled: _Compiled | None = None


@dataclass(frozen=True, eq=False, slots=True)
class _Compiled:
    """A compiled kernel, taken apart as a launch needs it."""

    run: Any
    function: Any
    metadata: Any


def shared_constants(
    segments: Segments, table: FactorTable, side: int, tiling: Tiling
) -> tuple[Any, ...]:
    """Return the constants with which the ones of `shrink` and of `expand` begin, in this order:
    GROUP, SIDE, FACTOR, COMPUTE, ALIGNED, WHOLE and PRECISION.
    """
    compute, precision = products(table.numbers.device, tiling.compute)
    return (
        segments.sizes.group,
        side,
        TYPES[table.dtype],
        compute,
        table.aligned,
        table.wide[side] % 16 == 0,
        precision,
    )


class Relaunch:
    """One kernel, and its compiled forms.

    Args:
        kernel: it takes tensors, then integers that it is not specialised for, then constants.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[int, Hashable], _Compiled] = {}

    def __call__(
        self, plan: LaunchPlan, moving: Sequence[Tensor], lists: Pointers, table: Pointers
    ) -> None:
        """Launch it on the device of its tensors, in the current stream there.

        Args:
            plan: of this launch.
            moving: the kernel's first tensors, which differ from launch to launch.
            lists: the next ones, of the batch.
            table: the last ones, of the site.
        """
        device = moving[0].device
        if not _can_skip_triton(device):
            self._ask(plan, moving, lists, table)
            return
        addresses = [tensor.data_ptr() for tensor in moving]
        is_aligned = lists.aligned and table.aligned
        for address in addresses:
            is_aligned = is_aligned and not address % 16
        if not is_aligned or _is_observed():
            self._ask(plan, moving, lists, table)
            return
        compiled = plan.compiled
        if compiled is None:
            key = device.index, plan.kind
            compiled = plan.compiled = self._compiled.get(key)
            if compiled is None:
                made = self._ask(plan, moving, lists, table)
                compiled = _Compiled(made.run, made.function, made.packed_metadata)
                plan.compiled = self._compiled[key] = compiled
                return
        # A launch goes to the current device. To be sure of it takes as long as to launch.
        with on(device) if _has_several() else _NOTHING:
            compiled.run(
                *plan.grid,
                _stream(device),
                compiled.function,
                compiled.metadata,
                None,
                None,
                None,
                *addresses,
                *lists.addresses,
                *table.addresses,
                *plan.numbers,
                *plan.constants,
            )

    def _ask(
        self, plan: LaunchPlan, moving: Sequence[Tensor], lists: Pointers, table: Pointers
    ) -> Any:
        """Launch it by way of Triton, and return the compiled kernel."""
        tensors = (*moving, *lists.tensors, *table.tensors)
        with on(moving[0].device):
            launch = self._kernel[plan.grid]
            return launch(*tensors, *plan.numbers, *plan.constants, **plan.options)


_NOTHING = contextlib.nullcontext()


def _can_skip_triton(device: torch.device) -> bool:
    return device.type == "cuda" and _IS_KNOWN


def _is_observed() -> bool:
    """Return whether a profiler wants to be told of launches, which Triton does."""
    return bool(knobs.runtime.launch_enter_hook.calls)


def _stream(device: torch.device) -> int:
    return int(driver.active.get_current_stream(device.index))


@functools.cache
def _has_several() -> bool:
    return torch.cuda.device_count() > 1
