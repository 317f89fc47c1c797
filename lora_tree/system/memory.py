"""Memory: how much of it there is, and whether something fits, asked before it is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import BudgetError

__all__ = ["check_fits", "free_bytes", "total_bytes"]

_MEMINFO = "/proc/meminfo"
_GROUP = "/sys/fs/cgroup"  # of a container, which may have less than the machine
_SMALL = 256 << 20  # not worth a look


def total_bytes() -> int | None:
    """Return the memory that this process could have at most; None where the system does not say."""
    told = _meminfo()
    known = _pages("SC_PHYS_PAGES")
    if "MemTotal" in told:
        known = [told["MemTotal"] + told.get("SwapTotal", 0)]
    known += [group.limit for group in _groups()]
    return min(known, default=None)


def free_bytes() -> int | None:
    """Return the memory that this process can still have; None where the system does not say."""
    told = _meminfo()
    known = _pages("SC_AVPHYS_PAGES")
    if "MemAvailable" in told:  # counts what the page cache would give back, which the pages do not
        known = [told["MemAvailable"] + told.get("SwapFree", 0)]
    # The page cache's part of a container's memory is given back when a process needs it.
    known += [max(group.limit - group.used + group.files, 0) for group in _groups()]
    return min(known, default=None)


def check_fits(nbytes: int, what: str, *, free: bool = True) -> None:
    """Refuse what can't be held in memory, before it is allocated.

    Args:
        nbytes: how much it takes.
        what: named first in the error.
        free: compare with the memory that is free now; else with all there is, for memory that is
            taken from a pool.

    Raises:
        BudgetError: it is more than that.
    """
    if nbytes <= _SMALL:
        return
    most = free_bytes() if free else total_bytes()
    if most is not None and nbytes > most:
        there = "are free" if free else "is all there is"
        raise BudgetError(
            f"{what}: takes {nbytes:,} bytes of memory, and {most:,} {there}",
            "open it on a machine with more memory; or, where it should be small, its file is "
            "broken",
        )


def _meminfo() -> dict[str, int]:
    """The lines of Linux's own account, in bytes."""
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
    """The memory of a container: its limit, what is used of it, and how much of that are files' pages."""

    limit: int
    used: int
    files: int


def _groups() -> list[_ControlGroup]:
    """The container that this process runs in, as either version of Linux's control groups tells of it."""
    found: list[_ControlGroup] = []
    for limit_file, used_file, stat_file, files in (
        ("memory.max", "memory.current", "memory.stat", "file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "cache",
        ),
    ):
        limit, used = _number(f"{_GROUP}/{limit_file}"), _number(f"{_GROUP}/{used_file}")
        if limit is not None and used is not None:
            found.append(_ControlGroup(limit, used, _stat(f"{_GROUP}/{stat_file}", files)))
    return found


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
