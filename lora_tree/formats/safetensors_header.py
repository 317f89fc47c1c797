"""Parse the header of a safetensors file, and check it before anything is allocated.

    8 bytes: n, little-endian │ n bytes: the header, padded with spaces │ the tensors, back to back
    header: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …,
             "__metadata__": {"str": "str"}}

Law: every header that `parse_header` accepts, the package accepts too, and reads to the same bits.
`parse_header` refuses more: duplicate keys, fields that the format does not have, dtypes that no
adapter has, empty tensors. It never crashes, and takes memory in proportion to the header only.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, plural
from . import strict_json
from .limits import TENSORS

__all__ = ["DTYPES", "NAMES", "Header", "parse_header"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDICES = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
_INDEX_END = "_topk_indices"
"""The end of the only names whose tensors are whole numbers: places in VB-LoRA's bank."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """A file without its numbers.

    Args:
        tensors: on the meta device, as views of one storage that all of them share.
        metadata: the file's ``__metadata__``.
        spans: (offset in the storage, bytes) of each run to read, in the order of the file. There
            is one span, unless a tensor in the file is not aligned for its dtype.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    spans: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """The size of the storage: the end of its last span."""
        place, size = self.spans[-1]
        return place + size


def parse_header(head: bytes, nbytes: int, where: str) -> Header:
    """Parse the header of a file, and check it against the bytes of tensors that follow it.

    Args:
        head: the bytes of the header.
        nbytes: the size of the tensors that follow.
        where: names the file in errors.

    Raises:
        FormatError: it is malformed, or the file does not match it.
    """
    fields = strict_json.loads(head, f"{where}: header")
    # The plain search comes first: the regular expression is slow on a header of up to 100 MB.
    if b"-0" in head and _minus_zero(head):
        raise FormatError(
            f"{where}: header: -0 is no size and no place, expected 0",
            "write the file again with the safetensors package",
        )
    # The format reserves this one key for metadata.
    metadata = fields.pop("__metadata__", None)
    if metadata is None:
        metadata = {}  # MLX writes null if there are none, which the package accepts too
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(
            f"{where}: header: __metadata__ must map strings to strings, got {str(metadata)[:80]}",
            "write the file again with the safetensors package",
        )
    if len(fields) > TENSORS:
        raise FormatError(
            f"{where}: header: {plural(len(fields), 'tensor')}; the most is {TENSORS:,}",
            "no adapter has so many: is it the right file?",
        )
    entries: dict[str, _HeaderEntry] = {}
    for name, value in fields.items():
        dtypes = _INDICES if name.endswith(_INDEX_END) else DTYPES
        entries[name] = _entry(value, f"{where}: {name[:200]}", dtypes)
    return _laid_out(entries, metadata, nbytes, where)


def _laid_out(
    entries: Mapping[str, _HeaderEntry], metadata: Mapping[str, str], nbytes: int, where: str
) -> Header:
    """Assign each tensor an offset in one storage.

    The offsets are those in the file, so that one read fills the storage. A torch view has to be
    aligned for its dtype. The package aligns what it writes, but the format does not require it: a
    tensor that is not aligned is moved up, and begins a new span.
    """
    read = 0  # bytes of the file so far
    place = 0  # bytes of the storage so far
    places: dict[str, int] = {}
    spans = [(0, 0)]
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        # No gaps and no overlaps, which the package refuses too: a file can't hide bytes.
        if entry.begin != read:
            raise FormatError(
                f"{where}: {name}: its bytes begin at {entry.begin}, expected {read}",
                "download or save it again",
            )
        if place % entry.dtype.itemsize:
            place += -place % entry.dtype.itemsize
            spans.append((place, 0))
        places[name] = place
        spans[-1] = spans[-1][0], spans[-1][1] + entry.nbytes
        place += entry.nbytes
        read = entry.end
    if read != nbytes:
        raise FormatError(
            f"{where}: the header describes {read} bytes of tensors, the file holds {nbytes}",
            "download or save it again",
        )
    # The meta device allocates nothing, however large the tensors are.
    storage = torch.empty(place, dtype=torch.uint8, device="meta")
    tensors = {name: _view(storage, entry, places[name]) for name, entry in entries.items()}
    return Header(tensors, metadata, tuple(spans))


@dataclass(frozen=True)
class _HeaderEntry:
    """One tensor, as a header describes it; its bytes are counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def _view(storage: Tensor, entry: _HeaderEntry, place: int) -> Tensor:
    return storage[place : place + entry.nbytes].view(entry.dtype).view(entry.shape)


def _entry(value: Any, where: str, dtypes: Mapping[str, torch.dtype]) -> _HeaderEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(
            f"{where}: expected dtype, shape and data_offsets, got {str(value)[:80]}",
            "write the file again with the safetensors package",
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    are_sizes = _are_sizes(shape) and _are_sizes(offsets)
    if not are_sizes or len(offsets) != 2 or not isinstance(dtype, str):
        raise FormatError(
            f"{where}: dtype, shape or data_offsets are malformed: {str(value)[:200]}",
            "write the file again with the safetensors package",
        )
    if dtype not in dtypes:
        raise FormatError(
            f"{where}: dtype {dtype[:20]} is not supported, expected one of {', '.join(dtypes)}",
            "8-bit floats and integers are quantised values: save the adapter dequantised, in bf16 "
            "or wider",
        )
    # The format and the package allow empty tensors, but no factor is empty: this is a lost shard.
    if not math.prod(shape):
        raise FormatError(
            f"{where}: the tensor is empty, shape {tuple(shape)}",
            "a save under DeepSpeed ZeRO-3 or FSDP leaves empty tensors unless the shards are "
            "gathered first",
        )
    if offsets[1] - offsets[0] != math.prod(shape) * dtypes[dtype].itemsize:
        raise FormatError(
            f"{where}: {dtype} {tuple(shape)} does not fill its bytes {offsets[0]} to {offsets[1]}",
            "download or save it again",
        )
    return _HeaderEntry(dtypes[dtype], tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    """Return whether a value is a short list of sizes.

    The bounds keep products cheap: Python's integers are unbounded, and a product of a thousand
    huge ones would take minutes.
    """
    if not isinstance(value, list) or len(value) > 8:
        return False
    # `type` instead of isinstance, because JSON's `true` is an int for isinstance.
    return all(type(size) is int and 0 <= size < 2**48 for size in value)


def _minus_zero(head: bytes) -> bool:
    """Return whether a number of a header is -0.

    Python reads it as the integer 0; the package reads it as a float, and refuses it. Names may
    contain these two characters, so strings are removed first.
    """
    outside_of_strings = re.sub(rb'"(?:[^"\\]|\\.)*"', b'""', head, flags=re.DOTALL)
    return re.search(rb"-0(?![0-9])", outside_of_strings) is not None
