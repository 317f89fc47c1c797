"""Marks: numbers by which behaviours are told apart; the same key has the same mark."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable

__all__ = ["Marks"]

KEPT_MARKS = 1024

_MARKS = itertools.count(1)


class Marks:
    """Key → mark, for the last keys used."""

    def __init__(self) -> None:
        self._of: OrderedDict[Hashable, int] = OrderedDict()

    def of(self, key: Hashable) -> int:
        """Return the mark of ``key``, a new one if it is not known."""
        # Taken out and put back at the end, where the last used are.
        mark = self._of.pop(key, None) or next(_MARKS)
        self._of[key] = mark
        if len(self._of) > KEPT_MARKS:
            self._of.popitem(last=False)
        return mark

    @staticmethod
    def new() -> int:
        """Return a mark that nothing else has."""
        return next(_MARKS)
