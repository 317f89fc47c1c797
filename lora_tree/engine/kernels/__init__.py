"""Kernels in Triton, and when they are used.

A kernel is loaded when a device first needs it: Triton is slow to import, and not there on every platform. It is tried
once, on a small problem; where it can't be compiled (Triton needs a C compiler) or comes out wrong, a warning says so,
and stock operations do the same work on the device.
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
    """Whether kernels run on a device: it is CUDA, Triton is installed, and a small problem came out right."""
    return device.type == "cuda" and _tried(device)


def merge_launch(parts: Sequence[MergePart]) -> Launch:
    """Lay out ``weight ← round_once(pristine + Σ scale · left @ right)`` of many weights for one launch a kind of part.

    Args:
        parts: of devices for which `usable` is true; `can_merge` says yes to each.
    """
    launch: Launch = importlib.import_module(f"{__name__}.merge").lay_out_parts(parts)
    return launch


def sample_launch(tensors: Sequence[Tensor], steps: Sequence[int]) -> Callable[[], Tensor]:
    """Lay out a sample of some tensors, the bits of a number every few numbers; calling it takes it in one launch."""
    made: Callable[[], Tensor] = importlib.import_module(f"{__name__}.sample").lay_out_samples(
        tensors, steps
    )
    return made


@functools.cache
def _tried(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        module = importlib.import_module(f"{__name__}.merge")
        return bool(module.is_right_on(device))
    except Exception as error:  # whatever a compiler, or a driver, may say
        warnings.warn(
            f"Triton can't be used on {device} ({type(error).__name__}: {error!s:.200}): "
            "merged switches take stock operations, which are slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
