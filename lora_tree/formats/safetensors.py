"""safetensors files: read into memory of our own, and written to the same bytes every time.

    8 bytes: n, little-endian │ n bytes: a JSON header, padded with spaces │ the tensors, back to back
    header: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {str: str}}

The package of that name maps the file into memory, so a file that is cut short later takes the process with it
(SIGBUS), and it writes metadata in a changing order. Here all tensors are read into one buffer of our own, in which
they lie as in the file, by one read; and every size is checked against the file's before anything is allocated.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..adapter import over
from ..errors import FormatError
from ..storage import Allocate
from ..system.reading import Inside
from ..system.reading import stream as stream_of
from . import strict_json
from .pointer import check_pointer

__all__ = ["Header", "Opened", "header_fields", "opened", "parse_header", "read_tensors", "render_tensors"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Header:
    """Everything about a file but its numbers.

    Args:
        tensors: on the meta device, each at its place in the one storage that all of them share.
        metadata: what the writer says beside.
        spans: (place, bytes) of what is read into that storage, in the order of the file. It is all one span, unless
            a tensor lies in the file where no tensor of its dtype can.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    spans: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """What the storage takes."""
        return sum(self.spans[-1])


class Opened:
    """A file that is being read; see `opened`.

    Args:
        stream: at its beginning.
        where: names the file in errors.
        witness: is shown the file's bytes, in order, and may not keep them.

    Attributes:
        head: the header, as it stands in the file.
        nbytes: of the tensors.
    """

    def __init__(self, stream: BinaryIO, where: str, witness: Callable[[memoryview], object] | None) -> None:
        self._stream, self._where, self._witness = stream, where, witness
        self.head, size = _head(stream, where, witness)
        self.nbytes = size - stream.tell()

    def numbers(self, header: Header, allocate: Allocate | None = None) -> Tensor:
        """(header.nbytes,) uint8: the storage of the header's tensors, filled from the file; to be asked once.

        Args:
            header: the head, parsed.
            allocate: makes the memory; None: ordinary memory.

        Raises:
            FormatError: the file was cut short meanwhile.
        """
        memory = (allocate or _ordinary)(header.nbytes)
        start = memory.data_ptr()
        for place, nbytes in header.spans:
            part = (ctypes.c_char * nbytes).from_address(start + place)
            if self._stream.readinto(part) != nbytes:  # type: ignore[attr-defined]
                raise _cut_short(self._where)
            if self._witness:
                self._witness(memoryview(part))
        return memory


@contextmanager
def opened(
    file: str | Path,
    where: str,
    witness: Callable[[memoryview], object] | None = None,
    inside: Inside | None = None,
) -> Iterator[Opened]:
    """``file`` while it is read; ``where`` names it in errors. See `Opened`.

    Raises:
        FormatError: it can't be read, or is cut short; also for what goes wrong inside.
    """
    try:
        with stream_of(file, inside=inside) as stream:
            yield Opened(stream, where, witness)
    except OSError as error:
        raise FormatError(f"{where}: can't be read: {error.strerror or error}") from error


def parse_header(head: bytes, nbytes: int, where: str) -> Header:
    """What the head of a file says, checked against the ``nbytes`` of tensors that follow it.

    Raises:
        FormatError: it is malformed, or the file is not what it says.
    """
    fields = strict_json.loads(head, f"{where}: header")
    metadata = fields.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise FormatError(f"{where}: header: __metadata__ must map strings to strings, got {str(metadata)[:80]}")
    entries = {name: _entry(value, f"{where}: {name[:200]}") for name, value in fields.items()}
    read = place = 0  # bytes of the file, and of the storage, that are spoken for
    places: dict[str, int] = {}
    spans = [(0, 0)]
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != read:
            raise FormatError(f"{where}: {name}: its bytes begin at {entry.begin}, expected {read}")
        if place % entry.dtype.itemsize:
            place += -place % entry.dtype.itemsize
            spans.append((place, 0))
        places[name] = place
        spans[-1] = spans[-1][0], spans[-1][1] + entry.end - entry.begin
        place += entry.end - entry.begin
        read = entry.end
    if read != nbytes:
        raise FormatError(
            f"{where}: the header describes {read} bytes of tensors, the file holds {nbytes}",
            "download or save it again",
        )
    storage = torch.empty(place, dtype=torch.uint8, device="meta")
    tensors = {name: _view(storage, entry, places[name]) for name, entry in entries.items()}
    return Header(tensors, metadata, tuple(spans))


def read_tensors(file: str | Path, where: str, *, outline: bool = False) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Every tensor of ``file``, all in one buffer, and the file's metadata; ``where`` names the file in errors.

    Args:
        outline: read the header only; the tensors have shapes and dtypes, and no numbers (the meta device).

    Raises:
        FormatError: the file can't be read, is cut short, or is not what its header says.
    """
    with opened(file, where) as reading, torch.inference_mode(False):
        header = parse_header(reading.head, reading.nbytes, where)
        if outline:
            return dict(header.tensors), header.metadata
        there = over(reading.numbers(header))
        return {name: there(tensor) for name, tensor in header.tensors.items()}, header.metadata


def render_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file; they depend on names and values alone.

    Wide dtypes come first and names are sorted, as the safetensors package does it, so every tensor is aligned.

    >>> data = render_tensors({"x": torch.ones(2)}, {"format": "pt"})
    >>> len(data) % 8, data[-4:].hex()
    (0, '0000803f')
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), NAMES[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {key: metadata[key] for key in sorted(metadata)}}
    size = 0
    for name in names:
        t = tensors[name]
        end = size + t.numel() * t.element_size()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    data = bytearray(start + size)
    data[:start] = len(text).to_bytes(8, "little") + text
    for name in names:
        t = tensors[name].detach()
        begin = start + header[name]["data_offsets"][0]
        torch.frombuffer(data, dtype=t.dtype, count=t.numel(), offset=begin).copy_(t.reshape(-1))
    return bytes(data)


def _ordinary(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def header_fields(stream: BinaryIO, where: str) -> tuple[dict[str, Any], int, int]:
    """What the header of an open file says, as it stands there; where the tensors begin; and the size of the file.

    Raises:
        FormatError: it is cut short, or no header.
    """
    head, size = _head(stream, where)
    return strict_json.loads(head, f"{where}: header"), 8 + len(head), size


def _head(stream: BinaryIO, where: str, witness: Callable[[memoryview], object] | None = None) -> tuple[bytes, int]:
    """The header's bytes, and the size of the file; the stream is where the tensors begin."""
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(first := stream.read(8), "little")
    check_pointer(first, where, "safetensors")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise FormatError(
            f"{where}: not a whole safetensors file: {size} bytes, of which the header should take {length}",
            "download or save it again: an unfinished download looks like this",
        )
    head = stream.read(length)
    if len(head) != length:
        raise _cut_short(where)
    if witness:
        witness(memoryview(first))
        witness(memoryview(head))
    return head, size


def _cut_short(where: str) -> FormatError:
    return FormatError(f"{where}: the file was cut short while it was read")


@dataclass(frozen=True)
class _Entry:
    """One tensor, as a header describes it: where its bytes lie, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _view(storage: Tensor, entry: _Entry, place: int) -> Tensor:
    return storage[place : place + entry.end - entry.begin].view(entry.dtype).view(entry.shape)


def _entry(value: Any, where: str) -> _Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: expected dtype, shape and data_offsets, got {str(value)[:80]}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2 and isinstance(dtype, str)):
        raise FormatError(f"{where}: dtype, shape or data_offsets are malformed: {str(value)[:200]}")
    if dtype not in DTYPES:
        raise FormatError(
            f"{where}: dtype {dtype[:20]} is not supported, expected one of {', '.join(DTYPES)}",
            "8-bit floats and integers are quantised values: save the adapter dequantised, in bf16 or wider",
        )
    if not math.prod(shape):
        raise FormatError(
            f"{where}: the tensor is empty, shape {tuple(shape)}",
            "a save under DeepSpeed ZeRO-3 or FSDP leaves empty tensors unless the shards are gathered first",
        )
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise FormatError(f"{where}: {dtype} {tuple(shape)} does not fill its bytes {offsets[0]} to {offsets[1]}")
    return _Entry(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(size) is int and 0 <= size < 2**48 for size in value)
    )
