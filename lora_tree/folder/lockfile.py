"""tree.lock: the hashes of a tree's files, and what each node was trained on.

    content       = SHA-256 of "<SHA-256 of adapter_config.json> <of adapter_model.safetensors>"
                    of an adapter that is one file, SHA-256 of "<SHA-256 of it>"
    pieces        = SHA-256 of "<SHA-256 of adapter_config.json> <of the weights' pieces>", of large
                    weights; several processors check it together (`pieces`)
    lineage(root) = SHA-256 of "lora_tree lineage 1"
    lineage(node) = SHA-256 of "<lineage of its parent> <content> <weight, as float.hex()>"
                    its parent's own, if the node has no adapter; a weight per module is hashed as
                    "{<pattern>=<hex>,…,default=<hex>}", in the order in which it is written

Names are no part of a lineage: a renamed node is the same model. A node is *stale* if the lineage
of its parent, or the base, is no longer what its entry says it was trained on; *unlocked* if its
files are not what its entry says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, StringConstraints, ValidationError, model_validator

from ..errors import FormatError, PathError, SpecError
from ..formats import strict_json
from ..node_names import check_path
from ..provenance import TrainedWith
from ..spec import FormatVersion, StrictModel, check_format
from ..spec_errors import describe_invalid
from ..weights import Weight, parse_weight, weight_digest
from .disk import Stamp

__all__ = [
    "ROOT",
    "BaseLock",
    "Commit",
    "Count",
    "Digest",
    "FileLock",
    "HubLock",
    "LineageLock",
    "MadeLock",
    "NodeLock",
    "NodesRecord",
    "TreeLock",
    "WeightLine",
    "content",
    "lineage",
    "parse_lock",
    "parse_record",
    "render_lock",
    "weight_line",
    "weight_of",
]

ROOT = hashlib.sha256(b"lora_tree lineage 1").hexdigest()

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
# The system reports sizes as signed 64-bit integers, so a larger number in a lock is a mistake.
Count = Annotated[int, Field(ge=0, lt=2**63)]
Commit = Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")]
Loss = Annotated[float, Field(allow_inf_nan=False)]

_REPAIR = (
    "restore it; or remove it and run lora-tree lock, which forgets what the nodes were trained on"
)


def _line(weight: str) -> str:
    parse_weight(weight)  # its SpecError is a ValueError, as pydantic wants one
    return weight


WeightLine = Annotated[float, Field(allow_inf_nan=False)] | Annotated[str, AfterValidator(_line)]
"""A weight as a lock has it: a number, or one line for a weight per module."""


def weight_line(weight: Weight) -> float | str:
    """Return a weight as a lock has it."""
    return weight if isinstance(weight, float) else f"{weight}"


def weight_of(line: float | str) -> Weight:
    """Return the weight in a lock's line."""
    return parse_weight(line) if isinstance(line, str) else line


class FileLock(StrictModel):
    """The size and time of a file, which are seen without reading it."""

    size: Count
    # A file may be dated before 1970, so a time may be negative.
    mtime_ns: Annotated[int, Field(ge=-(2**63), lt=2**63)]

    @classmethod
    def of(cls, stamp: Stamp) -> FileLock:
        """Return the entry for a file with this stamp."""
        return cls(size=stamp.size, mtime_ns=stamp.mtime_ns)


class BaseLock(StrictModel):
    """A base: its name, and the fingerprint of its files if it is a folder that was at hand."""

    name: str | None = None
    fingerprint: Digest | None = None

    def differs(self, other: BaseLock) -> bool:
        """Tell whether the two are known to be different bases."""
        if self.fingerprint and other.fingerprint:
            return self.fingerprint != other.fingerprint
        # One base may have two names, a hub id and a folder. So names count only without
        # fingerprints.
        return None not in (self.name, other.name) and self.name != other.name


class MadeLock(StrictModel):
    """The time and the command that gave a node its content; see `lora_tree.provenance.Made`.

    ``training`` is a key of the lock's ``trainings``, which list what nodes were trained with.
    """

    when: Annotated[str, StringConstraints(max_length=40)]
    by: str
    before: Loss | None = None
    after: Loss | None = None
    training: Digest | None = None


class HubLock(StrictModel):
    """An adapter on the model hub: its name as tree.yaml has it, and the commit that is used."""

    adapter: str
    commit: Commit


class NodeLock(StrictModel):
    """One node's files, and the lineage that it was trained on.

    Args:
        content: the hash of its files.
        pieces: the hash by pieces of the weights; None if they are small, or it is not known.
        config, weights: their sizes and times.
        file: the same of an adapter that is one file, in another program's format.
        trained_on: the hash of the lineage.
        base: the base that it was trained on; None if that is the lock's own.
        written: a save of this library wrote the files.
        untrained: its increments are zero, so it fits any lineage above it.
        made: the time and the command that gave it its content; None if no save wrote it.
        hub: where it is on the model hub; None if its files are on this machine.
    """

    content: Digest
    pieces: Digest | None = None
    config: FileLock | None = None
    weights: FileLock | None = None
    file: FileLock | None = None
    trained_on: Digest
    base: BaseLock | None = None
    written: bool = False
    untrained: bool = False
    made: MadeLock | None = None
    hub: HubLock | None = None

    @model_validator(mode="after")
    def _has_its_files(self) -> NodeLock:
        pair = self.config is not None and self.weights is not None
        if pair == (self.file is not None) or (self.config is None) != (self.weights is None):
            raise ValueError("expected config and weights, or file alone")
        return self

    @property
    def files(self) -> tuple[FileLock, ...]:
        """The entries of its files, in the order in which they are hashed."""
        return tuple(one for one in (self.config, self.weights, self.file) if one is not None)


class LineageLock(StrictModel):
    """The last step of a lineage: an adapter below the lineage ``above``.

    ``node`` was the name of its node at the time; it is for messages only. A weight per module is
    one line, because keys of JSON have no order and the first pattern that matches counts.
    """

    above: Digest
    content: Digest
    weight: WeightLine
    node: str

    @property
    def own_weight(self) -> Weight:
        """The weight as a value."""
        return weight_of(self.weight)


class NodesRecord(StrictModel):
    """A JSON file of this library that has an entry for each node.

    Args:
        nodes: path → its entry.
        lineages: every lineage that an entry's ``trained_on`` leads to: hash → its last step.
        trainings: hash → what nodes were trained with, once for all nodes of a run.
    """

    version: FormatVersion = 1
    nodes: Mapping[str, Any] = Field(default_factory=dict)
    lineages: dict[Digest, LineageLock] = Field(default_factory=dict)
    trainings: dict[Digest, TrainedWith] = Field(default_factory=dict)


class TreeLock(NodesRecord):
    """A whole tree.lock.

    Args:
        base: the base of the tree.
        yaml: SHA-256 of tree.yaml, if a save wrote it.
    """

    base: BaseLock = BaseLock()
    yaml: Digest | None = None
    nodes: dict[str, NodeLock] = Field(default_factory=dict)


Record = TypeVar("Record", bound=NodesRecord)


def parse_lock(raw: bytes, file: str) -> TreeLock:
    """Parse a tree.lock.

    Args:
        raw: its bytes.
        file: its name, for messages.

    Raises:
        NewerFormat: a newer version of this library wrote it.
        SpecError: it is broken, or no lock.
    """
    return parse_record(raw, file, TreeLock, _REPAIR)


def parse_record(raw: bytes, file: str, kind: type[Record], repair: str) -> Record:
    """Parse a JSON file of this library that has an entry for each node.

    Args:
        raw: its bytes.
        file: its name, for messages.
        kind: its model.
        repair: what to do about a broken one.

    Raises:
        NewerFormat: a newer version of this library wrote it.
        SpecError: it is broken, or another file.
    """
    try:
        data = strict_json.loads(raw, file)
        check_format(data, file)
        record = kind.model_validate(data)
        # The empty path passes `check_path`, since it is the root's. But the root has no adapter,
        # so no entry can be about it.
        for path in record.nodes:
            if not check_path(path):
                raise PathError("a node without a name")
    except ValidationError as error:
        mistakes = describe_invalid(error, data, kind)[:8]
        raise SpecError(*(f"{file}: {text}" for _, text in mistakes), repair) from error
    except FormatError as error:  # which names the file already
        raise SpecError(error.what, repair) from error
    except PathError as error:
        raise SpecError(f"{file}: {error.what}", repair) from error
    return record


def render_lock(lock: TreeLock) -> bytes:
    """Return the bytes of a tree.lock; they depend on its meaning alone."""
    data = lock.model_dump(mode="json", exclude_none=True)
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def content(*files: str) -> str:
    """Return the hash of a node's content, given the SHA-256 of its config and its weights.

    For an adapter in one file, give that file's alone.
    """
    return hashlib.sha256(" ".join(files).encode()).hexdigest()


def lineage(above: str, own: str | None, weight: Weight) -> str:
    """Return the hash of a node's lineage, given its parent's, its own content and its weight."""
    if own is None:
        return above
    # As float.hex, because two weights that print alike may differ in the last bit.
    return hashlib.sha256(f"{above} {own} {weight_digest(weight)}".encode()).hexdigest()
