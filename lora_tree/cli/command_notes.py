"""The command line that is running, as a save notes it in tree.lock and in the history."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..provenance import SaveNote

__all__ = ["command_note", "noted_command"]

_MOST = 1000  # characters; a shell may have expanded a pattern to thousands of names
_running: list[str] = []


@contextmanager
def noted_command(arguments: Sequence[str]) -> Iterator[None]:
    """Remember the arguments while their command runs."""
    # A stack: a command may run another one in its own process, and goes on after it.
    _running.append(shlex.join(["lora-tree", *arguments]))
    try:
        yield
    finally:
        _running.pop()


def command_note(**more: Mapping[str, Any]) -> SaveNote:
    """Return the note of a save that the running command makes.

    Args:
        more: further fields of `SaveNote`.
    """
    # Imported at the first save, not at the top: the list of commands must not wait for pydantic.
    from ..provenance import SaveNote

    text = _running[-1] if _running else "lora-tree"
    if len(text) > _MOST:
        text = text[:_MOST] + "…"
    return SaveNote(by=text, **more)
