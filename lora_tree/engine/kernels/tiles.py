"""Tiles: the functions, types and options of Triton that the kernels share."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.standard import _elementwise_max, _elementwise_min, _sum_combine
from triton.runtime import driver

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton
    gdc_launch_dependents = gdc_wait = None

__all__ = [
    "TYPES",
    "added",
    "begin_next",
    "begins_early",
    "greatest",
    "larger",
    "options_for",
    "products",
    "shared_bytes",
    "smallest",
    "wait_for_last",
]

added = _sum_combine
"""The sum of two numbers, for ``tl.reduce`` and scans. `tl.sum` does not run in the interpreter.
The interpreter recognises this function, and would apply any other one number by number.
"""

smallest, greatest = _elementwise_min, _elementwise_max
"""Return the smaller and the larger of two numbers, in the same way."""

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def larger(x, y):  # type: ignore[no-untyped-def]
    """Return the larger of two numbers: with ``tl.reduce``, whether any is above zero."""
    return tl.where(x > y, x, y)


def products(device: torch.device, compute: torch.dtype) -> tuple[Any, str]:
    """Return the type and the precision of a kernel's products.

    Args:
        device: where it runs; on a CPU that is the interpreter, which multiplies no bf16.
        compute: the dtype that was asked for.
    """
    if device.type == "cpu":
        return tl.float32, "ieee"
    return TYPES[compute], "tf32x3"


@triton.jit  # type: ignore[untyped-decorator]
def wait_for_last(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until the kernel before this one is done, and what it wrote can be read."""
    if EARLY:
        gdc_wait()


@triton.jit  # type: ignore[untyped-decorator]
def begin_next(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the kernel after this one begin; its `wait_for_last` waits for what this one writes."""
    if EARLY:
        gdc_launch_dependents()


@functools.cache
def begins_early(device: torch.device) -> bool:
    """Return whether a kernel may begin while the one before it ends (from Hopper on).

    It saves the time between the two. Until `wait_for_last` it may read only what neither of them
    writes, and write nothing.
    """
    if device.type != "cuda" or gdc_wait is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def options_for(device: torch.device, warps: int, stages: int) -> dict[str, Any]:
    """Return the options of a kernel's compilation for a device.

    Args:
        device: in the interpreter there is none to compile for.
        warps: of a program.
        stages: of its loop; each has a buffer in shared memory.
    """
    if device.type != "cuda":
        return {}
    early = {"launch_pdl": True} if begins_early(device) else {}
    return {"num_warps": warps, "num_stages": stages, **early}


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Return how much shared memory a program may have on a GPU."""
    properties = driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])
