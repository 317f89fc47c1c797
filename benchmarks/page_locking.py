"""Time ways to get 84 MB into memory that a GPU copies from at full speed, and the copies.

    hash       the file's SHA-256 alone: the floor of a first use
    allocator  new page-locked memory from torch's allocator
    ours       a mapping, filled beside the hash and then locked (`cache/page_locked.py`)
    copies     from page-locked memory; from ordinary memory by torch; through staging buffers

Run it with ``python -m benchmarks.page_locking``, on a machine with a GPU.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lora_tree.cache.link import CudaLink
from lora_tree.cache.page_locked import PageLocked
from lora_tree.cache.staging import STAGE_BYTES, send_staged

from .hashing import NBYTES, read_and_hashed

__all__ = ["main"]

ROUNDS = 5


def main() -> None:
    """Print a line for each way."""
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return
    device = _device()
    data = torch.randint(256, (NBYTES,), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights"
        file.write_bytes(data.numpy().data)
        _say("its hash alone", lambda: hashlib.sha256(data.numpy().data).digest())
        kept: list[Tensor] = []  # else the allocator would reuse the same memory
        _say("torch's page-locked memory, new", lambda: kept.append(_locked_by_torch(NBYTES)))
        kept.clear()
        link = CudaLink(device)
        _say("read, hashed beside it, then locked", lambda: _read_and_locked(file, link))
    locked, there = _locked_by_torch(NBYTES), torch.empty(NBYTES, dtype=torch.uint8, device=device)
    stages = [_locked_by_torch(STAGE_BYTES) for _ in range(2)]
    _say("a copy from page-locked memory", lambda: there.copy_(locked, non_blocking=True))
    _say("torch's copy from ordinary memory", lambda: there.copy_(data))
    _say("through staging buffers", lambda: send_staged([data], there, stages, _copy))


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _locked_by_torch(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _read_and_locked(file: Path, link: CudaLink) -> None:
    """Read a file into new memory and lock it; here the hash runs only beside the read."""
    memory = PageLocked(link)
    piece = memory.take(NBYTES)
    read_and_hashed(file, piece, "by pieces")
    memory.lock(piece)
    del piece
    memory.close()


def _copy(to: Tensor, stage: Tensor) -> torch.cuda.Event:
    to.copy_(stage, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _say(what: str, call: Callable[[], object]) -> None:
    taken = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    print(f"{what:36} median {statistics.median(taken):7.2f} ms, best {min(taken):7.2f} ms")


if __name__ == "__main__":
    main()
