"""Kernels in Triton, and the decision whether a device uses them.

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
from typing import Protocol

import torch
from torch import Tensor

from .part import MergePart, MergeTerm, can_merge

__all__ = [
    "Launch",
    "MergePart",
    "MergeTerm",
    "can_merge",
    "merge_launch",
    "sample_launch",
    "usable",
]


class Launch(Protocol):
    """Many weights laid out for a kernel: addresses, and none of the memory that they lead to."""

    def run(self) -> None:
        """Write all of them; the device works on while this returns."""
        ...


def usable(device: torch.device) -> bool:
    """Return whether kernels run on a device.

    It has to be CUDA, Triton has to be installed, and a small problem has to come out right.
    """
    return device.type == "cuda" and _tried(device)


def merge_launch(parts: Sequence[MergePart]) -> Launch:
    """Lay out ``weight ← round_once(pristine + Σ scale · left @ right)`` for many weights.

    Weights of one kind share a launch.

    Args:
        parts: of devices for which `usable` is true; `can_merge` says yes to each.
    """
    launch: Launch = importlib.import_module(f"{__name__}.merge").lay_out_parts(parts)
    return launch


def sample_launch(tensors: Sequence[Tensor], steps: Sequence[int]) -> Callable[[], Tensor]:
    """Return a function that takes a sample of some tensors, as bits, in one launch.

    Args:
        tensors: on one device, laid out row by row.
        steps: how far the sampled numbers of each lie apart.
    """
    module = importlib.import_module(f"{__name__}.sample")
    take: Callable[[], Tensor] = module.lay_out_samples(tensors, steps)
    return take


@functools.cache
def _tried(device: torch.device) -> bool:
    # Asked without an import: where there is no Triton, its absence is no reason to warn.
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        module = importlib.import_module(f"{__name__}.merge")
        return bool(module.is_right_on(device))
    except Exception as error:
        # A compiler, a driver and a cache folder may each fail with an error of their own, and a
        # slower switch is better than none.
        warnings.warn(
            f"Triton can't be used on {device} ({type(error).__name__}: {error!s:.200}): "
            "merged switches take stock operations, which are slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
