"""History: the earlier versions of a tree's nodes in one log; a value, and its bytes.

    .versions/tree.json        node → its earlier versions, the oldest first
                               (other.json: other.yaml's)
    .versions/<content>/       the files of a content that no node has any more; see `archive`

A version is a node's entry in tree.lock, with the node's weight, as it was before a save changed
its content or its weight. So a plain move makes no version: the history of a node follows it to its
new path.

Law: a node's history has each (content, weight) once, at its latest place, and has no entry for the
present one. So a user who goes back and forth between two versions does not push a third one out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import Field

from ..provenance import TrainedWith
from ..spec import StrictModel
from ..weights import Weight, plain_weight
from .lockfile import (
    BaseLock,
    Count,
    Digest,
    HubLock,
    MadeLock,
    NodesRecord,
    WeightLine,
    parse_record,
    weight_line,
    weight_of,
)
from .trained import (
    Lineages,
    Trained,
    lineage_locks,
    made_lock,
    made_of,
    training_locks,
)

__all__ = [
    "HISTORY",
    "LOG_NAME",
    "History",
    "Version",
    "ended",
    "history_place",
    "other_versions",
    "parse_history",
    "render_history",
]

HISTORY = ".versions"
LOG_NAME = re.compile(r"[^./\0][^/\0]{0,200}\.json\Z")
_REPAIR = "restore it; or remove it: the versions' files stay on the disk until lora-tree gc"


@dataclass(frozen=True)
class Version:
    """One content that a node has or had, with its weight at the time.

    Args:
        content: the hash of its two files.
        weight: the node's.
        nbytes: the size of the two files.
        on: what it was trained on and its origin, as far as a lock said so.
        until: the time at which a save replaced it; None if it is the present one.
        ended_by: the command that replaced it.
        elsewhere: the folder that its user named, relative to the tree's; such files stay there.
        hub: how tree.yaml named it, if it is on the model hub, and the commit of its files.
    """

    content: str
    weight: Weight
    nbytes: int
    on: Trained | None = None
    until: str | None = None
    ended_by: str | None = None
    elsewhere: str | None = None
    hub: HubLock | None = None

    @property
    def key(self) -> tuple[str, Weight]:
        """The content and the weight; versions that differ in one of them are different."""
        return self.content, self.weight

    def as_dict(self) -> dict[str, object]:
        """Return the content, its origin and its end as plain data for JSON."""
        return {
            "content": self.content,
            "weight": plain_weight(self.weight),
            "bytes": self.nbytes,
            "when": self.when,
            "by": self.by,
            "until": self.until,
            "ended_by": self.ended_by,
            "losses": self.losses,
        }

    @property
    def is_present(self) -> bool:
        """True if the node has it now."""
        return self.until is None

    @property
    def when(self) -> str | None:
        """The time at which a save made it the present one, UTC; None if no save noted it."""
        return self.on.made.when if self.on is not None and self.on.made is not None else None

    @property
    def by(self) -> str | None:
        """The command that made it."""
        return self.on.made.by if self.on is not None and self.on.made is not None else None

    @property
    def losses(self) -> tuple[float, float] | None:
        """Its loss before and after its training, in nats per token."""
        return self.on.made.losses if self.on is not None and self.on.made is not None else None

    @property
    def training(self) -> TrainedWith | None:
        """The rows, settings and run that its content was trained with."""
        return self.on.made.training if self.on is not None and self.on.made is not None else None


@dataclass(frozen=True)
class History:
    """The earlier versions of the nodes of a tree; of nodes that were removed, too."""

    nodes: Mapping[str, tuple[Version, ...]] = field(default_factory=dict)

    def contents(self) -> dict[str, int]:
        """Return content → bytes, for all contents that the history itself has to keep."""
        found = {}
        for versions in self.nodes.values():
            for version in versions:
                if version.elsewhere is None:
                    found[version.content] = version.nbytes
        return found

    def moved(self, moves: Mapping[str, str]) -> History:
        """Return the history with moved nodes at their new paths, after the versions there."""
        nodes: dict[str, tuple[Version, ...]] = {}
        # A node that was at the new path before, and was removed, keeps its versions there.
        for path in sorted(self.nodes, key=lambda path: path in moves):
            to = moves.get(path, path)
            nodes[to] = (*nodes.get(to, ()), *self.nodes[path])
        return History(nodes)

    def bounded(self, most: int, present: Mapping[str, str]) -> History:
        """Return the history with at most ``most`` contents of each node beside the present one.

        Args:
            most: the bound.
            present: node → its content now.
        """
        nodes = {}
        for path, versions in self.nodes.items():
            nodes[path] = _bounded(versions, present.get(path), most)
        return History(nodes).without_empty()

    def within(self, budget_bytes: int, live: Iterable[str]) -> tuple[History, list[str]]:
        """Return the history that fits a budget, and the nodes of which a version was dropped.

        Args:
            budget_bytes: for all contents, each counted once.
            live: contents that nodes have; they do not count against the budget.
        """
        sizes = self.contents()
        for content in live:
            sizes.pop(content, None)
        # A content is as old as its last entry: several nodes may have had it.
        ages: dict[str, tuple[str, int]] = {}
        for versions in self.nodes.values():
            for number, version in enumerate(versions):
                # Saves within one second are told apart by their order in the node's list.
                age = version.until or "", number
                ages[version.content] = max(age, ages.get(version.content, age))
        room = budget_bytes - sum(sizes.values())
        dropped: set[str] = set()
        for content in sorted(sizes, key=lambda content: (ages[content], content)):
            if room >= 0:
                break
            dropped.add(content)
            room += sizes[content]
        shortened: list[str] = []
        nodes: dict[str, tuple[Version, ...]] = {}
        for path, versions in self.nodes.items():
            left = tuple(v for v in versions if v.content not in dropped or v.elsewhere)
            if len(left) < len(versions):
                shortened.append(path)
            nodes[path] = left
        return History(nodes).without_empty(), shortened

    def without_empty(self) -> History:
        """Return the history without nodes that have no version in it."""
        return History({path: versions for path, versions in self.nodes.items() if versions})


def ended(
    versions: Sequence[Version], old: Version, now: tuple[str, Weight] | None, most: int
) -> tuple[Version, ...]:
    """Return a node's earlier versions with one more.

    Args:
        versions: the earlier ones so far.
        old: the node's version until now.
        now: content and weight that it has from now on; None if it was removed.
        most: different contents that are kept beside the present one.
    """
    others = [version for version in versions if version.key != old.key]
    return _bounded([*others, old], None if now is None else now[0], most)


def other_versions(versions: Sequence[Version], now: tuple[str, Weight]) -> tuple[Version, ...]:
    """Return a node's earlier versions, without the present one."""
    return tuple(version for version in versions if version.key != now)


def _bounded(versions: Sequence[Version], present: str | None, most: int) -> tuple[Version, ...]:
    """Return the versions of the last ``most`` contents, with at most ``most`` weights each."""
    times: dict[str, int] = {}
    kept: list[Version] = []
    for version in reversed(versions):
        others = times.keys() - {present}
        is_new = version.content not in times and version.content != present
        # Weights are counted apart: to try ten of them must not push out five good contents.
        if times.get(version.content, 0) >= most or (is_new and len(others) >= most):
            continue
        times[version.content] = times.get(version.content, 0) + 1
        kept.append(version)
    return tuple(reversed(kept))


# ---------------------------------------------------------------------- its file
class VersionLock(StrictModel):
    """A version as the log has it; the log lists lineages and trainings apart, each once."""

    content: Digest
    weight: WeightLine
    nbytes: Count
    trained_on: Digest | None = None
    base: BaseLock | None = None
    untrained: bool = False
    made: MadeLock | None = None
    until: str
    ended_by: str
    elsewhere: str | None = None
    hub: HubLock | None = None


class HistoryLog(NodesRecord):
    """A whole log."""

    nodes: dict[str, list[VersionLock]] = Field(default_factory=dict)


def history_place(lock: str) -> str:
    """Return the place of a tree's log, given the name of its lock.

    >>> history_place("tree.lock"), history_place("other.yml.lock")
    ('.versions/tree.json', '.versions/other.yml.json')
    """
    return f"{HISTORY}/{lock.removesuffix('.lock')}.json"


def parse_history(raw: bytes, file: str) -> History:
    """Parse a log.

    Raises:
        NewerFormat: a newer version of this library wrote it.
        SpecError: it is broken.
    """
    log = parse_record(raw, file, HistoryLog, _REPAIR)
    lineages = Lineages(log.lineages)
    nodes: dict[str, tuple[Version, ...]] = {}
    for path, versions in log.nodes.items():
        nodes[path] = tuple(_version(entry, log, lineages) for entry in versions)
    return History(nodes)


def _version(entry: VersionLock, log: HistoryLog, lineages: Lineages) -> Version:
    on = None
    if entry.trained_on is not None:
        lineage = lineages.of(entry.trained_on)
        made = made_of(entry.made, log.trainings)
        on = Trained(lineage, entry.base or BaseLock(), entry.untrained, made)
    return Version(
        entry.content,
        weight_of(entry.weight),
        entry.nbytes,
        on,
        entry.until,
        entry.ended_by,
        entry.elsewhere,
        entry.hub,
    )


def render_history(history: History) -> bytes:
    """Return the bytes of a log; they depend on its meaning alone."""
    mentioned: list[Trained] = []
    nodes: dict[str, list[VersionLock]] = {}
    for path, versions in history.nodes.items():
        nodes[path] = [_version_lock(version) for version in versions]
        mentioned.extend(version.on for version in versions if version.on is not None)
    log = HistoryLog(
        nodes=nodes, lineages=lineage_locks(mentioned), trainings=training_locks(mentioned)
    )
    data = log.model_dump(mode="json", exclude_none=True)
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def _version_lock(version: Version) -> VersionLock:
    on = version.on
    return VersionLock(
        content=version.content,
        weight=weight_line(version.weight),
        nbytes=version.nbytes,
        trained_on=None if on is None else on.on.digest,
        base=None if on is None else on.base,
        untrained=on is not None and on.untrained,
        made=None if on is None else made_lock(on.made),
        until=version.until or "",
        ended_by=version.ended_by or "",
        elsewhere=version.elsewhere,
        hub=version.hub,
    )
