"""Find how many bytes a cache may hold. The nearest place that names a budget counts:

lt.attach(tree, base, host_budget="8GiB")     first
LORA_TREE_HOST_BUDGET=8GiB                    then the environment
cache: {host_budget: 8GiB}                    then tree.yaml
                                              else there is no bound
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import LoraTreeError, SpecError, suggest
from .given import unchecked

__all__ = ["Budgets", "format_bytes", "parse_bytes", "why_no_size"]

UNITS = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
MOST = 1 << 62
# The number of digits is bounded, because int() raises an error of Python's own at some thousands.
_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*", re.ASCII)
_ADVICE = "write a number of bytes, or one with a unit: 512MiB, 8GiB (1024³), 8GB (1000³)"
VARIABLES = {"host": "LORA_TREE_HOST_BUDGET", "device": "LORA_TREE_DEVICE_BUDGET"}


@dataclass(frozen=True)
class Budgets:
    """Bytes for adapters in each kind of memory; None: no bound.

    Args:
        host_bytes: in RAM.
        device_bytes: on the base's device. For a base on the CPU that is RAM too, and the smaller
            counts.

    Raises:
        SpecError: one is not a positive whole number.
    """

    host_bytes: int | None = None
    device_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, nbytes in (("host_bytes", self.host_bytes), ("device_bytes", self.device_bytes)):
            # `type`, not `isinstance`: True is an int.
            is_int = type(unchecked(nbytes)) is int
            if nbytes is not None and not (is_int and 0 < nbytes <= MOST):
                raise SpecError(
                    f"{name}: expected whole bytes, at least 1 and at most 4 EiB, got "
                    f"{_spelled(nbytes)}"
                )

    @staticmethod
    def of(
        host: int | str | None,
        device: int | str | None,
        *,
        spec: tuple[int | str | None, int | str | None] = (None, None),
        environment: Mapping[str, str] = os.environ,
    ) -> Budgets:
        """Return the budgets, each from the nearest place that names it.

        Args:
            host, device: the arguments of `attach`.
            spec: tree.yaml's.
            environment: the environment's variables.

        Raises:
            SpecError: a size makes no sense; names the place.

        >>> Budgets.of("2MiB", None, environment={"LORA_TREE_DEVICE_BUDGET": "1kB"})
        Budgets(host_bytes=2097152, device_bytes=1000)
        """
        # Each budget by itself: a program may name one in code and leave the other to the
        # environment.
        budgets = []
        for (name, variable), requested, in_yaml in zip(
            VARIABLES.items(), (host, device), spec, strict=True
        ):
            text, where = requested, f"{name}_budget"
            # A variable that is set to nothing is how a shell unsets it for one command.
            if text is None and environment.get(variable, "").strip():
                text, where = environment[variable], variable
            if text is None:
                text, where = in_yaml, f"tree.yaml: cache.{name}_budget"
            budgets.append(None if text is None else _named(text, where))
        return Budgets(*budgets)

    @property
    def bounded(self) -> bool:
        """True if at least one of the two is bounded."""
        return self.host_bytes is not None or self.device_bytes is not None


def parse_bytes(size: int | str) -> int:
    """Return the bytes of a size: a number, or a number with a unit.

    ``8GiB`` is 8 · 1024³ bytes, ``8GB`` is 8 · 1000³.

    Raises:
        SpecError: it is neither, or not positive, or more than 4 EiB.

    >>> parse_bytes("1.5 KiB"), parse_bytes("2GB"), parse_bytes(4096)
    (1536, 2000000000, 4096)
    >>> parse_bytes("8Gib")
    Traceback (most recent call last):
    lora_tree.errors.SpecError: got '8Gib': no unit 'Gib'; did you mean 'GiB'?
      write a number of bytes, or one with a unit: 512MiB, 8GiB (1024³), 8GB (1000³)
    """
    read = _read_size(size)
    if isinstance(read, _WrongSize):
        what = f": {read.reason}" if read.reason else ", which is not a size"
        raise SpecError(f"got {read.got}{what}", _ADVICE)
    return read


def why_no_size(size: int | str) -> str | None:
    """Return why a value is not a size, or how to write one; None if it is one.

    >>> why_no_size("8Gib"), why_no_size("8GiB")
    ("no unit 'Gib'; did you mean 'GiB'?", None)
    """
    read = _read_size(size)
    return (read.reason or _ADVICE) if isinstance(read, _WrongSize) else None


@dataclass(frozen=True)
class _WrongSize:
    """A value that is no size.

    Args:
        got: the value, as a message spells it.
        reason: what is wrong with it; "" if it is nothing like a size.
    """

    got: str
    reason: str = ""


def _read_size(size: object) -> int | _WrongSize:
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        return _WrongSize(repr(size))
    unit = ""
    if isinstance(size, int):
        # Python refuses to write out an integer of thousands of digits.
        number = str(size) if size.bit_length() < 64 else str(MOST + 1)
    else:
        match = _SIZE.fullmatch(size)
        if match is None:
            return _WrongSize(repr(size[:60]))
        number, unit = match[1], match[2]
    if unit and unit not in UNITS:
        return _WrongSize(repr(str(size)[:60]), f"no unit {unit[:20]!r}{_unit_like(unit)}")
    nbytes = -1
    if not number.startswith("-"):
        # In whole numbers: a float has too few digits for 4 EiB.
        integer_part, _, fraction = number.partition(".")
        factor = UNITS[unit or "B"]
        nbytes = int(integer_part) * factor + int(fraction or 0) * factor // 10 ** len(fraction)
    if not 0 < nbytes <= MOST:
        return _WrongSize(_spelled(size), "a budget is at least 1 byte and at most 4 EiB")
    return nbytes


def format_bytes(nbytes: int) -> str:
    """Return a size for a person to read.

    >>> format_bytes(1536), format_bytes(12), format_bytes(3 << 30)
    ('1.5 KiB', '12 B', '3.0 GiB')
    """
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{nbytes} B"
        size /= 1024
    return f"{size:.1f} TiB"


def _spelled(size: object) -> str:
    """Return a size for a message; Python refuses to write out an integer that is too large."""
    if isinstance(size, int) and size.bit_length() > 1024:
        return "a huge integer"
    return repr(str(size)[:60])


def _named(size: int | str, where: str) -> int:
    try:
        return parse_bytes(size)
    except LoraTreeError as error:
        raise error.within(where) from None


def _unit_like(unit: str) -> str:
    for known in UNITS:
        if known.casefold() == unit.casefold():
            return f"; did you mean {known!r}?"
    return suggest(unit, UNITS)
