"""Decide which names from clients may be looked up in the tree, and give each its one spelling.

    "fr/legal"                          a path
    "de:0.50+fr:1."  →  "de:0.5+fr:1.0" a blend: paths in order, weights as Python writes floats

A client may send any text, so all of this is done before the tree is looked at.

Law: refusing a name costs no more than reading it. Two names that mean one blend have one spelling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ...blend import parse_blend, spelled
from ...errors import LoraTreeError, PathError, SpecError, plural, printable
from ...node_names import MAX_DEPTH

__all__ = ["NameRules", "RequestedName", "shown"]

MOST_CHARACTERS = 128 * MAX_DEPTH
"""The longest path that a tree can have."""
MOST_PATHS = 16
"""The largest number of paths in a blend."""
SHOWN_CHARACTERS = 120

_PATTERN = re.compile(r"[A-Za-z0-9_.*?-]+(/[A-Za-z0-9_.*?-]+)*\Z")
_ANY_DEPTH = "**"


def shown(text: object, most: int = SHOWN_CHARACTERS) -> str:
    r"""Return a text in a form that is safe for a log: one line, printable, cut where it is long.

    >>> shown("gpt-4\nINFO: forged")
    'gpt-4\\nINFO: forged'
    >>> shown("x" * 1_000_000, most=4)
    'xxxx… (1,000,000 characters)'
    """
    text = str(text)
    # The text is cut before its characters are looked at: it may be as long as a request.
    head = printable(text[:most])
    return head if len(text) <= most else f"{head}… ({plural(len(text), 'character')})"


@dataclass(frozen=True)
class RequestedName:
    """A path or blend that a client may request.

    Args:
        name: its one spelling.
        paths: the nodes that it names.
    """

    name: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class NameRules:
    """The rules by which names are admitted.

    Args:
        blends: admit blends, not only paths.
        allow: the paths that may be asked for, alone or in a blend: paths themselves, or patterns
            in which ``*`` and ``?`` stand for a part of one name and ``**`` for any number of
            names. None allows every path.

    Raises:
        SpecError: ``allow`` is empty, or holds no pattern.

    >>> rules = NameRules(allow=("de", "fr/*"))
    >>> rules.admit("fr/legal").name
    'fr/legal'
    >>> rules.admit("fr")
    Traceback (most recent call last):
    lora_tree.errors.PathError: 'fr' is not on the list of paths that clients may ask for
    >>> NameRules(blends=True).admit("fr:0.50+de:1").name
    'de:1.0+fr:0.5'
    """

    blends: bool = False
    allow: tuple[str, ...] | None = None
    _exact: frozenset[str] = field(init=False, repr=False, default=frozenset())
    _patterns: tuple[tuple[str, ...], ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        if self.allow is None:
            return
        if not self.allow:
            raise SpecError(
                "the list of paths that clients may ask for is empty",
                "name paths or patterns, or no list",
            )
        for pattern in self.allow:
            if not _PATTERN.match(pattern):
                raise SpecError(
                    f"{shown(pattern)!r} is neither a path nor a pattern of paths",
                    "write fr/legal, fr/* (one name) or fr/** (everything below fr)",
                )
        exact = frozenset(pattern for pattern in self.allow if not set(pattern) & set("*?"))
        patterns = tuple(
            tuple(pattern.split("/")) for pattern in self.allow if pattern not in exact
        )
        # The patterns are split once, because every request is matched against them. A frozen
        # dataclass refuses a plain assignment in its own `__post_init__` too.
        object.__setattr__(self, "_exact", exact)
        object.__setattr__(self, "_patterns", patterns)

    def admit(self, name: str) -> RequestedName:
        """Return the request of a client, without looking at the tree.

        Raises:
            PathError: the name is no path, or one that clients may not ask for.
            SpecError: it is a blend, and blends are off; or a weight makes no sense.
        """
        requested = self.read(name)
        for path in requested.paths:
            if not self.allows(path):
                raise PathError(
                    f"{shown(path)!r} is not on the list of paths that clients may ask for"
                )
        return requested

    def read(self, name: str) -> RequestedName:
        """Return the meaning of a name, in its one spelling.

        Raises:
            PathError, SpecError: see `admit`.
        """
        # The cheapest test first: a name may be as long as a request.
        if len(name) > MOST_CHARACTERS:
            raise PathError(
                f"a name of {plural(len(name), 'character')}; the longest path has "
                f"{MOST_CHARACTERS:,}"
            )
        if not name.isascii():
            raise PathError("a name with characters that no path has")
        # Names of nodes contain neither character, so either of them means a blend.
        is_blend = ":" in name or "+" in name
        if is_blend and not self.blends:
            raise SpecError("blends are not served by name", "LORA_TREE_VLLM_BLENDS=1 allows them")
        # The signs are counted before the blend is parsed, so that a name of thousands of paths
        # costs no more than reading it.
        if name.count("+") >= MOST_PATHS:
            raise SpecError(
                f"a blend of {name.count('+') + 1} paths; at most {MOST_PATHS} are served"
            )
        spelling = spelled(name)
        if not spelling:
            raise PathError("nothing to serve", "the bare base is served under its own name")
        return RequestedName(spelling, tuple(parse_blend(spelling)))

    def one_spelling(self, name: str) -> str:
        """Return the one spelling of a name; the unchanged name if it is no admitted blend."""
        # vLLM looks up any text that a client sends. An error raised here would come out of a
        # lookup in vLLM's own dict, where it expects none.
        if len(name) > MOST_CHARACTERS or not (":" in name or "+" in name):
            return name
        try:
            return self.read(name).name
        except LoraTreeError:
            return name

    def allows(self, path: str) -> bool:
        """Tell whether a path may be asked for."""
        if self.allow is None or path in self._exact:
            return True
        names = path.split("/")
        return any(_fits(names, pattern) for pattern in self._patterns)


def _fits(names: list[str], pattern: tuple[str, ...]) -> bool:
    """Tell whether names match a pattern. ``used``: the possible counts of parts matched so far."""
    # All possible positions are followed at once. Backtracking could take exponential time with
    # several ``**`` in a pattern.
    used = _skip_any_depth({0}, pattern)
    for name in names:
        after = set()
        for i in used:
            if i < len(pattern) and pattern[i] == _ANY_DEPTH:
                after.add(i)
            elif i < len(pattern) and fnmatchcase(name, pattern[i]):
                after.add(i + 1)
        used = _skip_any_depth(after, pattern)
    return len(pattern) in used


def _skip_any_depth(used: Iterable[int], pattern: tuple[str, ...]) -> set[int]:
    """Add the positions behind each ``**``, which may match no name at all."""
    found = set(used)
    for i in sorted(found):
        while i < len(pattern) and pattern[i] == _ANY_DEPTH:
            i += 1
            found.add(i)
    return found
