"""safetensors files: read into memory of our own, and written to the same bytes every time.

    8 bytes: n, little-endian │ n bytes: a JSON header, padded with spaces │ the tensors, back to back
    header: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {str: str}}

The package of that name maps the file into memory, so a file that is cut short later takes the process with it
(SIGBUS), and it writes metadata in a changing order. Here all tensors are read by one read into one buffer of our own,
in which they lie as in the file, and every size is checked against the file's before anything is allocated.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import FormatError
from ..storage import Allocate
from . import strict_json

__all__ = ["Entry", "Header", "header_fields", "read_header", "read_tensors", "render_tensors"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes lie, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """Everything about a file but its numbers; ``start`` is the offset of the first tensor's bytes."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    start: int


def read_header(file: str | Path, where: str) -> Header:
    """The header of ``file``, checked against its size; ``where`` names the file in errors.

    Raises:
        FormatError: the file can't be read, is cut short, or is not what its header says.
    """
    try:
        with open(file, "rb") as stream:
            return _header(stream, where)
    except OSError as error:
        raise FormatError(f"{where}: can't be read: {error.strerror or error}") from error


def read_tensors(
    file: str | Path,
    where: str,
    *,
    outline: bool = False,
    allocate: Allocate | None = None,
    witness: Callable[[memoryview], object] | None = None,
) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Every tensor of ``file``, all in one buffer, and the file's metadata.

    Args:
        outline: read the header only; the tensors have shapes and dtypes, and no numbers (the meta device).
        allocate: makes the buffer; None: ordinary memory.
        witness: is shown the file's bytes, in order, and may not keep them.

    Raises:
        FormatError: the file can't be read, is cut short, or is not what its header says.
    """
    try:
        with open(file, "rb") as stream:
            header = _header(stream, where, witness)
            if outline:
                made = {n: torch.empty(e.shape, dtype=e.dtype, device="meta") for n, e in header.tensors.items()}
                return made, header.metadata
            size = max((entry.end for entry in header.tensors.values()), default=0)
            with torch.inference_mode(False):  # read under inference_mode, trained on top of later
                buffer = (allocate or _ordinary)(size)
                memory = (ctypes.c_char * size).from_address(buffer.data_ptr())
                if stream.readinto(memory) != size:
                    raise FormatError(f"{where}: the file was cut short while it was read")
                if witness:
                    witness(memoryview(memory))
                return _views(buffer, header.tensors), header.metadata
    except OSError as error:
        raise FormatError(f"{where}: can't be read: {error.strerror or error}") from error


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
    return torch.empty(nbytes, dtype=torch.uint8)


def _views(buffer: Tensor, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Every tensor in the buffer; in memory of its own where it does not lie on a multiple of its size."""
    found: dict[str, Tensor] = {}
    whole: dict[torch.dtype, Tensor] = {}  # one call a tensor instead of three: an adapter has hundreds
    for name, entry in entries.items():
        dtype, shape, size = entry.dtype, entry.shape, entry.dtype.itemsize
        if entry.begin % size:
            found[name] = buffer[entry.begin : entry.end].clone().view(dtype).reshape(shape)
            continue
        if dtype not in whole:
            whole[dtype] = buffer[: buffer.numel() // size * size].view(dtype)
        strides = [math.prod(shape[i:]) for i in range(1, len(shape) + 1)]
        found[name] = whole[dtype].as_strided(shape, strides, entry.begin // size)
    return found


def header_fields(
    stream: BinaryIO, where: str, witness: Callable[[memoryview], object] | None = None
) -> tuple[dict[str, Any], int, int]:
    """What the header of an open file says, as it stands there; where the tensors begin; and the size of the file.

    Args:
        witness: is shown the bytes up to there.

    Raises:
        FormatError: it is cut short, or no header.
    """
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(first := stream.read(8), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise FormatError(
            f"{where}: not a whole safetensors file: {size} bytes, of which the header should take {length}",
            "download or save it again; a Git LFS pointer or an unfinished download looks like this",
        )
    text = stream.read(length)
    if len(text) != length:
        raise FormatError(f"{where}: the file was cut short while it was read")
    if witness:
        witness(memoryview(first))
        witness(memoryview(text))
    return strict_json.loads(text, f"{where}: header"), 8 + length, size


def _header(stream: BinaryIO, where: str, witness: Callable[[memoryview], object] | None = None) -> Header:
    fields, start, size = header_fields(stream, where, witness)
    metadata = fields.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise FormatError(f"{where}: header: __metadata__ must map strings to strings, got {str(metadata)[:80]}")
    tensors = {name: _entry(value, f"{where}: {name[:200]}") for name, value in fields.items()}
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise FormatError(f"{where}: {name}: its bytes begin at {entry.begin}, expected {position}")
        position = entry.end
    if position != size - start:
        raise FormatError(
            f"{where}: the header describes {position} bytes of tensors, the file holds {size - start}",
            "download or save it again",
        )
    return Header(tensors, metadata, start)


def _entry(value: Any, where: str) -> Entry:
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
    return Entry(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(size) is int and 0 <= size < 2**48 for size in value)
    )
