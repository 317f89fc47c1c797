"""tree.lock: what the files of a tree were, and what each node was trained on.

    content       = SHA-256 of "<SHA-256 of adapter_config.json> <SHA-256 of adapter_model.safetensors>"
    lineage(root) = SHA-256 of "lora_tree lineage 1"
    lineage(node) = SHA-256 of "<lineage of its parent> <content> <weight, as float.hex()>"
                    its parent's own, where the node has no adapter

Names are no part of a lineage: a renamed node is the same model. A node is *stale* when the lineage of its parent, or
the base, is no longer what its entry says it was trained on; *unlocked* when its files are not what its entry says.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError

from ..errors import FormatError, PathError, SpecError
from ..formats import strict_json
from ..formats.limits import LOCK_BYTES
from ..node_names import check_path
from ..spec import StrictModel, check_format
from ..spec_errors import explain
from ..system.reading import is_folder, open_stream
from . import disk
from .disk import Stamp

__all__ = [
    "ROOT",
    "BaseLock",
    "Count",
    "Digest",
    "FileLock",
    "LineageLock",
    "NodeLock",
    "TreeLock",
    "content",
    "dump",
    "fingerprint",
    "lineage",
    "parse",
]

ROOT = hashlib.sha256(b"lora_tree lineage 1").hexdigest()

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]

_SAMPLES = 32
_SAMPLE_BYTES = 4096
_WEIGHTS = (".safetensors", ".bin", ".gguf")


class FileLock(StrictModel):
    """What can be seen of a file without reading it."""

    size: Count
    mtime_ns: Annotated[int, Field(ge=-(2**63), lt=2**63)]

    @classmethod
    def of(cls, stamp: Stamp) -> FileLock:
        return cls(size=stamp.size, mtime_ns=stamp.mtime_ns)


class BaseLock(StrictModel):
    """A base: its name, and what is known of its files where it is a folder."""

    name: str | None = None
    fingerprint: Digest | None = None

    def differs(self, other: BaseLock) -> bool:
        """The two are known to be different bases."""
        if self.fingerprint and other.fingerprint:
            return self.fingerprint != other.fingerprint
        return None not in (self.name, other.name) and self.name != other.name


class NodeLock(StrictModel):
    """One node's files, and what it was trained on; ``base`` only where that is not the lock's own.

    ``untrained``: its increments are zero, so it fits whatever lies above it.
    """

    content: Digest
    config: FileLock
    weights: FileLock
    trained_on: Digest
    base: BaseLock | None = None
    written: bool = False
    untrained: bool = False


class LineageLock(StrictModel):
    """The last step of a lineage: an adapter, below the lineage ``above``; ``node`` was its name then."""

    above: Digest
    content: Digest
    weight: Annotated[float, Field(allow_inf_nan=False)]
    node: str


class TreeLock(StrictModel):
    """A whole tree.lock; ``yaml`` is the SHA-256 of the tree.yaml, where save wrote it.

    ``lineages`` describes those that ``trained_on`` mentions: hash → its last step.
    """

    version: Literal[1] = 1
    base: BaseLock = BaseLock()
    yaml: Digest | None = None
    nodes: dict[str, NodeLock] = Field(default_factory=dict)
    lineages: dict[Digest, LineageLock] = Field(default_factory=dict)


def parse(raw: bytes, file: str) -> TreeLock:
    """The meaning of a tree.lock.

    Raises:
        NewerFormat: a newer version of this library wrote it.
        SpecError: it is none.
    """
    repair = (
        "restore it; or remove it and run lora-tree lock, which forgets what the nodes were trained on",
    )
    try:
        data = strict_json.loads(raw, file)
        check_format(data, file)
        lock = TreeLock.model_validate(data)
        for path in lock.nodes:
            if not check_path(path):
                raise PathError("a node without a name")
    except ValidationError as error:
        raise SpecError(
            *(f"{file}: {text}" for _, text in explain(error, data, TreeLock)[:8]), *repair
        ) from error
    except (FormatError, PathError) as error:
        raise SpecError(
            error.what if isinstance(error, FormatError) else f"{file}: {error.what}", *repair
        ) from error
    return lock


def dump(lock: TreeLock) -> bytes:
    """Its bytes, which depend on its meaning alone."""
    data = lock.model_dump(mode="json", exclude_none=True)
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def content(config: str, weights: str) -> str:
    """The hash of a node's content, from the SHA-256 of its two files."""
    return hashlib.sha256(f"{config} {weights}".encode()).hexdigest()


def lineage(above: str, own: str | None, weight: float) -> str:
    """The lineage of a node from its parent's, the hash of its own content and its weight."""
    if own is None:
        return above
    return hashlib.sha256(f"{above} {own} {float(weight).hex()}".encode()).hexdigest()


# ---------------------------------------------------------------------- the base
def fingerprint(base: str | os.PathLike[str]) -> str | None:
    """What a base's folder holds: names, sizes, configs and headers whole, weights sampled; None for no folder.

    Reads a few MB of a model of any size. Two folders with equal fingerprints hold the same model, except by intent.
    """
    folder = Path(base)
    files = sorted(_files(folder))
    if not any(file.name.endswith((".json", *_WEIGHTS)) for file in files):
        return None
    found = hashlib.sha256()
    for file in files:
        with disk.named("read the base", file):
            size = file.stat().st_size
        if file.name.endswith(_WEIGHTS):
            found.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
            found.update(_sampled(file, size))
        elif file.name == "config.json" or file.name.endswith(".index.json"):
            found.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
            found.update(disk.read(file, most=LOCK_BYTES))
    return found.hexdigest()


def _files(folder: Path) -> list[Path]:
    """The plain files in a folder and one level below it (a diffusers pipeline); links followed."""
    if not is_folder(folder):
        return []
    with disk.named("read the base", folder):
        return [file for pattern in ("*", "*/*") for file in folder.glob(pattern) if file.is_file()]


def _sampled(file: Path, size: int) -> bytes:
    with disk.named("read the base", file), open_stream(file) as stream:
        header = int.from_bytes(stream.read(8), "little") if file.suffix == ".safetensors" else 0
        start = 8 + header if 0 < header <= min(size - 8, 100_000_000) else 0
        found = hashlib.sha256()
        stream.seek(0)
        found.update(stream.read(start))
        step = max((size - start) // _SAMPLES, _SAMPLE_BYTES)
        for offset in range(start, size, step):
            stream.seek(offset)
            found.update(stream.read(_SAMPLE_BYTES))
        stream.seek(max(size - _SAMPLE_BYTES, 0))
        found.update(stream.read(_SAMPLE_BYTES))
    return found.digest()
