"""Small trees of adapters for the tests of folders, and ways to compare them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from oracle import random_adapter

import lora_tree as lt
from lora_tree.errors import FolderError, LoraTreeError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"


def adapter(seed: int) -> lt.Adapter:
    """A tiny adapter; another seed, another value, files of the same size."""
    return random_adapter({"q_proj": (8, 8), "v_proj": (8, 8)}, seed, base="org/model")


def tree(*, weight: float = 0.8) -> lt.AdapterTree:
    """fr → legal, medical; de (fresh); grp (a group) → x."""
    made = lt.AdapterTree(base="org/model", defaults={"r": 4, "target_modules": ["q_proj"]})
    made.add("fr", adapter=adapter(1))
    made.add("fr/legal", adapter=adapter(2), weight=weight)
    made.add("fr/medical", adapter=adapter(3))
    made.add("de", r=8)
    made.add("grp", group=True)
    made.add("grp/x", adapter=adapter(4))
    return made


def opened(path: Path) -> lt.AdapterTree:
    """The tree there, whether or not it is stale."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lt.StaleWarning)
        return lt.load(path)


def value(of: lt.AdapterTree) -> dict[str, object]:
    """Everything that a tree says, as something that can be compared."""
    return {"": (of.base, of.defaults)} | {path: _node(of, path) for path in of.paths()}


def _node(of: lt.AdapterTree, path: str) -> object:
    node, own = of[path], of.adapter(path)
    factors = (
        None
        if own is None
        else {n: (v.A.tolist(), v.B.tolist(), v.scale) for n, v in own.modules.items()}
    )
    return node.weight, node.fresh, factors


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def all_are_there(folder: Path) -> None:
    """Read every version that the folder's history names; each is compared with its hash."""
    for path, versions in lt.history(folder).items():
        for number in range(1, len(versions) + 1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", lt.StaleWarning)
                read, _ = lt.load_versions(folder, f"{path}@{number}")
            assert read.adapter(path) is not None


def nested(folder: Path, *paths: str) -> Path:
    """A folder of adapters as PEFT leaves them: no tree.yaml, no lock."""
    for seed, path in enumerate(paths):
        adapter(seed).save(folder / path)
    return folder


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def nudge(file: Path) -> None:
    """Another byte, the same size, another time."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    os.utime(file, ns=(1, 1))


def refused(folder: Path, error: type[LoraTreeError]) -> str:
    """What load says; check has to list it too, and must not raise."""
    with pytest.raises(error) as caught:
        lt.load(folder)
    text = str(caught.value)
    assert any(problem.text.splitlines()[0] in text for problem in lt.check(folder))
    return text


def untouched(folder: Path, save: Callable[[], None], *, match: str) -> str:
    """The save is refused, and nothing in the folder has changed."""
    before = listing(folder)
    with pytest.raises(FolderError, match=match) as caught:
        save()
    assert listing(folder) == before
    return str(caught.value)
