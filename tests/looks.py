"""Every file that Python opens, and every folder that it lists, by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LISTS: list[list[str]] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _LISTS or event not in ("open", "os.listdir", "os.scandir"):
        return
    if isinstance(args[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(args[0]))
        for looked in _LISTS:
            looked.append(path)


sys.addaudithook(_audit)  # it can't be taken out again, only have nothing to do


@contextmanager
def looking() -> Iterator[list[str]]:
    """Yield a list that gets the real path of everything that is opened or listed in the block."""
    looked: list[str] = []
    _LISTS.append(looked)
    try:
        yield looked
    finally:
        _LISTS[:] = [other for other in _LISTS if other is not looked]
