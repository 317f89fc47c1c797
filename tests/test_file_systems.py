"""File systems that lack something, or fail: what was to be written is there, or one error names
the file.

Each call of the operating system that a save, an export or a served cache makes fails in turn, with
each answer that real file systems give.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from forked import Forked
from front import folder_of
from safetensors.torch import load_file
from shell import save_base
from torch import nn
from zoo import listing

import lora_tree as lt
from lora_tree.errors import LoraTreeError
from lora_tree.folder import survey
from lora_tree.folder.transactions.commit import writing
from lora_tree.integrations.flat_cache import FlatCache, FlatForm
from lora_tree.runs.checkpoint_factors import load_factors, save_factors
from lora_tree.runs.checkpoint_place import put_back, staged_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no flock:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::lora_tree.StaleWarning"),
]
Q = "model.layers.0.self_attn.q_proj"
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)
BROKEN = errno.EIO


def adapter(seed: int) -> lt.Adapter:
    return oracle.random_adapter({Q: (32, 32)}, seed, scale=0.5)


def dense(*seeds: int) -> torch.Tensor:
    """ΔW of a lineage, in float64."""
    parts = [oracle.dense(adapter(seed).modules[Q]) for seed in seeds]
    return torch.stack(parts).sum(0)


def tree(*seeds: int) -> lt.AdapterTree:
    made = lt.AdapterTree()
    made.add("fr", adapter=adapter(seeds[0]))
    made.add("fr/legal", adapter=adapter(seeds[1]))
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


@dataclass(frozen=True)
class Work:
    """Something that writes into a folder, and what must be there afterwards.

    Args:
        before: makes what is there already.
        do: writes.
        delta: what is there, as one ΔW; None where it has not been written.
        old, new: the ΔW before and after.
    """

    before: Callable[[Path], object]
    do: Callable[[Path, Path], object]
    delta: Callable[[Path, Path], torch.Tensor | None]
    old: torch.Tensor | None
    new: torch.Tensor


def _saved(folder: Path, base: Path) -> torch.Tensor:
    return lt.load(folder / "zoo").flatten("fr/legal").modules[Q].dense().double()


def _save(folder: Path, base: Path) -> None:
    opened = lt.load(folder / "zoo")
    opened.update("fr/legal", adapter=adapter(3))
    opened.save(folder / "zoo")


def _one(folder: Path, base: Path) -> torch.Tensor | None:
    there = folder / "one"
    return lt.Adapter.load(there).modules[Q].dense().double() if there.exists() else None


def _flat(folder: Path, base: Path) -> torch.Tensor | None:
    found = sorted(folder.glob("cache/*/adapter_config.json"))
    return lt.Adapter.load(found[0].parent).modules[Q].dense().double() if found else None


def _serve(folder: Path, base: Path) -> None:
    kept = FlatCache(folder / "cache", budget_bytes=1 << 30, form=FlatForm(8))
    try:
        kept.get(*survey(folder / "zoo"), "fr/legal")
    finally:
        folder_of(kept)._held.release()


def _merged(folder: Path, base: Path) -> torch.Tensor | None:
    file = folder / "merged/model.safetensors"
    if not file.exists():
        assert not (folder / "merged").exists()
        return None
    return (
        load_file(file)[f"{Q}.weight"] - load_file(base / "model.safetensors")[f"{Q}.weight"]
    ).double()


def _zoo(folder: Path) -> None:
    tree(1, 2).save(folder / "zoo")


def _model(*seeds: int) -> lt.TreeModel:
    """A model with a node that trains, named as the base's."""
    top = here = nn.Module()
    *above, name = Q.split(".")
    for part in above:
        here.add_module(part, nn.Module())
        here = here.get_submodule(part)
    here.add_module(name, nn.Linear(32, 32, bias=False))
    model = lt.attach(tree(*seeds), top)
    model.trainable("fr")
    return model


def _checkpoint(folder: Path, seed: int) -> None:
    with staged_checkpoint(folder / "run", "checkpoint-1", writes=True, meet=lambda: None) as stage:
        save_factors(_model(seed, 2), stage / "checkpoint-1")


def _trained(folder: Path, base: Path) -> torch.Tensor | None:
    put_back(folder / "run")
    there = folder / "run/checkpoint-1"
    if not there.exists():
        return None
    load_factors(model := _model(9, 2), there)
    model.tree.adapter("fr")
    kept = lt.Adapter.load(there / "nodes/fr").modules[Q].dense().double()
    assert torch.equal(model.tree.flatten("fr").modules[Q].dense().double().detach(), kept)
    return kept


def _look_through(folder: Path, base: Path) -> None:
    opened = lt.load(folder / "zoo")
    for path in opened.paths():
        opened.adapter(path)
    lt.check(folder / "zoo")
    lt.lock(folder / "zoo", accept_stale=True)


WORKS = {
    "a look through a tree": Work(_zoo, _look_through, _saved, dense(1, 2), dense(1, 2)),
    "a save": Work(_zoo, _save, _saved, dense(1, 2), dense(1, 3)),
    "a new tree": Work(
        lambda folder: None,
        lambda folder, base: tree(1, 2).save(folder / "zoo"),
        lambda folder, base: _saved(folder, base) if (folder / "zoo").exists() else None,
        None,
        dense(1, 2),
    ),
    "one adapter": Work(
        lambda folder: adapter(1).save(folder / "one"),
        lambda folder, base: adapter(2).save(folder / "one"),
        _one,
        dense(1),
        dense(2),
    ),
    "a portable export": Work(
        _zoo,
        lambda folder, base: lt.portable(lt.load(folder / "zoo"), "fr/legal").save(folder / "one"),
        _one,
        None,
        dense(1, 2),
    ),
    "an export as a model": Work(
        _zoo,
        lambda folder, base: lt.export_model(
            lt.load(folder / "zoo"), "fr/legal", folder / "merged", base=base
        ),
        _merged,
        None,
        dense(1, 2),
    ),
    "a training checkpoint": Work(
        lambda folder: ((folder / "run").mkdir(), _checkpoint(folder, 1)),
        lambda folder, base: _checkpoint(folder, 3),
        _trained,
        dense(1),
        dense(3),
    ),
    "a served cache": Work(_zoo, _serve, _flat, None, dense(1, 2)),
}


class Failing:
    """Calls that go through, but for one or all of them.

    Args:
        at: the number of the call that fails; None: all do.
        counts: whether a call is one of those that are counted.
    """

    def __init__(
        self, at: int | None, code: int, counts: Callable[..., bool] = lambda *_: True
    ) -> None:
        self.at, self.code, self.counts, self.seen = at, code, counts, 0

    def __call__(self, real: Callable[..., Any], *args: Any, **more: Any) -> Any:
        if self.counts(*args):
            self.seen += 1
            if self.at is None or self.seen == self.at + 1:
                file = [] if isinstance(args[0], int) else [args[0]]  # as the system tells it
                raise OSError(self.code, os.strerror(self.code), *file)
        return real(*args, **more)

    @property
    def fired(self) -> bool:
        return self.seen > (self.at or 0)


def faults(
    work: Work,
    base: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[tuple[Any, str]],
    code: int,
    counts: Callable[..., bool] = lambda *_: True,
    *,
    at_once: bool = False,
    each: int = 1,
) -> Iterator[tuple[Path, dict[str, bytes | None], LoraTreeError | None]]:
    """(Folder, what was in it, the error) of the same work, where its first call fails, its second,
    …; or all.

    ``each``: every so many calls are passed over, others for each kind of work.
    """
    start = len(str(work)) % each
    for at in [None] if at_once else range(start, 10_000, each):
        folder = scratch / "at"
        folder.mkdir()
        work.before(folder)
        before = listing(folder)
        failing = Failing(at, code, counts)
        error = None
        with monkeypatch.context() as patched:
            for module, name in calls:
                patched.setattr(module, name, partial(failing, getattr(module, name)))
            try:
                work.do(folder, base)
            except (
                LoraTreeError
            ) as raised:  # anything else, and a bare OSError above all, is a fault
                error = raised
        if failing.fired:
            yield folder, before, error
        shutil.rmtree(folder)
        if not failing.fired:
            assert at, "the faults did not reach the work"
            return


def close(got: torch.Tensor | None, wanted: torch.Tensor | None) -> bool:
    """The same ΔW; a merged one is the difference of two rounded weights."""
    if got is None or wanted is None:
        return got is wanted
    return torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


def left_of(folder: Path, before: dict[str, bytes | None]) -> set[str]:
    """What is in the folder that was not there, apart from a cache's own empty files."""
    own = re.compile(
        r"run/\.unfinished(/.*)?\Z|cache(/\.locks(/(budget|make-.|[0-9a-f]{32}\.held))?)?\Z"
    )
    return {name for name in listing(folder).keys() - before.keys() if not own.match(name)}


def came_true_or_named(
    work: Work,
    base: Path,
    folder: Path,
    before: dict[str, bytes | None],
    error: LoraTreeError | None,
) -> None:
    """The right numbers; or an error that names a file in there, and nothing left behind."""
    found = work.delta(folder, base)
    if error is None:
        assert close(found, work.new)
        assert not [
            name
            for name in left_of(folder, before)
            if re.search(r"\.lora_tree|\.(alone|shared)\.", name)
        ]
        return
    assert str(folder) in str(error).splitlines()[0], error
    if "the folder opens as the new tree" in str(error) or close(found, work.new):
        assert close(found, work.new)
        for place in (folder / "zoo", folder / "one"):
            if place.exists():
                with writing(place):  # the next writer carries out the rest
                    pass
            assert not (place / ".lora_tree").exists()
        return
    assert close(found, work.old)
    assert left_of(folder, before) == set()
    assert {name: data for name, data in listing(folder).items() if name in before} == before


LOCKED = [
    name for name in WORKS if name not in ("a portable export", "a training checkpoint")
]  # new folders need none
WRITTEN = [name for name in WORKS if name != "a look through a tree"]


@pytest.mark.parametrize("at_once", [False, True], ids=["each in turn", "all"])
@pytest.mark.parametrize("name", LOCKED)
def test_without_flock_everything_is_written_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path, name: str, at_once: bool
) -> None:
    work = WORKS[name]
    for code in NO_FLOCK:
        for folder, before, error in faults(
            work, base, tmp_path, monkeypatch, [(fcntl, "flock")], code, at_once=at_once
        ):
            assert error is None
            came_true_or_named(work, base, folder, before, error)


@pytest.mark.parametrize("name", LOCKED)
def test_a_lock_that_fails_is_told_with_its_file_and_nothing_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path, name: str
) -> None:
    work = WORKS[name]
    for folder, before, error in faults(
        work, base, tmp_path, monkeypatch, [(fcntl, "flock")], BROKEN
    ):
        assert error is None or "lock it" in str(error)
        came_true_or_named(work, base, folder, before, error)


def is_folder(file: int) -> bool:
    return stat.S_ISDIR(os.fstat(file).st_mode)


@pytest.mark.parametrize("at_once", [False, True], ids=["each in turn", "all"])
@pytest.mark.parametrize("name", WRITTEN)
def test_without_fsync_of_folders_everything_is_written_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path, name: str, at_once: bool
) -> None:
    work = WORKS[name]
    for code in NO_FOLDER_SYNC:
        calls = [(os, "fsync")]
        for folder, before, error in faults(
            work, base, tmp_path, monkeypatch, calls, code, is_folder, at_once=at_once
        ):
            assert error is None
            came_true_or_named(work, base, folder, before, error)


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", WRITTEN)
def test_an_fsync_that_fails_is_told_with_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path, name: str, code: int
) -> None:
    work, told = WORKS[name], 0
    for folder, before, error in faults(work, base, tmp_path, monkeypatch, [(os, "fsync")], code):
        came_true_or_named(work, base, folder, before, error)
        told += error is not None
    assert told > 1


EACH = 5
READS = [
    (builtins, "open"),
    (io, "open"),
    *((os, name) for name in ("open", "stat", "lstat", "listdir", "scandir")),
]
WRITES = [
    *(
        (os, name)
        for name in ("mkdir", "rename", "unlink", "rmdir", "write", "pwrite", "ftruncate", "utime")
    ),
    *((os, name) for name in ("copy_file_range", "fchmod", "chmod") if hasattr(os, name)),
]


@pytest.mark.parametrize("calls", [READS, WRITES], ids=["reads", "writes"])
@pytest.mark.parametrize("name", WORKS)
def test_no_error_of_the_system_comes_out_bare(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    base: Path,
    name: str,
    calls: list[tuple[Any, str]],
) -> None:
    def ours(first: object, *_: object) -> bool:
        return isinstance(first, int) or str(tmp_path) in os.fsdecode(first)  # type: ignore[arg-type]

    work, each = WORKS[name], EACH if calls is READS else 1
    for folder, _, error in faults(
        work, base, tmp_path, monkeypatch, calls, errno.EIO, ours, each=each
    ):
        if error is not None:
            assert re.search(f"{folder}|{base}|fr/legal", str(error)), error
        found = work.delta(folder, base)
        assert close(found, work.old) or close(found, work.new)


# ----------------------------------------------------------------- several processes, without flock
ALONE = """
import errno, fcntl, os, sys, time, warnings
def refuse(file, operation):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = refuse
warnings.simplefilter("ignore")
import lora_tree as lt
from oracle import random_adapter
def adapter(seed):
    return random_adapter({{ {module!r}: (32, 32)}}, seed, scale=0.5)
folder = {folder!r}
"""


def without_flock(folder: Path, body: str) -> Forked:
    return Forked(ALONE.format(module=Q, folder=str(folder)) + body)


def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_flock_processes_that_save_into_one_folder_lose_nothing(tmp_path: Path) -> None:
    _zoo(tmp_path)
    body = """
for i in range(4):
    while True:
        tree = lt.load(folder + "/zoo")
        tree.add(f"{me}{i}", adapter=adapter(i))
        try:
            tree.save(folder + "/zoo")
            break
        except lt.errors.FolderError as error:
            assert "another writer" in str(error), error  # it was saved meanwhile: open it again
"""
    savers = [without_flock(tmp_path, f"me = {name!r}\n{body}") for name in "abc"]
    assert [saver.end(300)[0] for saver in savers] == [0, 0, 0]
    found = lt.load(tmp_path / "zoo", strict=True)
    assert set(found.paths()) == {
        "fr",
        "fr/legal",
        *(f"{name}{i}" for name in "abc" for i in range(4)),
    }
    for name in "abc":
        for i in range(4):
            assert close(found.flatten(f"{name}{i}").modules[Q].dense().double(), dense(i))
    assert not (tmp_path / "zoo/.lora_tree").exists()


def test_without_flock_what_another_process_serves_stays_until_it_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _zoo(tmp_path)
    body = """
from lora_tree.folder import survey
from lora_tree.integrations.flat_cache import FlatCache, FlatForm
kept = FlatCache(folder + "/cache", budget_bytes=1 << 30, form=FlatForm(8))
print(kept.get(*survey(folder + "/zoo"), "fr").content, flush=True)
time.sleep(600)
"""
    server = without_flock(tmp_path, body)
    content = server.stdout.readline().strip()
    refused(monkeypatch)
    other = FlatCache(tmp_path / "cache", budget_bytes=1 << 30, form=FlatForm(8))
    try:
        assert content in folder_of(other).in_use_elsewhere()
        server.kill()
        assert content not in folder_of(other).in_use_elsewhere()
    finally:
        folder_of(other)._held.release()


def test_without_flock_the_stage_of_a_killed_export_is_cleared_and_that_of_a_living_one_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path
) -> None:
    _zoo(tmp_path)
    body = """
from lora_tree.export.model_folder import new_model_folder
from pathlib import Path
with new_model_folder(Path(folder) / "merged", needs_bytes=0) as stage:
    print(stage.folder.name, flush=True)
    time.sleep(600)
"""
    writer = without_flock(tmp_path, body)
    stage = tmp_path / writer.stdout.readline().strip()
    refused(monkeypatch)
    export = WORKS["an export as a model"]
    export.do(tmp_path, base)
    assert stage.is_dir()
    writer.kill()
    shutil.rmtree(tmp_path / "merged")
    export.do(tmp_path, base)
    assert close(export.delta(tmp_path, base), export.new)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["merged", "zoo"]
