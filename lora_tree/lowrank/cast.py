"""Move or round a value, and tell whether that changed it."""

from __future__ import annotations

import torch

from ..errors import SpecError
from .value import LowRank

__all__ = ["cast", "differs"]


def cast(value: LowRank, device: torch.device | str | None, dtype: torch.dtype | None) -> LowRank:
    """Return the value on a device and in a dtype; None leaves one as it is.

    Raises:
        SpecError: a finite factor is too large for the dtype.
    """
    moved = value.to(device=device, dtype=dtype)
    if not _is_narrower(value, moved):
        return moved
    largest = max(float(t.abs().max()) for t in value.tensors)
    most = torch.finfo(moved.dtype).max
    # Compare the numbers before the cast: a number that is too large becomes infinite in some
    # dtypes, and the dtype's largest number in others.
    if largest > most and value.is_finite:
        raise SpecError(
            f"a factor goes up to {largest:.5g}, {_name(moved.dtype)} to {most:.5g}",
            "keep it in another dtype: bfloat16 and float32 go up to 3e38",
        )
    return moved


def differs(old: LowRank, new: LowRank) -> bool:
    """Return whether a cast of ``old`` to ``new`` changed a number."""
    if not _is_narrower(old, new):
        return False
    for was, now in zip(old.tensors, new.tensors, strict=True):
        if not torch.equal(now.to(device=was.device, dtype=was.dtype), was):
            return True
    return False


def _is_narrower(old: LowRank, new: LowRank) -> bool:
    """Return whether a new dtype is narrower than the old one; False on the meta device."""
    if old.A.is_meta or new.A.is_meta:
        return False
    for was, now in zip(old.tensors, new.tensors, strict=True):
        before, after = torch.finfo(was.dtype), torch.finfo(now.dtype)
        if after.max < before.max or after.eps > before.eps:
            return True
    return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
