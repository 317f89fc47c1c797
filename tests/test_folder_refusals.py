"""Every refusal of a save comes before its first byte: nothing is written, renamed or removed, in
any folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import adapter, listing, opened, tree

import lora_tree as lt
from lora_tree.errors import FolderError, FormatError, LoraTreeError, SpecError
from lora_tree.folder import disk

WRITES = ("write", "rename", "replace", "unlink")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class WatchedOs:
    """The ``os`` module, which notes every operation that changes what a disk holds.

    Making and removing folders is left out: the writer's own ``.lora_tree``, with its lock, has to
    be there before the decision.
    """

    def __init__(self) -> None:
        self.writes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in WRITES:
            return real

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.writes.append(f"{name} {args[0]}")
            return real(*args, **kwargs)

        return noted


def several(*, also: str = "later") -> lt.AdapterTree:
    """A tree whose first nodes could be written at once; the last one is where a case goes
    wrong.
    """
    made = tree()
    made.add("a", adapter=adapter(11))
    made.add(also, adapter=adapter(12))
    return made


def no_way_to_write(folder: Path) -> lt.AdapterTree:
    made = several()
    value = lt.LowRank(torch.ones(2, 4), torch.ones(4, 2))
    made.update("later", adapter=lt.Adapter({"one.base_layer": value}))
    return made


def not_ours(folder: Path) -> lt.AdapterTree:
    adapter(13).save(folder / "later")
    return several()


def written_by_another(folder: Path) -> lt.AdapterTree:
    tree().save(folder)
    mine, theirs = opened(folder), opened(folder)
    theirs.update("grp/x", adapter=adapter(14))
    theirs.save(folder)
    mine.add("a", adapter=adapter(11))
    mine.update("grp/x", adapter=adapter(15))
    return mine


def taken_out_by_another(folder: Path) -> lt.AdapterTree:
    tree().save(folder)
    mine, theirs = opened(folder), opened(folder)
    theirs.remove("grp", recursive=True)
    theirs.save(folder)
    mine.add("a", adapter=adapter(11))
    return mine


def would_come_back(folder: Path) -> lt.AdapterTree:
    for seed, path in enumerate(("fr", "later")):
        adapter(seed).save(folder / path)
    made = lt.load(folder)
    made.remove("later")
    made.add("a", adapter=adapter(11))
    return made


def another_would_go(folder: Path) -> lt.AdapterTree:
    tree().save(folder)
    mine, theirs = opened(folder), opened(folder)
    theirs.add("theirs", adapter=adapter(14))
    theirs.save(folder)
    mine.add("a", adapter=adapter(11))
    return mine


def twin_has_to_go(folder: Path) -> lt.AdapterTree:
    several().save(folder)
    made = opened(folder)
    made.rename("later", "Later")
    return made


def yaml_of_another(folder: Path) -> lt.AdapterTree:
    folder.mkdir()
    (folder / "tree.yaml").write_text("version: 1\nbase: org/other\n")
    return several()


def yaml_changed_since(folder: Path) -> lt.AdapterTree:
    tree().save(folder)
    made = opened(folder)
    yaml = folder / "tree.yaml"
    yaml.write_text(yaml.read_text().replace("0.8", "0.7"))
    made.add("a", adapter=adapter(11))
    made.update("fr", weight=0.5)
    return made


def yaml_without_letters(folder: Path) -> lt.AdapterTree:
    made = several()
    made.base = "org/\ud800"
    return made


def copied_files_changed(folder: Path) -> lt.AdapterTree:
    tree().save(folder.with_name("old"))
    made = opened(folder.with_name("old"))
    made.add("a", adapter=adapter(11))
    weights = folder.with_name("old") / "grp/x" / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    stat = weights.stat()
    weights.write_bytes(bytes(data))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return made


def copied_files_gone(folder: Path) -> lt.AdapterTree:
    tree().save(folder.with_name("old"))
    made = opened(folder.with_name("old"))
    made.add("a", adapter=adapter(11))
    shutil.rmtree(folder.with_name("old") / "grp/x")
    return made


def a_link_on_the_way(folder: Path) -> lt.AdapterTree:
    folder.mkdir()
    (folder / "later").symlink_to(folder.with_name("nowhere"))
    return several()


def a_file_on_the_way(folder: Path) -> lt.AdapterTree:
    folder.mkdir()
    (folder / "later").write_text("mine")
    return several()


def a_folder_in_a_file_s_place(folder: Path) -> lt.AdapterTree:
    (folder / "later" / CONFIG).mkdir(parents=True)
    return several()


def no_permission(folder: Path) -> lt.AdapterTree:
    (folder / "closed").mkdir(parents=True)
    made = several()
    made.add("closed", adapter=adapter(13))
    return made


REFUSALS: dict[Callable[[Path], lt.AdapterTree], tuple[type[LoraTreeError], str]] = {
    no_way_to_write: (FormatError, "later: one.base_layer: PEFT's keys have no way to write"),
    not_ours: (FolderError, "an adapter that no save wrote"),
    written_by_another: (FolderError, "written by another writer since this tree was opened"),
    taken_out_by_another: (FolderError, "taken out by another writer since this tree was opened"),
    would_come_back: (FolderError, "so they stay, and would be a node again"),
    another_would_go: (FolderError, "written by another writer since this tree was opened"),
    twin_has_to_go: (FolderError, "only by case"),
    yaml_of_another: (FolderError, "belongs to another tree, and no save wrote it"),
    yaml_changed_since: (FolderError, "written by another writer since this tree was opened"),
    yaml_without_letters: (SpecError, "can't be written as UTF-8"),
    copied_files_changed: (FolderError, "its files have changed since the tree was opened"),
    copied_files_gone: (FormatError, "no adapter there"),
    a_link_on_the_way: (SpecError, "a save writes into the tree's own folders only"),
    a_file_on_the_way: (FolderError, "a file or a link lies where a folder belongs"),
    a_folder_in_a_file_s_place: (FolderError, "a folder lies where a file belongs"),
    no_permission: (FolderError, "closed: can't be written: no permission"),
}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.__name__)
def test_a_refused_save_writes_nothing(
    case: Callable[[Path], lt.AdapterTree],
    dry_run: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "zoo"
    refused = case(folder)
    before, watched = listing(tmp_path), WatchedOs()
    error, message = REFUSALS[case]
    with monkeypatch.context() as patched:
        patched.setattr(disk, "os", watched)
        # root may write anywhere, so the system's answer is a made one
        patched.setattr(os, "access", lambda path, _: not str(path).endswith("closed"))
        with pytest.raises(error, match=message):
            refused.save(folder, dry_run=dry_run)
    assert watched.writes == []
    assert listing(tmp_path) == before


def test_the_watch_sees_a_save_that_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = WatchedOs()
    monkeypatch.setattr(disk, "os", watched)
    several().save(tmp_path / "zoo")
    assert {note.split()[0] for note in watched.writes} >= {"write", "rename", "unlink"}


def test_a_dry_run_of_a_save_writes_nothing_and_changes_no_node(tmp_path: Path) -> None:
    made = several()
    before = {path: made[path] for path in made.paths()}
    made.save(tmp_path / "new/zoo", dry_run=True)
    assert listing(tmp_path) == {}
    assert {path: made[path] for path in made.paths()} == before
    made.save(tmp_path / "zoo")
    made.update("later", adapter=adapter(13))
    saved = listing(tmp_path)
    made.save(tmp_path / "zoo", dry_run=True)
    assert listing(tmp_path) == saved
    made.save(tmp_path / "zoo")
    assert listing(tmp_path) != saved


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_file_in_the_place_of_a_folder_above_the_tree_is_refused(
    tmp_path: Path, dry_run: bool
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FolderError, match=f"{tmp_path}/file"):
        several().save(tmp_path / "file/new/zoo", dry_run=dry_run)
    several().save(tmp_path / "zoo")
    (tmp_path / "zoo/.lora_tree").write_text("mine")
    for attempt in (
        lambda: several().save(tmp_path / "zoo", dry_run=dry_run),
        lambda: lt.gc(tmp_path / "zoo", dry_run=dry_run),
    ):
        with pytest.raises(FolderError, match=r"\.lora_tree: a file or a link lies where a folder"):
            attempt()
