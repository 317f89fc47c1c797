"""Records of a tree's training runs: the settings, the losses step by step, and the end of each.

    zoo/.runs/3/run.json         command, times, nodes, settings, data; how it ended, node by node
                metrics.jsonl    a line for each step and node, and for each evaluation and path
                lock             held while the run takes steps
    zoo/.runs-other.yaml/…       the runs of other.yaml's tree

Law: apart from the times, a run that was cut off and resumed has the lines of one that was not. So
no step is missing, and none is recorded twice.

Opening the tree passes over the folder, as over every name that begins with a dot. `run_store.py`
writes here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ...errors import FolderError, FormatError, LoraTreeError
from ...formats import strict_json
from ...system import locks
from ...system.reading import is_folder
from .. import disk
from ..reading.tree_place import YAML, TreePlace, place_of

__all__ = [
    "METRICS",
    "RUN_ABOUT",
    "RUN_LOCK",
    "NodeMetric",
    "NodeOutcome",
    "PathMetric",
    "RunRecord",
    "RunState",
    "is_held",
    "metric_lines",
    "numbered_runs",
    "read_run",
    "run_records",
    "runs_folder",
]

METRICS, RUN_ABOUT, RUN_LOCK = "metrics.jsonl", "run.json", "lock"
_ABOUT_BYTES = 16 << 20
_METRICS_BYTES = 1 << 30
_NUMBER = re.compile(r"[1-9][0-9]{0,8}\Z")

RunState: TypeAlias = Literal["running", "stopped", "cut off", "trained", "finished", "diverged"]
"""stopped: by its caller; cut off: by a kill; trained: all steps done, the tree not yet saved."""


@dataclass(frozen=True)
class NodeMetric:
    """The metrics of a node in one step.

    Args:
        step: its number, from 1.
        node: the path of a node that trained.
        loss: the mean over the tokens of the step's rows through the node, in nats; of preferences
            the mean over them.
        tokens: the tokens learnt in these rows.
        grad_norm: the norm of the node's gradients before clipping; NaN if it was not finite.
        lr: the node's learning rate in this step.
        time_s: seconds that the whole step took.
    """

    step: int
    node: str
    loss: float
    tokens: int
    grad_norm: float
    lr: float
    time_s: float


@dataclass(frozen=True)
class PathMetric:
    """A path's loss on held-out rows.

    Args:
        step: the step after which it was measured; 0: before the first.
        path: the path of the rows.
        loss: the mean over their tokens, in nats; of preferences the mean over them.
        tokens: the tokens learnt in them.
    """

    step: int
    path: str
    loss: float
    tokens: int


@dataclass(frozen=True)
class NodeOutcome:
    """The outcome of a run for one node.

    Args:
        first, last: its loss in training, in its first and its last step; None if it had no row.
        before, after: the mean loss of the held-out rows through it, before the first step and as
            the run left it; None without such rows.
        best_step: the step after which that loss was lowest.
        stopped_at: the step after which it no longer trained, because it had stopped improving.
    """

    first: float | None = None
    last: float | None = None
    before: float | None = None
    after: float | None = None
    best_step: int | None = None
    stopped_at: int | None = None


@dataclass(frozen=True)
class RunRecord:
    """A run of a tree.

    Args:
        number: counted from 1 and never given twice; names it on the command line.
        folder: the folder of the record.
        state: see `RunState`.
        by: the command, or the program's own name.
        began, ended: UTC, like ``2026-11-26T19:17:26Z``; ended is None while no end was noted.
        done: the steps that it took.
        steps: the steps that it was to take.
        nodes: the nodes that trained, in the order of the tree.
        settings: as JSON has them; see `lora_tree.runs.Settings.plain`.
        about: all of run.json: ``data``, ``max_length``, ``checkpoints``, ``unit`` and more.
        outcomes: node → its outcome; empty before the run was trained.
        stale: the nodes that it made stale.
    """

    number: int
    folder: Path
    state: RunState
    by: str
    began: str
    ended: str | None
    done: int
    steps: int
    nodes: tuple[str, ...]
    settings: Mapping[str, Any]
    about: Mapping[str, Any] = field(repr=False, default_factory=dict)
    outcomes: Mapping[str, NodeOutcome] = field(default_factory=dict)
    stale: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """The unit of all losses: ``nats per token``, or ``nats per preference``."""
        return str(self.about.get("unit", "nats per token"))

    def metrics(self) -> list[NodeMetric]:
        """Return the metrics of every step and node, in order.

        A last line that a kill cut short is skipped.

        Raises:
            FolderError, FormatError: the file can't be read.
        """
        return [_node_metric(line, where) for line, where in self._lines() if "node" in line]

    def evaluations(self) -> list[PathMetric]:
        """Return the losses on held-out rows, in order; raises like `metrics`."""
        return [_path_metric(line, where) for line, where in self._lines() if "path" in line]

    def node_evaluations(self) -> dict[str, list[tuple[int, float]]]:
        """Return each node's losses on held-out rows: (step, mean over the paths through it).

        The mean is over all their tokens. A node without such rows is left out. Raises like
        `metrics`.
        """
        measured = self.evaluations()
        losses: dict[str, list[tuple[int, float]]] = {}
        for node in self.nodes:
            sums: dict[int, list[PathMetric]] = {}
            for line in measured:
                if line.path == node or line.path.startswith(f"{node}/"):
                    sums.setdefault(line.step, []).append(line)
            for step, lines in sums.items():
                tokens = sum(line.tokens for line in lines)
                loss = math.fsum(line.loss * line.tokens for line in lines) / max(tokens, 1)
                losses.setdefault(node, []).append((step, loss))
        return losses

    def _lines(self) -> Iterator[tuple[dict[str, Any], str]]:
        file = self.folder / METRICS
        for number, line in enumerate(metric_lines(file), 1):
            where = f"{file}:{number}"
            yield strict_json.loads(line, where), where


def run_records(path: str | os.PathLike[str]) -> list[RunRecord]:
    """Return the runs of a tree, the oldest first.

    A run that can't be read, or has only begun to be written, is left out.

    Args:
        path: the folder of the tree, or a YAML file in it.

    Raises:
        FolderError: there is no folder, or it can't be read.

    >>> # [(run.number, run.state, run.done) for run in run_records("zoo/")]
    """
    records = []
    for number, folder in numbered_runs(runs_folder(place_of(path))):
        try:
            records.append(read_run(number, folder))
        except LoraTreeError:
            continue  # one damaged file must not hide the other runs
    return records


def runs_folder(place: TreePlace) -> Path:
    """Return where the runs of a tree are kept."""
    # Each YAML of a folder is a tree of its own.
    name = ".runs" if place.yaml == YAML else f".runs-{place.yaml}"
    return Path(place.folder) / name


def numbered_runs(folder: Path) -> list[tuple[int, Path]]:
    """Return (number, folder) of the runs that are kept in a folder, the oldest first.

    Raises:
        FolderError: it can't be read.
    """
    if not is_folder(folder):
        return []
    with disk.named("list it", folder):
        names = [name for name in os.listdir(folder) if _NUMBER.match(name)]
    return [(number, folder / str(number)) for number in sorted(map(int, names))]


def read_run(number: int, folder: Path) -> RunRecord:
    """Read one run.

    Raises:
        FolderError, FormatError: run.json can't be read, or a value in it makes no sense.
    """
    file = folder / RUN_ABOUT
    about = strict_json.loads(disk.read_file(file, most=_ABOUT_BYTES, follow=False), str(file))
    try:
        record = _record_of(number, folder, about)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{file}: not the record of a run: {error!r}") from error
    if record.state != "running":
        return record
    # A process writes the end of its run into run.json. If it was killed it did not, and it holds
    # no lock any more.
    state: RunState = "running" if is_held(folder / RUN_LOCK) else "cut off"
    changed = {"state": state, "done": _last_step(folder / METRICS)}
    return RunRecord(**{**vars(record), **changed})


def is_held(lock: Path) -> bool:
    """Tell whether a process holds a run's lock; one that can't be opened counts as free."""
    try:
        held = locks.attempt(lock, shared=True, make=False)
    except FolderError:
        return False
    if held is None:
        return True
    held.release()
    return False


def metric_lines(file: Path) -> list[bytes]:
    """Return the whole lines of a metrics file; none if there is no file.

    Raises:
        FolderError: it can't be read, or is too large.
    """
    if not disk.exists(file):
        return []
    data = disk.read_file(file, most=_METRICS_BYTES, follow=False)
    # After the last newline there is nothing, or the beginning of a line that a kill cut short.
    return data.split(b"\n")[:-1]


# ---------------------------------------------------------------------- private
def _last_step(file: Path) -> int:
    steps = [0]
    for line in metric_lines(file)[-1:]:
        steps.append(int(strict_json.loads(line, str(file)).get("step", 0)))
    return max(steps)


def _record_of(number: int, folder: Path, about: Mapping[str, Any]) -> RunRecord:
    state = about["state"]
    if state not in ("running", "stopped", "trained", "finished", "diverged"):
        raise ValueError(f"state {state!r}")
    outcomes = {}
    for node, outcome in about.get("outcomes", {}).items():
        outcomes[str(node)] = NodeOutcome(**outcome)
    ended = about.get("ended")
    return RunRecord(
        number=number,
        folder=folder,
        state=state,
        by=str(about["by"]),
        began=str(about["began"]),
        ended=None if ended is None else str(ended),
        done=int(about.get("done", 0)),
        steps=int(about["settings"]["steps"]),
        nodes=tuple(map(str, about["nodes"])),
        settings=dict(about["settings"]),
        about=about,
        outcomes=outcomes,
        stale=tuple(map(str, about.get("stale", ()))),
    )


def _node_metric(line: Mapping[str, Any], where: str) -> NodeMetric:
    try:
        return NodeMetric(
            step=int(line["step"]),
            node=str(line["node"]),
            loss=_number(line["loss"]),
            tokens=int(line["tokens"]),
            grad_norm=_number(line["grad_norm"]),
            lr=_number(line["lr"]),
            time_s=_number(line["time_s"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: not the line of a step: {error!r}") from error


def _path_metric(line: Mapping[str, Any], where: str) -> PathMetric:
    try:
        loss, tokens = _number(line["loss"]), int(line["tokens"])
        return PathMetric(int(line["step"]), str(line["path"]), loss, tokens)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: not the line of an evaluation: {error!r}") from error


def _number(value: Any) -> float:
    """Return a number from JSON, which has no NaN and no infinity: null stands for both."""
    return math.nan if value is None else float(value)
