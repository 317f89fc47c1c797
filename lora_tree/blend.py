"""Blend: several paths with weights, from which every node gets its coefficient.

    coefficient of a node  =  its weight · Σ weight of every entry whose lineage passes through it

A path is the blend with one entry of weight 1. Half-way between two siblings, ``{"fr/legal": 0.5,
"fr/medical": 0.5}``, their parent keeps its full weight. An entry may have a weight per module
(`weights`), and then all of this holds for each module separately.

A blend has one canonical spelling (`spelled`), which is its key in losses, counts, files and
servers. Two blends share it if and only if they give the same paths the same weights, to the last
bit; entries that add nothing do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from .errors import PathError, SpecError
from .node_names import check_path
from .weights import GivenWeight, Weight, as_weight, parse_weight

__all__ = ["Blend", "depth_first", "parse_blend", "spelled"]

Blend: TypeAlias = str | Mapping[str, GivenWeight]
"""A path, ``"fr/legal"``; or a blend, as a mapping or as ``"fr/legal:0.5+fr/medical:0.5"``."""


def parse_blend(blend: Blend) -> dict[str, Weight]:
    """Return a blend, in any of its spellings, as path → weight.

    Raises:
        PathError: not a path, nor a mapping of paths.
        SpecError: a weight is not a finite number, or there are no entries.

    >>> parse_blend("fr/legal:0.5+fr/medical:0.5")
    {'fr/legal': 0.5, 'fr/medical': 0.5}
    >>> parse_blend("fr/legal")
    {'fr/legal': 1.0}
    >>> parse_blend("fr/legal:{*.down_proj=0.5}") == parse_blend({"fr/legal": {"*.down_proj": 0.5}})
    True
    """
    if isinstance(blend, Mapping):
        if not blend:
            raise SpecError("an empty blend; the bare base is the path ''")
        weights = {}
        for path, weight in blend.items():
            check_path(path)
            weights[path] = as_weight(weight, f"blend: weight of {path!r}")
        return weights
    if not isinstance(blend, str):
        raise PathError(
            f"expected a path like 'fr/legal' or a mapping of paths to weights, got {blend!r}"
        )
    if ":" not in blend and "+" not in blend:
        check_path(blend)
        return {blend: 1.0}
    entries: dict[str, Weight] = {}
    # No name and no pattern holds a plus or a colon, so a text can be cut at them. A weight like
    # 1e+5 would be cut as well, and so `spelled` never writes one.
    for entry in blend.split("+"):
        path, colon, number = entry.strip().rpartition(":")
        if not colon:
            path, number = number, "1"
        # "fr:0.5,de:0.5": without this the error would call 'fr:0.5,de' a bad name.
        if ":" in path:
            raise SpecError(
                f"blend {blend!r}: paths are joined by a plus; write 'fr/legal:0.5+fr/medical:0.5'"
            )
        if path in entries:
            raise SpecError(f"blend {blend!r}: {path!r} occurs twice")
        entries[path] = _entry(number, path, blend)
    return parse_blend(entries)


def _entry(number: str, path: str, blend: str) -> Weight:
    """Return the weight of an entry; raises as `parse_blend`."""
    if number.startswith("{"):
        return parse_weight(number, f"blend: weight of {path!r}")
    try:
        return float(number)
    except ValueError:
        raise SpecError(
            f"blend {blend!r}: {number!r} is not a number; write 'fr/legal:0.5+fr/medical:0.5'"
        ) from None


def spelled(blend: Blend) -> str:
    """Return a blend in its one spelling, which `parse_blend` reads back to the same weights.

    Paths are in the order of their names, weights are the shortest decimals that read back to the
    same float. Entries
    that add nothing (a weight of 0, the bare base) are left out; one path with a weight of 1 is
    that path.

    Raises:
        PathError, SpecError: as `parse_blend`.

    >>> spelled({"fr/medical": 0.5, "fr/legal": 0.25}), spelled("fr/legal:1"), spelled({"fr": 0.0})
    ('fr/legal:0.25+fr/medical:0.5', 'fr/legal', '')
    >>> spelled({"fr": {"default": 1, "*.down_proj": 0.5}})
    'fr:{*.down_proj=0.5,default=1.0}'
    """
    parts = {path: weight for path, weight in sorted(parse_blend(blend).items()) if path and weight}
    if not parts:
        return ""
    if list(parts.values()) == [1.0]:
        return next(iter(parts))
    return "+".join(f"{path}:{_decimal(weight)}" for path, weight in parts.items())


def _decimal(weight: Weight) -> str:
    """Return a weight as text without a plus sign, which would begin another entry."""
    return f"{weight}".replace("e+", "e")


def depth_first(path: str) -> tuple[str, ...]:
    """Return the key that sorts paths depth-first, children by name: the order of every sum."""
    return tuple(path.split("/"))
