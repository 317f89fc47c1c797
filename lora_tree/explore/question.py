"""Question: one prompt, and the paths and blends that are to answer it, as rows of one batch.

    asked      fr/legal   fr/legal:0.7+de:0.3   ""
    parents    fr         ""                            added as rows, unless they are asked anyway

An answer is compared with its parent's: the node above a path, or the deepest node above all paths
of a blend. The bare base has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..blend import parse_blend, spelled
from ..errors import SpecError, plural
from ..tree import AdapterTree

__all__ = ["MOST_REQUESTED", "Question", "QuestionRow", "parent_of", "rows_of"]

MOST_REQUESTED = 16
"""Paths and blends in one batch: each is a row with a key/value cache of its own."""


@dataclass(frozen=True)
class Question:
    """A prompt, the paths and blends that answer it, and how the answers are drawn.

    Args:
        prompt: text to go on from, or the description of an image.
        blends: the paths and blends that answer, each as `lora_tree.parse_blend` reads it.
        max_new_tokens: the most tokens of an answer.
        temperature: 0 takes the likeliest token every time.
        seed: of the draws; every row draws the same numbers.
    """

    prompt: str
    blends: tuple[str, ...]
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class QuestionRow:
    """A row of the batch.

    Args:
        blend: the path or blend that answers, in its one spelling; ``""`` is the bare base.
        parent: the path with whose answer its own is compared; None for the bare base.
        is_requested: False if it is a row only because others are compared with it.
    """

    blend: str
    parent: str | None
    is_requested: bool


def parent_of(blend: str) -> str | None:
    """Return the path that a blend's answer is compared with; None for the bare base.

    Raises:
        PathError, SpecError: not a blend.

    >>> parent_of("fr/legal"), parent_of("fr/legal:0.5+fr/medical:0.5"), parent_of("fr:0.7+de:0.3")
    ('fr', 'fr', '')
    >>> parent_of("") is None
    True
    """
    blend = spelled(blend)
    if not blend:
        return None
    lineages = [path.split("/") for path in parse_blend(blend)]
    if len(lineages) == 1:
        return "/".join(lineages[0][:-1])
    shared: list[str] = []
    for names in zip(*lineages, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return "/".join(shared)


def rows_of(question: Question, tree: AdapterTree) -> tuple[QuestionRow, ...]:
    """Return the rows of a question: its paths in their order, then parents that are missing.

    Raises:
        PathError, SpecError: something asked is no path or blend of this tree, nothing is asked or
            too much, or a number makes no sense.
    """
    _check_numbers(question)
    # A dict keeps the order, and makes one row of a path that is asked twice.
    requested: dict[str, None] = {}
    for blend in question.blends:
        tree.coefficients(blend)
        requested[spelled(blend)] = None
    if not requested:
        raise SpecError("nothing is asked", "choose at least one path; '' is the bare base")
    if len(requested) > MOST_REQUESTED:
        raise SpecError(
            f"{plural(len(requested), 'path or blend', 'paths and blends')} are asked at once; "
            f"the most is {MOST_REQUESTED}",
            "ask some of them first",
        )
    rows = [QuestionRow(blend, parent_of(blend), True) for blend in requested]
    added: dict[str, None] = {}
    for row in rows:
        if row.parent is not None and row.parent not in requested:
            added[row.parent] = None
    rows.extend(QuestionRow(blend, parent_of(blend), False) for blend in added)
    return tuple(rows)


def _check_numbers(question: Question) -> None:
    if question.max_new_tokens < 1:
        raise SpecError(f"max_new_tokens must be at least 1, got {question.max_new_tokens}")
    if not 0 <= question.temperature < math.inf:
        raise SpecError(
            f"temperature must be 0 or a positive number, got {question.temperature}",
            "0 takes the likeliest token every time",
        )
