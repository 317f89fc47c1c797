"""Turn the operating system's refusals into this library's errors, with the file's name.

An OSError from a descriptor names no file, and no OSError names the action that failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FolderError, LoraTreeError

__all__ = ["named"]


@contextmanager
def named(doing: str, path: str | Path) -> Iterator[None]:
    """Raise an OSError inside the block as a `FolderError` that names ``path``.

    Args:
        doing: what the block does, as in "can't read it".
        path: the file or folder.

    >>> with named("read it", "a/file"):
    ...     raise PermissionError(13, "Permission denied")
    Traceback (most recent call last):
    lora_tree.errors.FolderError: a/file: can't read it: Permission denied
    """
    try:
        yield
    except LoraTreeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise FolderError(f"{path}: can't {doing}: {reason}") from error
