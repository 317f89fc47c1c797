"""Store runs in a tree's folder: a new run gets the next number, and the oldest are removed.

    .runs/lock           held while a run gets its number, or old ones are removed
    .runs/.gone-<id>/    a run that is being removed, and has lost its number already

A run's lines are appended as it goes, so a kill may cut the last one short and leave steps that no
checkpoint has. When the run is resumed it cuts these off, in a new file that replaces the old one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import FolderError, LoraTreeError
from ...formats import strict_json
from ...system import locks
from ...system.durable import sync_file
from ...system.flags import NO_FOLLOW, PLAIN
from ...system.reading import is_folder
from .. import disk
from .run_records import (
    METRICS,
    RUN_ABOUT,
    RUN_LOCK,
    NodeMetric,
    PathMetric,
    is_held,
    metric_lines,
    numbered_runs,
)

__all__ = [
    "RUNS_BYTES",
    "RUNS_KEPT",
    "append_metrics",
    "bytes_of_run",
    "cut_after",
    "drop_runs",
    "resumed_or_new_run",
    "spare_runs",
    "write_about",
]

RUNS_KEPT = 50
"""The most runs of a tree that are kept when another begins."""
RUNS_BYTES = 256 << 20
"""The bytes that all runs but the last may take together."""
_GONE = ".gone-"


@contextmanager
def _holding_run_lock(folder: Path) -> Iterator[None]:
    with locks.holding(folder / RUN_LOCK):
        yield


def resumed_or_new_run(folder: Path, identity: str, about: Mapping[str, Any]) -> Path:
    """Return the folder of a run: of an unfinished one to resume, or of a new one.

    Args:
        folder: where the runs are kept; made if missing.
        identity: the identity of the run; an unfinished run with the same one is resumed.
        about: the content of a new run's run.json.

    Raises:
        FolderError: the folder can't be written.
    """
    disk.make_inside(folder)
    with _holding_run_lock(folder):
        known = numbered_runs(folder)
        for _, own in reversed(known):
            if _is_resumable(own, identity):
                return own
        number = known[-1][0] + 1 if known else 1
        own = folder / str(number)
        disk.make_inside(own)
        write_about(own, {**about, "identity": identity})
        _drop(spare_runs(folder))
    return own


def write_about(own: Path, about: Mapping[str, Any]) -> None:
    """Replace a run's run.json."""
    disk.replace(own / RUN_ABOUT, json.dumps(about, indent=2).encode())


def append_metrics(
    own: Path, lines: Iterable[NodeMetric | PathMetric], *, last: bool = False
) -> None:
    """Append lines to a run's metrics.

    Args:
        own: the run's folder.
        lines: those of one step.
        last: sync the file, so that all lines so far survive a power cut.

    Raises:
        FolderError: they can't be written.
    """
    file = own / METRICS
    data = b"".join(_rendered(line) for line in lines)
    with disk.named("write it", file):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | PLAIN | NO_FOLLOW
        opened = os.open(file, flags, disk.mode_of(file))
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(opened, view) :]
            if last:
                sync_file(opened)
        finally:
            os.close(opened)


def cut_after(own: Path, step: int) -> None:
    """Remove the lines of later steps, which a resumed run is going to take again.

    Raises:
        FolderError, FormatError: the metrics can't be read or written.
    """
    file = own / METRICS
    if not disk.exists(file):
        return
    lines = metric_lines(file)
    kept = []
    for number, line in enumerate(lines, 1):
        if strict_json.loads(line, f"{file}:{number}").get("step", 0) <= step:
            kept.append(line + b"\n")
    data = b"".join(kept)
    stamp = disk.stamp(file)
    if stamp is None or stamp.size != len(data):
        disk.replace(file, data)


def spare_runs(folder: Path, *, most: int = RUNS_KEPT) -> list[Path]:
    """Return the runs beyond the bound, the oldest first; never one that a process is running.

    Args:
        folder: where the runs are kept.
        most: the number that stay; the last run always does, or its number would be given again.
    """
    spare, nbytes = [], 0
    for count, (_, own) in enumerate(reversed(numbered_runs(folder)), 1):
        nbytes += bytes_of_run(own)
        is_beyond = count > 1 and (count > most or nbytes > RUNS_BYTES)
        if is_beyond and not is_held(own / RUN_LOCK):
            spare.append(own)
    return spare[::-1]


def drop_runs(folder: Path, *, most: int = RUNS_KEPT) -> list[Path]:
    """Remove the runs beyond the bound, and the remains of a killed clean-up; return the runs.

    Raises:
        FolderError: the folder can't be written.
    """
    if not is_folder(folder):
        return []
    with _holding_run_lock(folder):
        spare = spare_runs(folder, most=most)
        _drop(spare)
        with disk.named("list it", folder):
            left = [name for name in os.listdir(folder) if name.startswith(_GONE)]
        for name in left:
            shutil.rmtree(folder / name, ignore_errors=True)
    return spare


def bytes_of_run(own: Path) -> int:
    """Return the bytes of a run's own two files."""
    stamps = [disk.stamp(own / name) for name in (RUN_ABOUT, METRICS)]
    return sum(stamp.size for stamp in stamps if stamp is not None)


# ---------------------------------------------------------------------- private
def _is_resumable(own: Path, identity: str) -> bool:
    """Tell whether a run is the same, unfinished and free; False if it can't be read."""
    file = own / RUN_ABOUT
    try:
        about = strict_json.loads(disk.read_file(file, follow=False), str(file))
    except LoraTreeError:
        return False
    is_open = about.get("state") != "finished"
    return is_open and about.get("identity") == identity and not is_held(own / RUN_LOCK)


def _drop(spare: Iterable[Path]) -> None:
    for own in spare:
        trash = own.with_name(f"{_GONE}{uuid.uuid4().hex}")
        # It loses its number first: a reader of the runs then finds it whole or not at all.
        with suppress(FolderError):
            disk.rename(own, trash)
            shutil.rmtree(trash, ignore_errors=True)


def _rendered(line: NodeMetric | PathMetric) -> bytes:
    plain = asdict(line)
    for name, value in plain.items():
        if isinstance(value, float) and not math.isfinite(value):
            plain[name] = None  # JSON has no NaN
    return json.dumps(plain, ensure_ascii=True).encode() + b"\n"
