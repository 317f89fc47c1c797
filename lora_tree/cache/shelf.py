"""Host memory that goes from hand to hand: what an evicted adapter leaves is the next one's.

    take ─▶ an adapter, or what is laid out for a path ─▶ nobody holds it any more ─▶ ready ─▶ take …

The system clears every page that it hands out, and in a virtual machine it may have to ask the host for it first: that
takes as long as reading and hashing what goes into it. An allocator would keep memory too, but in pieces between what
is still in use, and outside of every budget.

Law: what is ready is within the budget. It is at most what that leaves over (`at_most`), and a piece for which nothing
fits replaces as much of it as it takes.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

__all__ = ["PAGED", "Shelf", "trim"]

MOST_BYTES = 64 << 20  # as much stays ready, where a budget leaves it over
PAGED = 128 << 10  # bytes; smaller pieces are left to the allocator, which has pages of its own
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which the mmap module does not name
MREMAP_MAYMOVE = 1
FAILED = ctypes.c_void_p(-1).value or -1


def _libc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


LIBC = _libc()


class Shelf:
    """Pieces of host memory, which come back when nobody holds them any more. Any thread may ask.

    >>> shelf = Shelf()
    >>> piece = shelf.take(1 << 20)
    >>> piece.dtype, piece.numel()
    (torch.uint8, 1048576)
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        self._lock = threading.Lock()
        self._ready: dict[int, int] = {}  # address → bytes; no two of them touch
        self._starts: dict[int, int] = {}  # where they end → where they begin
        self._back: deque[tuple[int, int]] = (
            deque()
        )  # finalizers append: they may run while the lock is held
        self._closed = False
        self._ready_bytes = 0

    def take(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8, whatever is in it."""
        if LIBC is None or nbytes < PAGED:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        size = _paged(nbytes)
        with self._lock:
            self._collect()
            address, held = self._nearest(size)
            self._drop_to(self._ready_bytes - (size - held))
        if held < size:
            address = _grown(address, held, size)
        if not address:
            return torch.empty(
                nbytes, dtype=torch.uint8, device="cpu"
            )  # which says that there is no memory
        memory = (ctypes.c_char * nbytes).from_address(address)
        weakref.finalize(memory, self._come_back, address, size).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8)

    @property
    def ready_bytes(self) -> int:
        """What nobody holds."""
        with self._lock:
            self._collect()
            return self._ready_bytes

    def at_most(self, nbytes: int) -> None:
        """Give what is more than that back to the system."""
        with self._lock:
            self._collect()
            self._drop_to(nbytes)

    def close(self) -> None:
        """Give everything back to the system; what is in use, when it is let go of."""
        self._closed = True
        self.at_most(0)

    # ------------------------------------------------------------------ private
    def _come_back(self, address: int, size: int) -> None:
        waiting = sum(each for _, each in list(self._back))
        if self._closed or waiting + size > self._most:
            _unmap(address, size)
        else:
            self._back.append((address, size))

    def _collect(self) -> None:
        while self._back:
            self._put(*self._back.popleft())
        self._drop_to(self._most)

    def _nearest(self, size: int) -> tuple[int, int]:
        """So much of the smallest range that holds it; or else the largest range, and its size; or 0, 0."""
        ranges = [(held, address) for address, held in self._ready.items()]
        held, address = min(
            (r for r in ranges if r[0] >= size), default=max(ranges, default=(0, 0))
        )
        if held:
            self._remove(address)
        if held > size:
            self._put(address + size, held - size)
        return address, min(held, size)

    def _put(self, address: int, size: int) -> None:
        """A range is ready; with those that it touches it is one."""
        if address in self._starts:
            before = self._starts[address]
            size += self._remove(before)
            address = before
        if address + size in self._ready:
            size += self._remove(address + size)
        self._ready[address] = size
        self._starts[address + size] = address
        self._ready_bytes += size

    def _remove(self, address: int) -> int:
        size = self._ready.pop(address)
        del self._starts[address + size]
        self._ready_bytes -= size
        return size

    def _drop_to(self, nbytes: int) -> None:
        """The smallest go first: the least fits them."""
        while (over := self._ready_bytes - max(nbytes, 0)) > 0:
            address = min(self._ready, key=lambda address: self._ready[address])
            size = self._remove(address)
            dropped = min(size, _paged(over))
            _unmap(address + size - dropped, dropped)
            if size > dropped:
                self._put(address, size - dropped)


def trim() -> None:
    """Make the allocator give free memory back to the system, where it can be told to (glibc)."""
    give_back = getattr(LIBC, "malloc_trim", None)
    if give_back is not None:
        give_back(0)


def _paged(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _grown(address: int, held: int, size: int) -> int:
    """A range made larger, maybe elsewhere: its pages are moved, not copied. 0 where there is no memory.

    New pages are made without the interpreter's lock; where an old kernel refuses that, they are made when written.
    """
    assert LIBC is not None
    found: int = FAILED
    if held:
        found = LIBC.mremap(address, held, size, MREMAP_MAYMOVE)
        if found == FAILED:  # it was put together from several mappings
            _unmap(address, held)
            held = 0
    if found == FAILED:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        found = LIBC.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if found == FAILED:
        return 0
    LIBC.madvise(found + held, size - held, POPULATE_WRITE)
    return found


def _unmap(address: int, size: int) -> None:
    assert LIBC is not None
    LIBC.munmap(address, size)
