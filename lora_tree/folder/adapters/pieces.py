"""PieceHash: a hash of a large file that several processors compute together.

    file     │ 2 MiB │ 2 MiB │ … │ the rest │      at any size, in this order
    threads      0       1     …       2          SHA-256 of each piece, in hex
    hash     SHA-256 of the lines "<hex>\\n"

A shell computes it by ``split -b 2097152 --filter=sha256sum FILE | cut -c -64 | sha256sum``.

Two files with the same hash would need two pieces, or two lists of lines, with the same SHA-256. No
piece's hash is ever taken for a file's, since a file of one piece has its line hashed as well.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

from ...system.processors import ENOUGH, processors

__all__ = ["LARGE", "PIECE", "PieceHash", "threads_for"]

PIECE = 2 << 20
"""Bytes of a piece. The format of tree.lock depends on it."""

MOST_THREADS = 8
"""More would wait for the reader: it hands out bytes at most eight times as fast as one hashes."""


LARGE = 4 << 20
"""Bytes of weights that are worth a thread: less is hashed before a thread has begun. Smaller ones
have no hash of their pieces, so a lock of many small adapters is no larger."""

LARGE_FOR_FEW = 16 << 20
"""Bytes of weights that are worth threads if there are few processors."""


def threads_for(nbytes: int) -> int:
    """Return how many threads hash a file of that size at once."""
    count = processors()
    least = LARGE if count >= ENOUGH else LARGE_FOR_FEW
    return min(count, MOST_THREADS) if nbytes >= least else 1


class PieceHash:
    """The hash of a file's pieces, from bytes that are handed in one part after the other.

    Args:
        threads: the number that hash at once. With one, the caller's own thread hashes each part
            when it is handed in. With more, a part's bytes must stay unchanged until `hexdigest` or
            `close`.
    """

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._digests: list[Future[str] | str] = []  # of each whole piece, in order
        # The piece that is not whole yet: its parts, or with one thread the hash of them.
        self._parts: list[memoryview] = []
        self._hash = hashlib.sha256()
        self._nbytes = 0  # of it
        self.nbytes = 0  # of all that was handed in

    def update(self, data: memoryview) -> None:
        """Take the next bytes of the file."""
        self.nbytes += data.nbytes
        while data.nbytes:
            part = data[: PIECE - self._nbytes]
            data = data[part.nbytes :]
            self._nbytes += part.nbytes
            if self._threads > 1:
                self._parts.append(part)
            else:
                self._hash.update(part)
            if self._nbytes == PIECE:
                self._end_piece()

    @property
    def is_threaded(self) -> bool:
        """True while threads are hashing: there is time until `hexdigest` returns."""
        return self._pool is not None

    def hexdigest(self) -> str:
        """Wait until all pieces are hashed, and return the hash. Call it once."""
        if self._nbytes:
            self._end_piece()
        lines = []
        for one in self._digests:
            found = one if isinstance(one, str) else one.result()
            lines.append(f"{found}\n")
        self.close()
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def close(self) -> None:
        """Drop the pieces that are not hashed yet; a no-op after `hexdigest`."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _end_piece(self) -> None:
        if self._threads > 1:
            self._digests.append(self._started(self._parts))
        else:
            self._digests.append(self._hash.hexdigest())
        self._parts, self._hash, self._nbytes = [], hashlib.sha256(), 0

    def _started(self, parts: list[memoryview]) -> Future[str] | str:
        """Start to hash a piece in a thread; hash it here if no thread can be started."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "lora_tree hash")
        try:
            return self._pool.submit(_hash_of, parts)
        # No thread can be started: the interpreter is shutting down, as in a save by ``atexit``, or
        # the system allows no more.
        except RuntimeError:
            return _hash_of(parts)


def _hash_of(parts: list[memoryview]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)  # hashlib lets other threads run meanwhile
    return found.hexdigest()
