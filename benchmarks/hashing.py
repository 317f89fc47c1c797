"""The speed of the standard library's hashes, and of reading and checking a file.

    hashes      84 MB in memory, one thread, processor time
    first read  84 MB from the page cache into memory that was written to before, wall-clock time:
                    read, then hashed     the whole file's hash, in the reader's thread
                    hashed beside         the whole file's hash, in a separate thread
                    by pieces             the pieces' hashes, in as many threads as processors

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

from lora_tree.folder.adapters import hashing
from lora_tree.formats.peft import WEIGHTS
from lora_tree.formats.safetensors import PART

__all__ = ["rate", "read_and_hashed"]

NBYTES = 84_000_000
NAMES = ("sha256", "sha512", "sha3_256", "blake2b", "blake2s")
ROUNDS = 9
WAYS = ("read, then hashed", "hashed beside", "by pieces")


def rate(name: str, data: memoryview, rounds: int = 3) -> float:
    """Return the GB that a hash takes in a second of processor time; the best of some rounds."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        hashlib.new(name, data).digest()
        taken.append(time.process_time() - start)
    return data.nbytes / min(taken) / 1e9


def read_and_hashed(file: Path, memory: torch.Tensor, way: str) -> None:
    """Read a file in parts, as a reader of adapters does, and hash it.

    Args:
        file: as large as the memory.
        memory: (bytes,) uint8.
        way: one of `WAYS`.
    """
    nbytes, start = memory.numel(), memory.data_ptr()
    by_pieces = way == "by pieces"
    # Hashing by pieces uses this machine's number of threads.
    with mock.patch.object(hashing, "processors", return_value=8 if way == "hashed beside" else 1):
        witness = hashing.ContentHash(whole=not by_pieces, pieces=by_pieces, nbytes=nbytes)
        with file.open("rb", buffering=0) as stream:
            for begin in range(0, nbytes, PART):
                size = min(PART, nbytes - begin)
                part = (ctypes.c_char * size).from_address(start + begin)
                stream.readinto(part)
                witness(WEIGHTS, memoryview(part))
        _ = witness.pieces() if by_pieces else witness.content()


def main() -> None:
    """Print a line for each hash, and one for each way to read."""
    data = torch.randint(256, (NBYTES,), dtype=torch.uint8)
    seen = data.numpy().data
    for name in NAMES:
        print(f"{name:9} {rate(name, seen):.2f} GB/s")
    ways: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights"
        file.write_bytes(seen)
        memory = torch.zeros(NBYTES, dtype=torch.uint8)
        for _ in range(ROUNDS):
            for way, taken in ways.items():
                taken.append(_timed(partial(read_and_hashed, file, memory, way)))
    first = ways[WAYS[0]]
    for way, taken in ways.items():
        ratio = statistics.median(b / a for a, b in zip(first, taken, strict=True))
        print(f"{way:18} {1e3 * statistics.median(taken):.1f} ms, {ratio:.2f} of the first")


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
