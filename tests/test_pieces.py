"""A large file's pieces are hashed by several threads, and the lock has their hash beside the whole
file's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import RANKS, adapter, weights, zoo

import lora_tree as lt
from lora_tree.errors import UnlockedError
from lora_tree.folder.adapters import hashing, pieces
from lora_tree.folder.adapters.examine import examine
from lora_tree.folder.adapters.hashing import ContentHash
from lora_tree.folder.adapters.pieces import PieceHash
from lora_tree.folder.adapters.scan import find_files
from lora_tree.folder.reading.opening import inspect
from lora_tree.folder.reading.tree_place import place_of
from lora_tree.folder.transfer.outgoing import outgoing
from lora_tree.formats import safetensors as reader
from lora_tree.formats.peft import CONFIG, WEIGHTS

SMALL = 64


def by_hand(data: bytes, piece: int) -> str:
    """The rule, in one plain loop."""
    lines = ""
    for start in range(0, len(data), piece):
        lines += hashlib.sha256(data[start : start + piece]).hexdigest() + "\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def entry_by_hand(folder: Path) -> str:
    """The lock's hash of a node by pieces, from its files."""
    config = hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()
    both = f"{config} {by_hand((folder / WEIGHTS).read_bytes(), SMALL)}"
    return hashlib.sha256(both.encode()).hexdigest()


def entries(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "tree.lock").read_text())["nodes"]
    return found


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, bool]]]:
    """Small files count as large and have many pieces; yields how each `ContentHash` was made."""
    monkeypatch.setattr(hashing, "LARGE", 2 * SMALL)
    monkeypatch.setattr(pieces, "PIECE", SMALL)
    monkeypatch.setattr(pieces, "processors", lambda: 3)
    monkeypatch.setattr(pieces, "LARGE_FOR_FEW", 2 * SMALL)
    made: list[dict[str, bool]] = []
    plain = ContentHash.__init__

    def noted(self: ContentHash, *names: Any, **how: Any) -> None:
        made.append({kind: how.get(kind, kind == "whole") for kind in ("whole", "pieces")})
        plain(self, *names, **how)

    monkeypatch.setattr(ContentHash, "__init__", noted)
    yield made
    assert [t for t in threading.enumerate() if t.name.startswith("lora_tree hash")] == []


# ---------------------------------------------------------------------- the rule
@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize("part", [1, 7, 64, 200, 1000])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_hash_is_that_of_the_rule_however_the_bytes_are_handed_in(
    small: object, nbytes: int, part: int, threads: int
) -> None:
    data = bytes(i * i % 251 for i in range(nbytes))
    found = PieceHash(threads)
    for start in range(0, nbytes, part):
        found.update(memoryview(data)[start : start + part])
    assert found.is_threaded == (threads > 1 and nbytes >= SMALL)
    assert found.hexdigest() == by_hand(data, SMALL)
    assert not found.is_threaded


@pytest.mark.skipif(shutil.which("split") is None, reason="needs coreutils")
def test_a_shell_finds_the_same(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 20_000)
    # As the module and docs/folder.md say it.
    line = f"split -b 2097152 --filter=sha256sum {file} | cut -c -64 | sha256sum"
    told = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    found = PieceHash(2)
    found.update(memoryview(file.read_bytes()))
    assert found.hexdigest() == told.split()[0] == by_hand(file.read_bytes(), 2 << 20)


def test_pieces_that_were_not_asked_for_are_left_out_and_an_error_is_told(
    small: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = PieceHash(2)
    left.update(memoryview(bytes(10 * SMALL)))
    left.close()

    def fail(parts: object) -> str:
        raise MemoryError("none left")

    monkeypatch.setattr(pieces, "_hash_of", fail)
    failing = PieceHash(2)
    failing.update(memoryview(bytes(SMALL)))
    with pytest.raises(MemoryError, match="none left"):
        failing.hexdigest()
    failing.close()


@pytest.mark.parametrize(
    ("processors", "nbytes", "threads"),
    [
        (1, 1 << 30, 1),
        (2, 8 << 20, 1),
        (2, 16 << 20, 2),
        (4, 4 << 20, 4),
        (64, 1 << 30, 8),
        (64, 100, 1),
    ],
)
def test_threads_are_taken_for_large_files(
    monkeypatch: pytest.MonkeyPatch, processors: int, nbytes: int, threads: int
) -> None:
    monkeypatch.setattr(pieces, "processors", lambda: processors)
    assert pieces.threads_for(nbytes) == threads


# ---------------------------------------------------------------------- in the lock
def test_every_way_into_a_lock_brings_the_hash_of_the_pieces(small: object, tmp_path: Path) -> None:
    def check(folder: Path) -> dict[str, Any]:
        found = entries(folder)
        for path, entry in found.items():
            assert entry["pieces"] == entry_by_hand(folder / path), (folder, path)
        return found

    folder = zoo(tmp_path / "saved")
    told = check(folder)
    lt.load(folder).save(tmp_path / "copied", copy=True)
    assert check(tmp_path / "copied").keys() == told.keys()
    tree = lt.load(folder)
    tree.update("a/b", adapter=adapter("a/b", seed=3))
    tree.rename("e", "f")
    tree.save(folder)
    after = check(folder)
    assert after["a/b"]["pieces"] != told["a/b"]["pieces"]
    assert after["f/g"]["pieces"] == told["e/g"]["pieces"]
    for path, entry in after.items():
        assert tree[path].source.pieces == entry["pieces"]  # type: ignore[union-attr]
    # Files that a user brings, found by `lock`; those that it knows already keep theirs.
    adapter("e", seed=5).save(folder / "user")
    lt.lock(folder)
    assert "user" in check(folder)
    lt.lock(folder)
    check(folder)
    (folder / "tree.lock").unlink()
    lt.lock(folder)
    check(folder)


def test_a_pushed_lock_has_the_hash_of_the_config_that_is_pushed(
    small: object, tmp_path: Path
) -> None:
    base, folder = tmp_path / "base", tmp_path / "zoo"
    base.mkdir()
    (base / "config.json").write_text("{}")
    tree = lt.AdapterTree(base=str(base))
    for path in ("e", "e/g"):
        tree.add(path, adapter=lt.Adapter(adapter(path).modules, base=str(base)))
    tree.save(folder)
    sent = outgoing(inspect(place_of(folder)), base_name="org/model")
    for place, data in sent.files.items():
        there = tmp_path / "there" / place
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(data if isinstance(data, bytes) else data.read_bytes())
    changed = entries(folder)
    for path, entry in entries(tmp_path / "there").items():
        assert entry["pieces"] == entry_by_hand(tmp_path / "there" / path)
        assert entry["pieces"] != changed[path]["pieces"]


def test_small_weights_have_none(tmp_path: Path) -> None:
    folder = zoo(tmp_path / "zoo")
    assert all("pieces" not in entry for entry in entries(folder).values())


# ---------------------------------------------------------------------- at a read
def test_a_read_is_checked_by_pieces_alone_where_the_lock_has_them(
    small: list[dict[str, bool]], tmp_path: Path
) -> None:
    tree = lt.load(zoo(tmp_path / "zoo"))
    del small[:]
    for path in RANKS:
        source = tree[path].source
        assert source is not None
        read = source.load()
        for name, value in adapter(path).modules.items():
            assert all(map(torch.equal, read.modules[name].tensors, value.tensors))
    assert small == [{"whole": False, "pieces": True}] * len(RANKS)


@pytest.mark.parametrize("place", [0, SMALL - 1, SMALL, -SMALL, -1, "config"])
def test_no_changed_byte_is_overlooked(small: object, tmp_path: Path, place: int | str) -> None:
    folder = zoo(tmp_path / "zoo")
    source = lt.load(folder)["e/g"].source
    assert source is not None
    file = weights(folder, "e/g") if isinstance(place, int) else folder / "e/g" / CONFIG
    data = bytearray(file.read_bytes())
    at = place if isinstance(place, int) else data.index(b'"r": ') + 5
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(UnlockedError, match=r"not the files that tree\.lock speaks of"):
        source.load()


def test_the_hash_of_the_whole_files_decides_where_that_of_the_pieces_is_wrong(
    small: list[dict[str, bool]], tmp_path: Path
) -> None:
    folder = zoo(tmp_path / "zoo")
    lock = json.loads((folder / "tree.lock").read_text())
    lock["nodes"]["e"]["pieces"] = "0" * 64
    (folder / "tree.lock").write_text(json.dumps(lock))
    source = lt.load(folder)["e"].source
    assert source is not None
    del small[:]
    source.load()
    assert [how["whole"] for how in small] == [False, True]
    data = bytearray(weights(folder, "e").read_bytes())
    data[-1] ^= 1
    weights(folder, "e").write_bytes(data)
    content = lock["nodes"]["e"]["content"]
    with pytest.raises(UnlockedError, match=f"expected content {content[:12]}…, got "):
        source.load()


def test_a_lock_without_them_is_read_as_before(
    small: list[dict[str, bool]], tmp_path: Path
) -> None:
    folder = zoo(tmp_path / "zoo")
    lock = json.loads((folder / "tree.lock").read_text())
    for entry in lock["nodes"].values():
        del entry["pieces"]
    (folder / "tree.lock").write_text(json.dumps(lock))
    source = lt.load(folder)["e"].source
    assert source is not None
    del small[:]
    source.load()
    assert small == [{"whole": True, "pieces": False}]


# ---------------------------------------------------------------------- where no thread starts
AT_EXIT = """
import atexit, sys
from pathlib import Path
import torch
import lora_tree as lt
from lora_tree.folder.adapters import hashing, pieces
from lora_tree.formats import safetensors as reader

hashing.LARGE, pieces.LARGE, pieces.PIECE, reader.PART = 128, 128, 64, 40
for module in (hashing, pieces, reader):
    module.processors = lambda: 8
value = lt.LowRank(torch.randn(2, 5), torch.randn(6, 2))

def save_and_load():
    tree = lt.AdapterTree()
    tree.add("fr", adapter=lt.Adapter({"m": value}))
    tree.save(sys.argv[1])
    read = lt.load(sys.argv[1])["fr"].source.load().modules["m"]
    assert torch.equal(read.A, value.A) and torch.equal(read.B, value.B)
    print("saved and loaded")

atexit.register(save_and_load)
"""


def test_a_save_and_a_load_at_exit_need_no_thread(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(tmp_path / "zoo")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "saved and loaded\n", "")
    assert "pieces" in entries(tmp_path / "zoo")["fr"]


def test_without_threads_the_hashes_are_the_same(
    small: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    folder = zoo(tmp_path / "zoo")
    told = entries(folder)
    monkeypatch.setattr(hashing, "processors", lambda: 8)
    monkeypatch.setattr(reader, "processors", lambda: 8)
    monkeypatch.setattr(reader, "PART", 40)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    for path in RANKS:
        found = examine(find_files(str(folder / path), str(folder)))
        assert (found.content, found.pieces) == (told[path]["content"], told[path]["pieces"])
