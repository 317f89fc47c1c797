"""Globs on module names: ``q_proj``, ``*.down_proj``, ``layers.[0-7].*``.

A glob stands for the whole name, or for the rest of it after one of its dots, as PEFT's
``target_modules`` and ``rank_pattern`` do. ``*`` is any text, with dots; ``?`` one character;
``[0-7]`` one of several. ``fnmatch`` never goes back over a star, so a match takes at most
len(name) · len(pattern) steps, and there is no budget to pay from.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from .parse import MAX_CHARACTERS

__all__ = ["check_glob", "glob_means"]

_OF_A_REGEX = frozenset("\\()|^$+")
_OF_OUR_TEXTS = frozenset("{}=,:;")
"""They stand between the patterns and numbers of a weight that is written in one line."""


def check_glob(pattern: str) -> str:
    """Return a pattern if it is a glob on module names.

    Raises:
        ValueError: it is none; says what is wrong.
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


def glob_means(pattern: str, name: str) -> bool:
    """Return whether a glob stands for a module's name, or for its end after a dot.

    >>> glob_means("layers.[0-7].*", "model.layers.3.mlp.down_proj")
    True
    >>> glob_means("down_proj", "model.layers.3.mlp.down_proj"), glob_means("proj", "down_proj")
    (True, False)
    """
    # The names first: one that holds a bracket is no glob for itself.
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
