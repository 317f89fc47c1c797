"""safetensors files: written and read with the package of that name, and by a reader of our own where speed counts.

    8 bytes: n, little-endian │ n bytes: a JSON header, padded with spaces │ the tensors, back to back
    header: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {str: str}}

The package writes (`render_tensors`). It writes metadata in a changing order (that of a hash table), so we sort it
afterwards. The package also reads where speed does not matter (`read_tensors`).

Adapters are read by `TensorFile`: one read from a descriptor that was checked, past a hash, into one buffer of our own.
The package can't do that. It opens a file by name and maps it into memory, and a mapped file that is cut short later
takes the process with it (SIGBUS). Or it wants all bytes in memory first, and copies each tensor out of them.

Law: what `parse_header` accepts the package accepts, and reads to the same bits. It refuses more: a key that occurs
twice, fields that the format does not have, dtypes that no adapter has, tensors without numbers.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import FormatError
from ..storage import Allocate
from ..system.memory import check_fits
from ..system.reading import Inside, open_stream
from . import strict_json
from .limits import HEADER_BYTES, TENSORS
from .pointer import check_pointer

__all__ = [
    "Header",
    "TensorFile",
    "header_fields",
    "open_tensors",
    "parse_header",
    "read_tensors",
    "render_tensors",
]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


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


class TensorFile:
    """A file that is being read; see `open_tensors`.

    Args:
        stream: at its beginning.
        where: names the file in errors.
        witness: is shown the file's bytes, in order, and may not keep them.

    Attributes:
        head: the header, as it stands in the file.
        nbytes: of the tensors.
    """

    def __init__(
        self, stream: BinaryIO, where: str, witness: Callable[[memoryview], object] | None
    ) -> None:
        self._stream, self._where, self._witness = stream, where, witness
        self.head, size = _head(stream, where, witness)
        self.nbytes = size - stream.tell()

    def whole(self) -> bytes:
        """The whole file, its header too; to be asked once, instead of `numbers`.

        Raises:
            FormatError: the file was cut short meanwhile.
        """
        data = len(self.head).to_bytes(8, "little") + self.head + self._stream.read(self.nbytes)
        if len(data) != 8 + len(self.head) + self.nbytes:
            raise _cut_short(self._where)
        return data

    def numbers(self, header: Header, allocate: Allocate | None = None) -> Tensor:
        """(header.nbytes,) uint8: the storage of the header's tensors, filled from the file; to be asked once.

        Args:
            header: the head, parsed.
            allocate: makes the memory; None: ordinary memory.

        Raises:
            FormatError: the file was cut short meanwhile.
            BudgetError: there is not so much memory.
        """
        # Memory that is handed in may come from a pool, which is taken already.
        check_fits(header.nbytes, self._where, free=allocate is None)
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
def open_tensors(
    file: str | Path,
    where: str,
    witness: Callable[[memoryview], object] | None = None,
    inside: Inside | None = None,
) -> Iterator[TensorFile]:
    """``file`` while it is read; ``where`` names it in errors. See `TensorFile`.

    Raises:
        FormatError: it can't be read, or is cut short; also for what goes wrong inside.
    """
    try:
        with open_stream(file, inside=inside) as stream:
            yield TensorFile(stream, where, witness)
    except OSError as error:
        raise FormatError(f"{where}: can't be read: {error.strerror or error}") from error


def parse_header(head: bytes, nbytes: int, where: str) -> Header:
    """What the head of a file says, checked against the ``nbytes`` of tensors that follow it.

    Raises:
        FormatError: it is malformed, or the file is not what it says.
    """
    fields = strict_json.loads(head, f"{where}: header")
    if b"-0" in head and _minus_zero(head):
        raise FormatError(f"{where}: header: -0 is no size and no place")
    metadata = fields.pop("__metadata__", {})
    if not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise FormatError(
            f"{where}: header: __metadata__ must map strings to strings, got {str(metadata)[:80]}"
        )
    if len(fields) > TENSORS:
        raise FormatError(f"{where}: header: {len(fields):,} tensors; the most is {TENSORS:,}")
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


def read_tensors(
    file: str | Path, where: str, *, outline: bool = False
) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Every tensor of ``file``, and the file's metadata; ``where`` names the file in errors.

    Args:
        outline: read the header only; the tensors have shapes and dtypes, and no numbers (the meta device).

    Raises:
        FormatError: the file can't be read, is cut short, or is not what its header says.
    """
    with open_tensors(file, where) as reading, torch.inference_mode(False):
        header = parse_header(reading.head, reading.nbytes, where)
        if outline:
            return dict(header.tensors), header.metadata
        check_fits(reading.nbytes, where)
        data = reading.whole()
        try:
            return safetensors.torch.load(data), header.metadata
        except (
            safetensors.SafetensorError,
            ValueError,
            TypeError,
            KeyError,
            RuntimeError,
        ) as error:
            raise FormatError(
                f"{where}: safetensors can't read it: {error}", "download or save it again"
            ) from error


def render_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file; they depend on names and values alone.

    Wide dtypes come first and names are sorted, as the package does it, so every tensor is aligned.

    Raises:
        FormatError: a name or a dtype can't be written; names the tensor.

    >>> data = render_tensors({"x": torch.ones(2)}, {"format": "pt"})
    >>> len(data) % 8, data[-4:].hex()
    (0, '0000803f')
    """
    held = {}
    for name in sorted(tensors):
        if tensors[name].dtype not in NAMES:
            raise FormatError(
                f"{name[:200]}: dtype {tensors[name].dtype} is not written, expected {', '.join(DTYPES)}"
            )
        held[name] = (
            tensors[name].detach().cpu().contiguous()
        )  # kept until the package has read their memory
    try:
        entries: Any = {name: _spec(tensor) for name, tensor in held.items()}
        data: bytes = (
            safetensors.serialize(entries, dict(metadata)) if entries else _of_nothing(metadata)
        )
    except (safetensors.SafetensorError, UnicodeError, ValueError) as error:
        raise FormatError(f"safetensors can't write it: {error}") from error
    return _in_order(data, metadata)


def _spec(tensor: Tensor) -> Any:
    """A contiguous tensor as the package takes it: by its place in memory, or before 0.8 as bytes.

    `safetensors.torch.save` would do the same by way of numpy, and refuses two tensors that share memory.
    """
    dtype, shape, nbytes = (
        str(tensor.dtype)[6:],
        list(tensor.shape),
        tensor.numel() * tensor.element_size(),
    )
    spec = getattr(safetensors, "TensorSpec", None)
    if spec is not None:
        return spec(dtype=dtype, shape=shape, data_ptr=tensor.data_ptr(), data_len=nbytes)
    return {
        "dtype": dtype,
        "shape": shape,
        "data": ctypes.string_at(tensor.data_ptr(), nbytes) if nbytes else b"",
    }


def _of_nothing(metadata: Mapping[str, str]) -> bytes:
    """A file without tensors, of which the package makes no JSON."""
    fields = {"__metadata__": dict(metadata)} if metadata else {}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _in_order(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """The same file with its metadata sorted; the package writes it in the order of a hash table."""
    if len(metadata) < 2:
        return data
    start = 8 + int.from_bytes(data[:8], "little")
    fields = json.loads(data[8:start])
    fields["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    text = (
        json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
        .encode("utf-8")
        .ljust(start - 8)
    )
    if len(text) != start - 8:
        raise FormatError(
            "safetensors wrote a header that is not in its shortest form, which this version does not know"
        )
    return b"".join((data[:8], text, memoryview(data)[start:]))


def _ordinary(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def header_fields(stream: BinaryIO, where: str) -> tuple[dict[str, Any], int, int]:
    """What the header of an open file says, as it stands there; where the tensors begin; and the size of the file.

    Raises:
        FormatError: it is cut short, or no header.
    """
    head, size = _head(stream, where)
    return strict_json.loads(head, f"{where}: header"), 8 + len(head), size


def _head(
    stream: BinaryIO, where: str, witness: Callable[[memoryview], object] | None = None
) -> tuple[bytes, int]:
    """The header's bytes, and the size of the file; the stream is where the tensors begin."""
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(first := stream.read(8), "little")
    check_pointer(first, where, "safetensors")
    if size < 8 or length > min(HEADER_BYTES, size - 8):
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


def _minus_zero(head: bytes) -> bool:
    """Whether a number of a header is -0, which is a fraction to the package; names may well hold these two letters."""
    outside_of_strings = re.sub(rb'"(?:[^"\\]|\\.)*"', b'""', head, flags=re.DOTALL)
    return re.search(rb"-0(?![0-9])", outside_of_strings) is not None


def _cut_short(where: str) -> FormatError:
    return FormatError(f"{where}: the file was cut short while it was read")


@dataclass(frozen=True)
class _HeaderEntry:
    """One tensor, as a header describes it: where its bytes lie, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _view(storage: Tensor, entry: _HeaderEntry, place: int) -> Tensor:
    return storage[place : place + entry.end - entry.begin].view(entry.dtype).view(entry.shape)


def _entry(value: Any, where: str) -> _HeaderEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: expected dtype, shape and data_offsets, got {str(value)[:80]}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2 and isinstance(dtype, str)):
        raise FormatError(
            f"{where}: dtype, shape or data_offsets are malformed: {str(value)[:200]}"
        )
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
        raise FormatError(
            f"{where}: {dtype} {tuple(shape)} does not fill its bytes {offsets[0]} to {offsets[1]}"
        )
    return _HeaderEntry(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(size) is int and 0 <= size < 2**48 for size in value)
    )
