"""A base's checkpoint on the disk: its files, and the place of every tensor's bytes.

    model.safetensors                   one file
    model.safetensors.index.json        or an index, {"weight_map": {tensor: file}}, and its shards

Every tensor is known by its place and size, whatever its dtype. Only tensors in the dtypes of
`DTYPES` can be read as numbers.

Law: numbers are read from the same file as the header. If the file was replaced or cut short in
between, that is an error, never a mixture.
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
    "missing_files",
    "open_checkpoint",
    "outside_link_error",
    "own_files",
    "raw",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 << 20
"""The largest index that is read; those of the largest bases have some 10 MB."""

Identity = tuple[int, int, int, int]
"""Device, inode, size and time of a file: together they change when the file is replaced."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint.

    Args:
        file: the file that holds it.
        begin, end: its bytes, counted from the start of the file.
        dtype: None for a dtype that this library does not compute with.
        spelled: the dtype's name in the file.
        seen: identifies the file whose header was read; another file of the same name is refused.
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
        """Open the file that holds the tensor; the caller closes it.

        Raises:
            FormatError: the file was replaced since its header was read.
            OSError: it can't be opened.
        """
        stream = open_stream(self.file, buffering=0)
        # Compare the open file, not its name, which may point to another file a moment later.
        if _identity(stream) != self.seen:
            stream.close()
            raise FormatError(
                f"{self.file}: has changed since its header was read",
                "wait for the writer, and try again",
            )
        return stream

    def read(self, into: Tensor | None = None) -> Tensor:
        """Read the numbers.

        Args:
            into: memory to read them to, its first `nbytes` bytes (uint8); None: new memory.

        Raises:
            FormatError: the file was cut short, or its dtype is not one of `DTYPES`.
        """
        if self.dtype is None:
            raise FormatError(
                f"{self.file}: {self.name}: got dtype {self.spelled}, expected one of "
                f"{', '.join(DTYPES)}: nothing can be added to it",
                "name the folder of the base in bf16, fp16 or fp32",
            )
        memory = into
        if memory is None:
            memory = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")
        tensor = memory[: self.nbytes].view(self.dtype).reshape(self.shape)
        unread = raw(tensor)
        try:
            with self.open() as stream:
                stream.seek(self.begin)
                while unread:  # an unbuffered stream may give less than was asked for
                    count = stream.readinto(unread)  # type: ignore[attr-defined]
                    if not count:
                        raise FormatError(
                            f"{self.file}: {self.name}: the file was cut short while it was read",
                            "another program writes to it: try again when that is done",
                        )
                    unread = unread[count:]
        except OSError as error:
            raise FormatError(
                f"{self.file}: can't be read: {error.strerror or error}", "download it again"
            ) from error
        return tensor


def _identity(stream: BinaryIO) -> Identity:
    seen = os.fstat(stream.fileno())
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, as a view of its memory.

    The view does not keep the tensor alive: the caller must, as long as the view is used.

    >>> one = torch.tensor([1.0])
    >>> bytes(raw(one)).hex()
    '0000803f'
    """
    # numpy would do the same for the dtypes that it has; bf16 is not among them
    nbytes = tensor.numel() * tensor.element_size()
    held = (ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())
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
        total = 0
        for name in self.files:
            with named("look at it", self.folder / name):
                total += (self.folder / name).stat().st_size
        return total


def own_files(folder: Path) -> Inside:
    """Return a test of where a base's files may lie: in its folder, or in its own blobs.

    A snapshot in the hub's cache consists of links into the ``blobs`` of the same repository.
    """
    real = Path(os.path.realpath(folder))
    own = [str(real)]
    # …/huggingface/hub/models--org--name/snapshots/<commit>/config.json → ../../blobs/<hash>
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        own.append(str(real.parent.parent / "blobs"))
    return lambda file: any(os.path.commonpath((file, each)) == each for each in own)


def outside_link_error(file: Path) -> FolderError:
    """Return the error for a file of a base that is a link out of the base's folder."""
    return FolderError(
        f"{file}: is a link to {os.path.realpath(file)}, which lies outside the base, and would be "
        "copied into the checkpoint",
        "if you trust it, put the file itself there: cp --remove-destination TARGET LINK; "
        "otherwise remove it",
    )


def open_checkpoint(folder: Path, *, inside: Inside | None = None) -> Checkpoint:
    """Open the safetensors checkpoint in a folder, headers only.

    Args:
        inside: where its files may lie, all links followed; None: anywhere.

    Raises:
        FormatError: there is none, or a file is missing, broken, or not what the index says.
        FolderError: a file lies elsewhere.
    """
    # transformers (5) takes the single file if both exist, so the index would be an old one
    if is_file(folder / SINGLE):
        tensors = {stored.name: stored for stored in _tensors(folder / SINGLE, inside)}
        return Checkpoint(folder, (SINGLE,), tensors)
    if not is_file(folder / INDEX):
        raise FormatError(
            f"{folder}: no {SINGLE} and no {INDEX}",
            "give the folder of a transformers model saved as safetensors: "
            "model.save_pretrained(folder)",
        )
    placed = _index(folder / INDEX, inside)
    files = tuple(sorted(set(placed.values())))  # sorted: the same order on every machine
    tensors = {}
    for name in files:
        for stored in _tensors(folder / name, inside):
            if placed.get(stored.name) != name:
                raise FormatError(
                    f"{folder / name}: {stored.name} is in the file, but not there in {INDEX}",
                    "download the base again, or save it again with save_pretrained",
                )
            tensors[stored.name] = stored
    # transformers would initialise a missing parameter at random and only warn.
    missing = [name for name in placed if name not in tensors]
    if missing:
        raise FormatError(
            f"{folder / INDEX}: names tensors that its files do not hold: {listing(missing)}",
            "download the base again, or save it again with save_pretrained",
        )
    return Checkpoint(folder, files, tensors)


def missing_files(folder: Path, *, inside: Inside | None = None) -> list[str]:
    """Return the files that a checkpoint in a folder needs and that are not there.

    Raises:
        FormatError: its index is broken.
        FolderError: its index lies where it may not.
    """
    weights = [SINGLE]
    if not is_file(folder / SINGLE) and is_file(folder / INDEX):
        weights = sorted(set(_index(folder / INDEX, inside).values()))
    return [name for name in ("config.json", *weights) if not is_file(folder / name)]


def _reading(file: Path, inside: Inside | None) -> BinaryIO:
    """Open a file of a base to read; a file outside of the base is not even opened."""
    if inside is not None and not inside(os.path.realpath(file)):
        raise outside_link_error(file)
    # A link may change between this check and the opening, so the open file is checked too.
    return open_stream(file, inside=inside)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn an OSError into an error that names the file and the reason."""
    try:
        yield
    except FolderError:
        raise
    except OSError as error:
        if error.errno == errno.EXDEV:  # from `open_stream`: the open file lies outside
            raise outside_link_error(file) from error
        raise FormatError(
            f"{file}: can't be read: {error.strerror or error}", "download it again"
        ) from error


def _index(file: Path, inside: Inside | None) -> dict[str, str]:
    with _naming(file), _reading(file, inside) as stream:
        data = stream.read(MAX_INDEX_BYTES + 1)
    if len(data) > MAX_INDEX_BYTES:
        raise FormatError(
            f"{file}: more than {MAX_INDEX_BYTES:,} bytes, too large for an index",
            "download it again",
        )
    placed = strict_json.loads(data, str(file)).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FormatError(
            f"{file}: no weight_map, expected an object of tensor: file", "download it again"
        )
    for tensor, name in placed.items():
        # The index is a stranger's: a name with a slash in it could lead anywhere.
        is_plain = isinstance(name, str) and name == os.path.basename(name) and "\0" not in name
        if not is_plain or not name.endswith(".safetensors"):
            raise FormatError(
                f"{file}: {tensor}: {str(name)[:80]!r} is no safetensors file of this folder",
                "download the base again from where you trust it",
            )
    return placed


def _tensors(file: Path, inside: Inside | None) -> list[Stored]:
    with _naming(file), _reading(file, inside) as stream:
        return _header(stream, file)


def _header(stream: BinaryIO, file: Path) -> list[Stored]:
    fields, position, size = header_fields(stream, str(file))
    fields.pop("__metadata__", None)
    seen = _identity(stream)
    found = [_stored(name, value, file, position, seen) for name, value in fields.items()]
    found.sort(key=lambda stored: stored.begin)
    for stored in found:
        # Refuse gaps: then every byte belongs to the header or to a tensor, and a copy of all but
        # the changed tensors misses nothing.
        if stored.begin != position:
            raise FormatError(
                f"{file}: {stored.name}: its bytes begin at {stored.begin}, expected {position}",
                "download it again",
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
        spelled, shape = value["dtype"], tuple(value["shape"])
        begin, end = value["data_offsets"]
        sizes = (*shape, begin, end)
        is_whole = all(type(size) is int and 0 <= size < 2**48 for size in sizes)
        is_whole = is_whole and begin <= end and isinstance(spelled, str)
    except (TypeError, KeyError, ValueError):
        is_whole = False
    if not is_whole:
        raise FormatError(
            f"{file}: {name}: malformed in the header: {json.dumps(value)[:120]}",
            "expected dtype, shape and data_offsets: download it again",
        )
    # A tensor of another dtype (fp8, packed integers) is only copied, so its size is not checked.
    dtype = DTYPES.get(spelled)
    if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
        raise FormatError(
            f"{file}: {name}: {spelled} {shape} does not fill its bytes {begin} to {end}",
            "download it again",
        )
    return Stored(name, file, start + begin, start + end, dtype, spelled, shape, seen)
