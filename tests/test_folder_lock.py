"""Files that are not what tree.lock says: how they are told, accepted, and listed by check."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from zoo import (
    CONFIG,
    POINTER,
    WEIGHTS,
    adapter,
    listing,
    nested,
    nudge,
    refused,
    tree,
    value,
    write,
)

import lora_tree as lt
from lora_tree.errors import FolderError, FormatError, LoraTreeError, UnlockedError
from lora_tree.folder.transactions import record


# ---------------------------------------------------------------------- unlocked
def test_another_size_is_refused_at_load(zoo: Path) -> None:
    for path in ("fr", "grp/x"):
        with (zoo / path / CONFIG).open("a") as file:
            file.write(" ")
    text = refused(zoo, UnlockedError)
    assert f"fr: {zoo}/fr: {CONFIG} has" in text
    assert "grp/x" in text
    assert f"lora-tree lock {zoo}" in text


def test_a_command_in_an_advice_can_be_copied_whatever_the_folder_is_called(tmp_path: Path) -> None:
    zoo = tmp_path / "my zoo's"
    tree().save(zoo)
    with (zoo / "fr" / CONFIG).open("a") as file:
        file.write(" ")
    command = refused(zoo, UnlockedError).partition("accept them as they are: ")[2].splitlines()[0]
    assert shlex.split(command) == ["lora-tree", "lock", str(zoo)]


def test_another_time_alone_is_fine(zoo: Path) -> None:
    for file in zoo.rglob("adapter_*"):
        os.utime(file, ns=(5, 5))
    assert value(lt.load(zoo, strict=True)) == value(tree())


def test_another_content_of_the_same_size(zoo: Path) -> None:
    nudge(zoo / "fr" / WEIGHTS)
    assert "fr: " in refused(zoo, UnlockedError)


def test_a_content_that_hides_behind_size_and_time_is_found_when_read(zoo: Path) -> None:
    file = zoo / "fr" / WEIGHTS
    seen = file.stat()
    nudge(file)
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    loaded = lt.load(zoo)
    with pytest.raises(UnlockedError, match=r"fr: .*not the files that tree.lock speaks of"):
        loaded.adapter("fr")
    assert [(p.node, p.kind) for p in lt.check(zoo)] == [("fr", "unlocked")]


def test_files_that_change_after_opening(zoo: Path) -> None:
    loaded = lt.load(zoo)
    nudge(zoo / "fr" / WEIGHTS)
    with pytest.raises(UnlockedError, match="open the tree again"):
        loaded.adapter("fr")
    with pytest.raises(UnlockedError, match="have changed since the tree was opened"):
        loaded.save(zoo)
    with pytest.raises(LoraTreeError, match="have changed since the tree was opened"):
        loaded.save(zoo.parent / "other")
    assert not (zoo.parent / "other").exists()
    assert not (zoo / ".lora_tree").exists()


def test_a_new_adapter_folder_and_one_that_is_gone(zoo: Path) -> None:
    adapter(5).save(zoo / "it")
    shutil.rmtree(zoo / "fr/legal")
    text = refused(zoo, UnlockedError)
    assert f"it: {zoo}/it: not in the lock" in text
    assert "fr/legal: in the lock, but its adapter is gone" in text
    write(
        zoo / "tree.yaml", (zoo / "tree.yaml").read_text().replace("weight: 0.8", "adapter: null")
    )
    assert "fr/legal" not in refused(zoo, UnlockedError)
    lt.lock(zoo)
    assert lt.load(zoo, strict=True).paths() == [
        "de",
        "fr",
        "fr/legal",
        "fr/medical",
        "grp",
        "grp/x",
        "it",
    ]


def test_lock_accepts_the_files_as_they_are(zoo: Path) -> None:
    nudge(zoo / "fr" / WEIGHTS)
    lt.lock(zoo)
    assert {(p.node, p.kind) for p in lt.check(zoo)} == {
        ("fr/legal", "stale"),
        ("fr/medical", "stale"),
    }
    before = listing(zoo)
    lt.lock(zoo)
    assert listing(zoo) == before


BROKEN = {
    "a Git LFS pointer": (
        WEIGHTS,
        lambda data: POINTER,
        "is a Git LFS pointer, not the file itself",
    ),
    "a config as a Git LFS pointer": (
        CONFIG,
        lambda data: POINTER,
        "is a Git LFS pointer, not the file itself",
    ),
    "cut short": (WEIGHTS, lambda data: data[:-5], "the header describes"),
    "cut in its header": (WEIGHTS, lambda data: data[:40], "not a whole safetensors file"),
    "empty": (WEIGHTS, lambda data: b"", "not a whole safetensors file"),
    "too long": (WEIGHTS, lambda data: data + b"\0", "the header describes"),
    "a header of another rank": (
        CONFIG,
        lambda data: data.replace(b'"r": 2', b'"r": 4'),
        "expected (4, in)",
    ),
    "a config that is none": (CONFIG, lambda data: b"{", "not valid JSON"),
}


@pytest.mark.parametrize(("file", "broken", "cause"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_told_as_that_and_never_locked(
    zoo: Path, file: str, broken: Callable[[bytes], bytes], cause: str
) -> None:
    fr = zoo / "fr" / file
    fr.write_bytes(broken(fr.read_bytes()))
    before = listing(zoo)
    text = refused(zoo, UnlockedError)
    assert cause in text
    assert "lora-tree lock" not in text
    assert "git lfs pull" in text or "LFS" not in cause
    with pytest.raises(FormatError, match=re.escape(cause)):
        lt.lock(zoo)
    assert listing(zoo) == before
    with (zoo / "grp/x" / CONFIG).open("a") as whole:
        whole.write(" ")
    text = refused(zoo, UnlockedError)
    assert text.index(cause) < text.index(
        "put the files of fr right first; if the files are right, accept them"
    )
    (zoo / "grp/x" / CONFIG).write_bytes(before[f"grp/x/{CONFIG}"] or b"")
    (zoo / "tree.lock").unlink()  # without a lock to compare with
    with pytest.raises(FormatError, match=re.escape(cause)):
        lt.lock(zoo)
    assert not (zoo / "tree.lock").exists()


@pytest.mark.parametrize(("file", "broken", "cause"), BROKEN.values(), ids=BROKEN)
def test_files_that_broke_after_the_opening_are_told_as_that(
    zoo: Path, file: str, broken: Callable[[bytes], bytes], cause: str
) -> None:
    loaded = lt.load(zoo)
    fr = zoo / "fr" / file
    fr.write_bytes(broken(fr.read_bytes()))
    with pytest.raises(UnlockedError) as caught:
        loaded.adapter("fr")
    assert cause in str(caught.value)
    assert "lora-tree lock" not in str(caught.value)


def test_every_broken_node_is_named_and_an_unknown_kind_is_not_broken(tmp_path: Path) -> None:
    nested(tmp_path, "fr", "de", "it", "es")
    for path in ("fr", "it"):
        (tmp_path / path / WEIGHTS).write_bytes(POINTER)
    with pytest.raises(FormatError, match=r"(?s)^fr: .*\n  it: "):
        lt.lock(tmp_path)
    for path in ("fr", "it"):
        adapter(1).save(tmp_path / path)
    config = json.loads((tmp_path / "es" / CONFIG).read_text())
    write(tmp_path / "es" / CONFIG, json.dumps({**config, "use_dora": True}))
    lt.lock(tmp_path)
    assert [(problem.node, problem.kind) for problem in lt.check(tmp_path)] == [("es", "adapter")]
    (tmp_path / "es" / WEIGHTS).write_bytes(POINTER)
    with pytest.raises(FormatError, match="Git LFS pointer"):
        lt.lock(tmp_path)


def test_a_folder_without_a_tree_is_not_locked(tmp_path: Path) -> None:
    write(tmp_path / "sub/notes.txt", "mine")
    before = listing(tmp_path)
    with pytest.raises(FolderError, match=r"no tree: no tree\.yaml, and no folder below"):
        lt.lock(tmp_path)
    assert listing(tmp_path) == before


def test_adapters_elsewhere_are_locked_too(tmp_path: Path) -> None:
    adapter(1).save(tmp_path / "out")
    made = lt.AdapterTree()
    made.add("fr", adapter=tmp_path / "out")
    made.save(tmp_path / "zoo")
    nudge(tmp_path / "out" / WEIGHTS)
    assert "fr: " in refused(tmp_path / "zoo", UnlockedError)


# ---------------------------------------------------------------------- check
def test_check_reads_every_adapter(tmp_path: Path) -> None:
    nested(tmp_path, "fr", "de")
    write(tmp_path / "fr" / CONFIG, "{")
    (tmp_path / "de" / WEIGHTS).write_bytes(b"x")
    assert lt.load(tmp_path).paths() == ["de", "fr"]
    assert [(p.node, p.kind) for p in lt.check(tmp_path)] == [("de", "adapter"), ("fr", "adapter")]


def test_check_names_the_modules_whose_numbers_are_none(tmp_path: Path) -> None:
    A, B = torch.ones(2, 4), torch.ones(3, 2)
    # A save of the tree would refuse them.
    broken = lt.Adapter({"q": lt.LowRank(A, B), "v": lt.LowRank(A * float("nan"), B)})
    broken.save(tmp_path / "zoo/fr")
    lt.Adapter({"q": lt.LowRank(A, B * float("inf"))}).save(tmp_path / "zoo/fr/legal")
    found = [(p.node, p.kind, p.text.split(": ")[1]) for p in lt.check(tmp_path / "zoo")]
    assert found == [("fr", "numbers", "v (lora_A)"), ("fr/legal", "numbers", "q (lora_B)")]
    assert lt.load(tmp_path / "zoo").paths() == ["fr", "fr/legal"]


def test_check_lists_what_killed_saves_left(zoo: Path) -> None:
    stage = f"stage-{'0' * 32}"
    (zoo / record.HIDDEN / stage).mkdir(parents=True)
    assert [(p.kind, stage in p.text) for p in lt.check(zoo)] == [("leftover", True)]
    lt.load(zoo).save(zoo)
    assert lt.check(zoo) == []
    assert not (zoo / record.HIDDEN).exists()


def test_check_lists_what_may_not_be_looked_into(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (zoo / record.HIDDEN).mkdir()
    real = os.listdir

    def refuse(
        path: str | Path,
    ) -> list[str]:  # root may look anywhere, so the answer is a made one
        if Path(path).name == record.HIDDEN:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", refuse)
    text = f"{zoo}/.lora_tree: can't look into it: Permission denied"
    assert [(p.kind, p.text) for p in lt.check(zoo)] == [("folder", text)]
    with pytest.raises(FolderError, match="can't look into it: Permission denied"):
        lt.lock(zoo)


def test_check_does_not_raise_on_content(zoo: Path) -> None:
    write(zoo / "tree.yaml", "version: [")
    write(zoo / "tree.lock", "x")
    write(zoo / ".lora_tree/commit.json", "x")
    assert {"yaml", "lock", "record"} <= {p.kind for p in lt.check(zoo)}
    with pytest.raises(FolderError, match="no such folder"):
        lt.check(zoo / "nothing")


def test_an_outline_has_shapes_and_ranks_and_reads_no_numbers(tmp_path: Path) -> None:
    tree().save(tmp_path / "zoo")
    there = lt.load(tmp_path / "zoo")
    outline = there.outline("fr/legal")
    assert outline is not None
    assert {t.device.type for v in outline.modules.values() for t in v.tensors} == {"meta"}
    assert there["fr/legal"].loaded is None
    whole = there.adapter("fr/legal")
    assert whole is not None
    assert (outline.ranks, outline.numel, outline.nbytes) == (
        whole.ranks,
        whole.numel,
        whole.nbytes,
    )
    assert there.outline("fr/legal") is whole
    assert there.outline("de") is None
