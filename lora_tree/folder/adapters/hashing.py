"""ContentHash: the hashes of an adapter's content, found while its files are read.

    reader    part 0 │ part 1 │ part 2 │ …            each into its final place in memory
    hasher             part 0 │ part 1 │ part 2       in a thread of its own, if processors are free
    pieces             several threads, each a piece  where the lock has the hash of the pieces

SHA-256 takes several times as long as a read from the page cache, so the read is hidden behind it,
and so is what the reader does with the adapter afterwards. Meanwhile the reader often has the
interpreter's lock, for which the hasher has to wait between two parts: so parts that wait are
hashed as one.

Law: the hashes depend on the bytes alone. No caller gets an adapter before `content` or `pieces`
has returned the hash of its files.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ...formats.peft import CONFIG, FILES, WEIGHTS
from ...system.processors import ENOUGH, processors
from .. import disk
from ..lockfile import content
from .pieces import LARGE, PieceHash, threads_for

__all__ = ["ContentHash", "by_pieces", "weights_digest"]


class ContentHash:
    """The hashes of an adapter's content, from the bytes that its reader used.

    It is a reader's witness. A PEFT folder's weights stay unchanged until `content`, `pieces` or
    `close`, and are hashed beside the read. Readers of other formats may transpose factors in
    place, so those bytes are hashed at once.

    Args:
        names: the names of the adapter's files.
        whole: find `content`.
        pieces: find `pieces`.
        nbytes: the size of the weights, if known: several threads hash the pieces of large ones.
    """

    def __init__(
        self,
        names: Iterable[str] = FILES,
        *,
        whole: bool = True,
        pieces: bool = False,
        nbytes: int = 0,
    ) -> None:
        self._hashes = {name: hashlib.sha256() for name in names}
        self._whole = whole
        self._pieces = PieceHash(threads_for(nbytes)) if pieces else None
        self._parts: SimpleQueue[tuple[str, memoryview] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._error: Exception | None = None

    def __call__(self, name: str, data: memoryview) -> None:
        if name == WEIGHTS:
            if self._pieces is not None:
                self._pieces.update(data)
            if not self._whole:
                return
        if self._thread is None and not _is_worth_a_thread(name, data.nbytes):
            self._hashes[name].update(data)
            return
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="lora_tree hash", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread can be started; see `pieces`
                self._hashes[name].update(data)
                return
            self._thread = thread
        # From here on all parts go to the thread: a file's parts are hashed in their order.
        self._parts.put((name, data))

    @property
    def is_threaded(self) -> bool:
        """True while a thread hashes what was read: there is time until the hash is known."""
        if self._pieces is not None and self._pieces.is_threaded:
            return True
        return self._thread is not None

    def content(self) -> str:
        """Wait until all parts are hashed, and return the content's hash. Call it once."""
        return content(*self.digests().values())

    def digests(self) -> dict[str, str]:
        """Wait until all parts are hashed, and return the SHA-256 of each file.

        Without ``whole`` that of the weights is the hash of no bytes.
        """
        self._end()
        return {name: hashing.hexdigest() for name, hashing in self._hashes.items()}

    def pieces(self) -> str | None:
        """Return the hash by pieces; see `by_pieces`. Call it once."""
        if self._pieces is None:
            return None
        return by_pieces(self.digests(), self._pieces)

    def close(self) -> None:
        """Drop the parts that are not hashed yet; a no-op after the hash is known."""
        self._closed = True
        if self._pieces is not None:
            self._pieces.close()
        self._end()

    def _end(self) -> None:
        """Wait for the thread, and raise its error."""
        if self._thread is None:
            return
        self._parts.put(None)
        self._thread.join()
        self._thread = None
        if self._error is not None and not self._closed:
            raise self._error

    def _work(self) -> None:
        is_last = False
        while not is_last:
            parts, is_last = self._waiting()
            for name, data in _joined(parts):
                if self._closed or self._error is not None:
                    break
                try:
                    # hashlib lets other threads run meanwhile.
                    self._hashes[name].update(data)
                except Exception as error:
                    self._error = error

    def _waiting(self) -> tuple[list[tuple[str, memoryview]], bool]:
        """Return the parts that wait, at least one, and whether they are the last."""
        parts: list[tuple[str, memoryview]] = []
        part = self._parts.get()
        with contextlib.suppress(Empty):
            while part is not None:
                parts.append(part)
                part = self._parts.get_nowait()
        return parts, part is None


def by_pieces(digests: Mapping[str, str], weights: PieceHash) -> str | None:
    """Return the hash of an adapter by pieces of its weights; None if those are small.

    Args:
        digests: the SHA-256 of each of its files.
        weights: the hash of all its PEFT weights; for another format, of no bytes.
    """
    if weights.nbytes < LARGE:
        return None
    return content(digests[CONFIG], weights.hexdigest())


def weights_digest(path: str | Path) -> tuple[str, PieceHash]:
    """Return the SHA-256 of a file of weights, and the hash of its pieces.

    Raises:
        FolderError: it can't be read.
    """
    # One thread, so that no more than a block is in memory however slow the hash is.
    pieces = PieceHash()
    return disk.digest(path, witness=pieces.update), pieces


def _joined(parts: Sequence[tuple[str, memoryview]]) -> Iterator[tuple[str, memoryview]]:
    """Yield the parts; parts of a file that are contiguous in memory come as one."""
    run: list[memoryview] = []  # of the file `of`, from `start` to `end`
    of, start, end = "", 0, 0
    for name, data in parts:
        address = _address(data)
        if run and (name, address) != (of, end):
            yield of, _joined_view(start, end, run)
            run = []
        if address is None:
            yield name, data
            continue
        if not run:
            of, start = name, address
        run.append(data)
        end = address + data.nbytes
    if run:
        yield of, _joined_view(start, end, run)


def _address(data: memoryview) -> int | None:
    """Return the address of a part; None if the reader of weights did not make it."""
    return ctypes.addressof(data.obj) if isinstance(data.obj, ctypes.Array) else None


def _joined_view(start: int, end: int, parts: Sequence[memoryview]) -> memoryview:
    """Return the memory from ``start`` to ``end`` as one view, which keeps its parts alive."""
    array: Any = (ctypes.c_char * (end - start)).from_address(start)
    array.parts = parts
    return memoryview(array)


def _is_worth_a_thread(name: str, nbytes: int) -> bool:
    return name == WEIGHTS and nbytes >= LARGE and processors() >= ENOUGH
