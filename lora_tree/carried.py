"""Decide whether a base's tensor that an adapter carries is the base's own, or an override.

PEFT saves some tensors of the base beside the factors: every bias with ``bias="all"``, the whole
of an embedding or a head that is targeted. Such a tensor replaces the base's. If it is the base's
own, that changes nothing; if it is another, it is an override that the file did not declare.

The base may be loaded in another dtype than it was trained in. So both may be roundings of the same
stored numbers:

    one dtype holds the other    equal, once the wider one is rounded to the narrower one
    fp16 and bf16                within one rounding of each: one number may have become both

Law: the same stored numbers, loaded in any dtype, count as the base's own. A tensor that training
changed is an override if the change shows in the narrower of the two dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import BaseMismatch

__all__ = ["is_own", "is_same_tensor", "wider_tensor"]

BLOCK = 1 << 21
"""Numbers compared at once: a head is large, and most tensors that differ do so early."""


def is_own(name: str, carried: Tensor, own: Tensor) -> bool:
    """Return whether a tensor that an adapter carries is the base's own; else it is an override.

    Args:
        name: the parameter's, for errors.
        carried: the adapter's.
        own: the base's, on any device, in any dtype.

    Raises:
        BaseMismatch: they differ in shape; or the base's has no numbers (the meta device).
    """
    if own.is_meta:
        raise BaseMismatch(
            f"{name}: the adapter carries this tensor, and the base's own has no numbers here",
            "load the base's weights first, or name its folder: --base FOLDER, base=…",
        )
    if own.shape != carried.shape:
        raise BaseMismatch(
            f"{name}: the adapter carries it as {tuple(carried.shape)}, "
            f"the base has it as {tuple(own.shape)}",
            "attach the base that it was trained on; one whose vocabulary grew in training is "
            "resized first: base.resize_token_embeddings(…)",
        )
    return is_same_tensor(own, carried)


def is_same_tensor(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors may be the same stored numbers, each loaded in its own dtype.

    >>> third = torch.tensor([1 / 3])
    >>> is_same_tensor(third, third.bfloat16()), is_same_tensor(third.half(), third.bfloat16())
    (True, True)
    >>> is_same_tensor(third, third.bfloat16() * 1.01)
    False
    """
    if one.shape != other.shape or not (one.is_floating_point() and other.is_floating_point()):
        return False
    return all(_agree(x, y) for x, y in zip(_blocks(one), _blocks(other), strict=True))


def wider_tensor(one: Tensor, other: Tensor) -> Tensor:
    """Return the tensor whose dtype holds the other's numbers; the first if neither dtype does."""
    wide = torch.promote_types(one.dtype, other.dtype)
    if wide == other.dtype != one.dtype:
        return other
    return one


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor in blocks on the CPU; an empty one is one empty block."""
    flat = tensor.detach().reshape(-1)
    # The two tensors may be on different devices. Both come to the CPU a block at a time, so that
    # the base's device needs no memory for the comparison.
    for start in range(0, max(flat.numel(), 1), BLOCK):
        yield flat[start : start + BLOCK].cpu()


def _agree(x: Tensor, y: Tensor) -> bool:
    """Return whether two blocks may be the same stored numbers."""
    wide = torch.promote_types(x.dtype, y.dtype)
    if wide in (x.dtype, y.dtype):
        # The wider one may hold more digits of the stored number: it is
        # rounded as the narrower one was.
        narrow = y.dtype if wide == x.dtype else x.dtype
        return torch.equal(x.to(narrow), y.to(narrow))
    apart = (x.double() - y.double()).abs()
    near = apart <= _half_step(x) + _half_step(y)
    # Two infinities are equal, and their distance is NaN.
    equal = x.double() == y.double()
    return bool((near | equal).all())


def _half_step(t: Tensor) -> Tensor:
    """Return the most that rounding to ``t``'s dtype can have changed each number, in float64."""
    info = torch.finfo(t.dtype)
    _, exponent = torch.frexp(t.double().abs())  # |t| lies in [2^(e-1), 2^e)
    # Subnormal numbers are spaced like the smallest normal ones, no closer.
    least = round(math.log2(info.smallest_normal))
    exponent = torch.where(t == 0, least, (exponent - 1).clamp(min=least))
    step = exponent + round(math.log2(info.eps))
    return torch.ldexp(torch.ones_like(step, dtype=torch.float64), step - 1)
