"""Globs on module names: ``q_proj``, ``*.down_proj``, ``layers.[0-7].*``.

A glob matches the whole name, or the rest of it after one of its dots, as PEFT's
``target_modules`` and ``rank_pattern`` do. ``*`` is any text, dots included; ``?`` one character;
``[0-7]`` one of several. ``fnmatch`` does not backtrack over a star, so a match takes at most
len(name) · len(pattern) steps, and needs no budget.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from .parse import MAX_CHARACTERS

__all__ = ["check_glob", "glob_matches"]

_OF_A_REGEX = frozenset("\\()|^$+")
_OF_OUR_TEXTS = frozenset("{}=,:;")
"""The separators of weights per module that are written in one line; see `lora_tree.weights`."""


def check_glob(pattern: str) -> str:
    """Return the pattern if it is a valid glob on module names.

    Raises:
        ValueError: it is not; the message completes a sentence about the pattern.
    """
    if not pattern:
        raise ValueError("is empty; '*' names every module")
    if len(pattern) > MAX_CHARACTERS:
        raise ValueError(f"is longer than {MAX_CHARACTERS} characters")
    odd = sorted(set(pattern) & _OF_A_REGEX)
    if odd:
        raise ValueError(
            f"holds {odd[0]!r} of a regular expression; the patterns here are globs like "
            "'*.down_proj' and 'layers.[0-7].*'"
        )
    odd = sorted(set(pattern) & _OF_OUR_TEXTS)
    if odd or any(character.isspace() for character in pattern):
        raise ValueError(
            f"holds {odd[0] if odd else ' '!r}, which is in no name of a module; '?' stands for "
            "any one character"
        )
    return pattern


def glob_matches(pattern: str, name: str) -> bool:
    """Return whether a glob matches a module's name, or its end after a dot.

    >>> glob_matches("layers.[0-7].*", "model.layers.3.mlp.down_proj")
    True
    >>> glob_matches("down_proj", "model.layers.3.mlp.down_proj"), glob_matches("proj", "down_proj")
    (True, False)
    """
    # Compare literally first: a name that contains brackets does not match itself as a glob.
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
