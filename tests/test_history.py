"""What a save replaces is kept, numbered, compared and brought back; within a bound, and
atomically.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from forked import Forked
from sampling import slow
from test_folder_faults import MODULES, FaultyOs, Killed
from zoo import CONFIG, WEIGHTS, adapter, all_are_there, listing, opened, value

import lora_tree as lt
from lora_tree.cli import main
from lora_tree.errors import FolderError, LoraTreeError, PathError, SpecError, TreeError
from lora_tree.folder import disk
from lora_tree.folder.history_log import HISTORY, History, Version, parse_history, render_history
from lora_tree.folder.lockfile import HubLock
from lora_tree.folder.transactions import archive
from lora_tree.folder.transactions.record import check_places


def numbers(a: lt.Adapter | None) -> list[Any]:
    assert a is not None
    return [(n, v.A.tolist(), v.B.tolist(), v.scale) for n, v in sorted(a.modules.items())]


def replaced(zoo: Path, *seeds: int, path: str = "fr/legal") -> None:
    """Give a node one adapter after the other, each in a save of its own."""
    for seed in seeds:
        now = opened(zoo)
        now.update(path, adapter=adapter(seed))
        now.save(zoo, note=f"seed {seed}")


def kept(zoo: Path) -> set[str]:
    """The contents in the archive, each whole."""
    home = zoo / HISTORY
    found = {p.name for p in home.iterdir() if p.is_dir()} if home.exists() else set()
    for name in found:
        assert {p.name for p in (home / name).iterdir()} == {CONFIG, WEIGHTS}
    return found


def told(zoo: Path) -> dict[str, list[str]]:
    """Node → its contents, the oldest first."""
    return {path: [v.content for v in versions] for path, versions in lt.history(zoo).items()}


# ---------------------------------------------------------------------- kept and listed
def test_a_first_save_keeps_nothing(zoo: Path) -> None:
    assert not (zoo / HISTORY).exists()
    (only,) = lt.history(zoo)["fr/legal"]
    assert (only.is_present, only.by, only.weight) == (True, "tree.save()", 0.8)


def test_every_content_that_was_replaced_is_there_and_numbered_from_the_oldest(zoo: Path) -> None:
    replaced(zoo, 11, 12)
    versions = lt.history(zoo)["fr/legal"]
    assert [v.by for v in versions] == ["tree.save()", "seed 11", "seed 12"]
    assert [v.ended_by for v in versions] == ["seed 11", "seed 12", None]
    assert [v.is_present for v in versions] == [False, False, True]
    assert all(v.when is not None and v.when.endswith("Z") for v in versions)
    for number, seed in ((1, 2), (2, 11), (3, 12)):
        read, (path,) = lt.load_versions(zoo, f"fr/legal@{number}")
        assert path == "fr/legal"
        assert numbers(read.adapter(path)) == numbers(adapter(seed))
    read, (blend,) = lt.load_versions(zoo, f"fr/legal@{versions[1].content[:8]}:0.5+fr:0.5")
    assert blend == "fr/legal:0.5+fr:0.5"
    assert numbers(read.adapter("fr/legal")) == numbers(adapter(11))


def test_a_kept_content_is_an_adapter_that_peft_loads(zoo: Path) -> None:
    replaced(zoo, 11)
    (content,) = kept(zoo)
    factors = peft.utils.load_peft_weights(str(zoo / HISTORY / content), device="cpu")
    names = {name.split(".")[-3]: t for name, t in factors.items() if "lora_A" in name}
    assert torch.equal(names["q_proj"], adapter(2).modules["q_proj"].A)


def test_what_is_kept_costs_no_bytes_and_shares_none_with_the_tree(zoo: Path) -> None:
    before = (zoo / "fr/legal" / WEIGHTS).stat().st_ino
    replaced(zoo, 11)
    (content,) = kept(zoo)
    file = zoo / HISTORY / content / WEIGHTS
    assert file.stat().st_ino == before, "the old file itself, under another name"
    assert file.stat().st_nlink == 1, "a program that writes in place must not reach it"


def test_a_file_with_another_name_elsewhere_is_copied(zoo: Path, tmp_path: Path) -> None:
    os.link(zoo / "fr/legal" / WEIGHTS, tmp_path / "mine")
    replaced(zoo, 11)
    (content,) = kept(zoo)
    (tmp_path / "mine").write_bytes(b"overwritten in place")
    assert numbers(lt.Adapter.load(zoo / HISTORY / content)) == numbers(adapter(2))


def test_without_hard_links_files_are_copied(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "link", lambda *_: False)
    replaced(zoo, 11)
    (content,) = kept(zoo)
    assert numbers(lt.Adapter.load(zoo / HISTORY / content)) == numbers(adapter(2))


def test_a_content_that_two_nodes_had_is_stored_once(zoo: Path) -> None:
    now = opened(zoo)
    now.update("fr/medical", adapter=adapter(2))
    now.save(zoo)
    for path in ("fr/legal", "fr/medical"):
        replaced(zoo, 11, path=path)
    contents = {v.content for path in ("fr/legal", "fr/medical") for v in lt.history(zoo)[path]}
    assert len(contents) == 3  # adapters 2, 3 and 11
    assert len(kept(zoo)) == 2, "11 is the nodes' own"


def test_weight_and_content_make_a_version_and_a_move_makes_none(zoo: Path) -> None:
    now = opened(zoo)
    now.update("fr/legal", weight=0.5)
    now.save(zoo, note="set")
    assert not kept(zoo), "the content is the node's own still"
    now.move("fr/legal", "legal")
    now.save(zoo, note="mv")
    found = lt.history(zoo)
    assert "fr/legal" not in found
    assert [(v.weight, v.by) for v in found["legal"]] == [(0.8, "tree.save()"), (0.5, "set")]
    lt.restore(zoo, "legal@1")
    assert opened(zoo)["legal"].weight == 0.8


def test_a_weight_per_module_comes_back_in_the_order_of_its_patterns(zoo: Path) -> None:
    now = opened(zoo)
    now.update("fr/legal", weight={"v_*": 0.25, "*_proj": 0.5})
    now.save(zoo)
    before = opened(zoo)["fr/legal"].weight
    now.update("fr/legal", weight=1.0)
    now.save(zoo)
    lt.restore(zoo, "fr/legal@2")
    assert opened(zoo)["fr/legal"].weight == before


def test_a_history_follows_a_node_that_was_moved_and_changed_at_once(zoo: Path) -> None:
    now = opened(zoo)
    lt.rebase(now, "fr/legal", to="legal")
    now.save(zoo, note=lt.SaveNote(by="mv", moved={"fr/legal": "legal"}))
    assert len(lt.history(zoo)["legal"]) == 2
    assert numbers(lt.load_versions(zoo, "legal@1")[0].adapter("legal")) == numbers(adapter(2))


def test_the_lock_remembers_what_a_node_was_trained_with(zoo: Path) -> None:
    rows = zoo.parent / "rows.jsonl"
    rows.write_text("{}\n")
    training = lt.TrainedWith(
        nodes=["fr/legal"], data=lt.data_files([rows], zoo), settings={"lr": 0.1}
    )
    now = opened(zoo)
    now.update("fr/legal", adapter=adapter(11))
    note = lt.SaveNote(by="me", training={"fr/legal": training}, losses={"fr/legal": (2.0, 1.0)})
    now.save(zoo, note=note)
    replaced(zoo, 12)
    first, second, third = lt.history(zoo)["fr/legal"]
    assert (first.training, third.training) == (None, None)
    assert (second.training, second.losses) == (training, (2.0, 1.0))
    assert second.training is not None
    assert second.training.data[0].path == "../rows.jsonl"
    lt.restore(zoo, "fr/legal@2")
    assert lt.history(zoo)["fr/legal"][-1].training == training, "it goes with the content"
    now = opened(zoo)
    now.update("fr/legal", adapter=lt.Adapter.load(zoo / "fr/legal"))
    now.save(zoo, note="the same once more")
    assert lt.history(zoo)["fr/legal"][-1].training == training, "nothing has changed"
    lt.lock(zoo)
    assert lt.history(zoo)["fr/legal"][-1].training == training


# ---------------------------------------------------------------------- brought back
def test_a_restore_gives_the_very_bytes_back_and_is_itself_reversible(zoo: Path) -> None:
    before = listing(zoo)
    replaced(zoo, 11)
    changed = numbers(opened(zoo).adapter("fr/legal"))
    lt.restore(zoo, "fr/legal@1")
    after = listing(zoo)
    for name in (f"fr/legal/{CONFIG}", f"fr/legal/{WEIGHTS}", f"fr/{WEIGHTS}"):
        assert after[name] == before[name]
    assert not [p for p in lt.check(zoo) if p.kind != "stale"]
    lt.restore(zoo, "fr/legal@1")
    assert numbers(opened(zoo).adapter("fr/legal")) == changed
    assert len(lt.history(zoo)["fr/legal"]) == 2, "back and forth makes no third version"


def test_a_node_is_as_stale_as_it_was_with_that_version(zoo: Path) -> None:
    replaced(zoo, 11, path="fr")
    assert opened(zoo)["fr/legal"].stale
    (restored,) = lt.restore(zoo, "fr@1")
    assert restored.stale is None
    assert opened(zoo)["fr/legal"].stale is None, "its lineage is the one that it was trained on"


def test_removed_nodes_come_back_with_what_was_above_them(zoo: Path) -> None:
    whole = value(opened(zoo))
    now = opened(zoo)
    now.remove("fr", recursive=True)
    now.remove("grp", recursive=True)
    now.save(zoo, note="rm")
    found = lt.history(zoo)["fr/legal"]
    assert (len(found), found[0].ended_by) == (1, "rm")
    with pytest.raises(PathError, match="fr, above it in that version, is not in the tree"):
        lt.restore(zoo, "fr/legal")
    back = lt.restore(zoo, "fr/*", "fr", "grp/x@1")
    assert {r.path for r in back} == {"fr", "fr/legal", "fr/medical", "grp/x"}
    assert all(r.was_removed and r.stale is None for r in back)
    assert value(opened(zoo)) == whole
    assert not lt.check(zoo)
    assert all(len(versions) == 1 for versions in lt.history(zoo).values())
    assert not kept(zoo)


def test_an_adapter_that_its_user_named_is_named_again(zoo: Path, tmp_path: Path) -> None:
    adapter(21).save(tmp_path / "elsewhere")
    now = opened(zoo)
    now.add("it", adapter=tmp_path / "elsewhere")
    now.save(zoo)
    now.remove("it")
    now.save(zoo)
    assert not kept(zoo), "these files were never the tree's to keep"
    lt.restore(zoo, "it")
    again = opened(zoo)
    assert again["it"].home is None
    assert numbers(again.adapter("it")) == numbers(adapter(21))


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("fr/legal@4", PathError, "fr/legal has versions 1 to 2, got 4"),
        ("fr/legal@0", PathError, "versions 1 to 2"),
        ("fr/legal@beef", PathError, "at least 6 digits"),
        ("fr/legal@beefbeef", PathError, "no version beefbeef"),
        ("fr/legal", TreeError, "say which version"),
        ("fr/legl@1", PathError, "did you mean 'fr/legal'"),
        ("no/*", PathError, "matches no node that was removed"),
        ("../x@1", PathError, "is not a valid node name"),
    ],
)
def test_what_names_no_version_is_refused(
    zoo: Path, name: str, error: type[LoraTreeError], text: str
) -> None:
    replaced(zoo, 11)
    before = listing(zoo)
    with pytest.raises(error, match=text):
        lt.restore(zoo, name)
    assert listing(zoo) == before


def test_a_version_whose_files_were_changed_is_refused(zoo: Path) -> None:
    replaced(zoo, 11)
    (content,) = kept(zoo)
    file = zoo / HISTORY / content / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(LoraTreeError, match="have changed"):
        lt.restore(zoo, "fr/legal@1")
    with pytest.raises(LoraTreeError, match="not the files"):
        lt.load_versions(zoo, "fr/legal@1")[0].adapter("fr/legal")
    shutil.rmtree(file.parent)
    with pytest.raises(FolderError, match=r"fr/legal@1: the files of content \w+… are gone"):
        lt.restore(zoo, "fr/legal@1")


def test_two_trees_over_one_folder_keep_what_the_other_one_names(zoo: Path) -> None:
    shutil.copy(zoo / "tree.yaml", zoo / "other.yaml")
    lt.lock(zoo / "other.yaml")
    replaced(zoo, 11)
    lt.lock(zoo / "other.yaml")
    now = opened(zoo / "other.yaml")
    now.update("fr/legal", adapter=adapter(12))
    now.save(zoo / "other.yaml", note="other")
    assert [v.by for v in lt.history(zoo / "other.yaml")["fr/legal"]] == [None, "other"]
    assert len(kept(zoo)) == 2
    lt.gc(zoo / "other.yaml", versions=0)
    lt.lock(zoo)
    assert numbers(lt.load_versions(zoo, "fr/legal@1")[0].adapter("fr/legal")) == numbers(
        adapter(2)
    )


# ---------------------------------------------------------------------- within a bound
def test_so_many_contents_are_kept_as_the_tree_says(zoo: Path) -> None:
    now = opened(zoo)
    now.history = lt.spec.HistorySpec(versions=2)
    now.save(zoo)
    assert "versions: 2" in (zoo / "tree.yaml").read_text()
    replaced(zoo, 11, 12, 13)
    for weight in (0.1, 0.2, 0.3, 0.4):
        now = opened(zoo)
        now.update("fr/legal", weight=weight)
        now.save(zoo)
    versions = lt.history(zoo)["fr/legal"]
    assert len({v.content for v in versions[:-1]}) == 3, "two, and the present one's own"
    assert len(kept(zoo)) == 2, "weights that were tried push out no content"
    assert numbers(lt.load_versions(zoo, "fr/legal@1")[0].adapter("fr/legal")) == numbers(
        adapter(11)
    )


def test_nought_turns_it_off(zoo: Path) -> None:
    now = opened(zoo)
    now.history = lt.spec.HistorySpec(versions=0)
    now.update("fr/legal", adapter=adapter(11))
    now.save(zoo)
    assert not (zoo / HISTORY).exists()


def test_the_oldest_go_when_the_budget_has_no_room_and_a_warning_says_so(zoo: Path) -> None:
    size = sum((zoo / "fr/legal" / name).stat().st_size for name in (CONFIG, WEIGHTS))
    now = opened(zoo)
    now.history = lt.spec.HistorySpec(versions_budget=2 * size)
    now.save(zoo)
    replaced(zoo, 11, 12)
    with pytest.warns(lt.HistoryWarning, match="fr/legal: earlier versions were dropped"):
        replaced(zoo, 13)
    assert [v.by for v in lt.history(zoo)["fr/legal"]] == ["seed 11", "seed 12", "seed 13"]
    assert len(kept(zoo)) == 2


def test_gc_says_what_it_frees_and_frees_it(zoo: Path) -> None:
    replaced(zoo, 11, 12)
    stray = zoo / HISTORY / ("0" * 64)
    shutil.copytree(zoo / "fr", stray)
    for name in ("legal", "medical"):
        shutil.rmtree(stray / name)
    before = listing(zoo)
    told = lt.gc(zoo, versions=1, dry_run=True)
    assert listing(zoo) == before
    assert (told.nodes, len(told.contents), told.dry_run) == ({"fr/legal": 1}, 2, True)
    sizes = {p: p.stat().st_size for p in (zoo / HISTORY).rglob("adapter_*")}
    done = lt.gc(zoo, versions=1)
    assert (done.nodes, done.contents, done.dry_run) == (told.nodes, told.contents, False)
    assert done.nbytes == sum(size for p, size in sizes.items() if not p.exists())
    assert done.left_bytes == sum(size for p, size in sizes.items() if p.exists())
    assert [v.by for v in lt.history(zoo)["fr/legal"]] == ["seed 11", "seed 12"]
    assert not lt.check(zoo)


# -------------------------------------------------------------------- atomic, and nobody's to forge
def test_a_version_on_the_hub_keeps_its_name_there() -> None:
    hub = HubLock(adapter="hub:org/legal@main", commit="0" * 40)
    version = Version("1" * 64, 1.0, 9, None, "2026-01-01T00:00:00Z", "rm", "../cache", hub)
    history = History({"fr": (version,)})
    assert parse_history(render_history(history), "tree.json") == history


def test_a_content_that_a_cut_off_save_left_too_many_is_restored_all_the_same(zoo: Path) -> None:
    replaced(zoo, 11)
    present = lt.history(zoo)["fr/legal"][-1].content
    left = zoo / HISTORY / present
    left.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(zoo / "fr/legal" / name, left / name)
    (zoo / f".lora_tree/stage-{'0' * 32}").mkdir(parents=True)
    lt.restore(zoo, f"fr/legal@{present[:8]}")
    assert numbers(opened(zoo).adapter("fr/legal")) == numbers(adapter(11))
    assert not left.exists()


@slow
@pytest.mark.parametrize("what", ["restore", "gc"])
def test_killed_at_every_operation_it_is_as_before_or_done(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A save is killed likewise in test_folder_faults.py."""
    replaced(zoo, 11, 12)
    said = told(zoo)
    outcomes = []
    for at in range(10_000):
        folder = tmp_path / str(at)
        shutil.copytree(zoo, folder)
        faulty = FaultyOs(at, kills=True)
        with monkeypatch.context() as patched:
            for module in MODULES:
                patched.setattr(module, "os", faulty)
            with contextlib.suppress(Killed):
                if what == "gc":
                    lt.gc(folder, versions=1)
                else:
                    lt.restore(folder, "fr/legal@1")
        now = told(folder)
        outcomes.append(now != said)
        all_are_there(folder)
        if at % 5 and faulty.fired:
            shutil.rmtree(folder)
            continue  # what the next writer does depends on the phase alone, not on every step
        lt.lock(folder)  # a writer that changes no history
        live = {versions[-1].content for versions in lt.history(folder).values()}
        named = {v.content for versions in lt.history(folder).values() for v in versions}
        assert kept(folder) == named - live, "the next writer clears up"
        shutil.rmtree(folder)
        if not faulty.fired:
            break
    assert at > 20
    assert outcomes == sorted(outcomes)
    assert len(set(outcomes)) == 2


def test_a_narrow_terminal_cuts_neither_number_nor_content(
    zoo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(zoo, 5, 6)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit):
        main(["log", str(zoo), "fr/legal"])
    printed = capsys.readouterr().out
    for number, content in enumerate(told(zoo)["fr/legal"], 1):
        assert re.search(rf"^ +{number} .* {content[:8]} ", printed, re.MULTILINE)
    assert "by seed 6" in printed


def test_a_log_that_is_broken_is_named(zoo: Path) -> None:
    replaced(zoo, 11)
    log = zoo / HISTORY / "tree.json"
    good = log.read_text()
    for bad in ("{", good.replace('"content": "', '"content": "../'), good.replace("fr/legal", "")):
        log.write_text(bad)
        for act in (lambda: lt.history(zoo), lambda: replaced(zoo, 12)):
            with pytest.raises(SpecError, match=r"\.versions/tree\.json"):
                act()
    log.write_text(json.dumps({"version": 2}))
    with pytest.raises(SpecError, match="newer lora_tree"):
        lt.history(zoo)
    assert numbers(opened(zoo).adapter("fr/legal")) == numbers(adapter(11)), "the tree opens"


@pytest.mark.parametrize(
    ("writes", "deletes"),
    [
        ([], [f"{HISTORY}/tree.json"]),
        ([f"{HISTORY}/tree.txt"], []),
        ([f"{HISTORY}/{'0' * 64}/{WEIGHTS}"], []),
    ],
)
def test_a_record_may_replace_a_log_and_nothing_else_there(
    zoo: Path, writes: list[str], deletes: list[str]
) -> None:
    check_places(zoo, [f"{HISTORY}/tree.json"], [])
    with pytest.raises(SpecError, match="no file that a save"):
        check_places(zoo, writes, deletes)


def test_an_archive_that_is_a_link_is_refused(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (zoo / HISTORY).symlink_to(tmp_path / "outside")
    with pytest.raises(SpecError, match="a link"):
        replaced(zoo, 11)
    assert not list((tmp_path / "outside").iterdir())


def test_a_version_is_added_beside_its_node_on_the_nodes_above_it_now(zoo: Path) -> None:
    replaced(zoo, 11)
    tree = opened(zoo)
    path = lt.version_beside(tree, zoo, "fr/legal@1")
    assert path == "fr/legal.1"
    earlier, _ = lt.load_versions(zoo, "fr/legal@1")
    assert numbers(tree.flatten(path)) == numbers(earlier.flatten("fr/legal"))
    assert tree[path].weight == earlier["fr/legal"].weight == 0.8
    assert numbers(tree.adapter("fr/legal")) == numbers(adapter(11))


def test_a_version_whose_ancestors_were_removed_says_what_to_name(zoo: Path) -> None:
    fr, legal = opened(zoo).adapter("fr"), opened(zoo).adapter("fr/legal")
    now = opened(zoo)
    now.remove("fr", recursive=True)
    now.save(zoo)
    for read in (
        lambda: lt.load_versions(zoo, "fr/legal@1"),
        lambda: lt.version_beside(opened(zoo), zoo, "fr/legal@1"),
    ):
        with pytest.raises(PathError) as refused:
            read()
        assert str(refused.value) == (
            "fr/legal: fr, above it in that version, is not in the tree\n"
            '  read it on a version of each: add --on fr@1, or load_versions(…, "fr/legal@1", '
            '"fr@1")'
        )
    tree, _ = lt.load_versions(zoo, "fr/legal@1", "fr@1")
    assert numbers(tree.adapter("fr")) == numbers(fr)
    assert numbers(tree.adapter("fr/legal")) == numbers(legal)
    with pytest.raises(
        PathError, match="bring back those as well: lora-tree restore … fr fr/legal"
    ):
        lt.restore(zoo, "fr/legal@1")


def test_readers_beside_a_writer_see_whole_versions(zoo: Path) -> None:
    replaced(zoo, 11)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from test_history import replaced\n"
        "for seed in range(20, 26): replaced(Path(sys.argv[1]), seed)\n"
    )
    writer = Forked(code, zoo)
    contents = 0
    try:
        while writer.process.is_alive():
            versions = lt.history(zoo)["fr/legal"]
            contents = max(contents, len(versions))
            assert versions[-1].is_present
            # By its digits: a number may mean another version by the time it is looked up.
            name = f"fr/legal@{versions[-1].content[:12]}"
            read, _ = lt.load_versions(zoo, name)
            assert read["fr/legal"].has_adapter
    finally:
        code, _ = writer.end()
    assert code == 0
    assert contents == 6


def test_the_archive_holds_no_more_after_a_refused_save(zoo: Path, monkeypatch: Any) -> None:
    before = listing(zoo)

    def full(*_: Any, **__: Any) -> None:
        raise FolderError("disk full")

    monkeypatch.setattr(disk, "write", full)
    with pytest.raises(FolderError, match="disk full"):
        replaced(zoo, 11)
    assert listing(zoo) == before
    assert archive.archived(zoo) == set()
