"""Weights: the factor on a node's increments, one number or a number for each module.

    0.8                                                      one number
    {"default": 1.0, "*.down_proj": 0.5, "layers.[0-7].*": 0}    the first pattern that matches
    {*.down_proj=0.5,layers.[0-7].*=0,default=1.0}          the same in one line, as blends write it

The patterns are globs on the names that the adapter itself has for its modules
(`patterns/glob.py`). The first one that matches counts, as in PEFT's ``rank_pattern``; ``default``
may stand anywhere, is for the modules that none matches, and is 1 where it is left out. A mapping
with a ``default`` alone is that number.

Law: a pattern that matches no module is an error. It was misspelled, or is another model's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .errors import SpecError, listing, suggest
from .patterns import check_glob, glob_matches

__all__ = [
    "BlendedWeight",
    "GivenWeight",
    "ModuleWeights",
    "Weight",
    "as_weight",
    "blended",
    "check_finite",
    "check_matched",
    "inverse_weight",
    "parse_weight",
    "plain_weight",
    "scaled_weight",
    "weight_at",
    "weight_difference",
    "weight_digest",
    "weight_within",
    "why_no_patterns",
]

DEFAULT = "default"


@dataclass(frozen=True)
class ModuleWeights:
    """A weight per module: the number of the first pattern that matches a module's name.

    `as_weight` makes it of a mapping, and checks the patterns and numbers.

    Args:
        default: for modules that no pattern matches.
        patterns: (glob, number), in the order in which they are tried.

    >>> half = as_weight({"*.down_proj": 0.5, "layers.[0-7].*": 0})
    >>> half.of("layers.3.down_proj"), half.of("layers.3.q_proj"), half.of("layers.9.q_proj")
    (0.5, 0.0, 1.0)
    >>> f"{half:g}"
    '{*.down_proj=0.5,layers.[0-7].*=0,default=1}'
    """

    default: float
    patterns: tuple[tuple[str, float], ...]

    def of(self, module: str) -> float:
        """Return the number for a module."""
        for pattern, number in self.patterns:
            if glob_matches(pattern, module):
                return number
        return self.default

    def unmatched(self, modules: Collection[str]) -> list[str]:
        """Return the patterns that match none of the given modules."""
        found = []
        for pattern, _ in self.patterns:
            if not any(glob_matches(pattern, module) for module in modules):
                found.append(pattern)
        return found

    def as_dict(self) -> dict[str, float]:
        """Return the mapping that it was made from, with the default."""
        return {DEFAULT: self.default, **dict(self.patterns)}

    def __format__(self, spec: str) -> str:
        # So a message formats a weight with one word for both kinds: f"{weight:g}".
        shown = [f"{pattern}={number:{spec}}" for pattern, number in self.patterns]
        return "{" + ",".join([*shown, f"{DEFAULT}={self.default:{spec}}"]) + "}"


@dataclass(frozen=True)
class BlendedWeight:
    """A node's coefficient where entries of a blend have weights per module.

    Args:
        shares: the weights of the entries that pass through the node.
        own: the node's own weight.
    """

    shares: tuple[Weight, ...]
    own: Weight

    def of(self, module: str) -> float:
        """Return the number for a module.

        Raises:
            SpecError: it is too large for a float.
        """
        shares = [weight_at(share, module) for share in self.shares]
        return _total(shares, weight_at(self.own, module), module)

    def __format__(self, spec: str) -> str:
        return f"({' + '.join(f'{share:{spec}}' for share in self.shares)}) · {self.own:{spec}}"


Weight: TypeAlias = float | ModuleWeights | BlendedWeight
"""A number, or a value whose ``of(module)`` is one. Only a blend has a `BlendedWeight`."""

GivenWeight: TypeAlias = float | Mapping[str, float] | ModuleWeights | BlendedWeight
"""A weight as a caller writes it: a number, or a mapping of patterns to numbers."""


# ---------------------------------------------------------------------- in
def as_weight(given: object, where: str = "weight") -> Weight:
    """Return a weight as a caller or a file wrote it.

    Raises:
        SpecError: it is no finite number, and no mapping of patterns to such numbers; says
            ``where``.

    >>> as_weight(1), as_weight({"default": 0.5})
    (1.0, 0.5)
    >>> as_weight({r".*\\.q_proj": 1})
    Traceback (most recent call last):
    lora_tree.errors.SpecError: weight: pattern '.*\\\\.q_proj' holds '\\\\' of a regular \
expression; the patterns here are globs like '*.down_proj' and 'layers.[0-7].*'
    """
    if isinstance(given, ModuleWeights | BlendedWeight):
        return given
    if not isinstance(given, Mapping):
        check_finite(given, where)
        assert isinstance(given, int | float)
        return float(given)
    for pattern, number in given.items():
        check_finite(number, f"{where} of {pattern!r:.80}")
    why = why_no_patterns(given)
    if why is not None:
        raise SpecError(f"{where}: {why}")
    default = 1.0
    patterns = []
    for pattern, number in given.items():
        if pattern == DEFAULT:
            default = float(number)
        else:
            patterns.append((pattern, float(number)))
    return ModuleWeights(default, tuple(patterns)) if patterns else default


def why_no_patterns(given: Mapping[Any, object]) -> str | None:
    """Return why a mapping has no patterns, or which of them is none; None if all are.

    >>> why_no_patterns({"*.q_proj": 1.0}), why_no_patterns({})
    (None, 'an empty mapping; write one number, or patterns with numbers')
    """
    if not given:
        return "an empty mapping; write one number, or patterns with numbers"
    for pattern in given:
        if pattern == DEFAULT:
            continue
        try:
            check_glob(pattern)
        except (ValueError, TypeError) as error:
            return f"pattern {pattern!r:.80} {error}"
    return None


def parse_weight(text: str, where: str = "weight") -> Weight:
    """Return a weight out of one line: ``0.8``, or ``{*.down_proj=0.5,default=1}``.

    Raises:
        SpecError: it is neither; says ``where``.

    >>> parse_weight("*.down_proj=0.5").as_dict()
    {'default': 1.0, '*.down_proj': 0.5}
    """
    body = text.strip()
    if body.startswith("{") and body.endswith("}"):
        body = body[1:-1]
    if "=" not in body:
        return as_weight(_number(body, where, text), where)
    numbers: dict[str, float] = {}
    for part in body.split(","):
        pattern, equals, number = part.strip().rpartition("=")
        if not equals:
            raise SpecError(f"{where} {text!r:.80}: {part!r:.80} is no pattern=number", _WRITTEN)
        if pattern in numbers:
            raise SpecError(f"{where} {text!r:.80}: {pattern!r:.80} occurs twice")
        numbers[pattern] = _number(number, where, text)
    return as_weight(numbers, where)


_WRITTEN = "write 0.8, or '*.down_proj=0.5,layers.[0-7].*=0,default=1'"


def _number(text: str, where: str, full_text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SpecError(
            f"{where} {full_text!r:.80}: {text!r:.80} is not a number", _WRITTEN
        ) from None


def check_finite(value: object, what: str) -> None:
    """Refuse a value that is no number, or not finite.

    Raises:
        SpecError: it is one of these; names it by ``what``.
    """
    # Written as `not … <=` because every comparison with NaN is false. An integer is compared as it
    # is: float() raises an OverflowError for one that is too large.
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not abs(value) <= sys.float_info.max
    ):
        shown = repr(value) if not _is_huge(value) else "an integer too large for one"
        raise SpecError(f"{what} must be a finite number, got {shown}")


def _is_huge(value: object) -> bool:
    """Tell whether an integer has so many digits that Python may refuse to write it out."""
    return isinstance(value, int) and value.bit_length() > 1024


# ---------------------------------------------------------------------- out
def plain_weight(weight: Weight) -> Any:
    """Return a weight as plain data, for YAML and JSON: a number, or a mapping."""
    return weight if isinstance(weight, float) else _own(weight).as_dict()


def weight_digest(weight: Weight) -> str:
    """Return a text that two weights share only if they are equal, to the last bit.

    That of a number is ``float.hex()``.
    """
    if isinstance(weight, float):
        return weight.hex()
    if isinstance(weight, BlendedWeight):
        shares = "+".join(map(weight_digest, weight.shares))
        return f"({shares})*{weight_digest(weight.own)}"
    parts = [f"{pattern}={number.hex()}" for pattern, number in weight.patterns]
    return "{" + ",".join([*parts, f"{DEFAULT}={weight.default.hex()}"]) + "}"


def _own(weight: Weight) -> ModuleWeights:
    # A blend's coefficient is an answer of the tree and is never written anywhere.
    assert isinstance(weight, ModuleWeights)
    return weight


# ---------------------------------------------------------------------- arithmetic
def blended(path: str, shares: Sequence[Weight], own: Weight) -> Weight:
    """Return a node's coefficient: its own weight times those of the entries that pass through it.

    Raises:
        SpecError: it is too large for a float; names the node.
    """
    numbers = [share for share in shares if isinstance(share, float)]
    if len(numbers) < len(shares):
        return BlendedWeight(tuple(shares), own)
    if isinstance(own, float):
        return _total(numbers, own, path)
    return scaled_weight(own, _total(numbers, 1.0, path))


def _total(shares: Sequence[float], own: float, name: str) -> float:
    try:
        # fsum rounds once, so the total does not depend on the order of the entries.
        found = math.fsum(shares) * own
    # fsum raises where the sum is too large; a product of floats is infinite instead.
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        shares_text = " + ".join(f"{share:g}" for share in shares)
        raise SpecError(
            f"{name}: its coefficient ({shares_text}) · {own:g} is too large for a float"
        )
    return found


def scaled_weight(weight: Weight, by: float) -> Weight:
    """Return ``by`` times a weight."""
    if isinstance(weight, float):
        return weight * by
    if by == 0.0:
        return 0.0  # nothing of the node is left, and none of its files need be read
    if isinstance(weight, BlendedWeight):
        return BlendedWeight((weight,), by)
    patterns = tuple((pattern, number * by) for pattern, number in weight.patterns)
    return ModuleWeights(weight.default * by, patterns)


def inverse_weight(weight: Weight) -> Weight:
    """Return 1 / weight, and 0 where that is 0."""
    if isinstance(weight, float):
        return 1.0 / weight if weight else 0.0
    own = _own(weight)
    patterns = tuple((pattern, 1.0 / number if number else 0.0) for pattern, number in own.patterns)
    return ModuleWeights(1.0 / own.default if own.default else 0.0, patterns)


def weight_within(weight: Weight, modules: Collection[str]) -> Weight:
    """Return the same weights for some of the modules, without the patterns that match none.

    The result is one number if no pattern is left.
    """
    if not isinstance(weight, ModuleWeights):
        return weight
    missed = weight.unmatched(modules)
    left = tuple((each, number) for each, number in weight.patterns if each not in missed)
    return ModuleWeights(weight.default, left) if left else weight.default


def weight_difference(plus: Weight, minus: Weight) -> Weight:
    """Return the difference of two weights; equal ones cancel exactly."""
    if plus == minus:
        return 0.0
    if isinstance(plus, float) and isinstance(minus, float):
        return plus - minus
    return BlendedWeight((plus, scaled_weight(minus, -1.0)), 1.0)


def weight_at(weight: Weight, module: str) -> float:
    """Return the number that a weight is for a module."""
    return weight if isinstance(weight, float) else weight.of(module)


# ---------------------------------------------------------------------- patterns that match nothing
def check_matched(terms: Iterable[tuple[str, Weight, Collection[str]]]) -> None:
    """Refuse a pattern that matches no module.

    A node's own weight is for the modules of that node; the weight of a blend's entry is for those
    of all nodes that the entry passes through.

    Args:
        terms: (node, its coefficient, the names of its adapter's modules).

    Raises:
        SpecError: one matches none; names it and the nodes, with the nearest names.
    """
    seen: dict[ModuleWeights, tuple[list[str], set[str]]] = {}
    for node, weight, modules in terms:
        for own, share in _parts(weight):
            if own is not None:
                _refuse_unmatched(own, [node], modules)
            if share is not None:
                nodes, names = seen.setdefault(share, ([], set()))
                nodes.append(node)
                names.update(modules)
    for share, (nodes, names) in seen.items():
        _refuse_unmatched(share, nodes, names)


def _parts(
    weight: Weight, *, is_share: bool = False
) -> Iterable[tuple[ModuleWeights | None, ModuleWeights | None]]:
    """Yield the weights per module in a coefficient: (one of the node, one of an entry)."""
    if isinstance(weight, ModuleWeights):
        yield (None, weight) if is_share else (weight, None)
    elif isinstance(weight, BlendedWeight):
        for share in weight.shares:
            yield from _parts(share, is_share=True)
        yield from _parts(weight.own, is_share=is_share)


def _refuse_unmatched(
    weight: ModuleWeights, nodes: Sequence[str], modules: Collection[str]
) -> None:
    missed = weight.unmatched(modules)
    if not missed:
        return
    ends = {name.rpartition(".")[2] for name in modules}
    near = suggest(missed[0].rpartition(".")[2].strip("*"), ends)
    known = sorted(end for end in ends if not end.isdigit())
    raise SpecError(
        f"{listing(nodes, most=3)}: weight: pattern {missed[0]!r} matches no module of its "
        f"adapter{near}",
        f"the last parts of its names: {listing(known) or 'none'}",
        f"one of its names: {min(modules, default='none')}",
    )
