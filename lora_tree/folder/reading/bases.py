"""Bases: the folder that a base's name leads to, its fingerprint, and the base that adapters name.

name in tree.yaml      ../base, as seen from the tree's folder
fingerprint            a hash of the base's files, weights sampled: it shows a changed base
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...base_names import other_base
from ...errors import LoraTreeError
from ...formats import strict_json
from ...formats.limits import CONFIG_BYTES, LOCK_BYTES
from ...formats.peft import CONFIG
from ...system.reading import is_folder, open_stream
from .. import disk
from ..adapters.scan import Files
from ..lockfile import BaseLock

__all__ = ["agreed_base", "base_lock", "bases_of", "fingerprint", "local_base"]

_SAMPLES = 32
_SAMPLE_BYTES = 4096
_MOST_HEADER_BYTES = 100_000_000
_WEIGHTS = (".safetensors", ".bin", ".gguf")


def local_base(name: str | None, folder: str) -> str | None:
    """Return the base's own folder as an absolute path, or None if its name leads to no folder.

    Args:
        name: the base's.
        folder: the folder that a relative name starts from.
    """
    if not name or "\0" in name:
        return None
    path = os.path.normpath(os.path.join(folder, os.path.expanduser(name)))
    return path if os.path.isdir(path) else None


def base_lock(name: str | None, spelled: str | None, before: Iterable[BaseLock]) -> BaseLock:
    """Return the lock's entry for a base.

    Args:
        name: the base, a local folder as an absolute path; None if its files may not be looked at.
        spelled: its name as tree.yaml has it.
        before: earlier entries. If the base's files are not at hand, the fingerprint in the entry
            of the same name is kept.
    """
    if spelled is None:
        return BaseLock()
    digest = fingerprint(name) if name else None
    if digest is None:
        known = (base.fingerprint for base in before if base.name == spelled and base.fingerprint)
        digest = next(known, None)
    return BaseLock(name=spelled, fingerprint=digest)


# ---------------------------------------------------------------------- which base adapters name
def bases_of(adapters: Mapping[str, Files]) -> dict[str, str]:
    """Return the base that each adapter names in its config: node → base.

    A config that can't be read names none.
    """
    base_names: dict[str, str] = {}
    for path, files in adapters.items():
        if CONFIG not in files.now:
            continue
        config_file = files.now[CONFIG][0]
        try:
            config = strict_json.loads(disk.read_file(config_file, most=CONFIG_BYTES), config_file)
        except LoraTreeError:
            continue  # its flaw is a problem of its own, reported where adapters are examined
        named = config.get("base_model_name_or_path")
        if isinstance(named, str) and named:
            base_names[path] = named
    return base_names


def agreed_base(names: Iterable[str]) -> str | None:
    """Return the base that all names mean, as the first spells it; None if they disagree."""
    names = list(dict.fromkeys(names))
    if not names or any(other_base(names[0], name) for name in names[1:]):
        return None
    return names[0]


# ---------------------------------------------------------------------- the fingerprint
def fingerprint(base: str | os.PathLike[str]) -> str | None:
    """Hash a base's folder: names, sizes, configs and headers whole, weights sampled.

    A few MB are read of a model of any size. Two folders with equal fingerprints hold the same
    model, unless they were made to differ on purpose.

    Returns:
        the hash; None if it is no folder of a model.

    Raises:
        FolderError: a file can't be read.
    """
    folder = Path(base)
    files = sorted(_files(folder))
    if not any(file.name.endswith((".json", *_WEIGHTS)) for file in files):
        return None
    digest = hashlib.sha256()
    for file in files:
        with disk.named("read the base", file):
            size = file.stat().st_size
        label = f"{file.relative_to(folder).as_posix()} {size}\n".encode()
        if file.name.endswith(_WEIGHTS):
            digest.update(label + _sampled(file, size))
        elif file.name == "config.json" or file.name.endswith(".index.json"):
            digest.update(label + disk.read_file(file, most=LOCK_BYTES))
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    """List the plain files in a folder and one level below it, where a pipeline has its models."""
    if not is_folder(folder):
        return []
    with disk.named("read the base", folder):
        entries = [*folder.glob("*"), *folder.glob("*/*")]
        return [file for file in entries if file.is_file()]


def _sampled(file: Path, size: int) -> bytes:
    """Hash a weights file: its header whole, then samples at even distances, and its end."""
    with disk.named("read the base", file), open_stream(file) as stream:
        start = 0
        if file.suffix == ".safetensors":
            header_bytes = int.from_bytes(stream.read(8), "little")
            # An impossible length means a broken file. Its samples tell it from other files all the
            # same.
            if 0 < header_bytes <= min(size - 8, _MOST_HEADER_BYTES):
                start = 8 + header_bytes
        digest = hashlib.sha256()
        stream.seek(0)
        digest.update(stream.read(start))
        # The step is never smaller than a sample. So the samples of a small file cover it whole,
        # and those of a large one do not overlap.
        step = max((size - start) // _SAMPLES, _SAMPLE_BYTES)
        for offset in range(start, size, step):
            stream.seek(offset)
            digest.update(stream.read(_SAMPLE_BYTES))
        stream.seek(max(size - _SAMPLE_BYTES, 0))
        digest.update(stream.read(_SAMPLE_BYTES))
    return digest.digest()
