r"""Match names against one pattern in bounded time.

Python's ``re`` backtracks: it tries one way after the other, and ``(a|a)*b`` has 2⁴⁰ ways on forty
letters. Here all ways are followed at once, one character at a time (Thompson,
https://swtch.com/~rsc/regexp/regexp1.html): at most len(name) · len(instructions) visits. The
answer is only whether a name matches, so greediness makes no difference.

The names of a base are similar. So a pattern caches its moves from one set of steps to the next,
and most names cost one look-up per character.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .matching_budget import MatchingBudget
from .parse import MAX_CHARACTERS, Instruction, LookAround, check_pattern

__all__ = ["NamePattern", "starts"]

_COST_OF_PLAIN = 4  # of a match by re, for a pattern that can't backtrack
_COST_OF_VISIT = 4
_COST_OF_ATOM = 200  # of compiling a set of characters, when a name first reaches it
_MAX_REMEMBERED = 20_000  # steps in a pattern's cached moves


class NamePattern:
    r"""A regular expression that is matched in bounded time.

    Args:
        text: the regular expression.
        work: the budget for its matches; None: a new one.

    Raises:
        ValueError: it is not a regular expression (an `re.error`), or can't be matched in bounded
            time; the message has the reason.

    >>> NamePattern(r"layers\.[0-3]\..*(q|v)_proj").matches_end("model.layers.2.self_attn.q_proj")
    True
    >>> NamePattern("(a|a)*b").matches_end("a" * 1000)
    False
    """

    def __init__(self, text: str, work: MatchingBudget | None = None) -> None:
        self.text = text
        self._work = work or MatchingBudget(f"the pattern {text[:80]!r}")
        # Spend before parsing: to parse ten thousand long patterns must count, too.
        self._work.spend(4 * len(text[:MAX_CHARACTERS]), text)
        self._steps = check_pattern(text)
        self._work.spend(len(self._steps), text)
        self._plain: tuple[re.Pattern[str], re.Pattern[str]] | None = None
        self._compiled: dict[tuple[str, int], re.Pattern[str]] = {}
        self._moves: dict[tuple[frozenset[int], str, bool], tuple[bool, frozenset[int]]] = {}
        self._remembered = 0
        # A look around may read the whole name, every other step only the adjacent characters. A
        # move can be cached for other names only if it depends on adjacent characters alone.
        self._has_no_lookaround = all(step.around is None for step in self._steps)
        # A pattern without repetitions and choices can't backtrack, and re is faster.
        if re.search(r"[*+?{(|]", text) is None:
            self._plain = re.compile(rf"(.*\.)?({text})$"), re.compile(text)

    def matches_end(self, name: str) -> bool:
        r"""Return whether it matches the whole name, or the rest of the name after one of its dots.

        That is PEFT's ``(.*\.)?(pattern)$``, whose ``$`` also matches before a newline at the end.
        """
        if self._plain is not None:
            self._work.spend(_COST_OF_PLAIN, self.text)
            return self._plain[0].match(name) is not None
        ends = {len(name), len(name.removesuffix("\n"))}
        return any(at in ends for at in self._run(self._steps, name, set(starts(name))))

    def matches(self, name: str) -> bool:
        """Return whether it matches the whole name."""
        if self._plain is not None:
            self._work.spend(_COST_OF_PLAIN, self.text)
            return self._plain[1].fullmatch(name) is not None
        return any(at == len(name) for at in self._run(self._steps, name, {0}))

    def layer(self, name: str) -> int | None:
        r"""Return the number of the layer that ``name`` lies in, in a list that this matches.

        That is PEFT's ``(?:^|.*?\.)(?:pattern)\.(?P<idx>\d+)\.``: the first such place counts, and
        at one place the longest match.

        >>> NamePattern("(h|layers)").layer("model.layers.7.mlp.experts.3.up_proj")
        7
        """
        for start in starts(name):
            found = None
            for at in self._run(self._steps, name, {start}):
                index = re.compile(r"\.(\d+)\.").match(name, at)
                found = int(index[1]) if index is not None else found
            if found is not None:
                return found
        return None

    def _run(self, steps: tuple[Instruction, ...], name: str, begins: set[int]) -> Iterator[int]:
        """Yield every place of the name where the steps can end, from left to right."""
        now: frozenset[int] = frozenset()
        last = max(begins)
        for at in range(min(begins), len(name) + 1):
            if at in begins:
                now |= {0}  # all starts are followed in one pass over the name
            accepted, now = self._move(steps, now, name, at)
            if accepted:
                yield at
            if not now and at >= last:
                return

    def _move(
        self, steps: tuple[Instruction, ...], now: frozenset[int], name: str, at: int
    ) -> tuple[bool, frozenset[int]]:
        """Return whether the steps can end here, and the steps after the character at ``at``."""
        self._work.spend(1, self.text)
        if not self._has_no_lookaround:
            return self._compute_move(steps, now, name, at)[:2]
        key = (now, name[max(at - 1, 0) : at + 2], at == 0)
        known = self._moves.get(key)
        if known is None:
            accepted, after, visited = self._compute_move(steps, now, name, at)
            self._remembered += visited
            if self._remembered > _MAX_REMEMBERED:
                # Hostile names may all differ: bound the memory of the cache too.
                self._moves.clear()
                self._remembered = visited
            known = self._moves[key] = accepted, after
        return known

    def _compute_move(
        self, steps: tuple[Instruction, ...], now: frozenset[int], name: str, at: int
    ) -> tuple[bool, frozenset[int], int]:
        """Compute a move: whether the steps can end here, the steps that follow, and the cost."""
        seen = self._spread(steps, now, name, at)
        after: set[int] = set()
        for i in seen:
            if i < len(steps) and self._takes(steps[i], name, at):
                after.add(i + 1)
        return len(steps) in seen, frozenset(after), len(seen) + len(after) + 1

    def _spread(
        self, steps: tuple[Instruction, ...], now: frozenset[int], name: str, at: int
    ) -> set[int]:
        """Return these steps and all steps reachable from them without taking a character."""
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

    def _holds(self, around: LookAround, name: str, at: int) -> bool:
        if around.behind:
            found = any(place == at for place in self._run(around.steps, name, set(range(at + 1))))
        else:
            found = any(True for _ in self._run(around.steps, name, {at}))
        return found is around.wanted

    def _takes(self, step: Instruction, name: str, at: int) -> bool:
        return step.width == 1 and self._matches(step, name, at)

    def _matches(self, step: Instruction, name: str, at: int) -> bool:
        if len(step.atom) == 1 and step.width and step.atom != "." and not step.flags:
            return name.startswith(step.atom, at)
        # Compile lazily: most sets of characters are never reached by a name.
        known = self._compiled.get((step.atom, step.flags))
        if known is None:
            self._work.spend(_COST_OF_ATOM, self.text)
            known = self._compiled[step.atom, step.flags] = re.compile(step.atom, step.flags)
        return known.match(name, at) is not None


def starts(name: str) -> list[int]:
    """Return the offset of each part of a dotted name, in its first line only.

    PEFT's ``(.*\\.)?`` does not reach beyond it, because ``.`` does not match a newline.
    """
    line = name.partition("\n")[0]
    return [0, *(at + 1 for at, character in enumerate(line) if character == ".")]
