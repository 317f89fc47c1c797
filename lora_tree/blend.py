"""Blend: several paths with weights, and what their nodes' coefficients are made of.

    coefficient of a node  =  its weight · Σ weight of every entry whose lineage passes through it

A path is the blend with one entry of weight 1. Half-way between two siblings, ``{"fr/legal": 0.5,
"fr/medical": 0.5}``, their parent keeps its full weight.

A blend has one spelling, by which losses, counts, files and servers know it: two blends have the
same one where they name the same paths with the same weights, to the last bit, and only there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from .errors import PathError, SpecError
from .node_names import check_path

__all__ = ["Blend", "check_finite", "depth_first", "parse_blend", "spelled", "total"]

Blend: TypeAlias = str | Mapping[str, float]
"""A path, ``"fr/legal"``; or a blend, as a mapping or as ``"fr/legal:0.5+fr/medical:0.5"``."""


def parse_blend(blend: Blend) -> dict[str, float]:
    """A blend in any of its spellings as path → weight.

    Raises:
        PathError: not a path, nor a mapping of paths.
        SpecError: a weight is not a finite number, or there are no entries.

    >>> parse_blend("fr/legal:0.5+fr/medical:0.5")
    {'fr/legal': 0.5, 'fr/medical': 0.5}
    >>> parse_blend("fr/legal")
    {'fr/legal': 1.0}
    """
    if isinstance(blend, Mapping):
        if not blend:
            raise SpecError("an empty blend; the bare base is the path ''")
        for path, weight in blend.items():
            check_path(path)
            check_finite(weight, f"blend: weight of {path!r}")
        return {path: float(weight) for path, weight in blend.items()}
    if not isinstance(blend, str):
        raise PathError(
            f"expected a path like 'fr/legal' or a mapping of paths to weights, got {blend!r}"
        )
    if ":" not in blend and "+" not in blend:
        check_path(blend)
        return {blend: 1.0}
    entries: dict[str, float] = {}
    # No name holds a plus or a colon, so a text can be cut at them. A weight like 1e+5 would be cut
    # as well, and so `spelled` never writes one.
    for entry in blend.split("+"):
        path, colon, number = entry.strip().rpartition(":")
        if not colon:
            path, number = number, "1"
        try:
            value = float(number)
        except ValueError:
            raise SpecError(
                f"blend {blend!r}: {number!r} is not a number; write 'fr/legal:0.5+fr/medical:0.5'"
            ) from None
        if path in entries:
            raise SpecError(f"blend {blend!r}: {path!r} stands there twice")
        entries[path] = value
    return parse_blend(entries)


def spelled(blend: Blend) -> str:
    """Return a blend in its one spelling, which `parse_blend` reads back to the same weights.

    Paths come by name, weights as the shortest decimals that read back to the same float. Entries
    that add nothing (a weight of 0, the bare base) are left out; one path with a weight of 1 is
    that path.

    Raises:
        PathError, SpecError: as `parse_blend`.

    >>> spelled({"fr/medical": 0.5, "fr/legal": 0.25}), spelled("fr/legal:1"), spelled({"fr": 0.0})
    ('fr/legal:0.25+fr/medical:0.5', 'fr/legal', '')
    """
    parts = {path: weight for path, weight in sorted(parse_blend(blend).items()) if path and weight}
    if not parts:
        return ""
    if list(parts.values()) == [1.0]:
        return next(iter(parts))
    return "+".join(f"{path}:{_decimal(weight)}" for path, weight in parts.items())


def _decimal(weight: float) -> str:
    """A weight without a plus of its own, which would begin another entry."""
    return repr(weight).replace("e+", "e")


def total(path: str, shares: Sequence[float], weight: float) -> float:
    """A node's coefficient: its own weight times the weights of the entries that pass through it.

    Raises:
        SpecError: it is too large for a float; names the node.
    """
    try:
        # fsum rounds once, so the total does not depend on the order of the entries.
        found = math.fsum(shares) * weight
    # fsum raises where the sum is too large; a product of floats is infinite instead.
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        said = " + ".join(f"{share:g}" for share in shares)
        raise SpecError(f"{path}: its coefficient ({said}) · {weight:g} is too large for a float")
    return found


def depth_first(path: str) -> tuple[str, ...]:
    """A key that sorts paths depth-first, children by name: the order of every sum."""
    return tuple(path.split("/"))


def check_finite(value: object, what: str) -> None:
    """Refuse a number that is none, or not finite.

    Raises:
        SpecError: it is not; says ``what`` it should have been.
    """
    # Written as `not … <=` because every comparison with NaN is false. An integer is compared as it
    # is: float() raises an OverflowError for one that is too large.
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not abs(value) <= sys.float_info.max
    ):
        got = repr(value) if not _is_huge(value) else "an integer too large for one"
        raise SpecError(f"{what} must be a finite number, got {got}")


def _is_huge(value: object) -> bool:
    """Tell whether an integer has so many digits that Python may refuse to write it out."""
    return isinstance(value, int) and value.bit_length() > 1024
