"""Checks of the types and numbers that callers pass as arguments.

An annotation promises a type, and Python does not check it. A type checker believes the promise, so
it reports the code behind a failed test as unreachable. `unchecked` takes the promise back for one
expression:

    if not isinstance(unchecked(order), Mapping):
        raise SpecError(...)

The variable itself keeps its annotated type, so the code after the check needs no cast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real

import torch

from .errors import SpecError

__all__ = [
    "check_device",
    "check_dtype",
    "check_iterable",
    "check_max_error",
    "check_part",
    "check_rank",
    "check_whole_number",
    "finite_number",
    "unchecked",
]


def unchecked(value: object) -> object:
    """Return the value as a plain ``object``, so that a type checker lets its type be tested.

    >>> unchecked("a path"), isinstance(unchecked(4), str)
    ('a path', False)
    """
    return value


def check_iterable(values: object, what: str) -> None:
    """Refuse a value that can't be iterated over.

    Args:
        values: the argument.
        what: its name and what it holds, for the message: ``"paths: expected a list of paths"``.

    Raises:
        SpecError: it is no iterable.

    >>> check_iterable(["fr"], "paths: expected a list of paths")
    """
    if not isinstance(values, Iterable):
        raise SpecError(f"{what}, got {values!r:.80}")


def check_rank(rank: object) -> None:
    """Refuse a rank that is no whole number, or less than 1.

    Raises:
        SpecError: it is not.
    """
    check_whole_number(rank, "rank")


def check_whole_number(number: object, what: str) -> None:
    """Refuse a value that is no whole number, or less than 1, or 2^31 and more.

    Args:
        what: the argument, for the error.

    Raises:
        SpecError: it is one of these.

    >>> check_whole_number(0, "rows")
    Traceback (most recent call last):
    lora_tree.errors.SpecError: rows must be at least 1, got 0
    """
    # True is an Integral too, and no caller means 1 by it.
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise SpecError(f"{what} must be a whole number, got {number!r:.80}")
    integer = int(number)
    if integer < 1:
        # Python refuses to write out an integer of thousands of digits.
        shown = integer if integer > -(2**63) else "a huge negative one"
        raise SpecError(f"{what} must be at least 1, got {shown}")
    if integer >= 2**31:
        raise SpecError(f"{what} must be less than 2^31, got a larger number")


def finite_number(value: object, what: str) -> float:
    """Return a number of any numeric type as a float.

    Args:
        what: the argument, for the error.

    Raises:
        SpecError: it is no number, or not finite.
    """
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number):
        shown = f"{value!r:.80}"
        if isinstance(value, int) and value.bit_length() > 1024:
            shown = "an integer too large for a float"
        raise SpecError(f"{what} must be finite, got {shown}")
    return number


def check_max_error(bound: object) -> None:
    """Refuse a bound on a relative error that is no number, or negative, or NaN.

    Raises:
        SpecError: it is one of these.
    """
    # `not … >= 0` and not `… < 0`, so that NaN is refused.
    if isinstance(bound, bool) or not isinstance(bound, Real) or not float(bound) >= 0:
        raise SpecError(f"max_error must be 0 or more (a part of the norm), got {bound!r}")


def check_part(bound: object, what: str) -> None:
    """Refuse a bound that is no part of a whole: no number, negative, NaN, or 1 and more.

    Args:
        what: the argument, for the error.

    Raises:
        SpecError: it is one of these.

    >>> check_part(1.0, "loss")
    Traceback (most recent call last):
    lora_tree.errors.SpecError: loss: expected a part of the whole, 0 ≤ loss < 1, got 1.0
    """
    is_number = isinstance(bound, Real) and not isinstance(bound, bool)
    if not is_number or not 0.0 <= float(bound) < 1.0:  # type: ignore[arg-type]
        raise SpecError(f"{what}: expected a part of the whole, 0 ≤ {what} < 1, got {bound!r:.80}")


def check_dtype(dtype: object, what: str = "dtype") -> None:
    """Refuse a value that is neither a floating dtype of torch nor None.

    Args:
        what: the argument, for the error.

    Raises:
        SpecError: it is something else.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SpecError(
            f"{what} must be one of torch's floating dtypes, got {dtype!r:.80}",
            f"{what}=torch.bfloat16",
        )


def check_device(device: object) -> None:
    """Refuse a value that is neither a device that torch knows nor None.

    Raises:
        SpecError: it is something else.
    """
    if device is None or isinstance(device, torch.device):
        return
    # torch alone knows its devices. It raises one error for an unknown name, another for a value of
    # another type, and a third for an index that is too large.
    try:
        torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise SpecError(
            f"device must be one that torch knows, got {device!r:.80}", 'device="cpu", "cuda:0"'
        ) from error
