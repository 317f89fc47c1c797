"""Print the files that a push or a pull changes, one a line."""

from __future__ import annotations

from collections.abc import Sequence

from .console import out

__all__ = ["tell_changes"]


def tell_changes(new: Sequence[str], replaced: Sequence[str], deleted: Sequence[str]) -> int:
    """Print the files, each with a sign, and return how many there are."""
    for sign, files in (("+", new), ("~", replaced), ("-", deleted)):
        for file in files:
            out().print(f"{sign} {file}", soft_wrap=True)
    return len(new) + len(replaced) + len(deleted)
