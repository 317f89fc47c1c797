"""Runs side by side: the settings in which they differ, and what became of each node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..folder import NodeOutcome, RunRecord

__all__ = ["RunComparison", "compare_runs"]


@dataclass(frozen=True)
class RunComparison:
    """The outcome of `compare_runs`.

    Args:
        numbers: of the runs.
        differs: setting → its value in each run, None where a run has no such setting; only
            settings that are not the same in all.
        outcomes: node → its outcome in each run, None where it did not train.
    """

    numbers: tuple[int, ...]
    differs: Mapping[str, tuple[Any, ...]]
    outcomes: Mapping[str, tuple[NodeOutcome | None, ...]]

    def as_dict(self) -> dict[str, object]:
        """Return the comparison as plain data, for JSON."""
        outcomes = {}
        for node, each in self.outcomes.items():
            outcomes[node] = [None if one is None else vars(one) for one in each]
        return {"runs": self.numbers, "differs": dict(self.differs), "outcomes": outcomes}


def compare_runs(records: Sequence[RunRecord]) -> RunComparison:
    """Compare runs of one tree, or of several.

    Args:
        records: as `run_records` returns them.

    >>> # compare_runs(lt.run_records("zoo/")[-2:]).differs
    """
    each = [_settings_of(record) for record in records]
    names: dict[str, None] = {}
    for settings in each:
        names |= dict.fromkeys(settings)
    differs = {}
    for name in names:
        values = tuple(settings.get(name) for settings in each)
        if any(value != values[0] for value in values):
            differs[name] = values
    nodes: dict[str, None] = {}
    for record in records:
        nodes |= dict.fromkeys(record.nodes)
    outcomes = {node: tuple(record.outcomes.get(node) for record in records) for node in nodes}
    return RunComparison(tuple(record.number for record in records), differs, outcomes)


def _settings_of(record: RunRecord) -> dict[str, Any]:
    """Return a run's settings, nodes, rows and held-out settings, by name."""
    about = record.about
    found = dict(record.settings)
    found["nodes"] = list(record.nodes)
    files = about.get("data") or []
    found["data"] = [f"{file.get('path')} ({str(file.get('sha256'))[:8]})" for file in files]
    found["max_length"] = about.get("max_length")
    if not files:
        found["rows"] = str(about.get("rows"))[:8]
    watched = about.get("held_out") or {}
    for word in ("every", "patience"):
        found[f"eval {word}"] = watched.get(word)
    # Only their hash: the command, in the record's `by`, names the files.
    if watched:
        found["eval rows"] = str(watched.get("rows"))[:8]
    return found
