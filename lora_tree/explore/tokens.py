"""Tokens as text, and which of an answer's tokens differ from its parent's.

    parent    The | law |  says |  no
    answer    The | law |  may  |  say |  no
                          ^^^^^   ^^^^^         the tokens that the longest match leaves unmatched

A token may be half a character, so text is cut where whole characters end: the tokens of one
character are shown together, and differ if one of them does.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TextRun", "differing_tokens", "text_runs"]

CONTEXT_TOKENS = 8
"""Tokens of the prompt before an answer: some tokenizers drop the space of a text's first word."""

UNFINISHED = "\ufffd"
"""The end of a text whose last character lacks bytes, as tokenizers show it."""


@dataclass(frozen=True)
class TextRun:
    """Text of adjacent tokens that all differ from the parent's answer, or all agree with it."""

    text: str
    differs: bool


def differing_tokens(parent: Sequence[int], answer: Sequence[int]) -> list[bool]:
    """Return for each token of an answer whether the parent's answer lacks it there.

    >>> differing_tokens([1, 2, 3, 4], [1, 2, 9, 8, 4])
    [False, False, True, True, False]
    """
    differs = [True] * len(answer)
    # Without autojunk: it would treat the tokens that occur most often as noise.
    matcher = difflib.SequenceMatcher(None, parent, answer, autojunk=False)
    for block in matcher.get_matching_blocks():
        for at in range(block.b, block.b + block.size):
            differs[at] = False
    return differs


def text_runs(
    tokenizer: Any, prompt: Sequence[int], answer: Sequence[int], differs: Sequence[bool]
) -> tuple[TextRun, ...]:
    """Return an answer's text, cut where its tokens begin or cease to differ.

    Args:
        tokenizer: of transformers.
        prompt: its tokens, which the answer goes on from.
        answer: its tokens.
        differs: one for each token of the answer.
    """
    runs: list[TextRun] = []
    tokens = [*prompt[-CONTEXT_TOKENS:], *answer]
    before = len(tokens) - len(answer)
    # Decoding begins at `start`, one piece back, so that a space in front of the new piece is kept.
    # It does not begin at the first token, so that a long answer is decoded only once.
    start, done = 0, before
    for end in range(before + 1, len(tokens) + 1):
        known = _decoded(tokenizer, tokens[start:done])
        text = _decoded(tokenizer, tokens[start:end])
        # A token without text goes with the next piece: decoding that began at it would take the
        # next word for the first one of a text, and drop the space in front.
        has_whole_text = text != known and not text.endswith(UNFINISHED)
        if end < len(tokens) and not has_whole_text:
            continue
        marked = any(differs[done - before : end - before])
        _append(runs, TextRun(text[len(known) :], marked))
        start, done = done, end
    return tuple(runs)


def _append(runs: list[TextRun], piece: TextRun) -> None:
    """Add a piece to the last run, or begin another one."""
    if runs and runs[-1].differs == piece.differs:
        runs[-1] = TextRun(runs[-1].text + piece.text, piece.differs)
    elif piece.text:
        runs.append(piece)


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(
        tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
