"""Write a merged checkpoint: every file keeps its size, every tensor its offset.

    header, unchanged tensors   copied inside the kernel, byte for byte
    changed tensors             read, W ← round_once(W0 + Σ B A) as a switch does it, written
    tensors of one parameter    put together, changed and taken apart by transformers (see `names`)

So the headers are copied as well, and tensors can be written in any order.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..engine.arithmetic import Scratch, add_bias, add_weight, exact_mode
from ..folder import disk
from ..system.reading import open_stream
from .model_folder import ModelFolder
from .names import CheckpointNames, TensorGroup
from .shards import Checkpoint, Stored, raw
from .writes import Write

__all__ = ["CheckpointWriter", "GroupWrites"]

KERNEL_BYTES = 64 << 20
"""The most bytes per copy inside the kernel; progress is reported after each."""

PLAIN_BYTES = 8 << 20
"""The most bytes per read and write, if the kernel can't copy between the two files."""

WRITE_BYTES = 1 << 30
"""The most bytes per write: macOS refuses to write more than 2 GiB at once."""

GroupWrites = tuple[TensorGroup, list[Write]]
"""Tensors on the disk, and all writes to the parameters that are made of them."""


class CheckpointWriter:
    """One run over the files of a checkpoint.

    Args:
        checkpoint: the base's.
        folder: the folder that becomes the merged checkpoint.
        names: parameters ↔ tensors.
        progress: called with (bytes written, bytes to write).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: ModelFolder,
        names: CheckpointNames,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._names = names
        self._progress = progress
        self._scratch = Scratch()
        self._done_bytes = 0

    def run(self, changes: Sequence[GroupWrites]) -> None:
        """Write every file, and then the parameters that are made of several tensors.

        Raises:
            FolderError, FormatError: a file can't be written or read.
            BaseMismatch, SpecError: transformers can't convert a parameter.
        """
        alone: dict[str, list[Write]] = {}  # tensor → its writes
        together: list[GroupWrites] = []
        changing: set[str] = set()
        unfinished: set[str] = set()  # files that get tensors after the loop over the files
        for group, writes in changes:
            changing.update(stored.name for stored in group.stored)
            if group.converter is None:
                alone[group.stored[0].name] = writes
            else:
                together.append((group, writes))
                unfinished.update(stored.file.name for stored in group.stored)
        # Reuse one buffer for all tensors that change alone: clearing new pages costs as much as
        # reading into them.
        largest = max((self._checkpoint.tensors[name].nbytes for name in alone), default=0)
        buffer = torch.empty(largest, dtype=torch.uint8, device="cpu")
        syncs: list[Future[None]] = []
        # Each file is synced in the background while the next one is computed.
        with ThreadPoolExecutor(1) as pool, exact_mode(torch.device("cpu")):
            for name in self._checkpoint.files:
                self._write_file(name, alone, changing, buffer)
                if name not in unfinished:
                    syncs.append(pool.submit(self._folder.sync, name))
            # The tensors of one parameter may lie in several files, so these come last.
            for group, writes in together:
                self._change_together(group, writes)
            syncs += [pool.submit(self._folder.sync, name) for name in sorted(unfinished)]
            for sync in syncs:
                sync.result()  # raises what the thread raised

    def _write_file(
        self, name: str, alone: dict[str, list[Write]], changing: set[str], buffer: Tensor
    ) -> None:
        source = self._checkpoint.folder / name
        with self._folder.create(name) as out, disk.named("read it", source):
            self._copy_rest(name, out, changing)
            for stored in self._tensors_of(name):
                if stored.name in alone:
                    values = stored.read(buffer)
                    for write in alone[stored.name]:
                        self._add(write, values)
                    self._put(out, stored, values)

    def _tensors_of(self, name: str) -> list[Stored]:
        return [stored for stored in self._checkpoint.tensors.values() if stored.file.name == name]

    def _copy_rest(self, name: str, out: int, changing: set[str]) -> None:
        """Copy the header and every run of unchanged tensors."""
        source = self._checkpoint.folder / name
        tensors = self._tensors_of(name)
        with disk.named("copy it", source), self._open(source, tensors) as stream:
            size = os.fstat(stream.fileno()).st_size
            os.ftruncate(out, size)  # to its full size at once: tensors are put at their offsets
            at = 0
            for stored in tensors:
                if stored.name in changing:
                    self._copy(stream.fileno(), out, at, stored.begin)
                    at = stored.end
            self._copy(stream.fileno(), out, at, size)

    def _open(self, source: Path, tensors: Sequence[Stored]) -> BinaryIO:
        if tensors:
            # refuses a file that was replaced since its header was read
            return tensors[0].open()
        return open_stream(source)

    def _copy(self, source: int, out: int, begin: int, end: int) -> None:
        for at, size in _steps(begin, end):
            done = 0
            while done < size:
                copied = _copy_some(source, out, at + done, size - done)
                if not copied:
                    raise OSError(errno.EIO, "it was cut short meanwhile")
                done += copied
            self._tell(size)

    def _change_together(self, group: TensorGroup, writes: Sequence[Write]) -> None:
        parameters = self._names.make_parameters(group, Stored.read)
        # Check before the change: afterwards the bits no longer equal those of the files.
        self._names.check_inverse(group, parameters)
        for write in writes:
            # transformers may return a transposed view, but the sum is written in place
            values = parameters[write.parameter].contiguous()
            write.check_shape(tuple(values.shape))
            self._add(write, values)
            parameters[write.parameter] = values
        parts = self._names.take_apart(group, parameters)
        for stored in group.stored:
            with self._folder.reopen(stored.file.name) as out:
                # pop frees each part as soon as it is written: fused experts have many
                self._put(out, stored, parts.pop(stored.name))

    def _add(self, write: Write, values: Tensor) -> None:
        # As in a switch, an override is rounded to the dtype of the base's own tensor.
        for override in write.overrides:
            override.write(values)
        if not write.values:
            return
        if write.is_bias:
            add_bias(values, values, write.values)
        else:
            add_weight(write.site, values, values, write.values, self._scratch)

    def _put(self, out: int, stored: Stored, values: Tensor) -> None:
        assert values.dtype == stored.dtype
        assert values.numel() * values.element_size() == stored.nbytes
        rest, at = raw(values), stored.begin
        with disk.named("write it", self._folder.folder / stored.file.name):
            while rest:
                written = os.pwrite(out, rest[:WRITE_BYTES], at)
                rest = rest[written:]
                at += written
        self._tell(stored.nbytes)

    def _tell(self, nbytes: int) -> None:
        self._done_bytes += nbytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._checkpoint.nbytes)


def _copy_some(source: int, out: int, at: int, size: int) -> int:
    """Copy bytes from a file to the same offset of another, and return how many were copied.

    If possible the kernel copies; on btrfs and xfs it only shares the blocks.
    """
    try:
        return os.copy_file_range(source, out, size, at, at)
    except AttributeError:
        pass  # not on this system
    except OSError as error:
        # two file systems, or one that has no such call (some network shares, old kernels)
        cant = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
        if error.errno not in cant:
            raise
    return os.pwrite(out, os.pread(source, min(size, PLAIN_BYTES), at), at)


def _steps(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of pieces of at most `KERNEL_BYTES`."""
    for at in range(begin, end, KERNEL_BYTES):
        yield at, min(KERNEL_BYTES, end - at)
