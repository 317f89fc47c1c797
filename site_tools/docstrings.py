"""Docstrings as a site can show them: an extension of griffe, named in mkdocs.yml.

Markdown reads ``>>>`` as a quotation of a quotation, so each example is put into a fence. An entry
for two arguments becomes two, since a table has a row for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import griffe

_SHARED = re.compile(r"(?P<margin>\s+)(?P<names>\w+(?:, \w+)+): (?P<said>.*)")


class ShownDocstrings(griffe.Extension):
    """Changes docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change one docstring."""
        if obj.docstring is not None:
            lines = obj.docstring.value.splitlines()
            obj.docstring.value = "\n".join(_fenced(_one_by_one(lines)))


def _one_by_one(lines: Iterable[str]) -> Iterator[str]:
    """The lines, with ``a, b: …`` as ``b: as `a`.`` and ``a: …``."""
    for line in lines:
        shared = _SHARED.fullmatch(line)
        if shared is None:
            yield line
            continue
        first, *others = shared["names"].split(", ")
        for other in others:
            yield f"{shared['margin']}{other}: as `{first}`."
        yield f"{shared['margin']}{first}: {shared['said']}"


def _fenced(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines, with a fence around each example: from ``>>>`` to the next empty line."""
    margin: str | None = None
    for line in lines:
        if margin is None and line.lstrip().startswith(">>>"):
            margin = line[: len(line) - len(line.lstrip())]
            yield f"{margin}```pycon"
        elif margin is not None and not line.strip():
            yield f"{margin}```"
            margin = None
        yield line
    if margin is not None:
        yield f"{margin}```"
