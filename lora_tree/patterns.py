r"""Patterns on module names that came with a download, matched within a bounded amount of work.

Python's ``re`` tries one way after the other, and ``(a|a)*b`` on forty letters has 2⁴⁰ of them. Here
all ways are followed at once, a character at a time (Thompson,
https://swtch.com/~rsc/regexp/regexp1.html): at most len(name) · len(steps) visits. Only whether a
name matches is asked for, so greedy or not makes no difference.

    a|b     go(1, 3) a go(2) b          a*      go(1, 3) a go(-2)          a?      go(1, 2) a

A look ahead or behind is a pattern of its own, tried at its place in the same way. What needs to
remember what it took (``(a)\1``, ``(?>a)``) has no such steps, and is refused.

One match is bounded, but a file may hold thousands of patterns and a base thousands of names. So
every visit is paid for out of a `MatchingBudget`: one for all patterns of an adapter, one for all of a tree.
The names of a base are much alike, so a pattern remembers where a character led it before, and most
names cost it a look-up for each of their characters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from .errors import LoraTreeError, SpecError

__all__ = ["ByPattern", "MatchingBudget", "NamePattern", "Patterns", "check_pattern"]

T = TypeVar("T")

MAX_CHARACTERS = 2000  # of one pattern
STEPS_OF_WORK = 8_000_000
"""Steps that all patterns of one adapter, or of one tree, may take together: one to three seconds."""

_MAX_STEPS = 4000
_MAX_NESTING = 50
_COST_OF_PLAIN = 4  # a match by re where there is only one way through the pattern
_COST_OF_VISIT = 4
_MAX_REMEMBERED = 20_000  # steps in the moves that a pattern remembers
_COST_OF_KNOWN = 8  # to remember an answer; this bounds the memory that the answers take
_COST_OF_ATOM = 200  # to compile a set of characters when a name first meets it

_HERE = r"\^|\$|\\[AZbB]"
_CHARACTER = r"\\[afnrtv]|\\x[0-9a-fA-F]{2}|\\[^0-9A-Za-z]|[^\\\[\](){}*+?|^$.]"
_ONE = rf"\.|\\[dDwWsS]|\[\^?\]?(?:\\.|[^\]\\])*\]|{_CHARACTER}"
_ATOM = re.compile(rf"(?P<here>{_HERE})|(?P<one>{_ONE})", re.DOTALL)
_TIMES = re.compile(
    r"(?:(?P<sign>[*+?])|\{(?P<least>[0-9]{0,5})(?P<comma>,?)(?P<most>[0-9]{0,5})\})\??(?![*+?{])"
)
_GROUP = re.compile(
    r"\((?:\?(?:P<[A-Za-z_][A-Za-z0-9_]*>|(?P<look><?[=!])|(?P<on>[ims]*)(?:-(?P<off>[ims]+))?:)|(?!\?))"
)
_FLAGS = re.compile(r"\(\?(?P<on>[ims]+)\)")  # for the whole pattern, at its start only
_LETTERS = re.compile(r"\\?.")
_PLAIN_NAME = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\[.-])+\Z")
_WIDE = re.compile(r"\\[uUN]|[^\x00-\x7f]")


class MatchingBudget:
    """The budget of work for all patterns of one adapter, or of one tree.

    Args:
        whose: the file or the tree, for the error.
        error: the kind of error to raise.
        steps: how many visits are left.

    >>> MatchingBudget("zoo/tree.yaml", steps=10).spend(11)
    Traceback (most recent call last):
    lora_tree.errors.SpecError: zoo/tree.yaml: matching its patterns takes too long: more than 10 steps
      write them with less repetition, or name the modules instead of describing them
    """

    def __init__(
        self, whose: str, error: type[LoraTreeError] = SpecError, steps: int = STEPS_OF_WORK
    ) -> None:
        self._whose, self._error, self._most = whose, error, steps
        self.left = steps

    def spend(self, steps: int, pattern: str = "") -> None:
        """Take so many steps away.

        Raises:
            LoraTreeError: of the kind asked for: none are left; names the pattern that took the last.
        """
        self.left -= steps
        if self.left < 0:
            last = f" (the last was {pattern[:80]!r})" if pattern else ""
            raise self._error(
                f"{self._whose}: matching its patterns takes too long: more than {self._most:,} steps{last}",
                "write them with less repetition, or name the modules instead of describing them",
            )


@dataclass(frozen=True)
class _Instruction:
    """A step through a pattern: one of four kinds.

    width 1     take the next character, if ``atom`` matches it
    width 0     go on, if ``atom`` matches at this place without taking a character
    around      go on, if a pattern of its own matches what comes next, or what came before
    to          leap to other steps
    """

    atom: str = ""
    flags: int = 0
    width: int = 0
    around: _Around | None = None
    to: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Around:
    """A look ahead or behind: whether ``steps`` match there, and whether they should."""

    steps: tuple[_Instruction, ...]
    behind: bool
    wanted: bool


class NamePattern:
    r"""A regular expression that is matched in bounded time.

    Args:
        text: of the pattern.
        work: what its matches are paid from; without it, a budget of its own.

    Raises:
        ValueError: it is none (an `re.error`), or needs more than that; says what.

    >>> NamePattern(r"layers\.[0-3]\..*(q|v)_proj").ends("model.layers.2.self_attn.q_proj")
    True
    >>> NamePattern("(a|a)*b").ends("a" * 1000)
    False
    """

    def __init__(self, text: str, work: MatchingBudget | None = None) -> None:
        self.text = text
        self._work = work or MatchingBudget(f"the pattern {text[:80]!r}")
        self._work.spend(4 * len(text[:MAX_CHARACTERS]), text)
        self._steps = check_pattern(text)
        self._work.spend(len(self._steps), text)
        self._plain: tuple[re.Pattern[str], re.Pattern[str]] | None = None
        self._compiled: dict[tuple[str, int], re.Pattern[str]] = {}
        self._moves: dict[tuple[frozenset[int], str, bool], tuple[bool, frozenset[int]]] = {}
        self._remembered = 0
        # a look around sees the whole name, every other step no more than the characters next to it
        self._looks_near = all(step.around is None for step in self._steps)
        if re.search(r"[*+?{(|]", text) is None:  # one way through it: re can't lose its own
            self._plain = re.compile(rf"(.*\.)?({text})$"), re.compile(text)

    def ends(self, name: str) -> bool:
        r"""Whether it matches the whole name, or what stands after one of its dots.

        That is PEFT's ``(.*\.)?(pattern)$``.
        """
        if self._plain is not None:
            self._work.spend(_COST_OF_PLAIN, self.text)
            return self._plain[0].match(name) is not None
        ends = {len(name), len(name.removesuffix("\n"))}
        return any(at in ends for at in self._run(self._steps, name, set(_starts(name))))

    def whole(self, name: str) -> bool:
        """Whether it matches the whole name."""
        if self._plain is not None:
            self._work.spend(_COST_OF_PLAIN, self.text)
            return self._plain[1].fullmatch(name) is not None
        return any(at == len(name) for at in self._run(self._steps, name, {0}))

    def layer(self, name: str) -> int | None:
        r"""The number of the layer that ``name`` lies in, where the list of layers has this name.

        That is PEFT's ``(?:^|.*?\.)(?:pattern)\.(?P<idx>\d+)\.``: the first such place counts, and
        at one place the longest match.

        >>> NamePattern("(h|layers)").layer("model.layers.7.mlp.experts.3.up_proj")
        7
        """
        for start in _starts(name):
            found = None
            for at in self._run(self._steps, name, {start}):
                index = re.compile(r"\.(\d+)\.").match(name, at)
                found = int(index[1]) if index is not None else found
            if found is not None:
                return found
        return None

    def _run(self, steps: tuple[_Instruction, ...], name: str, starts: set[int]) -> Iterator[int]:
        """Every place of the name where the steps come to their end, from left to right."""
        now: frozenset[int] = frozenset()
        last = max(starts)
        for at in range(min(starts), len(name) + 1):
            if at in starts:
                now |= {0}
            accepted, now = self._move(steps, now, name, at)
            if accepted:
                yield at
            if not now and at >= last:
                return

    def _move(
        self, steps: tuple[_Instruction, ...], now: frozenset[int], name: str, at: int
    ) -> tuple[bool, frozenset[int]]:
        """Whether the steps can end at this place, and where its character leads."""
        self._work.spend(1, self.text)
        if not self._looks_near:
            return self._moved(steps, now, name, at)[:2]
        key = (now, name[max(at - 1, 0) : at + 2], at == 0)
        known = self._moves.get(key)
        if known is None:
            accepted, after, visited = self._moved(steps, now, name, at)
            self._remembered += visited
            if self._remembered > _MAX_REMEMBERED:
                self._moves.clear()
                self._remembered = visited
            known = self._moves[key] = accepted, after
        return known

    def _moved(
        self, steps: tuple[_Instruction, ...], now: frozenset[int], name: str, at: int
    ) -> tuple[bool, frozenset[int], int]:
        seen = self._spread(steps, now, name, at)
        after = {i + 1 for i in seen if i < len(steps) and self._takes(steps[i], name, at)}
        return len(steps) in seen, frozenset(after), len(seen) + len(after) + 1

    def _spread(
        self, steps: tuple[_Instruction, ...], now: frozenset[int], name: str, at: int
    ) -> set[int]:
        """Those steps, and all that can be reached from them without taking a character."""
        stack, seen = list(now), set(now)
        while stack:
            i = stack.pop()
            if i == len(steps):
                continue
            step = steps[i]
            reached = [i + leap for leap in step.to]
            if step.around is not None:
                if self._holds(step.around, name, at):
                    reached.append(i + 1)
            elif step.atom and not step.width and self._matches(step, name, at):
                reached.append(i + 1)
            stack.extend(new for new in reached if new not in seen)
            seen.update(reached)
        self._work.spend(_COST_OF_VISIT * len(seen), self.text)
        return seen

    def _holds(self, around: _Around, name: str, at: int) -> bool:
        if around.behind:
            found = any(place == at for place in self._run(around.steps, name, set(range(at + 1))))
        else:
            found = any(True for _ in self._run(around.steps, name, {at}))
        return found is around.wanted

    def _takes(self, step: _Instruction, name: str, at: int) -> bool:
        return step.width == 1 and self._matches(step, name, at)

    def _matches(self, step: _Instruction, name: str, at: int) -> bool:
        if len(step.atom) == 1 and step.width and step.atom != "." and not step.flags:
            return name.startswith(step.atom, at)
        known = self._compiled.get((step.atom, step.flags))
        if known is None:
            self._work.spend(_COST_OF_ATOM, self.text)
            known = self._compiled[step.atom, step.flags] = re.compile(step.atom, step.flags)
        return known.match(name, at) is not None


class ByPattern(Generic[T]):
    r"""Values by patterns on the ends of names; the first pattern that matches counts.

    Most patterns in files are plain names (``^model\.layers\.0\.mlp``, or with bare dots, each of which
    matches any character). Those are looked up by what they spell, so that a file with a pattern
    for each of its thousand modules does not cost a million matches.

    Args:
        entries: patterns with their values, in the order in which they count.
        work: what building it and asking it are paid from.

    Raises:
        ValueError: a pattern is none, or can't be matched in bounded time.

    >>> ranks = ByPattern([(r"^a\.q", 4), ("(q|v)", 8)], MatchingBudget("a test"))
    >>> ranks.first("a.q", 2), ranks.first("b.q", 2), ranks.first("b.k", 2)
    (4, 8, 2)
    """

    def __init__(self, entries: Iterable[tuple[str, T]], work: MatchingBudget) -> None:
        self._work = work
        self._values: list[T] = []
        self._patterns: list[tuple[int, NamePattern]] = []  # those that are no plain names
        self._all: list[NamePattern] = []
        # (anchored, where any character will do) → what a pattern spells → its place
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
        """The value of the first pattern that matches ``name`` or what stands after one of its dots.

        Raises:
            LoraTreeError: the patterns have cost too much.
        """
        if "\n" in name:  # which "." does not match and "$" may stand before
            for value, pattern in zip(self._values, self._all, strict=True):
                if pattern.ends(name):
                    return value
            return default
        found = self._looked_up(name)
        for at, pattern in self._patterns:
            if at > found:
                break
            if pattern.ends(name):
                found = at
                break
        return self._values[found] if found < len(self._values) else default

    def _looked_up(self, name: str) -> int:
        """The place of the first plain name that matches; the number of entries where none does."""
        found = len(self._values)
        ends = [name[start:] for start in _starts(name)]
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
    """The patterns of one tree: each is parsed once, and asked about a name once.

    Nodes of a tree mostly share their patterns, so ten thousand of them cost what one does.

    Args:
        work: what all of it is paid from.
    """

    def __init__(self, work: MatchingBudget) -> None:
        self._work = work
        self._made: dict[str, NamePattern] = {}
        self._known: dict[tuple[str, str, str], bool | int | None] = {}

    def whole(self, text: str, name: str) -> bool:
        """Whether the pattern matches the whole name.

        Raises:
            SpecError: the patterns of this tree have cost too much.
        """
        return bool(self._asked("whole", text, name))

    def ends(self, text: str, name: str) -> bool:
        """Whether the pattern matches the name, or what stands after one of its dots; raises likewise."""
        return bool(self._asked("ends", text, name))

    def layer(self, text: str, name: str) -> int | None:
        """The layer that the name lies in, see `NamePattern.layer`; raises likewise."""
        return self._asked("layer", text, name)

    def _asked(self, what: str, text: str, name: str) -> bool | int | None:
        key = (what, text, name)
        if key not in self._known:
            self._work.spend(_COST_OF_KNOWN, text)
            if text not in self._made:
                self._made[text] = NamePattern(text, self._work)
            self._known[key] = getattr(self._made[text], what)(name)
        return self._known[key]


@lru_cache(256)
def check_pattern(text: str) -> tuple[_Instruction, ...]:
    """Parse a pattern into its steps, without compiling any of its parts.

    Raises:
        ValueError: it is no regular expression (an `re.error`), or has no such steps; says what.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS} characters")
    if "[" in text and _WIDE.search(
        text
    ):  # a set of a million characters takes re a while to compile
        raise ValueError("characters beyond ASCII beside a [set] are not understood here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "possible nested set" is not the caller's concern
        re.compile(text)
    return tuple(_Parser(text).whole())


def _starts(name: str) -> list[int]:
    """Where the parts of a dotted name begin."""
    line = name.partition("\n")[0]
    return [0, *(at + 1 for at, character in enumerate(line) if character == ".")]


@dataclass
class _Parser:
    """A pattern → its steps."""

    text: str
    at: int = 0
    depth: int = 0
    flags: int = 0

    def whole(self) -> list[_Instruction]:
        flags = _FLAGS.match(self.text)
        if flags is not None:
            self.at, self.flags = flags.end(), _flags_of(flags["on"])
        steps = self.choice()
        if self.at < len(self.text):
            raise self.beyond()
        return steps

    def choice(self) -> list[_Instruction]:
        """``a|b``"""
        rows = [self.row()]
        while self.text.startswith("|", self.at):
            self.at += 1
            rows.append(self.row())
        total = sum(len(row) + 2 for row in rows) - 2
        steps: list[_Instruction] = []
        for row in rows[:-1]:
            steps.append(_Instruction(to=(1, len(row) + 2)))
            steps += row
            steps.append(_Instruction(to=(total - len(steps),)))
        return self.few(steps + rows[-1])

    def row(self) -> list[_Instruction]:
        """``ab``"""
        steps: list[_Instruction] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            steps += self.piece()
            self.few(steps)
        return steps

    def piece(self) -> list[_Instruction]:
        """``a``, ``[a-z]``, ``(a|b)``, ``a{2,3}``"""
        atom = _ATOM.match(self.text, self.at)
        if atom is not None:
            self.at = atom.end()
            steps = [_Instruction(atom[0], self.flags, 0 if atom["here"] else 1)]
        elif self.text.startswith("(", self.at):
            steps = self.group()
        else:
            raise self.beyond()
        times = _TIMES.match(self.text, self.at)
        if times is None:
            return steps
        if atom is not None and atom["here"]:
            raise self.beyond()
        self.at = times.end()
        return self.repeated(steps, times)

    def group(self) -> list[_Instruction]:
        opens = _GROUP.match(self.text, self.at)
        if opens is None:
            raise self.beyond()
        outside, self.at = self.flags, opens.end()
        self.flags = (outside | _flags_of(opens["on"] or "")) & ~_flags_of(opens["off"] or "")
        self.depth += 1
        if self.depth > _MAX_NESTING:
            raise ValueError(f"groups nested more than {_MAX_NESTING} deep")
        steps = self.choice()
        self.depth -= 1
        self.flags = outside
        if not self.text.startswith(")", self.at):
            raise self.beyond()
        self.at += 1
        look = opens["look"]
        if look:
            return [_Instruction(around=_Around(tuple(steps), "<" in look, "=" in look))]
        return steps

    def repeated(self, steps: list[_Instruction], times: re.Match[str]) -> list[_Instruction]:
        """``*`` is {0,}, ``+`` is {1,} and ``?`` is {0,1}."""
        sign = times["sign"]
        least = int(sign == "+") if sign else int(times["least"] or 0)
        most: int | None
        if sign:
            most = {"*": None, "+": None, "?": 1}[sign]
        else:
            most = int(times["most"]) if times["most"] else None
            if not times["comma"]:
                if not times["least"]:
                    raise self.beyond()
                most = least
        if len(steps) * max(least, most or 0) > _MAX_STEPS:
            raise self.many()
        if most is not None:
            maybe = [_Instruction(to=(1, len(steps) + 1)), *steps]
            return self.few(steps * least + maybe * (most - least))
        if least:  # the last of those that must be there is gone through again and again
            return self.few([*steps * least, _Instruction(to=(-len(steps), 1))])
        return self.few(
            [_Instruction(to=(1, len(steps) + 2)), *steps, _Instruction(to=(-len(steps) - 1,))]
        )

    def few(self, steps: list[_Instruction]) -> list[_Instruction]:
        if len(steps) > _MAX_STEPS:
            raise self.many()
        return steps

    def many(self) -> ValueError:
        return ValueError(f"more than {_MAX_STEPS} steps when its repetitions are written out")

    def beyond(self) -> ValueError:
        return ValueError(f"{self.text[self.at : self.at + 20]!r} is not understood here")


def _flags_of(letters: str) -> int:
    found = 0
    for letter in letters:
        found |= {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL}[letter].value
    return found
