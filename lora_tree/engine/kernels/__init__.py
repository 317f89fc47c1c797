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
from collections.abc import Sequence

import torch

from .part import Part, Term, can_merge

__all__ = ["Part", "Term", "can_merge", "merge", "usable"]


def usable(device: torch.device) -> bool:
    """Whether kernels run on a device: it is CUDA, Triton is installed, and a small problem came out right."""
    return device.type == "cuda" and _tried(device)


def merge(parts: Sequence[Part]) -> None:
    """Write every part, ``weight ← round_once(pristine + Σ scale · left @ right)``, in one launch a kind of part.

    Args:
        parts: of devices for which `usable` is true.
    """
    importlib.import_module(f"{__name__}.merge").merge(parts)


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
