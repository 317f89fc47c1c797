"""The writer's lock: one process at a time writes a folder.

    .lora_tree/lock       held by the writer, and removed by it together with the folder around it

A lock that no living process holds does not block. Readers take no lock: they look through the
record (see `pending`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import FolderError, listing
from ...system import claims, locks
from .. import disk
from .record import HIDDEN

__all__ = ["only_writer"]

WAIT_S = 10.0


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the writer's lock on ``folder`` while the block runs.

    Raises:
        FolderError: another process kept writing for `WAIT_S` seconds, or the lock can't be made.
    """
    hidden = folder / HIDDEN
    held = _acquire(hidden, hidden / "lock", time.monotonic() + WAIT_S)
    try:
        yield
    finally:
        try:
            held.release(remove=True)
        finally:
            disk.drop(hidden)  # empty unless a decision is still to be carried out


def _acquire(hidden: Path, lock: Path, until: float) -> locks.Held:
    while True:
        disk.make_inside(hidden)
        held = None
        try:
            held = locks.attempt(lock)
        except FolderError as error:
            # The writer before this one may have removed the hidden folder since it was made above.
            if not isinstance(error.__cause__, FileNotFoundError):
                disk.drop(hidden)
                raise
        if held is not None:
            return held
        if time.monotonic() > until:
            raise _busy_error(hidden, lock)
        locks.pause()


def _busy_error(hidden: Path, lock: Path) -> FolderError:
    who = listing(claims.owners(lock), most=3)
    text = f"{hidden.parent}: another process has been writing this folder for {WAIT_S:.0f} s"
    return FolderError(
        f"{text}: {who}" if who else text,
        "wait until it is done, or end it; the lock of an ended process does not block",
    )
