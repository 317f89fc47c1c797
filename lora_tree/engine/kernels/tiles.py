"""Tiles: what the kernels share in Triton's own words."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.standard import _sum_combine

__all__ = ["TYPES", "added", "larger", "products"]

added = _sum_combine
"""Returns a sum, for ``tl.reduce`` and scans. `tl.sum` itself does not run in the interpreter. That
knows this very function, and would take any other number by number.
"""

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
