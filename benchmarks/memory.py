"""The most bytes of tensors alive at once, and a C library that keeps freed memory.

Bytes are counted as tensors are made and freed, so the count is exact and the same in every run.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["keep_memory", "peak_bytes"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_memory() -> bool:
    """Let the C library keep freed memory, as jemalloc and tcmalloc do; return whether it does.

    By default glibc maps large tensors again at every use, and the system clears every page of
    them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(M_MMAP_THRESHOLD, 2**31 - 1) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that ``run`` holds beyond those before it; on CUDA by its allocator.

    On a CPU, memory that an operation takes and frees internally is not counted.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - int(before)
    alive = _Alive()
    with alive:
        run()
    return alive.most


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._given: set[int] = set()
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # existed before, or is written in place
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._held:
                self._given.add(tensor.untyped_storage().data_ptr())
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, Tensor)
                and tensor.untyped_storage().data_ptr() not in self._given
            ):
                self._take(tensor.untyped_storage())
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._held or not size:
            return

        def freed(_: Any) -> None:
            if self._held.pop(key, None) is not None:
                self.now -= size

        self._held[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)
