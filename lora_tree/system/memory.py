"""The memory of this machine or container, asked before something large is allocated.

Linux hands out more memory than it has, and kills the process when it is written to. A file that
claims to hold a terabyte would end the process without an error, so it is refused here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import BudgetError

__all__ = ["check_fits", "free_bytes", "total_bytes"]

_MEMINFO = "/proc/meminfo"
_GROUP = "/sys/fs/cgroup"  # of a container, which may have less memory than the machine
_SMALL = 256 << 20  # not worth the milliseconds that the files of /proc take


def total_bytes() -> int | None:
    """Return the most memory that this process could have; None where the system does not say."""
    meminfo = _meminfo()
    known = _pages("SC_PHYS_PAGES")
    if "MemTotal" in meminfo:
        known = [meminfo["MemTotal"] + meminfo.get("SwapTotal", 0)]
    known += [group.limit for group in _groups()]
    return min(known, default=None)


def free_bytes() -> int | None:
    """Return the memory that this process can still have; None where the system does not say."""
    meminfo = _meminfo()
    known = _pages("SC_AVPHYS_PAGES")
    # MemAvailable counts the page cache, which the kernel gives back; SC_AVPHYS_PAGES does not.
    if "MemAvailable" in meminfo:
        known = [meminfo["MemAvailable"] + meminfo.get("SwapFree", 0)]
    # A container's usage counts its page cache too, which is given back when a process needs it.
    known += [max(group.limit - group.used + group.files, 0) for group in _groups()]
    return min(known, default=None)


def check_fits(nbytes: int, what: str, *, free: bool = True) -> None:
    """Refuse an allocation that the memory can't hold.

    Args:
        nbytes: its size.
        what: named first in the error.
        free: compare with the memory that is free now; else with the total, for a caller that takes
            it from a pool of its own.

    Raises:
        BudgetError: it is larger than that memory.
    """
    if nbytes <= _SMALL:
        return
    most = free_bytes() if free else total_bytes()
    if most is not None and nbytes > most:
        reason = "are free" if free else "is all there is"
        raise BudgetError(
            f"{what}: takes {nbytes:,} bytes of memory, and {most:,} {reason}",
            "open it on a machine with more memory; if it should be small, its file is broken: "
            "download or save it again",
        )


def _meminfo() -> dict[str, int]:
    """Return the values of Linux's /proc/meminfo, in bytes."""
    found: dict[str, int] = {}
    for line in _lines(_MEMINFO):
        name, _, rest = line.partition(":")
        number = rest.split()
        if number and number[0].isdigit():
            found[name] = int(number[0]) << 10
    return found


def _pages(name: str) -> list[int]:
    if name not in os.sysconf_names:
        return []
    pages = os.sysconf(name)
    return [pages * os.sysconf("SC_PAGE_SIZE")] if pages > 0 else []


@dataclass(frozen=True)
class _ControlGroup:
    """The memory of a container: its limit, its usage, and the page cache's part of the usage."""

    limit: int
    used: int
    files: int


def _groups() -> list[_ControlGroup]:
    """Return the container of this process, by either version of Linux's control groups."""
    groups: list[_ControlGroup] = []
    versions = (
        ("memory.max", "memory.current", "memory.stat", "file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "cache",
        ),
    )
    for limit_file, used_file, stat_file, files in versions:
        limit = _number(f"{_GROUP}/{limit_file}")  # the word "max" where there is no limit
        used = _number(f"{_GROUP}/{used_file}")
        if limit is not None and used is not None:
            groups.append(_ControlGroup(limit, used, _stat(f"{_GROUP}/{stat_file}", files)))
    return groups


def _stat(file: str, name: str) -> int:
    for line in _lines(file):
        if line.startswith(f"{name} "):
            return int(line.split()[1])
    return 0


def _number(file: str) -> int | None:
    lines = _lines(file)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(file: str) -> list[str]:
    try:
        with open(file, encoding="ascii", errors="replace") as stream:
            return stream.read().splitlines()
    except OSError:
        return []
