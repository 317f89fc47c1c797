"""Tensors of a base that an adapter carries, and whether they are the base's own.

PEFT saves some tensors of the base beside the factors: every bias with ``bias="all"``, the whole of an embedding or a
head that is targeted. They replace and do not add up, so they are accepted only where they change nothing.

The base may be loaded in another dtype than it was trained in, so both may be roundings of the same stored numbers:

    one dtype holds the other    equal, once the wider one is rounded to the narrower one
    fp16 and bf16                within one rounding of each: no number lies nearer that both could have come from

Law: a load of the same stored numbers in any dtype is accepted; a step of training that shows in the narrower of the
two dtypes is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import BaseMismatch

__all__ = ["check_carried", "is_same_tensor", "wider_tensor"]

BLOCK = 1 << 21
"""How many numbers are compared at once: a head is large, and most that differ do so early."""


def check_carried(name: str, carried: Tensor, own: Tensor, *todo: str) -> None:
    """Refuse a tensor that an adapter carries and that is not the base's own.

    Args:
        name: of the parameter.
        carried: the adapter's.
        own: the base's, on any device, in any dtype.
        todo: what to do about it.

    Raises:
        BaseMismatch: they differ in shape or in a number; or the base's has no numbers (the meta device).
    """
    if own.is_meta:
        raise BaseMismatch(
            f"{name}: the adapter carries this tensor, and the base's own has no numbers here",
            *todo,
        )
    if own.shape != carried.shape:
        raise BaseMismatch(
            f"{name}: the adapter carries it as {tuple(carried.shape)}, the base has it as {tuple(own.shape)}",
            *todo,
        )
    if not is_same_tensor(own, carried):
        raise BaseMismatch(
            f"{name}: the adapter carries a {name.rpartition('.')[2]} that is not the base's, "
            "and a replaced tensor does not add up",
            *todo,
        )


def is_same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape may be the same stored numbers, each loaded in its own dtype.

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
    """The tensor whose dtype holds the other's numbers; the first where neither does."""
    wide = torch.promote_types(one.dtype, other.dtype)
    return other if wide == other.dtype != one.dtype else one


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().reshape(-1)
    for start in range(0, max(flat.numel(), 1), BLOCK):
        yield flat[start : start + BLOCK].cpu()


def _agree(x: Tensor, y: Tensor) -> bool:
    wide = torch.promote_types(x.dtype, y.dtype)
    if wide in (x.dtype, y.dtype):
        narrow = y.dtype if wide == x.dtype else x.dtype
        return torch.equal(x.to(narrow), y.to(narrow))
    apart = (x.double() - y.double()).abs()
    near = apart <= _half_step(x) + _half_step(y)
    return bool(
        (near | (x.double() == y.double())).all()
    )  # infinities are equal, and have no distance


def _half_step(t: Tensor) -> Tensor:
    """The most that rounding to ``t`` can have changed each of its numbers, in float64."""
    info = torch.finfo(t.dtype)
    _, exponent = torch.frexp(t.double().abs())  # |t| lies in [2^(e-1), 2^e)
    least = round(
        math.log2(info.smallest_normal)
    )  # below it the numbers lie no nearer to each other
    exponent = torch.where(t == 0, least, (exponent - 1).clamp(min=least))
    step = exponent + round(math.log2(info.eps))
    return torch.ldexp(torch.ones_like(step, dtype=torch.float64), step - 1)
