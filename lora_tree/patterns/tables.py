"""Match many patterns on many names: values by pattern, and cached answers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Generic, TypeVar

from .match import NamePattern, starts
from .matching_budget import MatchingBudget

__all__ = ["ByPattern", "Patterns"]

T = TypeVar("T")

_COST_OF_KNOWN = 8  # of caching an answer; this bounds the memory of the cache

_LETTERS = re.compile(r"\\?.")
_PLAIN_NAME = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\[.-])+\Z")


class ByPattern(Generic[T]):
    r"""Values by patterns on the ends of names. The first pattern that matches wins.

    Most patterns in files are plain names (``^model\.layers\.0\.mlp``, or with bare dots, each of
    which matches any character). These are looked up in a table, so that a file with a pattern for
    each of its thousand modules does not cost a million matches.

    Args:
        entries: patterns with their values, the first match first.
        work: the budget for building the table and for every look-up.

    Raises:
        ValueError: a pattern is not a regular expression, or can't be matched in bounded time.

    >>> ranks = ByPattern([(r"^a\.q", 4), ("(q|v)", 8)], MatchingBudget("a test"))
    >>> ranks.first("a.q", 2), ranks.first("b.q", 2), ranks.first("b.k", 2)
    (4, 8, 2)
    """

    def __init__(self, entries: Iterable[tuple[str, T]], work: MatchingBudget) -> None:
        self._work = work
        self._values: list[T] = []
        self._patterns: list[tuple[int, NamePattern]] = []  # (index, pattern), without plain names
        self._all: list[NamePattern] = []
        # (is anchored at the start, positions of its bare dots) → its letters → its index. A name
        # is looked up once for each key, with its letters at these positions replaced by dots.
        self._spelled: dict[tuple[bool, tuple[int, ...]], dict[str, int]] = {}
        for at, (text, value) in enumerate(entries):
            pattern = NamePattern(text, work)
            self._values.append(value)
            self._all.append(pattern)
            if _PLAIN_NAME.match(text) is None:
                self._patterns.append((at, pattern))
                continue
            letters = _LETTERS.findall(text.removeprefix("^"))
            holes = tuple(i for i, letter in enumerate(letters) if letter == ".")
            spelled = "".join(letter.removeprefix("\\") for letter in letters)
            self._spelled.setdefault((text.startswith("^"), holes), {}).setdefault(spelled, at)

    def first(self, name: str, default: T) -> T:
        """Return the value of the first pattern that matches ``name``, or its rest after a dot.

        Raises:
            LoraTreeError: the budget is spent.
        """
        # "." does not match a newline, and "$" matches before one. The table ignores both rules, so
        # such a name is matched pattern by pattern.
        if "\n" in name:
            for value, pattern in zip(self._values, self._all, strict=True):
                if pattern.matches_end(name):
                    return value
            return default
        found = self._plain_index(name)
        for at, pattern in self._patterns:
            if at > found:
                break  # a plain name with a smaller index matches
            if pattern.matches_end(name):
                found = at
                break
        return self._values[found] if found < len(self._values) else default

    def _plain_index(self, name: str) -> int:
        """Return the index of the first plain name that matches; the number of entries if none."""
        found = len(self._values)
        ends = [name[start:] for start in starts(name)]  # the first is the whole name
        for (anchored, holes), table in self._spelled.items():
            self._work.spend(len(ends) + len(holes))
            for end in ends[:1] if anchored else ends:
                if holes and holes[-1] >= len(end):
                    continue
                letters = list(end)
                for hole in holes:
                    letters[hole] = "."
                found = min(found, table.get("".join(letters), found))
        return found


class Patterns:
    """The patterns of one tree: each is parsed once, and matched with each name once.

    The nodes of a tree mostly share their patterns, so ten thousand nodes cost as much as one.

    Args:
        work: the budget for all patterns together.
    """

    def __init__(self, work: MatchingBudget) -> None:
        self._work = work
        self._made: dict[str, NamePattern] = {}
        self._known: dict[tuple[str, str, str], bool | int | None] = {}

    def matches(self, text: str, name: str) -> bool:
        """Return whether the pattern matches the whole name.

        Raises:
            SpecError: the budget of this tree is spent.
        """
        return bool(self._look_up("matches", text, name))

    def matches_end(self, text: str, name: str) -> bool:
        """Return whether the pattern matches the name or an end of it; raises as `matches`."""
        return bool(self._look_up("matches_end", text, name))

    def layer(self, text: str, name: str) -> int | None:
        """Return the number of the name's layer, as `NamePattern.layer`; raises as `matches`."""
        return self._look_up("layer", text, name)

    def _look_up(self, what: str, text: str, name: str) -> bool | int | None:
        key = (what, text, name)
        if key not in self._known:
            self._work.spend(_COST_OF_KNOWN, text)
            if text not in self._made:
                self._made[text] = NamePattern(text, self._work)
            self._known[key] = getattr(self._made[text], what)(name)
        return self._known[key]
