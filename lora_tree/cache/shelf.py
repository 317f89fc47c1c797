"""Host memory that is reused: an evicted adapter's pages hold the next adapter.

    take ─▶ an adapter, or side paths ─▶ collected ─▶ ready ─▶ take …

The system clears every page that it hands out, and a virtual machine may have to ask its host for
the page first. That takes as long as reading and hashing what goes into the page. An allocator
would keep freed memory too, but in pieces between others that are in use, and outside of every
budget.

Law: ready memory is within the budget. It is at most what the budget leaves over (`trim_to`), and
a new piece for which no ready range is large enough takes the place of as many ready bytes.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

__all__ = [
    "LIBC",
    "PAGED",
    "Shelf",
    "map_pages",
    "round_to_pages",
    "tensor_at",
    "trim",
    "unmap_pages",
]

MOST_BYTES = 256 << 20
"""The most bytes that stay ready, if the budget has room for them: a few stacks of routed batches
over a small model."""

PAGED = 128 << 10
"""Pieces below this many bytes are left to the allocator, which has pages of its own."""

POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which the mmap module does not name
MREMAP_MAYMOVE = 1
FAILED = ctypes.c_void_p(-1).value or -1


def _libc() -> ctypes.CDLL | None:
    """Load the C library with the types of the calls used here; None without Linux."""
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
    """Hands out pieces of host memory, and gets each back when it is collected.

    Any thread may call any method.

    >>> shelf = Shelf()
    >>> piece = shelf.take(1 << 20)
    >>> piece.dtype, piece.numel()
    (torch.uint8, 1048576)
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        # Guards all fields but `_back`. It may be taken while the cache's lock is held, so nothing
        # that is called with this one held may take the cache's.
        self._lock = threading.Lock()
        self._ready: dict[int, int] = {}  # address → bytes, of ranges that do not touch
        self._starts: dict[int, int] = {}  # end of a range → its address
        # Ranges that came back. A finalizer may run while this thread holds
        # the lock, so it only appends here.
        self._back: deque[tuple[int, int]] = deque()
        self._closed = False
        self._ready_bytes = 0

    def take(self, nbytes: int) -> Tensor:
        """Return uninitialised memory, (nbytes,) uint8."""
        if LIBC is None or nbytes < PAGED:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        size = round_to_pages(nbytes)
        with self._lock:
            self._collect()
            address, held = self._take_best_fit(size)
            # The range grows by size - held bytes; as many ready bytes go
            # back, to stay within the budget.
            self._drop_to(self._ready_bytes - (size - held))
        if held < size:
            address = _grow_range(address, held, size)
        if not address:
            # The system has no memory. torch may find some, or else raises an error that says so.
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return tensor_at(address, nbytes, partial(self._note_free, address, size))

    @property
    def ready_bytes(self) -> int:
        """The bytes that are ready to be taken."""
        with self._lock:
            self._collect()
            return self._ready_bytes

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
    def _note_free(self, address: int, size: int) -> None:
        """Note that a range is free; runs as a finalizer, without the lock."""
        waiting = sum(each for _, each in list(self._back))
        # If no thread takes anything for a while, `_back` is never emptied: it is bounded here.
        if self._closed or waiting + size > self._most:
            unmap_pages(address, size)
        else:
            self._back.append((address, size))

    def _collect(self) -> None:
        """Make the ranges that came back ready."""
        while self._back:
            self._put(*self._back.popleft())
        self._drop_to(self._most)

    def _take_best_fit(self, size: int) -> tuple[int, int]:
        """Take ``size`` bytes from the smallest ready range that fits; return its address and size.

        If none fits, return the largest range and its size, for the caller to grow; (0, 0) if
        none is ready.
        """
        ranges = [(held, address) for address, held in self._ready.items()]
        fitting = [(held, address) for held, address in ranges if held >= size]
        if fitting:
            held, address = min(fitting)
        else:
            held, address = max(ranges, default=(0, 0))
        if held:
            self._remove(address)
        if held > size:
            self._put(address + size, held - size)
        return address, min(held, size)

    def _put(self, address: int, size: int) -> None:
        """Make a range ready, joined with the ready ranges that it touches."""
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
        """Remove the ready range that begins at ``address``; return its size."""
        size = self._ready.pop(address)
        del self._starts[address + size]
        self._ready_bytes -= size
        return size

    def _drop_to(self, nbytes: int) -> None:
        """Unmap ready memory down to ``nbytes``; the smallest ranges, which fit least, go first."""
        target = max(nbytes, 0)
        while self._ready_bytes > target:
            over = self._ready_bytes - target
            address = min(self._ready, key=lambda address: self._ready[address])
            size = self._remove(address)
            dropped = min(size, round_to_pages(over))
            unmap_pages(address + size - dropped, dropped)
            if size > dropped:
                self._put(address, size - dropped)


def trim() -> None:
    """Make the allocator give freed memory back to the system; a no-op without glibc."""
    give_back = getattr(LIBC, "malloc_trim", None)
    if give_back is not None:
        give_back(0)


def round_to_pages(nbytes: int) -> int:
    """Round up to whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _grow_range(address: int, held: int, size: int) -> int:
    """Grow a range, moving its pages if need be, and return its address; 0 if there is no memory.

    Args:
        address, held: the range, or (0, 0) for a new one.
        size: the size of the result, whole pages.
    """
    assert LIBC is not None
    found: int = FAILED
    if held:
        found = LIBC.mremap(address, held, size, MREMAP_MAYMOVE)
        if found == FAILED:
            # The range was joined from several mappings, and mremap moves
            # only one. A new one replaces it.
            unmap_pages(address, held)
            held = 0
    if found == FAILED:
        found = map_pages(size)
        if not found:
            return 0
    # ctypes releases the interpreter's lock for the call, so other threads run while
    # the kernel makes the pages. A kernel before 5.14 refuses, and makes them at the
    # first write: the result is not looked at.
    LIBC.madvise(found + held, size - held, POPULATE_WRITE)
    return found


def tensor_at(address: int, nbytes: int, come_back: Callable[[], object]) -> Tensor:
    """Return memory as a tensor, (nbytes,) uint8.

    Args:
        address: where it begins.
        nbytes: its size.
        come_back: called when no view of the tensor is alive any more, in any thread.
    """
    # `frombuffer` keeps `memory` alive for as long as a view of the tensor lives.
    memory = (ctypes.c_char * nbytes).from_address(address)
    weakref.finalize(memory, come_back).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)


def map_pages(size: int) -> int:
    """Map ``size`` bytes of new memory, and return their address; 0 if there is no memory."""
    assert LIBC is not None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    found: int = LIBC.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    return 0 if found == FAILED else found


def unmap_pages(address: int, size: int) -> None:
    """Give mapped memory back to the system."""
    assert LIBC is not None
    LIBC.munmap(address, size)
