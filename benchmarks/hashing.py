"""How fast the standard library hashes, and what a read beside the hash gains.

    hashes      84 MB in memory, one thread, processor time
    first read  84 MB from the page cache into memory that was written to before, wall-clock time:
                read, then hashed; and each part hashed in a thread while the next one is read

Run it with ``python -m benchmarks.hashing``.
"""

from __future__ import annotations

import ctypes
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from lora_tree.folder import hashing
from lora_tree.formats.peft import WEIGHTS
from lora_tree.formats.safetensors import PART

__all__ = ["rate", "read_and_hashed"]

NBYTES = 84_000_000
NAMES = ("sha256", "sha512", "sha3_256", "blake2b", "blake2s")
ROUNDS = 9


def rate(name: str, data: memoryview, rounds: int = 3) -> float:
    """Return the GB of processor time's second that a hash takes; the best of some rounds."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        hashlib.new(name, data).digest()
        taken.append(time.process_time() - start)
    return data.nbytes / min(taken) / 1e9


def read_and_hashed(file: Path, memory: torch.Tensor, *, beside: bool) -> str:
    """Read a file in parts, as a reader of adapters does, and return its hash."""
    nbytes, start = memory.numel(), memory.data_ptr()
    with mock.patch.object(hashing, "processors", return_value=8 if beside else 1):
        witness = hashing.ContentHash([WEIGHTS])
        with file.open("rb", buffering=0) as stream:
            for begin in range(0, nbytes, PART):
                size = min(PART, nbytes - begin)
                part = (ctypes.c_char * size).from_address(start + begin)
                stream.readinto(part)
                witness(WEIGHTS, memoryview(part))
        return witness.content()


def main() -> None:
    """Print a line for each hash, and one for the two ways to read."""
    data = torch.randint(256, (NBYTES,), dtype=torch.uint8)
    seen = data.numpy().data
    for name in NAMES:
        print(f"{name:9} {rate(name, seen):.2f} GB/s")
    ways: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights"
        file.write_bytes(seen)
        memory = torch.zeros(NBYTES, dtype=torch.uint8)
        for _ in range(ROUNDS):
            for beside, taken in ways.items():
                taken.append(_timed(partial(read_and_hashed, file, memory, beside=beside)))
    ratio = statistics.median(b / a for a, b in zip(ways[False], ways[True], strict=True))
    print(
        f"read, then hashed {1e3 * statistics.median(ways[False]):.1f} ms; hashed beside the read "
        f"{1e3 * statistics.median(ways[True]):.1f} ms; median of ratios {ratio:.2f}"
    )


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
