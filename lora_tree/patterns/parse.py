r"""Parse a pattern into the instructions of a Thompson automaton, which `match` runs.

    a|b     go(1, 3) a go(2) b          a*      go(1, 3) a go(-2)          a?      go(1, 2) a

A look ahead or behind is a nested pattern, which is matched at its place in the same way. A pattern
that depends on what an earlier part matched (``(a)\1``, ``(?>a)``) has no such instructions, and is
refused.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["MAX_CHARACTERS", "Instruction", "LookAround", "check_pattern"]

MAX_CHARACTERS = 2000
"""The length of the longest pattern that is parsed."""

# Repetitions are expanded, so `((a{99}){99}){99}` would be a million instructions; and each nested
# group takes frames of Python's stack. No real pattern on module names comes near either bound.
_MAX_STEPS = 4000
_MAX_NESTING = 50

# The supported grammar. `here` takes no character, `one` takes one. Everything else, such as a
# back-reference, matches none of these and is refused.
_HERE = r"\^|\$|\\[AZbB]"
_CHARACTER = r"\\[afnrtv]|\\x[0-9a-fA-F]{2}|\\[^0-9A-Za-z]|[^\\\[\](){}*+?|^$.]"
_ONE = rf"\.|\\[dDwWsS]|\[\^?\]?(?:\\.|[^\]\\])*\]|{_CHARACTER}"
_ATOM = re.compile(rf"(?P<here>{_HERE})|(?P<one>{_ONE})", re.DOTALL)
_TIMES = re.compile(
    r"(?:(?P<sign>[*+?])|\{(?P<least>[0-9]{0,5})(?P<comma>,?)(?P<most>[0-9]{0,5})\})\??(?![*+?{])"
)
_GROUP = re.compile(
    r"\((?:\?(?:P<[A-Za-z_][A-Za-z0-9_]*>|(?P<look><?[=!])"
    r"|(?P<on>[ims]*)(?:-(?P<off>[ims]+))?:)|(?!\?))"
)
_FLAGS = re.compile(r"\(\?(?P<on>[ims]+)\)")  # for the whole pattern, at its start only
# A set may span a million characters beyond ASCII, which re compiles slowly.
_WIDE = re.compile(r"\\[uUN]|[^\x00-\x7f]")


@dataclass(frozen=True)
class Instruction:
    """One step through a pattern, of four kinds.

    width 1     take the next character, if ``atom`` matches it
    width 0     go on, if ``atom`` matches at this place without taking a character
    around      go on, if a nested pattern matches at this place, or does not
    to          jump to other instructions, by these relative distances
    """

    atom: str = ""
    flags: int = 0
    width: int = 0
    around: LookAround | None = None
    to: tuple[int, ...] = ()


@dataclass(frozen=True)
class LookAround:
    """A look ahead or behind.

    Args:
        steps: the nested pattern.
        behind: whether it has to end here (look behind) or to begin here (look ahead).
        wanted: whether it has to match (``=``), or must not (``!``).
    """

    steps: tuple[Instruction, ...]
    behind: bool
    wanted: bool


@lru_cache(256)
def check_pattern(text: str) -> tuple[Instruction, ...]:
    r"""Parse a pattern into its instructions.

    Its sets of characters are compiled later, when a name first reaches them.

    Raises:
        ValueError: it is not a regular expression (an `re.error`), or can't be written as
            instructions; the message has the reason.

    >>> len(check_pattern("layers.[0-3]"))
    8
    >>> check_pattern(r"(a)\1")
    Traceback (most recent call last):
    ValueError: '\\1' is not understood here
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS} characters")
    if "[" in text and _WIDE.search(text):
        raise ValueError("characters beyond ASCII beside a [set] are not understood here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "possible nested set" is not the caller's concern
        # re decides what is a valid pattern. Without wide sets, compiling takes linear time.
        re.compile(text)
    return tuple(_Parser(text).parse())


@dataclass
class _Parser:
    """A recursive-descent parser: one method per level of the grammar, the loosest first.

    Args:
        text: the pattern.
        at: the offset of the next character to read.
        depth: the number of open groups.
        flags: re's flags that apply at this place.
    """

    text: str
    at: int = 0
    depth: int = 0
    flags: int = 0

    def parse(self) -> list[Instruction]:
        """Parse all of the text.

        Raises:
            ValueError: a part of it is not understood.
        """
        flags = _FLAGS.match(self.text)
        if flags is not None:
            self.at, self.flags = flags.end(), _flags_of(flags["on"])
        steps = self.choice()
        if self.at < len(self.text):
            raise self.unsupported_error()
        return steps

    def choice(self) -> list[Instruction]:
        """Parse ``a|b``."""
        rows = [self.row()]
        while self.text.startswith("|", self.at):
            self.at += 1
            rows.append(self.row())
        total = sum(len(row) + 2 for row in rows) - 2
        steps: list[Instruction] = []
        for row in rows[:-1]:
            steps.append(Instruction(to=(1, len(row) + 2)))
            steps += row
            steps.append(Instruction(to=(total - len(steps),)))
        return self.check_count(steps + rows[-1])

    def row(self) -> list[Instruction]:
        """Parse ``ab``."""
        steps: list[Instruction] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            steps += self.piece()
            self.check_count(
                steps
            )  # check after each piece: a long row of repetitions would exhaust the memory first
        return steps

    def piece(self) -> list[Instruction]:
        """Parse ``a``, ``[a-z]``, ``(a|b)`` or ``a{2,3}``."""
        atom = _ATOM.match(self.text, self.at)
        if atom is not None:
            self.at = atom.end()
            steps = [Instruction(atom[0], self.flags, 0 if atom["here"] else 1)]
        elif self.text.startswith("(", self.at):
            steps = self.group()
        else:
            raise self.unsupported_error()
        times = _TIMES.match(self.text, self.at)
        if times is None:
            return steps
        if atom is not None and atom["here"]:
            raise self.unsupported_error()
        self.at = times.end()
        return self.repeated(steps, times)

    def group(self) -> list[Instruction]:
        """Parse ``(a)``, ``(?:a)``, ``(?i:a)``, or a look around, ``(?=a)``."""
        opens = _GROUP.match(self.text, self.at)
        if opens is None:
            raise self.unsupported_error()
        outside, self.at = self.flags, opens.end()
        self.flags = (outside | _flags_of(opens["on"] or "")) & ~_flags_of(opens["off"] or "")
        self.depth += 1
        if self.depth > _MAX_NESTING:
            raise ValueError(f"groups nested more than {_MAX_NESTING} deep")
        steps = self.choice()
        self.depth -= 1
        self.flags = outside
        if not self.text.startswith(")", self.at):
            raise self.unsupported_error()
        self.at += 1
        look = opens["look"]
        if look:
            return [Instruction(around=LookAround(tuple(steps), "<" in look, "=" in look))]
        return steps

    def repeated(self, steps: list[Instruction], times: re.Match[str]) -> list[Instruction]:
        """Expand a repetition of steps: ``*`` is {0,}, ``+`` is {1,} and ``?`` is {0,1}."""
        sign = times["sign"]
        least = int(sign == "+") if sign else int(times["least"] or 0)
        most: int | None
        if sign:
            most = {"*": None, "+": None, "?": 1}[sign]
        else:
            most = int(times["most"]) if times["most"] else None
            if not times["comma"]:
                if not times["least"]:
                    raise self.unsupported_error()  # `{}`, which re matches literally
                most = least
        if len(steps) * max(least, most or 0) > _MAX_STEPS:
            raise self.too_many_error()
        if most is not None:
            maybe = [Instruction(to=(1, len(steps) + 1)), *steps]
            return self.check_count(steps * least + maybe * (most - least))
        if least:
            # The last of the required copies jumps back to its own beginning.
            return self.check_count([*steps * least, Instruction(to=(-len(steps), 1))])
        return self.check_count(
            [Instruction(to=(1, len(steps) + 2)), *steps, Instruction(to=(-len(steps) - 1,))]
        )

    def check_count(self, steps: list[Instruction]) -> list[Instruction]:
        """Return the steps, or raise if there are too many."""
        if len(steps) > _MAX_STEPS:
            raise self.too_many_error()
        return steps

    def too_many_error(self) -> ValueError:
        """Return the error for too many steps."""
        return ValueError(f"more than {_MAX_STEPS} steps when its repetitions are written out")

    def unsupported_error(self) -> ValueError:
        """Return the error for a part that is beyond this grammar."""
        return ValueError(f"{self.text[self.at : self.at + 20]!r} is not understood here")


def _flags_of(letters: str) -> int:
    """Return re's flags for letters of ``(?ims)``."""
    found = 0
    for letter in letters:
        found |= {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL}[letter].value
    return found
