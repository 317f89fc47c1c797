"""Open plain files to read, without waiting; the file that was checked is the one that is read.

A name can lead to a pipe, which would make its reader wait for ever, to a device, or through a link
to somewhere else; and it can be given to another file between a look at it and the opening. So the
file is opened first, in a way that waits for nothing, and the open file itself is checked.

A file is missing only if the system says so. Any other answer (no permission, a broken disk) is an
error: a caller that takes it for "missing" would delete or overwrite the file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import FolderError
from .flags import NO_FOLLOW, NO_WAIT, PLAIN

__all__ = ["Inside", "is_file", "is_folder", "open_plain", "open_stream", "plain_file", "stat_of"]

Inside = Callable[[str], bool]
"""A function: real path, all links followed → whether a file may lie there."""

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def stat_of(path: str | Path, *, follow: bool = True) -> os.stat_result | None:
    """Return the system's ``stat`` of a path, or None if nothing is there.

    Args:
        follow: look at the file that a link leads to, not at the link.

    Raises:
        FolderError: the system refuses to tell.
    """
    try:
        return os.stat(path, follow_symlinks=follow)
    except ValueError:  # a name with a NUL in it
        return None
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise FolderError(
            f"{path}: can't tell whether it exists: {error.strerror or error}",
            "make the folders above it accessible, or mount their disk again, and try again",
        ) from error


def is_file(path: str | Path, *, follow: bool = True) -> bool:
    """Tell whether there is a plain file of this name; see `stat_of`."""
    seen = stat_of(path, follow=follow)
    return seen is not None and stat.S_ISREG(seen.st_mode)


def is_folder(path: str | Path, *, follow: bool = True) -> bool:
    """Tell whether there is a folder of this name; see `stat_of`."""
    seen = stat_of(path, follow=follow)
    return seen is not None and stat.S_ISDIR(seen.st_mode)


def plain_file(path: str | Path, *, follow: bool = True, inside: Inside | None = None) -> int:
    """Open a plain file to read, and return its descriptor.

    Args:
        follow: follow a link; without it a link is refused.
        inside: where the file may lie.

    Raises:
        OSError: it can't be opened, is no plain file, or lies where it may not. The caller adds the
            name.
    """
    try:
        file = os.open(path, os.O_RDONLY | PLAIN | NO_WAIT | (0 if follow else NO_FOLLOW))
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "a link") from error
        raise
    except ValueError as error:  # a name with a NUL in it, or with what no file system can spell
        raise OSError(errno.EINVAL, f"not a file's name: {error}") from error
    try:
        seen = os.fstat(file)
        if not stat.S_ISREG(seen.st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        if inside is not None:
            _check_inside(file, path, inside)
    except BaseException:
        os.close(file)
        raise
    return file


def _check_inside(file: int, path: str | Path, inside: Inside) -> None:
    real = _real_path(file, path)
    if not inside(real):
        raise OSError(errno.EXDEV, f"leads to {real}, which is not where it may lie")


def _real_path(file: int, path: str | Path) -> str:
    """Return the real path of an open file; its name may lead elsewhere by now."""
    with suppress(OSError):
        # Linux: one call, and it tells of the open file itself
        return os.readlink(f"/proc/self/fd/{file}")
    # Elsewhere the name is followed again, and the result compared with the open file.
    real = os.path.realpath(path)
    if not os.path.samestat(os.fstat(file), os.lstat(real)):
        raise OSError(errno.EXDEV, "became another file while it was opened")
    return real


@contextmanager
def open_plain(
    path: str | Path, *, follow: bool = True, inside: Inside | None = None
) -> Iterator[int]:
    """Yield the descriptor of a plain file while the block runs; see `plain_file`."""
    file = plain_file(path, follow=follow, inside=inside)
    try:
        yield file
    finally:
        os.close(file)


def open_stream(
    path: str | Path, *, follow: bool = True, inside: Inside | None = None, buffering: int = -1
) -> BinaryIO:
    """Return a plain file as a binary stream, to be closed by the caller; see `plain_file`.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as made, open_stream(made.name) as reading:
    ...     reading.read()
    b''
    """

    def opener(_: str, __: int) -> int:
        return plain_file(path, follow=follow, inside=inside)

    return open(path, "rb", buffering=buffering, opener=opener)
