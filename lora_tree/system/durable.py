"""Make files and names durable: fsync, as far as the system and the file system have it.

A file's bytes must be on the disk before the file gets its name, and a folder is synced after names
in it have changed. Network shares and some FUSE file systems can't sync a folder (EINVAL, ENOTSUP).
They keep names by themselves or not at all, so git, SQLite and borg ignore these errors, and so
does this library. A file that can't be synced is an error.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from .named import named

__all__ = ["sync_file", "sync_folder"]

_NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def sync_file(file: int) -> None:
    """Make the bytes of an open file durable.

    Raises:
        OSError: the disk is full or broken; the caller knows the file's name.
    """
    if sys.platform == "darwin":
        import fcntl

        try:
            # macOS leaves bytes in the disk's own cache after an fsync; this empties that too
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
        except OSError:
            pass  # a network share has only fsync, which raises if anything is wrong
    os.fsync(file)


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder durable, if its file system can.

    Raises:
        FolderError: the folder can't be opened, or its disk is broken.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folders
    with named("sync it", folder):
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(file)
        except OSError as error:
            if error.errno not in _NO_FOLDERS:
                raise
        finally:
            os.close(file)
