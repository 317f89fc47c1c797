"""Page-locked host memory for adapters: a device copies from it at the full speed of its bus.

    take ─▶ a file is read into it ─▶ lock ─▶ sent, and sent again ─▶ collected ─▶ ready ─▶ take …

torch's own page-locked memory comes in powers of two: an adapter of 80 MiB would hold 128 MiB,
outside of every budget. It is also locked before anything is in it, and to have the system make
locked pages takes as long as to hash what goes into them. So a piece is mapped here, filled by the
reader, and locked while the hash still runs, which takes a few milliseconds. A piece that comes
back stays locked, and adapters of one size use it again.

Laws. A piece is as large as was asked, in whole pages. It is not handed out again before the last
copy from it is done, and it is unlocked before its memory goes back to the system. Ready memory is
within the budget: at most what the budget leaves over (`trim_to`).
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from .shelf import LIBC, PAGED, map_pages, round_to_pages, tensor_at, unmap_pages

__all__ = ["Locks", "PageLocked"]

MOST_BYTES = 256 << 20
"""The most bytes that stay ready, if the budget has room for them."""

HUGE = 2 << 20
"""Bytes of a huge page on x86 and most other machines: a first write to it takes half the time."""

HUGE_PAGES = 14  # MADV_HUGEPAGE of Linux, which the mmap module has only on some systems


class Locks(Protocol):
    """The part of a `Link` that page-locks host memory."""

    def allocate(self, nbytes: int) -> Tensor:
        """Return page-locked memory of the device's own library: (nbytes,) uint8."""
        ...

    def lock_pages(self, address: int, nbytes: int) -> bool:
        """Page-lock some memory; return False if the system refuses."""
        ...

    def unlock_pages(self, address: int) -> None:
        """Undo `lock_pages`."""
        ...


@dataclass(eq=False)
class _Piece:
    """Memory in a mapping of its own.

    Args:
        address: where the memory begins.
        nbytes: its size, whole pages.
        mapped: address and bytes of the whole mapping, which begins before a huge page.
        is_locked: `lock_pages` was called.
        copied: the event after the last copy from it; None: none is known to run.
    """

    address: int
    nbytes: int
    mapped: tuple[int, int]
    is_locked: bool = False
    copied: Any = None


class PageLocked:
    """Hands out pieces of host memory, and gets each back when it is collected.

    Any thread may call any method.

    Args:
        locks: locks and unlocks the pages.
        most_bytes: the most bytes that stay ready.
    """

    def __init__(self, locks: Locks, most_bytes: int = MOST_BYTES) -> None:
        self._locks, self._most = locks, most_bytes
        # Guards `_ready`. It may be taken while the cache's lock is held, so nothing that is called
        # with this one held may take the cache's.
        self._lock = threading.Lock()
        self._ready: list[_Piece] = []
        self._out: dict[int, _Piece] = {}  # address → a piece that is in use
        # Pieces that came back. A finalizer may run while this thread holds the lock, so it only
        # appends here.
        self._back: deque[_Piece] = deque()
        self._closed = False

    def take(self, nbytes: int) -> Tensor:
        """Return uninitialised memory, (nbytes,) uint8; `lock` it when it is filled."""
        if LIBC is None or nbytes < PAGED:
            return self._locks.allocate(nbytes)
        size = round_to_pages(nbytes)
        piece = self._take_ready(size)
        if piece is None:
            piece = _map_memory(size)
        if piece is None:
            # The system has no memory. torch may find some, or else raises an error that says so.
            return self._locks.allocate(nbytes)
        self._out[piece.address] = piece
        return tensor_at(piece.address, nbytes, partial(self._note_free, piece.address))

    def lock(self, memory: Tensor) -> None:
        """Page-lock a piece that was filled; a no-op for other memory, and for a locked piece.

        If the system refuses, the piece stays unlocked: it is sent all the same, more slowly.
        """
        piece = self._out.get(memory.data_ptr())
        if piece is not None and not piece.is_locked:
            piece.is_locked = self._locks.lock_pages(piece.address, piece.nbytes)

    def note_copy(self, memory: Tensor, event: Any) -> None:
        """Note that a copy from a piece runs until ``event``; a no-op for other memory."""
        piece = self._out.get(memory.data_ptr())
        if piece is not None:
            piece.copied = event

    @property
    def ready_bytes(self) -> int:
        """The bytes that are ready to be taken."""
        with self._lock:
            self._collect()
            return self._ready_bytes()

    def trim_to(self, nbytes: int) -> None:
        """Keep at most ``nbytes`` ready; give the rest back to the system."""
        with self._lock:
            self._collect()
            self._drop_to(nbytes)

    def close(self) -> None:
        """Give ready memory back to the system, and from now on each piece that comes back."""
        self._closed = True
        self.trim_to(0)

    # ------------------------------------------------------------------ private
    def _take_ready(self, size: int) -> _Piece | None:
        """Return a ready piece of this size; None if there is none."""
        with self._lock:
            self._collect()
            for piece in self._ready:
                if piece.nbytes == size:
                    self._ready.remove(piece)
                    break
            else:
                # As many ready bytes go back as the new piece takes, to stay within the budget.
                self._drop_to(self._ready_bytes() - size)
                return None
        if piece.copied is not None:
            # Its adapter was evicted while it was being sent.
            piece.copied.synchronize()
            piece.copied = None
        return piece

    def _note_free(self, address: int) -> None:
        """Note that a piece is free; runs as a finalizer, without the lock."""
        piece = self._out.pop(address)
        waiting = sum([each.nbytes for each in list(self._back)])
        # If no thread takes anything for a while, `_back` is never emptied: it is bounded here.
        if self._closed or waiting + piece.nbytes > self._most:
            self._release(piece)
        else:
            self._back.append(piece)

    def _collect(self) -> None:
        """Make the pieces that came back ready."""
        while self._back:
            self._ready.append(self._back.popleft())
        self._drop_to(self._most)

    def _ready_bytes(self) -> int:
        return sum([piece.nbytes for piece in self._ready])

    def _drop_to(self, nbytes: int) -> None:
        """Release ready pieces until at most ``nbytes`` are left; the oldest go first."""
        while self._ready and self._ready_bytes() > max(nbytes, 0):
            self._release(self._ready.pop(0))

    def _release(self, piece: _Piece) -> None:
        """Give a piece back to the system."""
        if piece.copied is not None:
            piece.copied.synchronize()
        if piece.is_locked:
            self._locks.unlock_pages(piece.address)
        unmap_pages(*piece.mapped)


def _map_memory(size: int) -> _Piece | None:
    """Map new memory, in huge pages where the system has them; None if there is no memory.

    No page is made yet: the read that fills them makes them, beside the hash.
    """
    # The mapping is larger than the piece, so that the piece can begin where a huge page does. What
    # is left over before and after it is never written to, and takes no memory.
    whole = size + HUGE
    found = map_pages(whole)
    if not found:
        return None
    address = -(-found // HUGE) * HUGE
    assert LIBC is not None
    # A system without huge pages refuses, and the pages are of the usual size.
    LIBC.madvise(address, size, HUGE_PAGES)
    return _Piece(address, size, (found, whole))
