"""Flags for opening files, of which not every operating system has all."""

from __future__ import annotations

import os

__all__ = ["NO_FOLLOW", "NO_WAIT", "PLAIN"]


def _flags(*names: str) -> int:
    found = 0
    for name in names:
        found |= getattr(os, name, 0)
    return found


PLAIN = _flags("O_CLOEXEC", "O_BINARY")
"""Bytes as they are (Windows changes the ends of lines otherwise), and not handed on to other programs."""
NO_FOLLOW = _flags("O_NOFOLLOW")
NO_WAIT = _flags("O_NONBLOCK", "O_NOCTTY")
"""Opening a pipe does not wait for its writer."""
