"""A save cut off at each operation in turn, by a full disk or a kill: the folder opens as the old
tree or the new.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from sampling import slow
from zoo import adapter, all_are_there, listing, opened, tree, value

import lora_tree as lt
from lora_tree.errors import FolderError, LoraTreeError
from lora_tree.folder import atomic_folders, disk
from lora_tree.folder.reading import opening
from lora_tree.folder.transactions import archive, carry_out, commit, record, writer
from lora_tree.folder.transactions.changes import Changes, NewFile
from lora_tree.folder.transactions.pending import Pending
from lora_tree.system import claims, durable, locks, reading

MODULES = (
    disk,
    archive,
    carry_out,
    commit,
    record,
    atomic_folders,
    locks,
    claims,
    durable,
    reading,
)
WATCHED = ("open", "write", "fsync", "rename", "link", "unlink", "mkdir", "rmdir")


class Killed(BaseException):
    """What no cleanup may survive: from here on every operation raises it."""


class FaultyOs:
    """The ``os`` module, but the operation of a given number fails, is done and interrupted by
    Ctrl-C, or kills.
    """

    def __init__(self, at: int, *, kills: bool = False, interrupts: bool = False) -> None:
        self.at, self.kills, self.interrupts, self.seen = at, kills, interrupts, 0

    @property
    def fired(self) -> bool:
        return self.seen > self.at

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self.watched(name, real) if name in WATCHED else real

    def watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            turn = self.seen
            self.seen += 1
            if turn == self.at and name == "write" and not self.interrupts:
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            if self.kills and turn >= self.at:
                raise Killed
            if turn == self.at and self.interrupts:
                real(*args, **kwargs)
                raise KeyboardInterrupt
            if turn == self.at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "zoo"
    tree().save(folder)
    return folder


def change(folder: Path) -> lt.AdapterTree:
    """A tree opened from ``folder``, with a node of every kind of change."""
    loaded = opened(folder)
    loaded.update("fr/legal", adapter=adapter(20))
    loaded.move("fr/medical", "medical")
    loaded.remove("grp", recursive=True)
    loaded.add("it", adapter=adapter(21))
    loaded.update("fr", weight=0.5)
    return loaded


def faults(
    monkeypatch: pytest.MonkeyPatch,
    before: Path,
    scratch: Path,
    *,
    kills: bool = False,
    interrupts: bool = False,
) -> Iterator[tuple[Path, lt.AdapterTree, BaseException]]:
    """The same save, cut off at its first operation, its second, …, until one comes through."""
    for at in range(10_000):
        folder = scratch / str(at)
        shutil.copytree(before, folder)
        changed = change(folder)
        faulty = FaultyOs(at, kills=kills, interrupts=interrupts)
        with monkeypatch.context() as patched:
            for module in MODULES:
                patched.setattr(module, "os", faulty)
            try:
                changed.save(folder)
            except (LoraTreeError, KeyboardInterrupt, Killed) as error:
                caught: BaseException | None = error
            else:
                caught = None
        if not faulty.fired:
            assert at > 40, "the faults did not reach the save"
            return
        if caught is not None:
            yield folder, changed, caught
        shutil.rmtree(folder)


@slow
def test_killed_at_every_operation(
    monkeypatch: pytest.MonkeyPatch, before: Path, tmp_path: Path
) -> None:
    old, new = value(opened(before)), value(change(before))
    outcomes = []
    for folder, _, error in faults(monkeypatch, before, tmp_path, kills=True):
        assert isinstance(error, Killed)
        found = value(opened(folder))
        assert found in (old, new)
        outcomes.append(found == new)
        all_are_there(folder)
        assert {p.kind for p in lt.check(folder)} <= {"stale", "leftover"}
        again = opened(folder)
        again.add("next", adapter=adapter(30))
        again.save(folder)
        again.remove("next")
        assert value(again) == found
        assert {p.kind for p in lt.check(folder)} <= {"stale"}
        assert not (folder / record.HIDDEN).exists()
    assert outcomes == sorted(outcomes), "old until the decision, new from then on"
    assert len(set(outcomes)) == 2


@slow
def test_a_fault_at_every_operation(
    monkeypatch: pytest.MonkeyPatch, before: Path, tmp_path: Path
) -> None:
    old, new = value(opened(before)), value(change(before))
    files = listing(before)
    outcomes = []
    for folder, changed, error in faults(monkeypatch, before, tmp_path, kills=False):
        assert isinstance(error, FolderError)
        found = value(opened(folder))
        assert found in (old, new)
        outcomes.append(found == new)
        if found == old:
            assert listing(folder) == files, "nothing staged may stay behind"
        else:
            assert "the folder opens as the new tree" in str(error)
        assert value(changed) == new, "the tree in memory stays usable"
        changed.save(folder)
        assert value(opened(folder)) == new
        assert not (folder / record.HIDDEN).exists()
    assert outcomes == sorted(outcomes)
    assert len(set(outcomes)) == 2


@slow
def test_interrupted_at_every_operation(
    monkeypatch: pytest.MonkeyPatch, before: Path, tmp_path: Path
) -> None:
    old, new = value(opened(before)), value(change(before))
    files = listing(before)
    outcomes = []
    for folder, changed, error in faults(monkeypatch, before, tmp_path, interrupts=True):
        assert isinstance(error, KeyboardInterrupt)
        found = value(opened(folder))
        assert found in (old, new)
        outcomes.append(found == new)
        if found == old:
            left = {name: data for name, data in listing(folder).items() if name not in files}
            assert left.keys() <= {".lora_tree", ".lora_tree/lock"}, (
                "nothing staged may stay behind"
            )
            assert not [p for p in lt.check(folder) if p.kind != "stale"]
        changed.save(folder)
        assert value(opened(folder)) == value(changed) == new
        assert not (folder / record.HIDDEN).exists()
    assert outcomes == sorted(outcomes), "old until the decision, new from then on"
    assert len(set(outcomes)) == 2


def test_a_new_folder_is_not_left_half_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = tmp_path / "a/b"
    for at in range(10_000):
        faulty = FaultyOs(at, kills=False)
        with monkeypatch.context() as patched:
            for module in MODULES:
                patched.setattr(module, "os", faulty)
            try:
                tree().save(target)
            except FolderError as error:
                whole = "the folder opens as the new tree" in str(error)
                assert (tmp_path / "a").exists() == whole
        if not faulty.fired:
            break
        if (tmp_path / "a").exists():
            assert value(opened(target)) == value(tree())
            shutil.rmtree(tmp_path / "a")
    assert at > 30


def test_ctrl_c_leaves_no_new_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, left = disk.write, 5

    def write(*args: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(disk, "write", write)
    with pytest.raises(KeyboardInterrupt):
        tree().save(tmp_path / "a/b")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("kills", [False, True])
def test_one_adapter_is_whole_or_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exists: bool, kills: bool
) -> None:
    old, new = adapter(1), adapter(2)
    values = {a.modules["q_proj"].A.sum().item(): a for a in (old, new)}
    for at in range(10_000):
        folder = tmp_path / str(at) / "one"
        if exists:
            old.save(folder)
        faulty = FaultyOs(at, kills=kills)
        with monkeypatch.context() as patched:
            for module in MODULES:
                patched.setattr(module, "os", faulty)
            patched.setattr(atomic_folders, "rmtree", faulty.watched("rmtree", shutil.rmtree))
            with contextlib.suppress(LoraTreeError, Killed):
                new.save(folder)
        if folder.exists():
            assert lt.Adapter.load(folder).modules["q_proj"].A.sum().item() in values
            assert lt.load(folder.parent).adapter("one") is not None
        else:
            assert not exists
        new.save(folder)
        assert listing(folder).keys() == {"adapter_config.json", "adapter_model.safetensors"}
        if not faulty.fired:
            break
    assert at > 5


# ------------------------------------------------------ what is left is looked through and swept up
def cut_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> lt.AdapterTree:
    """A save that was killed right after its decision."""
    changed = change(folder)

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(commit, "carry_out", kill)
        with pytest.raises(Killed):
            changed.save(folder)
    return changed


def test_readers_look_through_the_record(
    monkeypatch: pytest.MonkeyPatch, before: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(before, tmp_path / "zoo"))
    expected = value(change(before))
    cut_off(folder, monkeypatch)
    files = listing(folder)
    loaded = opened(folder)
    assert not (folder / "it").is_file()
    assert value(loaded) == expected
    assert listing(folder) == files, "readers change nothing"
    assert "grp/x" not in loaded
    assert (folder / "grp/x/adapter_config.json").exists()
    lazily = opened(folder)
    lt.lock(folder)
    assert value(lazily) == expected, "a tree that was opened through the record outlives it"


def test_a_node_saved_by_itself_and_cut_off_is_carried_out_before_the_tree_is_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path in ("fr", "fr/legal"):
        adapter(1).save(tmp_path / path)

    def kill(*_: object, **__: object) -> None:
        raise Killed

    def cut_off_one() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(commit, "carry_out", kill)
            with pytest.raises(Killed):
                adapter(9).save(tmp_path / "fr")

    def own(of: lt.AdapterTree) -> torch.Tensor:
        found = of.adapter("fr")
        assert found is not None
        return found.modules["q_proj"].A

    expected = adapter(9).modules["q_proj"].A
    cut_off_one()
    loaded = lt.load(tmp_path)
    assert [(p.node, p.kind) for p in lt.check(tmp_path)] == [
        ("fr", "leftover"),
        ("fr", "leftover"),
    ]
    assert torch.equal(own(loaded), expected)
    loaded.update("fr", adapter=adapter(10))
    loaded.save(tmp_path)
    assert value(lt.load(tmp_path, strict=True)) == value(loaded)
    assert lt.check(tmp_path) == []
    cut_off_one()
    lt.lock(tmp_path, accept_stale=True)
    assert lt.check(tmp_path) == []
    assert torch.equal(own(lt.load(tmp_path)), expected)


def test_staged_files_that_are_not_what_was_decided(
    monkeypatch: pytest.MonkeyPatch, before: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(before, tmp_path / "zoo"))
    cut_off(folder, monkeypatch)
    staged = next((folder / record.HIDDEN).glob("stage-*/0"))
    staged.write_bytes(b"x" * staged.stat().st_size)
    with pytest.raises(FolderError, match=r"not the file that .*commit.json describes"):
        lt.lock(folder)
    with pytest.raises(LoraTreeError):
        value(opened(folder))


def test_permission_is_asked_before_anything_is_decided(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(before, tmp_path / "zoo"))
    changed, files = change(folder), listing(folder)
    with monkeypatch.context() as patched:  # root may write anywhere, so the answer is a made one
        patched.setattr(os, "access", lambda path, _: not str(path).endswith("fr/legal"))
        with pytest.raises(FolderError, match="fr/legal: can't be written: no permission"):
            changed.save(folder)
    assert listing(folder) == files


def test_a_folder_where_a_file_belongs_is_found_before_anything_is_decided(
    before: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(before, tmp_path / "zoo"))
    (folder / "it/adapter_config.json").mkdir(parents=True)
    changed, files = change(folder), listing(folder)
    with pytest.raises(
        FolderError,
        match=r"it/adapter_config.json: a folder lies where a file belongs\n  move it away",
    ):
        changed.save(folder)
    assert listing(folder) == files
    assert value(opened(folder)) == value(opened(before))
    (folder / "it/adapter_config.json").rmdir()
    changed.save(folder)
    assert value(opened(folder)) == value(changed)


@pytest.mark.parametrize(
    "places",
    [
        ("tree.lock", "tree.lock/adapter_config.json"),
        ("tree.yaml/fr/adapter_config.json",),
        ("fr/adapter_config.json", "fr/adapter_config.json/adapter_config.json"),
        ("fr/adapter_model.safetensors/x/adapter_config.json",),
    ],
)
def test_a_place_on_the_way_to_another_is_refused_before_anything_is_decided(
    before: Path, tmp_path: Path, places: tuple[str, ...]
) -> None:
    folder = Path(shutil.copytree(before, tmp_path / "zoo"))
    files = listing(folder)
    with commit.writing(folder) as transaction:
        changes = Changes(tuple(NewFile.of(place, b"{}") for place in places))
        with pytest.raises(LoraTreeError, match="is no file that a save writes"):
            transaction.apply(changes)
        assert not transaction.decided
        transaction.abandon()
    assert listing(folder) == files


# ---------------------------------------------------------------------- several at once
def test_a_second_writer_waits_and_then_says_so(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(before, tmp_path / "zoo"))
    monkeypatch.setattr(writer, "WAIT_S", 0.2)
    with commit.writing(folder):
        with pytest.raises(FolderError, match="another process has been writing this folder"):
            lt.lock(folder)
        assert len(opened(folder)) == 6, "readers do not wait"
    lt.lock(folder)


def test_a_file_carried_to_its_place_between_two_looks_is_found_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "zoo"
    tree().save(folder)
    changed = opened(folder)
    changed.update("fr", adapter=adapter(30))
    with monkeypatch.context() as patched:  # killed after the decision: nothing is in its place yet
        patched.setattr(
            commit, "carry_out", lambda *args, **kwargs: (_ for _ in ()).throw(Killed())
        )
        with contextlib.suppress(Killed):
            changed.save(folder)
    real, moved = disk.exists, []

    def then_carried(path: Any) -> bool:
        there = real(path)
        if there and "/stage-" in str(path) and not moved:
            moved.append(path)
            decided = record.read_record(folder)
            assert decided is not None
            carry_out.carry_out(folder, decided)
        return there

    source = opened(folder)["fr"].source
    assert source is not None
    monkeypatch.setattr(disk, "exists", then_carried)
    read = source.load()
    assert moved
    assert all(
        torch.equal(value.A, adapter(30).modules[name].A) for name, value in read.modules.items()
    )


@pytest.mark.parametrize("steps", [1, 3, None])
def test_a_tree_opened_while_a_save_is_carried_out_is_the_new_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: int | None
) -> None:
    """The files that the reader saw staged are at their places when it comes to read them."""
    folder = tmp_path / "zoo"
    tree().save(folder)
    changed = opened(folder)
    for path in ("fr", "fr/legal"):
        changed.update(path, adapter=adapter(30))
    with monkeypatch.context() as patched:  # killed after the decision: nothing is in its place yet
        patched.setattr(
            commit, "carry_out", lambda *args, **kwargs: (_ for _ in ()).throw(Killed())
        )
        with contextlib.suppress(Killed):
            changed.save(folder)
    real, scans = opening.scan, []

    def then_carried(root: str, decided: Pending) -> opening.Scan:
        found = real(root, decided)
        if not scans:
            for place, path in list(decided.staged.items())[:steps]:
                os.replace(path, folder / place)
            if steps is None:
                shutil.rmtree(folder / record.HIDDEN)
        scans.append(root)
        return found

    monkeypatch.setattr(opening, "scan", then_carried)
    assert value(opened(folder)) == value(changed)
    assert len(scans) == 2


def test_half_a_removal_is_looked_at_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another save removes a node's two files between the looks at the first and at the second."""
    folder = tmp_path / "zoo"
    tree().save(folder)
    found = opened(folder)["fr"].source
    assert found is not None
    real = disk.stamp

    def stamp(path: Any) -> disk.Stamp | None:
        seen = real(path)
        shutil.rmtree(folder / "fr", ignore_errors=True)
        return seen

    monkeypatch.setattr(disk, "stamp", stamp)
    with pytest.raises(LoraTreeError, match="no adapter there"):
        found.load()


@pytest.mark.parametrize("gone", ["folder", "file"])
def test_what_is_removed_while_a_folder_is_listed_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """Another save removes a node between the listing of its folder and the look at its files."""
    made = lt.AdapterTree(base="org/model")
    for i, name in enumerate(("stays", "goes")):
        made.add(name, adapter=adapter(i))
    made.save(tmp_path)
    listed, scandir = [], os.scandir
    at = str(tmp_path) if gone == "folder" else str(tmp_path / "goes")

    class Slow:
        """A listing that is complete before its first entry is looked at, as on a slow disk."""

        def __init__(self, folder: str) -> None:
            with scandir(folder) as entries:
                self.entries = list(entries)
            if folder == at:
                listed.append(folder)
                shutil.rmtree(tmp_path / "goes")

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("lora_tree.folder.adapters.scan.os.scandir", Slow)
    problems = lt.check(tmp_path)
    assert listed
    assert [problem.node for problem in problems] == ["goes"], problems
    assert "its adapter is gone" in problems[0].text, problems


def test_a_folder_that_goes_between_two_looks_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer before removes `.lora_tree` right after this one found it there."""
    folder, lstat = tmp_path / "hidden", os.lstat
    folder.mkdir()

    def gone(path: Any) -> os.stat_result:
        if folder.exists():
            folder.rmdir()
        return lstat(path)

    monkeypatch.setattr("lora_tree.folder.disk.os.lstat", gone)
    assert disk.make(folder)
    assert folder.is_dir()


def test_writers_take_turns_and_readers_see_whole_trees(tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    kinds = []
    for seed in (40, 50):
        made = lt.AdapterTree(base="org/model")
        for i in range(3):
            made.add(f"n{i}", adapter=adapter(seed + i))
        made.add(f"only{seed}", adapter=adapter(seed + 3))
        kinds.append(made)
    kinds[0].save(folder)
    expected = [value(kind) for kind in kinds]
    failures: list[BaseException] = []

    def turn(seed: int) -> None:
        made, only = lt.load(folder), f"only{seed}"
        for i in range(3):
            made.update(f"n{i}", adapter=adapter(seed + i))
        for path in made.paths():
            if path.startswith("only") and path != only:
                made.remove(path)
        if only not in made:
            made.add(only, adapter=adapter(seed + 3))
        made.save(folder)

    def write(seed: int) -> None:
        try:
            done = 0
            while done < 6:
                try:
                    turn(seed)
                    done += 1
                except FolderError as error:  # the other one was first, and is not undone
                    assert "open the tree again" in str(error), error
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in (40, 50)]
    for thread in threads:
        thread.start()
    looks = 0
    while any(thread.is_alive() for thread in threads):
        try:
            assert value(lt.load(folder, strict=True)) in expected
            looks += 1
        except LoraTreeError as error:  # opened before, read after: said so, never mixed
            assert "open the tree again" in str(error) or "no adapter there" in str(error), error
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert value(lt.load(folder, strict=True)) in expected
    assert lt.check(folder) == []


SAVER = """
from pathlib import Path
from zoo import adapter, opened
made, seed = opened({folder!r}), 100
while True:
    seed += 1
    made.update("fr/legal", adapter=adapter(seed % 2 + 100))
    made.update("grp/x", adapter=adapter(seed % 2 + 200))
    made.save(Path({folder!r}))
    if seed == 101:
        print("ready", flush=True)
"""


def test_killed_for_real(tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    code = SAVER.format(folder=str(folder))
    tree().save(folder)
    for delay_s in (0.05, 0.13, 0.31):
        saver = Forked(code)
        assert saver.stdout.readline() == "ready\n"
        time.sleep(delay_s)
        assert saver.kill()[0] == -signal.SIGKILL
        loaded = opened(folder)
        pair = {"fr/legal": loaded.adapter("fr/legal"), "grp/x": loaded.adapter("grp/x")}
        seeds = [(100, 200), (101, 201)]
        sums = [tuple(adapter(s).modules["q_proj"].A.sum().item() for s in both) for both in seeds]
        assert (
            tuple(a.modules["q_proj"].A.sum().item() for a in pair.values() if a is not None)
            in sums
        )
        again = opened(folder)
        for path, seed in (("fr/legal", 2), ("grp/x", 4)):
            again.update(path, adapter=adapter(seed))
        again.save(folder)
        assert value(lt.load(folder)) == value(tree())
        assert not (folder / record.HIDDEN).exists()
