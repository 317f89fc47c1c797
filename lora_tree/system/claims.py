"""Claims: lock files that name their owner, for file systems without flock.

    lock.alone.<token>      the claim of the one holder
    lock.shared.<token>     the claim of one of several holders

A claim is a file that its holder made (O_EXCL). A process makes its claim first and looks for
others afterwards. So of two that come at once, at least one sees the other, takes its own claim
back and tries later.

A claim is left over when its process has ended. The process is looked up by its id and the time at
which it began, which works on its own machine only, and not on Windows. Any other claim is left
over when its holder has not touched it for `STALE_S`; a holder touches its claims every `BEAT_S`.

Law: no claim's name is ever used twice. So a process that removes a claim that was left over can't
remove a newer one by mistake.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import socket
import stat
import sys
import threading
import time
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import FolderError
from .flags import NO_FOLLOW, PLAIN
from .reading import open_plain

__all__ = ["clear", "drop_claim", "make_claim", "owners"]

BEAT_S = 20.0
STALE_S = 300.0
_MOST_BYTES = 4096
_CLAIM = re.compile(r"(.+)\.(alone|shared)\.[0-9a-f]{32}\Z")

_own_claims: dict[str, Path] = {}  # token → claim; hold the condition to change it
_changed = threading.Condition()
_beating = False


def make_claim(path: Path, shared: bool) -> Path | None:
    """Make a claim on a path and return it; if another claim excludes it, return None.

    Raises:
        OSError: it can't be made.
        FolderError: another claim is no plain file.
    """
    token = uuid.uuid4().hex
    kind = "shared" if shared else "alone"
    claim = path.with_name(f"{path.name}.{kind}.{token}")
    with _changed:
        # Before the file is there: a claim of this process without an entry counts as left over,
        # and another thread would remove it.
        _own_claims[token] = claim
    try:
        _create(claim, token)
        # The clock of the file system, which all its machines share; their own clocks may differ.
        now_s = os.lstat(claim).st_mtime
        # Other claims are looked for after this one was made. The other way round, two processes
        # could both see none.
        for other in _claims(path):
            is_compatible = shared and ".shared." in other.name
            if other == claim or is_compatible:
                continue
            if not _is_abandoned(other, now_s):
                drop_claim(claim)
                return None
            with suppress(FileNotFoundError):
                os.unlink(other)
    except BaseException:  # Ctrl-C too: a claim that stays behind would shut everybody out
        drop_claim(claim)
        raise
    _keep_touching()
    return claim


def drop_claim(claim: Path) -> None:
    """Remove a claim of this process; never raises."""
    with suppress(OSError):
        os.unlink(claim)
    with _changed:
        _own_claims.pop(claim.name[-32:], None)
        _changed.notify_all()


def owners(path: Path) -> list[str]:
    """Describe the holders of a lock, as far as their claims tell.

    One of them reads ``process 7 on 'host', for 30 s``.
    """
    with suppress(OSError):
        return [_describe(claim) for claim in _claims(path)]
    return []


def clear(folder: Path, name: re.Pattern[str]) -> None:
    """Remove the claims in ``folder`` that were left over on paths that no longer exist.

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
            if _is_abandoned(folder / entry, time.time()):
                os.unlink(folder / entry)


# ---------------------------------------------------------------------- owners of claims
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
    own_claims = re.compile(re.escape(path.name) + r"\.(alone|shared)\.[0-9a-f]{32}\Z")
    return [
        path.with_name(name) for name in sorted(os.listdir(path.parent)) if own_claims.match(name)
    ]


def _owner(claim: Path) -> dict[str, Any]:
    """Return the owner that a claim names; any process may have written it, so it is checked."""
    try:
        with open_plain(claim, follow=False) as file:
            owner = json.loads(os.read(file, _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}  # gone, or not written to its end yet
    kinds = {"token": str, "host": str, "machine": str, "pid": int, "started": str, "since": int}
    if not isinstance(owner, dict) or owner.keys() != kinds.keys():
        return {}
    return owner if all(isinstance(owner[key], kind) for key, kind in kinds.items()) else {}


def _is_abandoned(claim: Path, now_s: float) -> bool:
    """Return whether the holder of a claim is gone."""
    try:
        seen = os.lstat(claim)
    except FileNotFoundError:
        return True
    if not stat.S_ISREG(seen.st_mode):
        raise FolderError(f"{claim}: a link, or not what a lock makes there", "remove it")
    owner = _owner(claim)
    if owner and owner["machine"] == _machine():
        if owner["pid"] == os.getpid() and owner["started"] == _started(os.getpid()):
            with _changed:
                return owner["token"] not in _own_claims
        if os.name == "posix":  # on Windows, to ask for a process would end it
            return not _is_running(owner["pid"], owner["started"])
    # a time far ahead comes from a copied file, not from a holder
    return abs(now_s - seen.st_mtime) > STALE_S


def _is_running(pid: int, started: str) -> bool:
    """Return whether a process still runs; another one may have its number by now."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # PermissionError: it runs, and is another user's
    return _started(pid) == started


@cache
def _machine() -> str:
    """Name the machine or container in which a process id names one process."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))  # each container has process ids of its own
    return " ".join(parts)


def _started(pid: int) -> str:
    """Return when a process began, in the kernel's ticks; empty where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return ""
    try:
        # The second field is the program's name in parentheses, and may have blanks and
        # parentheses in it; the 22nd is the start.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _describe(claim: Path) -> str:
    owner = _owner(claim)
    if not owner:
        return "an unknown process"
    age_s = max(time.time() - owner["since"], 0)
    return f"process {owner['pid']} on {owner['host'][:80]!r}, for {age_s:.0f} s"


def _keep_touching() -> None:
    """Start the thread that touches this process's claims, if it does not run yet."""
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
            if not _own_claims:
                _beating = False
                return
            claims = list(_own_claims.values())
        # Without the condition: a network share may take seconds, and a release must not wait.
        for claim in claims:
            with suppress(OSError):
                _touch(claim)


def _touch(claim: Path) -> None:
    """Renew a claim's time by writing its first byte again: some file systems have no utime."""
    file = os.open(claim, os.O_RDWR | PLAIN | NO_FOLLOW)
    try:
        first = os.read(file, 1)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, first)
    finally:
        os.close(file)


@atexit.register
def _drop_all() -> None:
    """Remove this process's claims when it ends, as the system does with its flocks."""
    for claim in list(_own_claims.values()):
        with suppress(OSError):
            os.unlink(claim)


def _forget_all() -> None:
    """Forget the parent's claims in the child of a fork: the parent still holds them."""
    global _beating, _changed
    _own_claims.clear()
    # A new condition: another thread of the parent may have held the old one during the fork, and
    # that thread does not exist here to release it.
    _changed = threading.Condition()
    _beating = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
