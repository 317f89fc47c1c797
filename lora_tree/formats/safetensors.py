"""Write safetensors files with the package of that name, and read them with a reader of our own.

The package writes (`render_tensors`). The order of its metadata is that of a hash table and varies,
so we sort them afterwards. The package also reads where speed does not matter (`read_tensors`).

Adapters are read by `TensorFile`: one pass over a descriptor that was checked, through a hash, into
one buffer of our own. The package can't do that. Either it opens a file by name and maps it into
memory, and a mapped file that is truncated later kills the process (SIGBUS). Or it needs all bytes
in memory first, and copies each tensor out of them.

Law: the bytes of a written file depend on the names and values of its tensors alone. For reading
see the law of `safetensors_header`.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import FormatError, plural
from ..storage import Allocate
from ..system.memory import check_fits
from ..system.processors import ENOUGH, processors
from ..system.reading import Inside, open_stream
from . import strict_json
from .limits import HEADER_BYTES
from .pointer import check_pointer
from .safetensors_header import DTYPES, NAMES, Header, parse_header

__all__ = [
    "DTYPES",
    "NAMES",
    "Header",
    "TensorFile",
    "header_fields",
    "open_tensors",
    "parse_header",
    "read_tensors",
    "render_tensors",
]


PART = 8 << 20
"""Bytes per read: a witness can process one part while the next one is read."""

MOST_READERS = 4
"""The most reader threads: eight write to memory no faster than four."""


class TensorFile:
    """An open safetensors file; see `open_tensors`.

    Args:
        stream: the file, at its beginning.
        where: names the file in errors.
        witness: is called with the file's bytes, in order; see `lora_tree.storage.Witness`.

    Attributes:
        head: the bytes of the header.
        nbytes: the size of the tensors.
    """

    def __init__(
        self, stream: BinaryIO, where: str, witness: Callable[[memoryview], object] | None
    ) -> None:
        self._stream, self._where, self._witness = stream, where, witness
        self.head, size = _head(stream, where, witness)
        self.nbytes = size - stream.tell()

    def read_all(self) -> bytes:
        """Return the whole file with its header. Call it once, instead of `numbers`.

        Raises:
            FormatError: the file was cut short meanwhile.
        """
        data = len(self.head).to_bytes(8, "little") + self.head + self._stream.read(self.nbytes)
        if len(data) != 8 + len(self.head) + self.nbytes:
            raise _cut_short(self._where)
        return data

    def numbers(self, header: Header, allocate: Allocate | None = None) -> Tensor:
        """Read the tensors into one buffer, (header.nbytes,) uint8. Call it at most once.

        Args:
            header: `head`, parsed.
            allocate: allocates the buffer; None: ordinary memory.

        Raises:
            FormatError: the file was cut short meanwhile.
            BudgetError: the memory is too small.
        """
        # The caller's allocator may own a pool, whose memory does not count as free any more.
        check_fits(header.nbytes, self._where, free=allocate is None)
        memory = (allocate or _ordinary)(header.nbytes)
        start = memory.data_ptr()
        parts = []
        for place, nbytes in header.spans:
            end = place + nbytes
            for begin in range(place, end, PART):
                # Straight into the tensor's memory: read() would make a bytes object of that size.
                part: Any = (ctypes.c_char * min(PART, end - begin)).from_address(start + begin)
                # The witness may still use the part while the next one is read, or after an error,
                # so the part keeps the memory alive.
                part.memory = memory
                parts.append(part)
        # Close the generator on every exit: its threads must stop before the file is closed.
        with closing(self._filled(parts)) as filled:
            for part in filled:
                if self._witness:
                    self._witness(memoryview(part))
        return memory

    def _filled(self, parts: Sequence[Any]) -> Generator[Any, None, None]:
        """Yield each part, in order, once its bytes have been read.

        Most of the time goes into new pages, which the system clears at the first write. Several
        threads do that in parallel, so several read if there are enough processors.
        """
        done, count = 0, processors()
        readers = min(len(parts), count // 2, MOST_READERS)
        if count >= ENOUGH and readers > 1 and hasattr(os, "preadv"):
            with ThreadPoolExecutor(readers, "lora_tree read") as pool:
                reads = self._reads(pool, parts)
                try:
                    for read in reads:
                        if read.result() != len(parts[done]):
                            raise _cut_short(self._where)
                        yield parts[done]
                        done += 1
                finally:
                    # After an error or an interrupt, cancel the reads that have not begun. The pool
                    # waits for the others.
                    for read in reads:
                        read.cancel()
        for part in parts[done:]:
            if self._stream.readinto(part) != len(part):  # type: ignore[attr-defined]
                raise _cut_short(self._where)
            yield part

    def _reads(self, pool: ThreadPoolExecutor, parts: Sequence[Any]) -> list[Future[int]]:
        """Submit a read of each part; return the futures, or none if no thread can be started."""
        file, place = self._stream.fileno(), self._stream.tell()
        reads: list[Future[int]] = []
        try:
            for part in parts:
                reads.append(pool.submit(os.preadv, file, [part], place))
                place += len(part)
        # The interpreter is shutting down, or the system allows no more threads. Then the caller
        # reads all parts itself; reads that were submitted write the same bytes to the same place.
        except RuntimeError:
            return []
        return reads


@contextmanager
def open_tensors(
    file: str | Path,
    where: str,
    witness: Callable[[memoryview], object] | None = None,
    inside: Inside | None = None,
) -> Iterator[TensorFile]:
    """Open a file for reading while the block runs.

    Args:
        where: names it in errors.
        witness: is called with its bytes; see `TensorFile`.
        inside: where it may lie, all links followed; None: anywhere.

    Raises:
        FormatError: it can't be read, or is cut short; also for an OSError inside the block.
    """
    try:
        with open_stream(file, inside=inside) as stream:
            yield TensorFile(stream, where, witness)
    except OSError as error:
        raise FormatError(f"{where}: can't be read: {error.strerror or error}") from error


def read_tensors(
    file: str | Path, where: str, *, outline: bool = False
) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Read every tensor of a file, and the file's metadata.

    Args:
        where: names the file in errors.
        outline: read the header only; the tensors are on the meta device, with shapes and dtypes
            but no numbers.

    Raises:
        FormatError: the file can't be read, is cut short, or does not match its header.
    """
    # Tensors made under a caller's inference_mode could never train.
    with open_tensors(file, where) as reading, torch.inference_mode(False):
        header = parse_header(reading.head, reading.nbytes, where)
        if outline:
            return dict(header.tensors), header.metadata
        check_fits(reading.nbytes, where)
        data = reading.read_all()
        try:
            return safetensors.torch.load(data), header.metadata
        except (
            safetensors.SafetensorError,
            ValueError,
            TypeError,
            KeyError,
            RuntimeError,
        ) as error:
            # The header passed our own check, so this is a difference between versions.
            raise FormatError(
                f"{where}: safetensors can't read it: {error}", "download or save it again"
            ) from error


def render_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a file, which depend on names and values alone.

    As the package does it, wide dtypes come first and names are sorted, so every tensor is aligned.

    Raises:
        FormatError: a name or a dtype can't be written; names the tensor.

    >>> data = render_tensors({"x": torch.ones(2)}, {"format": "pt"})
    >>> len(data) % 8, data[-4:].hex()
    (0, '0000803f')
    """
    # The package gets addresses, so these copies must stay alive until it has read their memory.
    held: dict[str, Tensor] = {}
    for name in sorted(tensors):
        if tensors[name].dtype not in NAMES:
            raise FormatError(
                f"{name[:200]}: dtype {tensors[name].dtype} is not written, expected "
                f"{', '.join(DTYPES)}",
                "convert it first: tensor.to(torch.bfloat16)",
            )
        held[name] = tensors[name].detach().cpu().contiguous()
    try:
        if not held:
            return _without_tensors(metadata)
        entries: Any = {name: _spec(tensor) for name, tensor in held.items()}
        data: bytes = safetensors.serialize(entries, dict(metadata))
    except (safetensors.SafetensorError, UnicodeError, ValueError) as error:
        raise FormatError(
            f"safetensors can't write it: {error}",
            "expected names and metadata that UTF-8 can spell",
        ) from error
    return _in_order(data, metadata)


def _spec(tensor: Tensor) -> Any:
    """Return a contiguous tensor as the package's ``serialize`` takes it.

    `safetensors.torch.save` goes through numpy, and refuses two tensors that share memory, as the
    factors of a flattened adapter may.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = list(tensor.shape)
    nbytes = tensor.numel() * tensor.element_size()
    spec = getattr(safetensors, "TensorSpec", None)
    if spec is not None:
        return spec(dtype=dtype, shape=shape, data_ptr=tensor.data_ptr(), data_len=nbytes)
    # Before safetensors 0.8 it takes bytes, which costs a copy.
    data = ctypes.string_at(tensor.data_ptr(), nbytes) if nbytes else b""
    return {"dtype": dtype, "shape": shape, "data": data}


def _without_tensors(metadata: Mapping[str, str]) -> bytes:
    """Return a file without tensors, for which the package (0.8) writes invalid JSON.

    Without metadata its header is ``{},"__metadata__":{}``, which it refuses to read.
    """
    fields: dict[str, Any] = {}
    if metadata:
        fields["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    text = _shortest_json(fields)
    text += b" " * (-len(text) % 8)  # the format requires the tensors to begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _in_order(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return the same file with its metadata sorted by key."""
    if len(metadata) < 2:
        return data
    start = 8 + int.from_bytes(data[:8], "little")
    fields = json.loads(data[8:start])
    fields["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    # Sorting does not change the length, so the header keeps its size with its padding of spaces,
    # and every offset stays valid.
    text = _shortest_json(fields).ljust(start - 8)
    if len(text) != start - 8:
        # The offsets would be wrong. No known version of the package gets here.
        raise FormatError(
            f"safetensors wrote a header of {start - 8} bytes, expected its shortest form, "
            f"{plural(len(text), 'byte')}",
            "install a version of safetensors that is known here; this is "
            f"{safetensors.__version__}",
        )
    return b"".join((data[:8], text, memoryview(data)[start:]))


def _shortest_json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _ordinary(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def header_fields(stream: BinaryIO, where: str) -> tuple[dict[str, Any], int, int]:
    """Parse the header of an open file without checking its entries.

    Returns:
        its fields, the offset of the first tensor, and the size of the file.

    Raises:
        FormatError: it is cut short, or not a header.
    """
    head, size = _head(stream, where)
    return strict_json.loads(head, f"{where}: header"), 8 + len(head), size


def _head(
    stream: BinaryIO, where: str, witness: Callable[[memoryview], object] | None = None
) -> tuple[bytes, int]:
    """Return the header and the size of the file; leave the stream at the first tensor."""
    # Ask the descriptor, not the name, which may belong to another file by now.
    size = os.fstat(stream.fileno()).st_size
    first = stream.read(8)
    length = int.from_bytes(first, "little")
    # Check for a pointer before the length: read as a number, its text is an enormous length, and
    # the advice for that, to download again, would not help.
    check_pointer(first, where, "safetensors")
    # Check the length before reading: in another kind of file these bytes may mean exabytes.
    if size < 8 or length > min(HEADER_BYTES, size - 8):
        # Look for "<" only now: a valid length may contain the same byte.
        if first.lstrip().startswith(b"<"):
            raise FormatError(
                f"{where}: not a safetensors file, it begins like a web page",
                "a login or an error was saved in its place: look into it, and download it again",
            )
        header = f"{plural(size, 'byte')}, of which the header should take {length:,}"
        if size < 8:
            header = f"{plural(size, 'byte')}, and the length of the header alone takes 8"
        raise FormatError(
            f"{where}: not a whole safetensors file: {header}",
            "download or save it again: an unfinished download looks like this",
        )
    head = stream.read(length)
    if len(head) != length:
        raise _cut_short(where)
    # In the order of the file, so that the witness can hash the whole file.
    if witness:
        witness(memoryview(first))
        witness(memoryview(head))
    return head, size


def _cut_short(where: str) -> FormatError:
    return FormatError(
        f"{where}: the file was cut short while it was read",
        "another program writes to it: read it again when that is done",
    )
