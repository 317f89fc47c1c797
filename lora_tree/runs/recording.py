"""Recording: a run keeps its steps, and how it ended, in the tree's folder.

    begins     a new number, or that of the same run, resumed; lines of later steps are removed
    a step     its lines are appended, before its checkpoint is written
    ends       stopped, diverged, or trained; then finished, once the tree was saved

The lines follow from the steps. So a run that resumes from checkpoint-50 keeps the lines up to 50
and writes the others again, which come out the same but for the times.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import FolderError
from ..folder import disk
from ..folder.past.run_records import (
    RUN_ABOUT,
    RUN_LOCK,
    NodeMetric,
    NodeOutcome,
    PathMetric,
    RunState,
    runs_folder,
)
from ..folder.past.run_store import append_metrics, cut_after, resumed_or_new_run, write_about
from ..folder.reading.tree_place import place_of
from ..formats import strict_json
from ..provenance import utc_now
from ..system import locks

__all__ = ["Recorder"]


class Recorder:
    """The record of one run, while the run takes steps.

    Args:
        zoo: the tree's folder, or its tree.yaml.
        about: the run's identity: its settings, nodes, rows and folder of checkpoints.
        more: the rest of run.json.
        by: the command, or the name of the program.
        done: steps that the run has taken; lines of later ones are removed.

    Raises:
        FolderError: the folder can't be written, or another process takes steps of the same run.
    """

    def __init__(
        self,
        zoo: str | os.PathLike[str],
        about: Mapping[str, Any],
        more: Mapping[str, Any],
        *,
        by: str,
        done: int,
    ) -> None:
        identity = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        content = {**about, **more, "by": by, "began": utc_now(), "state": "stopped", "done": 0}
        self.folder: Path = resumed_or_new_run(runs_folder(place_of(zoo)), identity, content)
        held = locks.attempt(self.folder / RUN_LOCK)
        if held is None:
            raise FolderError(
                f"{self.folder}: another process is training this run",
                "wait for it, or give this run another folder for its checkpoints (--run DIR)",
            )
        self._held = held
        try:
            file = self.folder / RUN_ABOUT
            # The file's own values stay: a resumed run keeps the time at which it first began.
            self._about = strict_json.loads(disk.read_file(file, follow=False), str(file))
            cut_after(self.folder, done)
            self._note("running", done, ended=None)
        except BaseException:
            held.release()
            raise

    def note(self, lines: Iterable[NodeMetric | PathMetric]) -> None:
        """Append lines of a step; raises FolderError if they can't be written."""
        append_metrics(self.folder, lines)

    def sync(self) -> None:
        """Make the lines so far outlast a power cut, as the checkpoint of their step does."""
        append_metrics(self.folder, (), last=True)

    def end(
        self,
        state: RunState,
        done: int,
        outcomes: Mapping[str, NodeOutcome],
        stale: Iterable[str] = (),
    ) -> None:
        """Record how the run ended, and release its lock; a later call may record a later state."""
        plain = {}
        for node, outcome in outcomes.items():
            plain[node] = {name: _json(value) for name, value in asdict(outcome).items()}
        try:
            self._note(state, done, ended=utc_now(), outcomes=plain, stale=list(stale))
        finally:
            self._held.release()

    def _note(self, state: RunState, done: int, **more: Any) -> None:
        self._about |= {"state": state, "done": done, **more}
        write_about(self.folder, self._about)


def _json(value: Any) -> Any:
    """Return a number, or None for one that JSON does not have."""
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
