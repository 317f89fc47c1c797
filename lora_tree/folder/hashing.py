"""ContentHash: the hash of an adapter's content, found while its files are read.

    reader    part 0 │ part 1 │ part 2 │ …            each into its final place in memory
    hasher             part 0 │ part 1 │ part 2       in a thread of its own, if processors are free

SHA-256 takes several times as long as a read from the page cache, so the read is hidden behind it.
Law: the hash depends on the bytes alone. No caller gets an adapter before `content` has returned
the hash of its files.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from queue import SimpleQueue

from ..formats.peft import WEIGHTS
from .lockfile import content
from .scan import FILES

__all__ = ["ContentHash"]

LARGE = 4 << 20
"""Bytes of a part that is worth a thread: less is hashed before a thread has begun."""

PROCESSORS = 4
"""With fewer, a thread takes the time from the reader, or from what computes beside both."""


class ContentHash:
    """The hash of an adapter's content, from the bytes that its reader used.

    It is a reader's witness. A PEFT folder's weights stay as they are until `content` or `close`,
    and are hashed beside the read. Readers of other formats may turn factors over in the memory
    into which they were read, so those are hashed at once.

    Args:
        names: of the adapter's files.
    """

    def __init__(self, names: Iterable[str] = FILES) -> None:
        self._hashes = {name: hashlib.sha256() for name in names}
        self._parts: SimpleQueue[tuple[str, memoryview] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._error: Exception | None = None

    def __call__(self, name: str, data: memoryview) -> None:
        if self._thread is None and not _is_worth_a_thread(name, data.nbytes):
            self._hashes[name].update(data)
            return
        # From here on all parts go to the thread: a file's parts are hashed in their order.
        self._parts.put((name, data))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="lora_tree hash", daemon=True)
            self._thread.start()

    def content(self) -> str:
        """Return the hash, when all parts are in it. Call it once."""
        self._end()
        return content(*(hashing.hexdigest() for hashing in self._hashes.values()))

    def close(self) -> None:
        """Leave out the parts that are not hashed yet; a no-op after `content`."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        """Wait for the thread, and raise what it met."""
        if self._thread is None:
            return
        self._parts.put(None)
        self._thread.join()
        self._thread = None
        if self._error is not None and not self._closed:
            raise self._error

    def _work(self) -> None:
        while (part := self._parts.get()) is not None:
            if self._closed or self._error is not None:
                continue
            name, data = part
            try:
                # hashlib lets other threads run meanwhile.
                self._hashes[name].update(data)
            except Exception as error:
                self._error = error


def _is_worth_a_thread(name: str, nbytes: int) -> bool:
    return name == WEIGHTS and nbytes >= LARGE and _processors() >= PROCESSORS


def _processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
