"""Relaunch: launch a kernel that Triton has compiled, without asking Triton for it again.

    first launch of a kind     Triton looks the kernel up, or compiles it, and launches it
    each launch after it       the compiled kernel is given its grid, addresses and integers

At every launch Triton inspects each argument to learn which compiled kernel suits it, and asks the
driver about each pointer. On the host of a GPU that took 40 to 80 µs, many times as long as the
launch itself, and a forward launches two kernels for every site.

A kernel is compiled for its constants, for the dtypes of its tensors, and for addresses that are
multiples of 16 bytes or are not. (For its integers too, unless it is declared with
``do_not_specialize``, as these kernels are.) A `LaunchPlan` decides the first two, and the
addresses are checked at every launch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
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

__all__ = ["BoundLaunch", "LaunchPlan", "Relaunch", "shared_constants"]

_VERSION = tuple([int(number) for number in triton.__version__.split(".")[:2]])
_IS_KNOWN = (3, 6) <= _VERSION < (4, 0)
"""True: this Triton's compiled kernels take all their arguments in the order of the signature."""

if _IS_KNOWN:
    from triton import knobs

    _RUNTIME = knobs.runtime


@dataclass(eq=False)
class LaunchPlan:
    """The part of a launch that is the same for all sites of one shape, in one batch.

    Args:
        grid: of programs.
        numbers: the integers.
        constants: in the order of the signature.
        kind: identifies the constants and the dtypes of the tensors.
        options: of its compilation, as ``num_warps``.
        compiled: the compiled kernel; None until it is found.
    """

    grid: tuple[int, int, int]
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]
    kind: Hashable
    options: Mapping[str, Any]
    compiled: _Compiled | None = None


@dataclass(frozen=True, eq=False, slots=True)
class _Compiled:
    """A compiled kernel, taken apart as a launch on one device needs it."""

    run: Any
    function: Any
    metadata: Any
    device: int
    is_one_of_several: bool
    stream_of: Callable[[int], int]


def shared_constants(
    segments: Segments, table: FactorTable, side: int, tiling: Tiling
) -> tuple[Any, ...]:
    """Return the constants that come first in both `shrink` and `expand`: GROUP, SIDE, FACTOR,
    COMPUTE, ALIGNED, WHOLE and PRECISION, in this order.
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

    def bind(self, plan: LaunchPlan, lists: Pointers) -> BoundLaunch:
        """Return a launch that takes only the tensors that differ between sites and calls.

        Args:
            plan: of the launch.
            lists: tensors of the batch, which come after those of a call.
        """
        return BoundLaunch(self, plan, lists)

    def ask(
        self, plan: LaunchPlan, moving: Sequence[Tensor], lists: Pointers, table: Pointers
    ) -> Any:
        """Launch it through Triton, and return the compiled kernel.

        Args:
            plan, lists: as `bind` takes them.
            moving: the kernel's first tensors.
            table: tensors of the site, which come after the lists.
        """
        tensors = (*moving, *lists.tensors, *table.tensors)
        with on(moving[0].device):
            launch = self._kernel[plan.grid]
            return launch(*tensors, *plan.numbers, *plan.constants, **plan.options)

    def compiled(
        self, plan: LaunchPlan, moving: Sequence[Tensor], lists: Pointers, table: Pointers
    ) -> tuple[_Compiled, bool]:
        """Return a plan's compiled kernel, and whether it had to be launched to be found; the
        arguments are those of `ask`.
        """
        device = moving[0].device.index
        compiled = self._compiled.get((device, plan.kind))
        if compiled is not None:
            return compiled, False
        made = self.ask(plan, moving, lists, table)
        compiled = _Compiled(
            made.run, made.function, made.packed_metadata, device, _has_several(), _stream_of()
        )
        self._compiled[device, plan.kind] = compiled
        return compiled, True


class BoundLaunch:
    """A kernel's launches for one plan and one batch; all sites of one shape share it.

    A forward launches hundreds of times for a token, and the host's time for that is most of what a
    path beside the weights costs. So every argument that stays the same is put together once. The
    addresses of a site's table come with the call: with a launch for each site, every new batch
    would have to make as many as the base has sites.
    """

    __slots__ = ("_compiled", "_last", "_lists", "_plan", "_relaunch")

    def __init__(self, relaunch: Relaunch, plan: LaunchPlan, lists: Pointers) -> None:
        self._relaunch, self._plan, self._lists = relaunch, plan, lists
        self._last = (*plan.numbers, *plan.constants)
        self._compiled = plan.compiled if lists.aligned else None

    def __call__(self, table: Pointers, *moving: Tensor) -> None:
        """Launch it on the device of its lists, in the current stream there.

        Args:
            table: tensors of the site, on that device.
            moving: the kernel's first tensors, on that device.
        """
        compiled = self._compiled
        addresses, bits = [], 0
        for tensor in moving:
            address = tensor.data_ptr()
            addresses.append(address)
            bits |= address
        if compiled is None or bits % 16 or not table.aligned or _is_observed():
            self._by_triton(table, moving, bits)
            return
        # A launch goes to the current device. Setting that takes as long as the launch, so it is
        # done only if there are several devices.
        with on(moving[0].device) if compiled.is_one_of_several else _NOTHING:
            compiled.run(
                *self._plan.grid,
                compiled.stream_of(compiled.device),
                compiled.function,
                compiled.metadata,
                None,
                None,
                None,
                *addresses,
                *self._lists.addresses,
                *table.addresses,
                *self._last,
            )

    def _by_triton(self, table: Pointers, moving: Sequence[Tensor], bits: int) -> None:
        """Launch through Triton, and keep the compiled kernel if the next launch can do without
        Triton.
        """
        device = moving[0].device
        is_aligned = self._lists.aligned and table.aligned and not bits % 16
        if not (is_aligned and _can_skip_triton(device)) or _is_observed():
            self._relaunch.ask(self._plan, moving, self._lists, table)
            return
        compiled, is_launched = self._relaunch.compiled(self._plan, moving, self._lists, table)
        self._compiled = self._plan.compiled = compiled
        if not is_launched:
            self(table, *moving)


_NOTHING = contextlib.nullcontext()


def _can_skip_triton(device: torch.device) -> bool:
    return device.type == "cuda" and _IS_KNOWN


def _is_observed() -> bool:
    """Return whether a profiler has asked to be told of launches, which only Triton's way does."""
    return bool(_RUNTIME.launch_enter_hook.calls)


def _stream_of() -> Callable[[int], int]:
    """Return the function that returns a device's current stream. It is kept, because finding the
    active driver takes longer than calling it.
    """
    find: Callable[[int], int] = driver.active.get_current_stream
    return find


def _has_several() -> bool:
    return torch.cuda.device_count() > 1
