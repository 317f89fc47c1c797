"""A large file is read by several threads, each a part; its witness sees the parts in order."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_tree.errors import FormatError
from lora_tree.formats import safetensors as reader
from lora_tree.formats.safetensors import open_tensors, parse_header
from lora_tree.overlay import over

pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="reads by one thread there")


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lora_tree read")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(1)
    tensors = {f"t{i}": torch.randn(3, 11, generator=draw) for i in range(9)}
    # Half a number of these makes a gap in memory before what follows.
    tensors["odd"] = torch.randn(5, generator=draw).half()
    save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.fixture(autouse=True)
def by_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Small parts, read as by a machine with many processors; yields the threads that read."""
    monkeypatch.setattr(reader, "PART", 40)
    monkeypatch.setattr(reader, "processors", lambda: 16)
    names: set[str] = set()
    plain = os.preadv

    def noted(*args: Any) -> int:
        names.add(threading.current_thread().name)
        return plain(*args)

    monkeypatch.setattr(os, "preadv", noted)
    yield names
    assert readers() == []


def read(file: Path, witness: Callable[[memoryview], object] | None = None) -> dict[str, Any]:
    with open_tensors(file, "weights", witness) as reading:
        header = parse_header(reading.head, reading.nbytes, "weights")
        there = over(reading.numbers(header))
        return {name: there(tensor) for name, tensor in header.tensors.items()}


def test_threads_read_what_the_package_reads_and_the_witness_sees_the_file(
    file: Path, by_threads: set[str]
) -> None:
    seen: list[bytes] = []
    found = read(file, lambda part: seen.append(bytes(part)))
    wanted = load_file(file)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert b"".join(seen) == file.read_bytes()
    assert by_threads
    assert all(name.startswith("lora_tree read") for name in by_threads)


@pytest.mark.parametrize(("processors", "is_alone"), [(1, True), (3, True), (4, False)])
def test_one_thread_reads_where_processors_are_few(
    file: Path,
    by_threads: set[str],
    monkeypatch: pytest.MonkeyPatch,
    processors: int,
    is_alone: bool,
) -> None:
    monkeypatch.setattr(reader, "processors", lambda: processors)
    found = read(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in load_file(file).items())
    assert (by_threads == set()) == is_alone
    monkeypatch.setattr(reader, "PART", 8 << 20)
    by_threads.clear()
    read(file)
    assert by_threads == set(), "a small file is one part"


def test_a_file_that_is_cut_short_meanwhile_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, count = os.preadv, iter(range(100))

    def short(file: int, buffers: Any, place: int) -> int:
        done = plain(file, buffers, place)
        return done - 1 if next(count) == 3 else done

    monkeypatch.setattr(os, "preadv", short)
    with pytest.raises(FormatError, match="the file was cut short while it was read"):
        read(file)


def test_after_an_interrupt_no_thread_reads_from_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, open_now, late = os.preadv, threading.Event(), []
    open_now.set()

    def noted(file: int, buffers: Any, place: int) -> int:
        if not open_now.is_set():
            late.append(place)
        return plain(file, buffers, place)

    def interrupt(part: memoryview) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "preadv", noted)
    with open_tensors(file, "weights") as reading:
        header = parse_header(reading.head, reading.nbytes, "weights")
        reading._witness = interrupt
        # The error holds the frames of the read, as a debugger or a log would.
        with pytest.raises(KeyboardInterrupt) as held:
            reading.numbers(header)
        assert readers() == []
        open_now.clear()
    assert late == []
    assert held.value is not None
