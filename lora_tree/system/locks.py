"""Lock a path between processes, on every file system.

flock is used where the file system has it: the lock ends with its process. Where it has not
(ENOSYS, EOPNOTSUPP, ENOLCK; Windows), each holder makes a file that names its owner (see `claims`).

A mount with flock and a mount without it do not see each other's locks.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import FolderError
from . import claims
from .flags import NO_FOLLOW, NO_WAIT, PLAIN
from .named import named

__all__ = ["Held", "acquire", "attempt", "holding", "pause"]

POLL_S = 0.05
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
_BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)


class Held:
    """A lock that this process holds until `release`."""

    def __init__(self, path: Path, file: int | None, claim: Path | None) -> None:
        self.path = path
        self._file = file
        self._claim = claim

    def release(self, *, remove: bool = False) -> None:
        """Release the lock; a second call does nothing.

        Args:
            remove: remove the lock file too. Processes that wait for it notice, and make it
                again.
        """
        try:
            is_held = self._file is not None or self._claim is not None
            if remove and is_held:
                # Before the lock is released: afterwards the file may be another process's.
                with suppress(OSError):
                    os.unlink(self.path)
        finally:
            file, self._file = self._file, None
            if file is not None:
                os.close(file)
            claim, self._claim = self._claim, None
            if claim is not None:
                claims.drop_claim(claim)


def attempt(path: str | Path, *, shared: bool = False, make: bool = True) -> Held | None:
    """Take a lock if that is possible at once, and return None if another holder is in the way.

    Args:
        path: a folder or a file. No link is followed.
        shared: let others hold it shared at the same time.
        make: make the file where it is missing.

    Raises:
        FolderError: the file can't be made, opened or locked.
    """
    return _attempt(Path(path), shared, make, wait=False)


def acquire(
    path: str | Path, *, shared: bool = False, make: bool = True, wait_s: float | None = None
) -> Held | None:
    """Wait for a lock and return it, or return None after ``wait_s`` seconds without it.

    Args:
        wait_s: None waits for ever.

    Raises:
        FolderError: see `attempt`.
    """
    until = None if wait_s is None else time.monotonic() + wait_s
    while True:
        held = _attempt(Path(path), shared, make, wait=until is None)
        if held is not None:
            return held
        if until is not None and time.monotonic() > until:
            return None
        pause()


def pause() -> None:
    """Wait a moment before the next attempt.

    The time is drawn at random. Processes that came at once would otherwise come back at once, see
    each other's claims and all withdraw again.
    """
    time.sleep(POLL_S * random.uniform(0.5, 1.5))


@contextmanager
def holding(path: str | Path, *, shared: bool = False, make: bool = True) -> Iterator[Held]:
    """Hold a lock while the block runs, after waiting for it as long as it takes.

    Raises:
        FolderError: see `attempt`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, holding(f"{folder}/lock"):
    ...     print(attempt(f"{folder}/lock"))
    None
    """
    held = acquire(path, shared=shared, make=make)
    assert held is not None  # it waits for ever
    try:
        yield held
    finally:
        held.release()


# ---------------------------------------------------------------------- flock
class _NoFlock(Exception):
    """The operating system, or this file system, has no flock."""


def _attempt(path: Path, shared: bool, make: bool, *, wait: bool) -> Held | None:
    with named("lock it", path):
        try:
            return _by_flock(path, shared, make, wait)
        except _NoFlock:
            claim = claims.make_claim(path, shared)
            return None if claim is None else Held(path, None, claim)


def _by_flock(path: Path, shared: bool, make: bool, wait: bool) -> Held | None:
    was_there = os.path.lexists(path)
    file = _open(path, make)
    try:
        _flock(file, shared, wait)
        if _is_same_file(file, path):
            return Held(path, file, None)
    except BaseException as error:
        # After Ctrl-C, too: a lock that stays behind would shut this process out.
        os.close(file)
        code = error.errno if isinstance(error, OSError) else None
        if code in _BUSY:
            return None
        if code in _NO_FLOCK:
            _warn_once(path, str(error))
            raise _NoFlock from error
        # A file that this call made is removed again. But not after Ctrl-C: the process for which
        # this one waited may hold it.
        if code is not None and not was_there:
            with suppress(OSError):
                os.unlink(path)
        raise
    # The last holder removed the file while we waited, so no other process sees this lock.
    os.close(file)
    return None


def _open(path: Path, make: bool) -> int:
    if _is_folder(path):
        if not hasattr(os, "O_DIRECTORY"):
            raise _NoFlock  # Windows opens no folders
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | PLAIN | NO_FOLLOW)
    flags = os.O_RDWR | PLAIN | NO_FOLLOW | NO_WAIT
    if make:
        flags |= os.O_CREAT
    file = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FolderError(f"{path}: not a plain file, but a lock file goes there", "move it away")
    return file


def _flock(file: int, shared: bool, wait: bool) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        raise _NoFlock from None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)


def _is_same_file(file: int, path: Path) -> bool:
    """Return whether the open file still has that name; its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


_warned: set[int] = set()


def _warn_once(path: Path, reason: str) -> None:
    """Warn once for each file system."""
    device = os.lstat(path.parent).st_dev
    if device in _warned:
        return
    _warned.add(device)
    warnings.warn(
        f"{path.parent}: this file system has no flock ({reason}); lora_tree uses lock files there "
        "instead, which processes that reach the same folder through a mount with flock do not see",
        RuntimeWarning,
        stacklevel=2,
    )
