"""A base's checkpoint as it lies on the disk: its files, and where every tensor's bytes are.

    model.safetensors                   one file
    model.safetensors.index.json        or an index, {"weight_map": {tensor: file}}, and its shards

Tensors of any dtype are known by place and size; numbers are read only of those whose dtype torch
has here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import FolderError, FormatError, listing
from ..formats import strict_json
from ..formats.safetensors import DTYPES, header_fields
from ..system.named import named
from ..system.reading import Inside, is_file, open_stream

__all__ = [
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "Stored",
    "leads_outside",
    "open_checkpoint",
    "own_files",
    "raw",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 << 20

Identity = tuple[int, int, int, int]
"""Device, inode, size and time of a file."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint.

    Args:
        file: the file that holds it; begin, end: its bytes, counted from the start of the file.
        dtype: None for one that this library does not compute with.
        spelled: the dtype as the file has it.
        seen: the file whose header was read. No other of its name is read.
    """

    name: str
    file: Path
    begin: int
    end: int
    dtype: torch.dtype | None
    spelled: str
    shape: tuple[int, ...]
    seen: Identity

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def open(self) -> BinaryIO:
        """Return the file that holds it, to be closed by the caller.

        Raises:
            FormatError: it is another file by now.
            OSError: it can't be opened.
        """
        stream = open_stream(self.file, buffering=0)
        if _identity(stream) != self.seen:
            stream.close()
            raise FormatError(
                f"{self.file}: has changed since its header was read",
                "wait for the writer, and try again",
            )
        return stream

    def read(self, into: Tensor | None = None) -> Tensor:
        """The numbers, in memory of their own; or at the start of ``into``, bytes (uint8) that are enough.

        Raises:
            FormatError: the file was cut short, or its dtype is none that can be computed with.
        """
        if self.dtype is None:
            raise FormatError(
                f"{self.file}: {self.name}: nothing can be added to a tensor of dtype "
                f"{self.spelled}"
            )
        room = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu") if into is None else into
        tensor = room[: self.nbytes].view(self.dtype).reshape(self.shape)
        view = raw(tensor)
        try:
            with self.open() as stream:
                stream.seek(self.begin)
                while view:
                    got = stream.readinto(view)  # type: ignore[attr-defined]
                    if not got:
                        raise FormatError(
                            f"{self.file}: {self.name}: the file was cut short while it was read"
                        )
                    view = view[got:]
        except OSError as error:
            raise FormatError(f"{self.file}: can't be read: {error.strerror or error}") from error
        return tensor


def _identity(stream: BinaryIO) -> Identity:
    seen = os.fstat(stream.fileno())
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which must live as long as they are used.

    >>> one = torch.tensor([1.0])
    >>> bytes(raw(one)).hex()
    '0000803f'
    """
    held = (ctypes.c_ubyte * (tensor.numel() * tensor.element_size())).from_address(
        tensor.data_ptr()
    )
    return memoryview(held).cast("B")


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint and every tensor in them, in the order in which they lie."""

    folder: Path
    files: tuple[str, ...]
    tensors: Mapping[str, Stored]

    @property
    def nbytes(self) -> int:
        """Bytes of all its weight files."""
        sizes = 0
        for name in self.files:
            with named("look at it", self.folder / name):
                sizes += (self.folder / name).stat().st_size
        return sizes


def own_files(folder: Path) -> Inside:
    """Where the files of a base may lie: in its folder, and in its repository's blobs in the hub's cache."""
    real = Path(os.path.realpath(folder))
    own = [str(real)]
    # …/huggingface/hub/models--org--name/snapshots/<commit>/config.json → ../../blobs/<hash>
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        own.append(str(real.parent.parent / "blobs"))
    return lambda file: any(os.path.commonpath((file, each)) == each for each in own)


def leads_outside(file: Path) -> FolderError:
    """The error for a file of a base that would be copied, and lies elsewhere."""
    return FolderError(
        f"{file}: is a link to {os.path.realpath(file)}, which lies outside the base, and would be "
        "copied into the "
        "checkpoint",
        "if you trust it, put the file itself there: cp --remove-destination TARGET LINK; "
        "otherwise remove it",
    )


def open_checkpoint(folder: Path, *, inside: Inside | None = None) -> Checkpoint:
    """The safetensors checkpoint in a folder, headers only.

    Args:
        inside: where its files may lie; None: wherever links lead.

    Raises:
        FormatError: there is none, or a file is missing, broken, or not what the index says.
        FolderError: a file lies where it may not.
    """
    if is_file(folder / SINGLE):  # before the index, as transformers looks for them
        tensors = {stored.name: stored for stored in _tensors(folder / SINGLE, inside)}
        return Checkpoint(folder, (SINGLE,), tensors)
    if not is_file(folder / INDEX):
        raise FormatError(
            f"{folder}: no {SINGLE} and no {INDEX}",
            "give the folder of a transformers model saved as safetensors: "
            "model.save_pretrained(folder)",
        )
    placed = _index(folder / INDEX, inside)
    files = tuple(sorted(set(placed.values())))
    tensors = {}
    for name in files:
        for stored in _tensors(folder / name, inside):
            if placed.get(stored.name) != name:
                raise FormatError(
                    f"{folder / name}: {stored.name} is in the file, but not there in {INDEX}"
                )
            tensors[stored.name] = stored
    gone = [name for name in placed if name not in tensors]
    if gone:
        raise FormatError(
            f"{folder / INDEX}: names tensors that its files do not hold: {listing(gone)}"
        )
    return Checkpoint(folder, files, tensors)


def _reading(file: Path, inside: Inside | None) -> BinaryIO:
    """A file of a base, open to read; one that lies where it may not is not even opened."""
    if inside is not None and not inside(os.path.realpath(file)):
        raise leads_outside(file)
    return open_stream(file, inside=inside)  # and the one that was opened is looked at again


@contextlib.contextmanager
def _told(file: Path) -> Iterator[None]:
    """Say which file can't be read, and why: it leads out of the base, or the system says no."""
    try:
        yield
    except FolderError:
        raise
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise leads_outside(file) from error
        raise FormatError(
            f"{file}: can't be read: {error.strerror or error}", "download it again"
        ) from error


def _index(file: Path, inside: Inside | None) -> dict[str, str]:
    with _told(file), _reading(file, inside) as stream:
        data = stream.read(MAX_INDEX_BYTES + 1)
    if len(data) > MAX_INDEX_BYTES:
        raise FormatError(f"{file}: too large for an index")
    placed = strict_json.loads(data, str(file)).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FormatError(f"{file}: no weight_map")
    for tensor, name in placed.items():
        plain = (
            isinstance(name, str)
            and name == os.path.basename(name)
            and name.endswith(".safetensors")
        )
        if not plain or "\0" in name:
            raise FormatError(
                f"{file}: {tensor}: {str(name)[:80]!r} is no safetensors file of this folder"
            )
    return placed


def _tensors(file: Path, inside: Inside | None) -> list[Stored]:
    with _told(file), _reading(file, inside) as stream:
        return _header(stream, file)


def _header(stream: BinaryIO, file: Path) -> list[Stored]:
    fields, position, size = header_fields(stream, str(file))
    fields.pop("__metadata__", None)
    seen = _identity(stream)
    found = sorted(
        (_stored(name, value, file, position, seen) for name, value in fields.items()),
        key=lambda s: s.begin,
    )
    for stored in found:
        if stored.begin != position:
            raise FormatError(
                f"{file}: {stored.name}: its bytes begin at {stored.begin}, expected {position}"
            )
        position = stored.end
    if position != size:
        raise FormatError(
            f"{file}: the header describes {position} bytes, the file holds {size}",
            "download it again",
        )
    return found


def _stored(name: str, value: Any, file: Path, start: int, seen: Identity) -> Stored:
    try:
        spelled, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = (
            all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end)) and begin <= end
        )
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or not isinstance(spelled, str):
        raise FormatError(f"{file}: {name}: malformed in the header: {json.dumps(value)[:120]}")
    dtype = DTYPES.get(spelled)
    if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
        raise FormatError(
            f"{file}: {name}: {spelled} {shape} does not fill its bytes {begin} to {end}"
        )
    return Stored(name, file, start + begin, start + end, dtype, spelled, shape, seen)
