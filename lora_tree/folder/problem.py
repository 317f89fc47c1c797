"""Problem: one mistake in a folder of adapters, as ``check`` lists it and ``load`` raises it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..errors import (
    FolderError,
    FormatError,
    LoraTreeError,
    NewerFormat,
    SpecError,
    StaleError,
    UnlockedError,
)

__all__ = ["HARMLESS", "Kind", "Problem", "raise_any"]

Kind: TypeAlias = Literal[
    "newer",
    "yaml",
    "lock",
    "record",
    "folder",
    "hub",
    "adapter",
    "unlocked",
    "stale",
    "leftover",
    "numbers",
]

# `raise_any` raises the first kind in this order that occurs. Files that say what the folders mean
# come first, because a mistake in them is the cause of others.
_RAISED: dict[str, type[LoraTreeError]] = {
    "newer": NewerFormat,
    "record": SpecError,
    "yaml": SpecError,
    "lock": SpecError,
    "folder": FolderError,
    "hub": FolderError,
    "adapter": FormatError,
    "unlocked": UnlockedError,
    "stale": StaleError,
}


@dataclass(frozen=True)
class Problem:
    """One mistake.

    Args:
        node: the path it concerns; ``""`` if it concerns no single node.
        kind: ``newer``: a file that a later version of this library wrote; ``yaml``, ``lock`` or
            ``record``: a file that makes no sense; ``folder``: something lies where it can't;
            ``adapter``: files that are incomplete, broken or of a kind that does not add up;
            ``unlocked``, ``stale``; ``leftover``: remains of a save that was cut off, harmless;
            ``hub``: an adapter on the model hub that may not be fetched; ``numbers``: factors, or
            their products, that are not finite.
        text: where, what was found, and what to do.
        broken: if ``unlocked``: the files can't be used either, so to accept them would not help.
    """

    node: str
    kind: Kind
    text: str
    broken: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


HARMLESS: frozenset[Kind] = frozenset(("stale", "leftover", "numbers"))
"""Kinds that do not keep a node from being opened."""


def raise_any(
    problems: Iterable[Problem],
    *todo: str,
    but: Iterable[Kind] = ("stale", "leftover"),
    after: Iterable[str] = (),
) -> None:
    """Raise all problems of one kind as one error: the first kind in the order of `_RAISED`.

    Args:
        problems: in any order.
        todo: advice about files that differ from the lock.
        but: the kinds that pass.
        after: the last lines of the error, of any kind.
    """
    problems = list(problems)
    for kind, error in _RAISED.items():
        texts = [problem.text for problem in problems if problem.kind == kind]
        if texts and kind not in set(but):
            # A problem's text is that of an error: its advice stands on further lines.
            lines: list[str] = []
            for text in texts:
                lines += text.split("\n  ")
            lines += todo if kind == "unlocked" else ()
            raise error(*lines, *after)
