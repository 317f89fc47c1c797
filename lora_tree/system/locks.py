"""Lock a path between processes, on every file system.

    .lora_tree/lock                      flock, where the file system has it: the lock ends with its process
    .lora_tree/lock.alone.<token>        where it has not (ENOSYS, EOPNOTSUPP, ENOLCK; Windows): a claim
    .locks/1f0c….shared.<token>          a claim of one of several holders

A claim is a file that its holder made (O_EXCL) and that tells its owner. A process makes its claim first and looks for
others afterwards. So of two that come at once, at least one sees the other, takes its own claim back and tries later.
A claim is left over when its process has ended, where that can be asked: same machine, same start. A claim from
another machine is left over when its holder has not touched it for `STALE_S`; a holder touches its claims all the time.

Law: no claim's name is ever used twice. So a process that removes a claim that was left over can't hit a newer one.

A mount with flock and a mount without it do not see each other's locks.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import random
import re
import socket
import stat
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import FolderError
from .flags import NO_FOLLOW, NO_WAIT, PLAIN
from .named import named
from .reading import opened

__all__ = ["Held", "acquire", "attempt", "clear", "holders", "holding", "pause"]

POLL_S = 0.05
BEAT_S = 20.0
STALE_S = 300.0
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
_BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
_MOST_BYTES = 4096
_CLAIM = re.compile(r"(.+)\.(alone|shared)\.[0-9a-f]{32}\Z")


class Held:
    """A lock that this process holds until `release`."""

    def __init__(self, path: Path, file: int | None, claim: Path | None) -> None:
        self.path = path
        self._file = file
        self._claim = claim

    def release(self, *, remove: bool = False) -> None:
        """Let go; a second call does nothing.

        Args:
            remove: take the lock file away too. Processes that wait for it notice, and make it again.
        """
        try:
            if remove and (self._file is not None or self._claim is not None):
                with suppress(OSError):  # still held, so no other process is inside
                    os.unlink(self.path)
        finally:
            file, self._file = self._file, None
            if file is not None:
                os.close(file)
            claim, self._claim = self._claim, None
            if claim is not None:
                _drop(claim)


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


def acquire(path: str | Path, *, shared: bool = False, make: bool = True, wait_s: float | None = None) -> Held | None:
    """Wait for a lock, and return None if it is not to be had within ``wait_s`` seconds (None: for ever).

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
    """Wait a moment before the next attempt; of several that came at once, not all come back at once."""
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


def holders(path: str | Path) -> list[str]:
    """Describe the holders of a lock, as far as their claims tell: ``["process 7 on host, for 30 s"]``."""
    path = Path(path)
    with suppress(OSError):
        return [_describe(claim) for claim in _claims(path)]
    return []


def clear(folder: Path, name: re.Pattern[str]) -> None:
    """Remove the claims that were left over in ``folder`` of paths that are not there any more.

    Args:
        name: matches the names of those paths.

    Raises:
        OSError: the folder can't be read.
    """
    for entry in os.listdir(folder):
        of = _CLAIM.match(entry)
        if of is None or not name.match(of[1]) or os.path.lexists(folder / of[1]):
            continue
        with suppress(OSError):
            if _left_over(folder / entry, time.time()):
                os.unlink(folder / entry)


# ---------------------------------------------------------------------- flock
class _NoFlock(Exception):
    """The operating system, or this file system, has no flock."""


def _attempt(path: Path, shared: bool, make: bool, *, wait: bool) -> Held | None:
    with named("lock it", path):
        try:
            return _by_flock(path, shared, make, wait)
        except _NoFlock:
            return _by_claim(path, shared)


def _by_flock(path: Path, shared: bool, make: bool, wait: bool) -> Held | None:
    there = os.path.lexists(path)
    file = _open(path, make)
    try:
        _flock(file, shared, wait)
        if _same(file, path):
            return Held(path, file, None)
    except BaseException as error:  # Ctrl-C too: a lock that nobody can let go of would shut this process out
        os.close(file)
        code = error.errno if isinstance(error, OSError) else None
        if code in _BUSY:
            return None
        if code in _NO_FLOCK:
            _say(path, str(error))
            raise _NoFlock from error
        if not there and not isinstance(error, _NoFlock):
            with suppress(OSError):
                os.unlink(path)
        raise
    os.close(file)
    return None


def _open(path: Path, make: bool) -> int:
    if _is_folder(path):
        if not hasattr(os, "O_DIRECTORY"):
            raise _NoFlock  # Windows opens no folders
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | PLAIN | NO_FOLLOW)
    file = os.open(path, os.O_RDWR | (os.O_CREAT if make else 0) | PLAIN | NO_FOLLOW | NO_WAIT, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FolderError(f"{path}: not a plain file", "move it away")
    return file


def _flock(file: int, shared: bool, wait: bool) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        raise _NoFlock from None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)


def _same(file: int, path: Path) -> bool:
    """The open file is still the one of that name; its last holder may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


_said: set[int] = set()


def _say(path: Path, reason: str) -> None:
    """Warn once for each file system."""
    device = os.lstat(path.parent).st_dev
    if device in _said:
        return
    _said.add(device)
    warnings.warn(
        f"{path.parent}: this file system has no flock ({reason}); lora_tree uses lock files there instead, which "
        "processes that reach the same folder through a mount with flock do not see",
        RuntimeWarning,
        stacklevel=2,
    )


# ---------------------------------------------------------------------- claims
_mine: dict[str, Path] = {}  # token → claim; whoever changes it holds the condition
_changed = threading.Condition()
_beating = False


def _by_claim(path: Path, shared: bool) -> Held | None:
    """Make a claim, and take it back if another stands against it."""
    token = uuid.uuid4().hex
    claim = path.with_name(f"{path.name}.{'shared' if shared else 'alone'}.{token}")
    with _changed:
        _mine[token] = claim  # before the file is there: a claim of this process without an entry is left over
    try:
        _create(claim, token)
        now_s = os.lstat(claim).st_mtime  # the clock of the file system, which all its machines share
        for other in _claims(path):
            if other == claim or (shared and ".shared." in other.name):
                continue
            if not _left_over(other, now_s):
                _drop(claim)
                return None
            with suppress(FileNotFoundError):
                os.unlink(other)
    except BaseException:
        _drop(claim)
        raise
    _keep_touching()
    return Held(path, None, claim)


def _create(claim: Path, token: str) -> None:
    owner = {
        "token": token,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": int(time.time()),
    }
    data = json.dumps(owner).encode()
    file = os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN | NO_FOLLOW, 0o644)
    try:
        os.write(file, data)
    finally:
        os.close(file)


def _claims(path: Path) -> list[Path]:
    mine = re.compile(re.escape(path.name) + r"\.(alone|shared)\.[0-9a-f]{32}\Z")
    return [path.with_name(name) for name in sorted(os.listdir(path.parent)) if mine.match(name)]


def _owner(claim: Path) -> dict[str, Any]:
    """What a claim says of its owner; anybody may have written it, so it counts only where it is well-formed."""
    try:
        with opened(claim, follow=False) as file:
            said = json.loads(os.read(file, _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}  # gone, or not written to its end yet
    kinds = {"token": str, "host": str, "machine": str, "pid": int, "started": str, "since": int}
    if not isinstance(said, dict) or said.keys() != kinds.keys():
        return {}
    return said if all(isinstance(said[key], kind) for key, kind in kinds.items()) else {}


def _left_over(claim: Path, now_s: float) -> bool:
    """Nobody holds this claim any more."""
    try:
        seen = os.lstat(claim)
    except FileNotFoundError:
        return True
    if not stat.S_ISREG(seen.st_mode):
        raise FolderError(f"{claim}: a link, or not what a lock makes there", "remove it")
    owner = _owner(claim)
    if owner and owner["machine"] == _machine() and os.name == "posix":
        if owner["pid"] == os.getpid() and owner["started"] == _started(os.getpid()):
            with _changed:
                return owner["token"] not in _mine
        return not _lives(owner["pid"], owner["started"])
    # a time far ahead comes from a copied file, not from a holder
    return abs(now_s - seen.st_mtime) > STALE_S


def _lives(pid: int, started: str) -> bool:
    """The process that told its start runs still; another one may have its number by now."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # another user's
    return _started(pid) == started


@cache
def _machine() -> str:
    """Name the set of processes among which a process id means something."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))  # containers count their processes anew
    return " ".join(parts)


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return ""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _describe(claim: Path) -> str:
    owner = _owner(claim)
    if not owner:
        return "an unknown process"
    age_s = max(time.time() - owner["since"], 0)
    return f"process {owner['pid']} on {owner['host'][:80]!r}, for {age_s:.0f} s"


def _drop(claim: Path) -> None:
    """Take a claim of this process back."""
    with suppress(OSError):
        os.unlink(claim)
    with _changed:
        _mine.pop(claim.name[-32:], None)
        _changed.notify_all()


def _keep_touching() -> None:
    """See to it that this process's claims are touched while it has some."""
    global _beating
    with _changed:
        if not _beating:
            _beating = True
            threading.Thread(target=_touch_all, name="lora_tree locks", daemon=True).start()


def _touch_all() -> None:
    global _beating
    while True:
        with _changed:
            _changed.wait(BEAT_S)
            if not _mine:
                _beating = False
                return
            claims = list(_mine.values())
        for claim in claims:
            with suppress(OSError):
                _touch(claim)


def _touch(claim: Path) -> None:
    """Write the first byte of a claim again: some file systems have no utime, and all note a write."""
    file = os.open(claim, os.O_RDWR | PLAIN | NO_FOLLOW)
    try:
        first = os.read(file, 1)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, first)
    finally:
        os.close(file)


@atexit.register
def _drop_all() -> None:
    """A process that ends leaves no claims, as it leaves no flocks."""
    for claim in list(_mine.values()):
        with suppress(OSError):
            os.unlink(claim)


def _forget_all() -> None:
    """The child of a fork holds no claims: they tell of its parent, who still does."""
    global _beating, _changed
    _mine.clear()
    _changed = threading.Condition()
    _beating = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
