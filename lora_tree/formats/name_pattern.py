"""Patterns on module names that came with a download: matched in time that is bounded, whatever they say.

Python's ``re`` tries one way after the other, and ``(a|a)*b`` on forty letters has 2⁴⁰ of them. Here all ways are
followed at once, a character at a time (Thompson, https://swtch.com/~rsc/regexp/regexp1.html): at most
len(name) · len(steps) looks. Only whether a name matches is asked for, so greedy or not makes no difference.

    a|b     go(1, 3) a go(2) b          a*      go(1, 3) a go(-2)          a?      go(1, 2) a

What needs to look back or ahead (``(?=…)``, ``\\1``) has no such steps, and is refused.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

__all__ = ["NamePattern"]

MAX_CHARACTERS = 2000  # of one pattern
_MAX_STEPS = 4000
_MAX_NESTING = 50

_HERE = r"\^|\$|\\[AZbB]"
_ONE = r"\\[dDwWsS]|\\[^0-9A-Za-z]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\\[\](){}*+?|^$]"
_ATOM = re.compile(rf"(?P<here>{_HERE})|(?P<one>{_ONE})", re.DOTALL)
_TIMES = re.compile(r"(?:(?P<sign>[*+?])|\{(?P<least>[0-9]{0,5})(?P<comma>,?)(?P<most>[0-9]{0,5})\})\??(?![*+?{])")


@dataclass(frozen=True)
class _Step:
    """A look at the name (``width`` 1: at the next character; 0: at the place), or a leap to other steps."""

    look: re.Pattern[str] | None = None
    width: int = 0
    to: tuple[int, ...] = ()


class NamePattern:
    """A regular expression that is matched in bounded time.

    Raises:
        ValueError: it is none (an `re.error`), or needs more than that; says what.

    >>> NamePattern(r"layers\\.[0-3]\\..*(q|v)_proj").ends("model.layers.2.self_attn.q_proj")
    True
    >>> NamePattern("(a|a)*b").ends("a" * 1000)
    False
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"longer than {MAX_CHARACTERS} characters")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "possible nested set" is no matter of ours
            itself = re.compile(text)
            if re.search(r"[*+?{(|]", text) is None:  # there is only one way through it: re can't lose its own
                self._plain: tuple[re.Pattern[str], re.Pattern[str]] | None = re.compile(rf"(.*\.)?({text})$"), itself
                self._steps: list[_Step] = []
            else:
                self._plain, self._steps = None, _Parser(text).whole()

    def ends(self, name: str) -> bool:
        """Whether it matches the whole name, or what stands after one of its dots: PEFT's ``(.*\\.)?(pattern)$``."""
        if self._plain is not None:
            return self._plain[0].match(name) is not None
        line = name.partition("\n")[0]
        starts = {0, *(at + 1 for at, character in enumerate(line) if character == ".")}
        return self._run(name, starts, {len(name), len(name.removesuffix("\n"))})

    def whole(self, name: str) -> bool:
        """Whether it matches the whole name."""
        if self._plain is not None:
            return self._plain[1].fullmatch(name) is not None
        return self._run(name, {0}, {len(name)})

    def _run(self, name: str, starts: set[int], ends: set[int]) -> bool:
        now: set[int] = set()
        for at in range(len(name) + 1):
            if at in starts:
                now.add(0)
            now = self._spread(now, name, at)
            if at in ends and len(self._steps) in now:
                return True
            now = {i + 1 for i in now if i < len(self._steps) and self._takes(i, name, at)}
        return False

    def _spread(self, now: set[int], name: str, at: int) -> set[int]:
        """Those steps, and all that can be reached from them without a character."""
        stack, seen = list(now), set(now)
        while stack:
            i = stack.pop()
            step = self._steps[i] if i < len(self._steps) else _Step()
            reached = [i + leap for leap in step.to]
            if step.look is not None and not step.width and step.look.match(name, at):
                reached.append(i + 1)
            stack.extend(new for new in reached if new not in seen)
            seen.update(reached)
        return seen

    def _takes(self, i: int, name: str, at: int) -> bool:
        step = self._steps[i]
        return step.look is not None and step.width == 1 and step.look.match(name, at) is not None


class _Parser:
    """A pattern → its steps."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def whole(self) -> list[_Step]:
        steps = self.choice()
        if self.at < len(self.text):
            raise self.beyond()
        return steps

    def choice(self) -> list[_Step]:
        """``a|b``"""
        rows = [self.row()]
        while self.text.startswith("|", self.at):
            self.at += 1
            rows.append(self.row())
        steps = rows.pop()
        for row in reversed(rows):
            steps = self.few([_Step(to=(1, len(row) + 2)), *row, _Step(to=(len(steps) + 1,)), *steps])
        return steps

    def row(self) -> list[_Step]:
        """``ab``"""
        steps: list[_Step] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            steps += self.piece()
            self.few(steps)
        return steps

    def piece(self) -> list[_Step]:
        """``a``, ``[a-z]``, ``(a|b)``, ``a{2,3}``"""
        atom = _ATOM.match(self.text, self.at)
        if atom is not None:
            self.at = atom.end()
            steps = [_Step(re.compile(atom[0]), 0 if atom["here"] else 1)]
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

    def group(self) -> list[_Step]:
        start = self.at
        self.at += 3 if self.text.startswith("(?:", start) else 1
        self.depth += 1
        if self.depth > _MAX_NESTING:
            raise ValueError(f"groups nested more than {_MAX_NESTING} deep")
        steps = self.choice()
        self.depth -= 1
        if not self.text.startswith(")", self.at):
            raise self.beyond()
        self.at += 1
        return steps

    def repeated(self, steps: list[_Step], times: re.Match[str]) -> list[_Step]:
        """``*`` is {0,}, ``+`` is {1,} and ``?`` is {0,1}."""
        sign = times["sign"]
        least = int(sign == "+") if sign else int(times["least"] or 0)
        most = {"*": None, "+": None, "?": 1}.get(sign) if sign else int(times["most"]) if times["most"] else None
        if not sign and not times["comma"]:
            if not times["least"]:
                raise self.beyond()
            most = least
        if len(steps) * max(least, most or 0) > _MAX_STEPS:
            raise ValueError(f"more than {_MAX_STEPS} steps when its repetitions are written out")
        maybe = [_Step(to=(1, len(steps) + 1)), *steps]
        again = [_Step(to=(1, len(steps) + 2)), *steps, _Step(to=(-len(steps) - 1,))]
        return self.few(steps * least + (again if most is None else maybe * (most - least)))

    def few(self, steps: list[_Step]) -> list[_Step]:
        if len(steps) > _MAX_STEPS:
            raise ValueError(f"more than {_MAX_STEPS} steps when its repetitions are written out")
        return steps

    def beyond(self) -> ValueError:
        return ValueError(f"{self.text[self.at : self.at + 20]!r} is not understood here")
