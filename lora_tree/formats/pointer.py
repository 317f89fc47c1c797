"""Recognise Git LFS pointers: three lines of text in place of a file that was never fetched.

A clone made without git-lfs has them in place of every weights file. Taken for safetensors they
look like a broken download, and the advice to download again would not help.
"""

from __future__ import annotations

from ..errors import FormatError

__all__ = ["check_pointer"]

_START = b"version https://git-lfs.github.com/spec/"
_ENOUGH = 8  # bytes that tell a pointer from any other file of an adapter


def check_pointer(first: bytes, where: str, kind: str) -> None:
    """Refuse a file that begins like a Git LFS pointer.

    Args:
        first: its first bytes; eight are enough.
        where: names the file in the error.
        kind: the kind of file that was expected.

    Raises:
        FormatError: it is one, and says how to fetch the file itself.

    >>> check_pointer(b'{"r": 8}', "adapter_config.json", "JSON")
    """
    if len(first) >= _ENOUGH and (first.startswith(_START) or _START.startswith(first)):
        raise FormatError(
            f"{where}: not a whole {kind} file",
            "it is a Git LFS pointer, not the file itself: run git lfs pull in that repository",
        )
