"""A tree behind a link that is switched from one release to the next: no answer is of both."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from front import adapter, front_end
from zoo import opened

import lora_tree as lt
from lora_tree.folder import survey
from lora_tree.integrations.vllm import plugin
from lora_tree.integrations.vllm.tree_view import release_of

PATHS = ("fr", "fr/legal", "de")


def release(at: Path, name: str, seed: int, *, locked: bool = True) -> Path:
    """A tree of the same shape for every release; each has weights of its own."""
    tree = lt.AdapterTree()
    for i, path in enumerate(PATHS):
        tree.add(path, adapter=adapter(seed + i))
    folder = at / "releases" / name
    tree.save(folder)
    if not locked:
        (folder / "tree.lock").unlink()
    return folder


def switch(at: Path, name: str) -> None:
    """Have ``current`` lead to a release, by one rename."""
    os.symlink(f"releases/{name}", at / ".current")
    os.replace(at / ".current", at / "current")


def dense(folder: Path) -> torch.Tensor:
    return lt.Adapter.load(folder).modules["up"].dense()


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "without a lock"])
def test_a_view_stays_with_its_release_when_the_link_is_switched(
    locked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The switch comes after the look, before a weight is read: the worst moment."""
    for name, seed in (("a", 1), ("b", 11)):
        release(tmp_path, name, seed, locked=locked)
    switch(tmp_path, "a")
    real = plugin.survey

    def then_switch(*args: object, **more: bool) -> object:
        seen = real(*args, **more)  # type: ignore[arg-type]
        switch(tmp_path, "b")
        return seen

    monkeypatch.setattr(plugin, "survey", then_switch)
    with front_end(tmp_path / "current", tmp_path / "cache", poll_s="30") as front:
        contents = front.answers(*PATHS)
    wanted = opened(tmp_path / "releases" / "a")
    for path, content in zip(PATHS, contents, strict=True):
        got = dense(tmp_path / "cache" / str(content))
        assert torch.equal(got, wanted.flatten(path).modules["up"].dense()), path


def test_a_switch_and_the_way_back_reach_every_path_and_no_answer_is_of_two_releases(
    tmp_path: Path,
) -> None:
    trees = {}
    for name, seed in (("a", 1), ("b", 11)):
        trees[name] = opened(release(tmp_path, name, seed))
    flat = {
        (name, path): tree.flatten(path).modules["up"].dense()
        for name, tree in trees.items()
        for path in PATHS
    }
    switch(tmp_path, "a")
    seen: list[tuple[str, str]] = []
    done = threading.Event()
    with front_end(tmp_path / "current", tmp_path / "cache") as front:

        def client() -> None:
            while not done.is_set():
                for path, content in zip(PATHS, front.answers(*PATHS), strict=True):
                    assert content is not None
                    seen.append((path, content))

        def waits_for(name: str) -> None:
            ends = time.monotonic() + 20
            while True:
                contents = front.answers(*PATHS)
                folders = {path: tmp_path / "cache" / str(content)
                           for path, content in zip(PATHS, contents, strict=True)}  # fmt: skip
                if all(torch.equal(dense(folders[path]), flat[name, path]) for path in PATHS):
                    return
                assert time.monotonic() < ends, f"release {name} was not taken"
                time.sleep(0.05)

        front.answers(*PATHS)
        running = threading.Thread(target=client)
        running.start()
        try:
            waits_for("a")
            for name in ("b", "a"):  # on, and back
                switch(tmp_path, name)
                waits_for(name)
        finally:
            done.set()
            running.join()
    for path, content in set(seen):
        got = dense(tmp_path / "cache" / content)
        assert any(torch.equal(got, flat[name, path]) for name in trees), path
    assert len({content for path, content in seen if path == "fr/legal"}) == 2


def test_a_link_is_followed_for_the_folder_and_not_for_the_yaml_file(tmp_path: Path) -> None:
    folder = release(tmp_path, "a", 1)
    switch(tmp_path, "a")
    (folder / "own.yaml").write_text("version: 1\n")
    (folder / "tree.yaml").symlink_to("own.yaml")
    assert release_of(str(tmp_path / "current")) == str(folder)
    assert release_of(str(tmp_path / "current" / "tree.yaml")) == str(folder / "tree.yaml")
    assert release_of(str(tmp_path / "gone")) == str(tmp_path / "gone")
    assert set(survey(release_of(str(tmp_path / "current")))[0].paths()) == set(PATHS)
