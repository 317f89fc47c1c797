"""Flags for opening files; no operating system has all of them."""

from __future__ import annotations

import os

__all__ = ["NO_FOLLOW", "NO_WAIT", "PLAIN"]


def _flags(*names: str) -> int:
    found = 0
    for name in names:
        found |= getattr(os, name, 0)
    return found


PLAIN = _flags("O_CLOEXEC", "O_BINARY")
"""Bytes stay unchanged (Windows would change line ends); closed when another program starts."""
NO_FOLLOW = _flags("O_NOFOLLOW")
"""A link at the end of the path is an error."""
NO_WAIT = _flags("O_NONBLOCK", "O_NOCTTY")
"""Opening a pipe does not wait for its writer."""
