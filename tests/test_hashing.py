"""An adapter is hashed while it is read, and is handed out when the hash has agreed.

Few processors and small files take no thread, so both are played here.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
from cached import RANKS, inputs, weights, zoo
from oracle import net as base

import lora_tree as lt
from lora_tree.errors import FormatError, LoraTreeError, UnlockedError
from lora_tree.folder.adapters import hashing
from lora_tree.folder.adapters.examine import examine, hashed
from lora_tree.folder.adapters.hashing import ContentHash
from lora_tree.folder.adapters.scan import find_files
from lora_tree.formats import safetensors as reader
from lora_tree.formats.peft import WEIGHTS


def hashers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lora_tree hash"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return zoo(tmp_path / "zoo")


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[threading.Thread]]:
    """Every file is read in small parts, which a thread hashes; the threads that were started."""
    monkeypatch.setattr(hashing, "LARGE", 1)
    monkeypatch.setattr(hashing, "processors", lambda: 8)
    monkeypatch.setattr(reader, "PART", 40)
    started: list[threading.Thread] = []
    plain = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "lora_tree hash":
            started.append(thread)
        plain(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    yield started
    assert hashers() == [], "a thread outlived its read"


def test_beside_the_read_the_hash_is_that_of_the_whole_files(
    folder: Path, beside: list[threading.Thread]
) -> None:
    tree = lt.load(folder)
    for path in RANKS:
        source = tree[path].source
        assert source is not None
        read = source.load()
        plain = lt.Adapter.load(folder / path)
        for name, value in plain.modules.items():
            assert all(map(torch.equal, read.modules[name].tensors, value.tensors))
        files = find_files(str(folder / path), str(folder))
        told = source.content  # type: ignore[attr-defined]
        assert examine(files).content == hashed(files) == told
    assert len(beside) == 2 * len(RANKS)


def test_a_part_is_hashed_while_the_next_is_read(
    folder: Path, beside: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, hashed_parts = threading.Semaphore(0), threading.Semaphore(0)
    waited: list[bool] = []

    class Hash:
        """Takes a part only when the part after it was read."""

        def update(self, part: memoryview) -> None:
            waited.append(reads.acquire(timeout=20))
            hashed_parts.release()

        def hexdigest(self) -> str:
            return ""

    monkeypatch.setattr(hashing, "hashlib", SimpleNamespace(sha256=Hash))
    witness = ContentHash([WEIGHTS])
    for part in (b"0123", b"4567", b"89ab"):
        witness(WEIGHTS, memoryview(part))
        reads.release()
    assert all(hashed_parts.acquire(timeout=20) for _ in range(3))
    witness.close()
    assert waited == [True] * 3


@pytest.mark.parametrize("damage", ["changed", "cut short", "cut while it is read", "interrupted"])
def test_what_is_not_right_is_refused_as_without_a_thread(
    folder: Path, beside: list[threading.Thread], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    model = lt.attach(lt.load(folder), base(), host_budget=4000)
    bare = model.base(inputs())
    file = weights(folder, "a/b")
    whole = file.read_bytes()
    error: type[BaseException] = LoraTreeError
    if damage == "changed":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        error = UnlockedError
    if damage == "cut short":
        file.write_bytes(whole[:-8])
        error = UnlockedError
    if damage in ("cut while it is read", "interrupted"):
        error = FormatError if damage[0] == "c" else KeyboardInterrupt
        monkeypatch.setattr(reader, "open_stream", _stops(reader.open_stream, error))
    with pytest.raises(error):
        model.activate("a/b")
    stats = model.cache.stats().tiers[0]
    assert stats.failures == 1
    assert hashers() == []
    assert torch.equal(model.base(inputs()), bare)
    monkeypatch.undo()
    file.write_bytes(whole)
    model.activate("a/b")


def _stops(plain: Any, error: type[BaseException]) -> Any:
    """Open a file whose fourth part is not there, or is interrupted."""

    class Stopping:
        def __init__(self, stream: BinaryIO) -> None:
            self._stream, self._parts = stream, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

        def __enter__(self) -> Stopping:
            return self

        def __exit__(self, *of: object) -> None:
            self._stream.close()

        def readinto(self, part: Any) -> int:
            self._parts += 1
            if self._parts < 4 or "a/b" not in str(self._stream.name):
                return int(self._stream.readinto(part))  # type: ignore[attr-defined]
            if error is KeyboardInterrupt:
                raise KeyboardInterrupt
            return 1

    return lambda *args, **more: Stopping(plain(*args, **more))


def test_an_error_of_the_thread_is_the_readers(
    folder: Path, beside: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hash:
        def update(self, part: memoryview) -> None:
            raise MemoryError("none left")

    monkeypatch.setattr(hashing, "hashlib", SimpleNamespace(sha256=Hash))
    source = lt.load(folder)["a"].source
    assert source is not None
    with pytest.raises(MemoryError, match="none left"):
        source.load()


@pytest.mark.parametrize(("processors", "threads"), [(2, 0), (4, 1)])
def test_a_thread_is_taken_where_processors_are_free(
    folder: Path,
    beside: list[threading.Thread],
    monkeypatch: pytest.MonkeyPatch,
    processors: int,
    threads: int,
) -> None:
    monkeypatch.setattr(hashing, "processors", lambda: processors)
    source = lt.load(folder)["a"].source
    assert source is not None
    source.load()
    assert len(beside) == threads
    del beside[:]
    monkeypatch.setattr(hashing, "LARGE", 4 << 20)
    source.load()
    assert beside == [], "small files are hashed before a thread has begun"


def test_files_whose_reader_may_write_over_them_are_hashed_at_once(
    beside: list[threading.Thread],
) -> None:
    data = bytearray(b"read into memory")
    witness = ContentHash(["adapters.safetensors"])
    witness("adapters.safetensors", memoryview(data))
    data[:4] = b"turn"  # as mlx-lm's factors are turned over
    right = ContentHash(["adapters.safetensors"])
    right("adapters.safetensors", memoryview(b"read into memory"))
    assert witness.content() == right.content()
    assert beside == []


def test_parts_that_wait_are_hashed_as_one_where_they_lie_one_behind_the_other() -> None:
    memory = (ctypes.c_char * 24)(*[bytes([i]) for i in range(24)])
    start = ctypes.addressof(memory)

    def part(name: str, begin: int, end: int) -> tuple[str, memoryview]:
        made: Any = (ctypes.c_char * (end - begin)).from_address(start + begin)
        made.memory = memory
        return name, memoryview(made)

    parts = [
        part("a", 0, 4),
        part("a", 4, 5),
        part("a", 8, 12),
        part("a", 5, 8),
        ("a", memoryview(b"text")),
        part("a", 12, 16),
        part("b", 16, 20),
        part("b", 20, 24),
    ]
    joined = [(name, bytes(data)) for name, data in hashing._joined(parts)]
    whole = bytes(range(24))
    assert joined == [
        ("a", whole[0:5]),
        ("a", whole[8:12]),
        ("a", whole[5:8]),
        ("a", b"text"),
        ("a", whole[12:16]),
        ("b", whole[16:24]),
    ]


def test_a_joined_part_keeps_its_memory() -> None:
    held = torch.arange(8, dtype=torch.uint8)
    made: Any = (ctypes.c_char * 8).from_address(held.data_ptr())
    made.memory = held
    gone = weakref.ref(held)
    joined = list(hashing._joined([("a", memoryview(made))]))
    del held, made
    assert bytes(joined[0][1]) == bytes(range(8))
    assert gone() is not None
    del joined
    gc.collect()
    assert gone() is None
