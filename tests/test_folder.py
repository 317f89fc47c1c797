"""The folder is the tree: round trips, what counts as a node, what the lock says, what save may and may not do."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from zoo import adapter, listing, opened, tree, value

import lora_tree as lt
from lora_tree.errors import (
    FolderError,
    FormatError,
    LoraTreeError,
    SpecError,
    StaleError,
    UnlockedError,
    UnsupportedAdapter,
)
from lora_tree.folder import bases, notes, record

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    tree().save(tmp_path / "zoo")
    return tmp_path / "zoo"


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


# ---------------------------------------------------------------------- round trips
def test_a_round_trip_changes_nothing(zoo: Path, tmp_path: Path) -> None:
    again = lt.load(zoo, strict=True)
    assert value(again) == value(tree())
    before = listing(zoo)
    again.save(zoo)
    assert listing(zoo) == before
    again.save(tmp_path / "other")
    assert value(lt.load(tmp_path / "other", strict=True)) == value(tree())
    assert listing(zoo) == before
    assert lt.check(zoo) == lt.check(tmp_path / "other") == []


def test_what_lies_in_a_saved_folder(zoo: Path) -> None:
    assert [name for name, data in listing(zoo).items() if data is not None] == [
        *(f"fr/{file}" for file in (CONFIG, WEIGHTS)),
        *(f"fr/legal/{file}" for file in (CONFIG, WEIGHTS)),
        *(f"fr/medical/{file}" for file in (CONFIG, WEIGHTS)),
        *(f"grp/x/{file}" for file in (CONFIG, WEIGHTS)),
        "tree.lock",
        "tree.yaml",
    ]
    assert (zoo / "tree.yaml").read_text() == (
        "version: 1\nbase: org/model\ndefaults:\n  r: 4\n  target_modules: [q_proj]\n"
        "tree:\n  de:\n    r: 8\n  fr:\n    children:\n      legal:\n        weight: 0.8\n"
    )


def test_bytes_do_not_depend_on_the_order_of_adding(tmp_path: Path) -> None:
    one, two = (
        tree(),
        lt.AdapterTree(base="org/model", defaults={"target_modules": ["q_proj"], "r": 4}),
    )
    two.add("grp", group=True)
    two.add("de", r=8)
    two.add("grp/x", adapter=adapter(4))
    two.add("fr", adapter=adapter(1))
    two.add("fr/medical", adapter=adapter(3))
    two.add("fr/legal", adapter=adapter(2), weight=0.8)
    one.save(tmp_path / "one")
    two.save(tmp_path / "two")
    assert {**listing(tmp_path / "one"), "tree.lock": b""} == {
        **listing(tmp_path / "two"),
        "tree.lock": b"",
    }


def test_an_empty_tree_opens_again(tmp_path: Path) -> None:
    lt.AdapterTree().save(tmp_path / "zoo")
    assert (tmp_path / "zoo" / "tree.yaml").read_text() == "version: 1\n"
    assert len(lt.load(tmp_path / "zoo")) == 0


def test_the_tree_stays_usable_after_a_save(zoo: Path, tmp_path: Path) -> None:
    loaded = lt.load(zoo)
    loaded.save(tmp_path / "other")
    shutil.rmtree(zoo)
    assert value(loaded) == value(tree())


def test_opening_reads_no_weights(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a file was hashed")

    monkeypatch.setattr("lora_tree.folder.disk.digest", refuse)
    assert len(lt.load(zoo)) == 6


def test_opening_a_thousand_nodes_is_fast(tmp_path: Path) -> None:
    adapter(1).save(tmp_path / "one")
    many = tmp_path / "zoo"
    for i in range(1000):
        folder = many / f"n{i // 100}" / f"n{i}"
        folder.mkdir(parents=True)
        for name in (CONFIG, WEIGHTS):
            os.link(tmp_path / "one" / name, folder / name)
    lt.lock(many)
    start = time.perf_counter()
    assert len(lt.load(many)) == 1010
    assert time.perf_counter() - start < 1.5


# ---------------------------------------------------------------------- what is a node
def test_a_nested_folder_opens_as_stacked(tmp_path: Path) -> None:
    loaded = lt.load(nested(tmp_path, "fr", "fr/legal", "x/y/z"))
    assert loaded.paths() == ["fr", "fr/legal", "x", "x/y", "x/y/z"]
    assert not loaded["x"].has_adapter
    assert loaded["x"].fresh is None
    assert loaded.base == "org/model"  # all of them name it


def test_what_a_yaml_says_and_what_the_folders_hold_come_together(tmp_path: Path) -> None:
    nested(tmp_path / "zoo", "fr", "off")
    adapter(7).save(tmp_path / "elsewhere")
    write(
        tmp_path / "zoo/tree.yaml",
        "version: 1\ndefaults: {target_modules: [q_proj]}\ntree:\n  fr: {weight: 0.5, children: {legal: {adapter: "
        "../elsewhere}}}\n  123: {r: 2}\n  no: {}\n  off: {adapter: null}\n",
    )
    loaded = lt.load(tmp_path / "zoo")
    assert loaded.paths() == ["123", "fr", "fr/legal", "no", "off"]
    assert loaded["fr"].weight == 0.5
    assert loaded["fr"].has_adapter
    assert loaded["fr/legal"].source is not None
    assert loaded["fr/legal"].source.where == tmp_path / "elsewhere"
    assert loaded["123"].fresh == lt.LoraSpec(r=2)
    assert loaded["no"].fresh == lt.LoraSpec()
    assert not loaded["off"].has_adapter
    assert loaded["off"].fresh is None


def test_a_yaml_is_opened_by_its_name(tmp_path: Path) -> None:
    nested(tmp_path, "fr", "de")
    write(tmp_path / "tree.yaml", "version: 1\nbase: one\n")
    write(tmp_path / "my.yaml", "version: 1\nbase: two\ntree: {de: {adapter: null}}\n")
    assert lt.load(tmp_path / "tree.yaml").base == lt.load(tmp_path).base == "one"
    mine = lt.load(tmp_path / "my.yaml")
    assert mine.base == "two"
    assert not mine["de"].has_adapter
    lt.lock(tmp_path / "my.yaml")
    assert (tmp_path / "my.lock").exists()
    assert not (tmp_path / "tree.lock").exists()
    mine.update("fr", weight=0.5)
    mine.save(tmp_path / "my.yaml")
    assert lt.load(tmp_path / "my.yaml")["fr"].weight == 0.5
    assert lt.load(tmp_path)["fr"].weight == 1.0


def test_a_base_in_a_folder_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "models/base/config.json", "{}")
    nested(tmp_path / "zoo", "fr")
    text = write(
        tmp_path / "zoo/tree.yaml", "version: 1\nbase: ../models/base  # ours\n"
    ).read_text()
    loaded = lt.load(tmp_path / "zoo")
    assert loaded.base == str(tmp_path / "models/base")
    loaded.save(tmp_path / "zoo")
    assert (tmp_path / "zoo/tree.yaml").read_text() == text
    loaded.save(tmp_path / "a/b")
    assert "base: ../../models/base\n" in (tmp_path / "a/b/tree.yaml").read_text()


def refused(folder: Path, error: type[LoraTreeError]) -> str:
    """What load says; check has to list it too, and must not raise."""
    with pytest.raises(error) as caught:
        lt.load(folder)
    text = str(caught.value)
    assert any(problem.text.splitlines()[0] in text for problem in lt.check(folder))
    return text


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("", "checkpoint-10"), "the output of a Trainer"),
        (("", "other"), "PEFT's save of several adapters"),
        (("",), "this is one adapter: open it with Adapter.load"),
        (
            ("run/checkpoint-500", "run/checkpoint-1000"),
            "checkpoint-500 looks like a step of a Trainer's run",
        ),
        (("a b",), "'a b' is not a valid node name"),
        (("con",), "'con' is not a valid node name"),
        (("fr", "FR"), "node fr differs from FR only by case"),
        (("fr/x", "FR/y"), "node fr differs from FR only by case"),
    ],
)
def test_folders_that_plainly_mean_something_else(
    tmp_path: Path, paths: tuple[str, ...], message: str
) -> None:
    assert message in refused(nested(tmp_path / "zoo", *paths), FolderError)


def test_a_node_of_a_tree_is_told_as_that_and_no_advice_would_break_the_tree(zoo: Path) -> None:
    for node in ("fr", "fr/legal"):
        text = refused(zoo / node, FolderError)
        assert f"this is the node {node} of the tree {zoo}; open that tree" in text
        assert "move" not in text
        assert "copy" not in text
    assert notes(zoo / "grp") == [
        f"{zoo}/grp: grp of the tree {zoo}; what lies above it there is not counted here"
    ]
    assert notes(zoo) == []
    for name in ("tree.yaml", "tree.lock"):
        (zoo / name).unlink()
    assert "where this is a node of a tree, open the folder above it" in refused(
        zoo / "fr", FolderError
    )


def test_a_checkpoint_can_be_named(tmp_path: Path) -> None:
    nested(tmp_path, "run/checkpoint-500")
    write(tmp_path / "tree.yaml", "version: 1\ntree: {fr: {adapter: run/checkpoint-500}}\n")
    assert lt.load(tmp_path).paths() == ["fr"]


@pytest.mark.parametrize(
    "place", ["tree.yml", "tree.lock", "own.yaml", f"fr/{CONFIG}", f"fr/{WEIGHTS}"]
)
def test_a_folder_with_the_name_of_a_file_is_no_node(tmp_path: Path, place: str) -> None:
    nested(tmp_path, "fr")
    if place.startswith("fr/"):
        (tmp_path / place).unlink()
    nested(tmp_path, place)
    files = listing(tmp_path)
    refused(tmp_path, LoraTreeError)
    with pytest.raises(LoraTreeError):
        tree().save(tmp_path)
    assert listing(tmp_path) == files


@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_nodes_called_like_checkpoints_are_listed_in_tree_yaml_and_open_again(
    tmp_path: Path, targets: list[str] | None
) -> None:
    adapter(9).save(tmp_path / "run/checkpoint-500")
    made = lt.AdapterTree(defaults=dict(target_modules=targets) if targets else None)
    made.add("checkpoint-100", adapter=adapter(1))
    made.add("fr", adapter=adapter(2))
    made.add("fr/checkpoint-1", group=True)
    made.add("fr/checkpoint-1/x", adapter=adapter(3))
    made.add("checkpoint-500", adapter=tmp_path / "run/checkpoint-500")
    made.save(tmp_path / "zoo")
    assert value(lt.load(tmp_path / "zoo", strict=True)) == value(made)
    assert lt.check(tmp_path / "zoo") == []
    files = listing(tmp_path / "zoo")
    assert b"  checkpoint-100: {}\n" in (files["tree.yaml"] or b"")
    loaded = lt.load(tmp_path / "zoo")
    loaded.save(tmp_path / "zoo")
    assert listing(tmp_path / "zoo") == files
    loaded.update("fr", weight=0.5)
    loaded.save(tmp_path / "zoo", copy=True)
    assert value(opened(tmp_path / "zoo")) == value(loaded)
    (tmp_path / "zoo/tree.yaml").unlink()
    assert "looks like a step of a Trainer's run" in refused(tmp_path / "zoo", FolderError)


def test_a_checkpoint_below_one_that_is_listed_is_refused(tmp_path: Path) -> None:
    nested(tmp_path, "checkpoint-1", "checkpoint-1/checkpoint-2")
    write(tmp_path / "tree.yaml", "version: 1\ntree: {checkpoint-1: {}}\n")
    assert "checkpoint-2 looks like a step of a Trainer's run" in refused(tmp_path, FolderError)


def finished_runs(folder: Path, *runs: str) -> dict[str, lt.Adapter]:
    """What trainers leave: the final adapter of each run on top, its checkpoints with other files below."""
    final = {}
    for seed, run in enumerate(runs):
        for number, step in enumerate(
            ("", "checkpoint-500", "checkpoint-1000", "checkpoint-1000/old")
        ):
            adapter(10 * seed + number).save(folder / run / step)
            for other in ("optimizer.pt", "trainer_state.json", "tokenizer.json"):
                write(folder / run / step / other, "x")
        final[run] = adapter(10 * seed)
    return final


def test_a_folder_of_finished_runs_is_the_tree_of_their_final_adapters(tmp_path: Path) -> None:
    final = finished_runs(tmp_path / "runs", "french", "german", "german/legal")
    loaded = lt.load(tmp_path / "runs")
    assert loaded.paths() == ["french", "german", "german/legal"]
    for run, expected in final.items():
        got = loaded.adapter(run)
        assert got is not None
        for name, value_ in expected.modules.items():
            assert torch.equal(got.modules[name].dense(), value_.dense())
    assert lt.check(tmp_path / "runs") == []
    told = notes(tmp_path / "runs")
    assert [line.partition(":")[0] for line in told] == ["french", "german", "german/legal"]
    assert "french/checkpoint-500" in told[0]
    lt.lock(tmp_path / "runs")
    before = listing(tmp_path / "runs")
    again = lt.load(tmp_path / "runs", strict=True)
    again.save(tmp_path / "runs")
    assert listing(tmp_path / "runs") == before
    again.update("german/legal", weight=0.5)
    again.save(tmp_path / "runs")
    assert lt.load(tmp_path / "runs", strict=True).paths() == ["french", "german", "german/legal"]
    assert {name for name in before if "checkpoint" in name} <= set(listing(tmp_path / "runs"))


def test_a_link_to_a_run_s_last_step_is_passed_over_with_it(tmp_path: Path) -> None:
    finished_runs(tmp_path, "french")
    (tmp_path / "french/latest").symlink_to("checkpoint-1000")
    (tmp_path / "french/checkpoint-500/base").symlink_to(tmp_path)
    assert lt.load(tmp_path).paths() == ["french"]
    (tmp_path / "french/latest").unlink()
    (tmp_path / "french/latest").symlink_to(tmp_path / "french")
    assert "latest: a link to" in refused(tmp_path, FolderError)


def test_a_step_without_the_final_adapter_above_it_is_still_refused(tmp_path: Path) -> None:
    finished_runs(tmp_path, "french")
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "french" / name).unlink()
    assert "checkpoint-500 looks like a step of a Trainer's run" in refused(tmp_path, FolderError)


def test_a_save_that_would_leave_steps_without_their_run_is_refused(tmp_path: Path) -> None:
    made = lt.AdapterTree()
    for seed, path in enumerate(("french", "german")):
        made.add(path, adapter=adapter(seed))
    made.save(tmp_path)
    adapter(7).save(tmp_path / "french/checkpoint-500")
    loaded = lt.load(tmp_path)
    loaded.remove("french")
    untouched(
        tmp_path, lambda: loaded.save(tmp_path), match="french/checkpoint-500: no node's any more"
    )


def test_a_step_that_tree_yaml_lists_is_a_node_and_the_others_are_passed_over(
    tmp_path: Path,
) -> None:
    finished_runs(tmp_path, "french")
    shutil.rmtree(tmp_path / "french/checkpoint-1000/old")
    write(tmp_path / "tree.yaml", "version: 1\ntree: {french: {children: {checkpoint-500: {}}}}\n")
    assert lt.load(tmp_path).paths() == ["french", "french/checkpoint-500"]
    assert [line.split(":")[1] for line in notes(tmp_path)] == [
        " passed over french/checkpoint-1000"
    ]


def broken_zoo(folder: Path) -> dict[str, str]:
    """A folder with every kind of broken node beside whole ones: node → a word of its reason."""
    nested(
        folder,
        "fr",
        "fr/law",
        "fr/law/eu",
        "de",
        "de/x",
        "it",
        "es",
        "a b",
        "half",
        "lfs",
        "lfs/below",
    )
    config = json.loads((folder / "es" / CONFIG).read_text())
    write(folder / "es" / CONFIG, json.dumps({**config, "use_dora": True}))
    (folder / "half" / CONFIG).unlink()
    (folder / "lfs" / WEIGHTS).write_bytes(POINTER)
    (folder / "latest").symlink_to("fr")
    write(
        folder / "tree.yaml",
        "version: 1\nbase: org/model\ntree: {named: {adapter: gone, children: {x: {r: 2}}}}\n",
    )
    adapter(12).save(folder / "named/y")
    return {
        "es": "use_dora", "a b": "not a valid node name", "half": "half an adapter", "lfs": "not a whole safetensors",
        "lfs/below": "lies below lfs", "latest": "a link to", "named": "no adapter there",
        "named/x": "lies below named", "named/y": "lies below named",
    }  # fmt: skip


def test_broken_folders_do_not_hide_the_others(tmp_path: Path) -> None:
    reasons = broken_zoo(tmp_path)
    with pytest.raises(LoraTreeError) as caught:
        lt.load(tmp_path)
    assert str(caught.value).splitlines()[-1] == (
        f"  to go on without them: lora_tree.load({str(tmp_path)!r}, skip_broken=True), or --skip-broken"
    )
    assert (
        str(caught.value).splitlines()[-2]
        == f"  these and all other problems: lora-tree check {tmp_path}"
    )
    with pytest.warns(lt.SkippedWarning) as warned:
        loaded = lt.load(tmp_path, skip_broken=True)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert loaded.paths() == ["de", "de/x", "fr", "fr/law", "fr/law/eu", "it"]
    whole = nested(tmp_path / "whole", "fr", "fr/law", "fr/law/eu", "de", "de/x", "it")
    assert {**value(loaded), "": 0} == {**value(lt.load(whole)), "": 0}
    assert loaded.base == "org/model"
    assert "Git LFS pointer" in str(warned[0].message)
    for node, reason in reasons.items():
        assert re.search(rf"(?m)^  .*\b{node}\b.*{reason}", str(warned[0].message)), node


def test_nodes_that_are_unlocked_are_left_out_too_and_the_root_s_own_files_never_are(
    zoo: Path,
) -> None:
    nudge(zoo / "fr" / WEIGHTS)
    with pytest.warns(
        lt.SkippedWarning,
        match=r"(?s)fr: .*other contents than the lock says.*fr/legal: lies below fr",
    ):
        loaded = lt.load(zoo, skip_broken=True)
    assert loaded.paths() == ["de", "grp", "grp/x"]
    assert lt.load(nested(zoo.parent / "sound", "fr"), skip_broken=True).paths() == ["fr"]
    write(zoo / "tree.yaml", "version: [")
    with pytest.raises(SpecError) as caught:
        lt.load(zoo, skip_broken=True)
    assert "skip_broken" not in str(caught.value)


def test_a_tree_with_nodes_left_out_does_not_save_over_the_whole_one(tmp_path: Path) -> None:
    broken_zoo(tmp_path / "zoo")
    with pytest.warns(lt.SkippedWarning):
        loaded = lt.load(tmp_path / "zoo", skip_broken=True)
    before = listing(tmp_path / "zoo")
    with pytest.raises(LoraTreeError):
        loaded.save(tmp_path / "zoo")
    assert listing(tmp_path / "zoo") == before
    loaded.save(tmp_path / "other")
    assert lt.load(tmp_path / "other").paths() == loaded.paths()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_half_an_adapter(tmp_path: Path, name: str) -> None:
    other = CONFIG if name == WEIGHTS else WEIGHTS
    nested(tmp_path, "fr", "de")
    (tmp_path / "fr" / other).unlink()
    assert f"fr: half an adapter: {name} without {other}" in refused(tmp_path, FormatError)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    nested(tmp_path, "fr")
    (tmp_path / "fr" / WEIGHTS).rename(tmp_path / "fr/adapter_model.bin")
    assert "is a pickle, which can run code" in refused(tmp_path, FormatError)


def test_a_named_adapter_that_is_not_there_has_its_line(tmp_path: Path) -> None:
    write(tmp_path / "tree.yaml", "version: 1\ntree:\n  fr:\n    adapter: gone\n")
    assert f"{tmp_path}/tree.yaml:4:5: node fr: {tmp_path}/gone: no adapter there" in refused(
        tmp_path, FormatError
    )


def test_two_adapters_for_one_node(tmp_path: Path) -> None:
    nested(tmp_path, "fr", "de")
    write(tmp_path / "tree.yaml", "version: 1\ntree:\n  fr:\n    adapter: de\n")
    assert "holds an adapter too; remove one" in refused(tmp_path, FormatError)


def test_links(tmp_path: Path) -> None:
    nested(tmp_path / "zoo", "fr")
    nested(tmp_path / "out", "de")
    (tmp_path / "zoo/de").symlink_to(tmp_path / "out/de")
    assert "zoo/de: a link to" in refused(tmp_path / "zoo", FolderError)
    write(tmp_path / "zoo/tree.yaml", "version: 1\ntree: {de: {adapter: de}}\n")
    assert lt.load(tmp_path / "zoo").paths() == ["de", "fr"]
    (tmp_path / "zoo/de").unlink()
    (tmp_path / "zoo/tree.yaml").unlink()
    (tmp_path / "zoo/latest").symlink_to("fr")
    assert "zoo/latest: a link to" in refused(tmp_path / "zoo", FolderError)
    (tmp_path / "zoo/latest").unlink()
    (tmp_path / "zoo/fr" / WEIGHTS).rename(tmp_path / "out/weights")
    (tmp_path / "zoo/fr" / WEIGHTS).symlink_to(tmp_path / "out/weights")
    assert "a link that leads out of" in refused(tmp_path / "zoo", FolderError)
    os.replace(tmp_path / "out/weights", tmp_path / "zoo/blob")
    (tmp_path / "zoo/fr" / WEIGHTS).unlink()
    (tmp_path / "zoo/fr" / WEIGHTS).symlink_to("../blob")
    assert (
        value(lt.load(tmp_path / "zoo"))["fr"]
        == value(lt.load(nested(tmp_path / "new", "fr")))["fr"]
    )


def hub_snapshot(plain: Path, cache: Path) -> Path:
    """The files of a folder as huggingface_hub keeps them: links into the blobs of their repository."""
    repository = cache / "models--org--library"
    snapshot = repository / "snapshots" / ("b" * 40)
    (repository / "blobs").mkdir(parents=True)
    for file in sorted(path for path in plain.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("files", ["the adapters alone", "tree.yaml and tree.lock too"])
def test_a_snapshot_in_the_hub_s_cache_is_the_tree_that_was_uploaded(
    tmp_path: Path, files: str
) -> None:
    if files == "the adapters alone":
        nested(tmp_path / "plain", "answer/lora", "answer/lora/legal", "rewrite")
    else:
        tree().save(tmp_path / "plain")
    snapshot = hub_snapshot(tmp_path / "plain", tmp_path / "hub")
    for outside in (True, False):
        assert value(lt.load(snapshot, outside=outside)) == value(lt.load(tmp_path / "plain"))
    assert lt.check(snapshot) == []
    one = next(path for path in lt.load(snapshot).paths() if lt.load(snapshot)[path].has_adapter)
    (tmp_path / "linked").symlink_to(snapshot)
    assert value(lt.load(tmp_path / "linked")) == value(lt.load(tmp_path / "plain"))
    below = snapshot / one.partition("/")[0]
    assert lt.Adapter.load(snapshot / one).numel > 0
    assert below.is_dir()


def test_a_snapshot_does_not_lead_into_another_repository(tmp_path: Path) -> None:
    snapshot = hub_snapshot(nested(tmp_path / "plain", "fr"), tmp_path / "hub")
    other = tmp_path / "hub/models--org--private/blobs"
    other.mkdir(parents=True)
    (snapshot / "fr" / WEIGHTS).resolve().rename(other / "weights")
    (snapshot / "fr" / WEIGHTS).unlink()
    (snapshot / "fr" / WEIGHTS).symlink_to(other / "weights")
    assert "a link that leads out of" in refused(snapshot, FolderError)


def test_a_hub_id_where_a_folder_is_expected_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = r"org/legal: no such folder\n.*huggingface_hub.snapshot_download\('org/legal'\) does"
    with pytest.raises(FormatError, match=told):
        lt.Adapter.load("org/legal")
    with pytest.raises(FormatError, match=told):
        lt.AdapterTree().add("fr", adapter="org/legal")
    with pytest.raises(FolderError, match=r"(?s)no such folder.*snapshot_download\('org/zoo'\)"):
        lt.load("org/zoo")
    write(tmp_path / "zoo/tree.yaml", "version: 1\ntree:\n  fr:\n    adapter: org/legal\n")
    text = refused(tmp_path / "zoo", FormatError)
    assert f"tree.yaml:4:5: node fr: {tmp_path}/zoo/org/legal: no such folder" in text
    assert "huggingface_hub.snapshot_download('org/legal')" in text
    for path in (".hidden/legal", "a/b/c", "legal"):
        with pytest.raises(FormatError, match="no adapter there") as caught:
            lt.Adapter.load(f"{tmp_path}/{path}" if path == "legal" else path)
        assert "snapshot_download" not in str(caught.value)
    (tmp_path / "org").mkdir()  # then it is a folder that was misspelled
    with pytest.raises(FormatError, match="no adapter there"):
        lt.Adapter.load("org/legal")


@pytest.mark.parametrize(
    ("named", "todo"),
    [
        (f"one/{WEIGHTS}", "name the folder that it lies in: one"),
        ("x.safetensors", None),
        ("one/notes/x", None),
    ],
)
def test_a_file_where_the_folder_of_an_adapter_is_expected_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, todo: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter(1).save(tmp_path / "one")
    for file in ("x.safetensors", "one/notes"):
        (tmp_path / file).write_bytes(b"x")
    write(tmp_path / "tree.yaml", f"version: 1\ntree:\n  fr:\n    adapter: {named}\n")
    texts = [refused(tmp_path, FormatError)]
    assert f"{tmp_path}/tree.yaml:4:5: node fr: {tmp_path}/{named}: " in texts[0]
    for use in (lt.Adapter.load, lambda folder: lt.AdapterTree().add("fr", adapter=folder)):
        with pytest.raises(FormatError) as caught:
            use(named)
        texts.append(str(caught.value))
    for text in texts:
        told = "no adapter there" if named == "one/notes/x" else "an adapter is a folder that holds"
        assert told in text
        assert ".lora_tree" not in text
        assert todo is None or todo in text


def test_a_weights_file_that_becomes_a_link_later_is_not_followed(tmp_path: Path) -> None:
    loaded = lt.load(nested(tmp_path / "zoo", "fr"))
    (tmp_path / "zoo/fr" / WEIGHTS).rename(tmp_path / "weights")
    (tmp_path / "zoo/fr" / WEIGHTS).symlink_to(tmp_path / "weights")
    with pytest.raises(FormatError, match="half an adapter"):
        loaded.adapter("fr")


def test_hidden_folders_are_not_looked_into(tmp_path: Path) -> None:
    nested(tmp_path, "fr", ".cache/de", "fr/.git/x")
    assert lt.load(tmp_path).paths() == ["fr"]


def test_depth_is_bounded(tmp_path: Path) -> None:
    nested(tmp_path, "/".join(["a"] * 70))
    assert "deeper than 64 levels" in refused(tmp_path, FolderError)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zo", "no such folder or tree.yaml; did you mean 'zoo'?"),
        ("no/where", "nor is there a folder"),
        ("zoo/fr/adapter_model.safetensors", "a single adapter: Adapter.load("),
        ("zoo/notes.txt", "neither a folder nor a YAML file"),
        ("zoo/my.yaml", "no such folder or tree.yaml"),
        ("empty", "no tree: no tree.yaml, and no folder below"),
        ("zoo/\0", "no such"),
    ],
)
def test_a_wrong_path(zoo: Path, name: str, message: str) -> None:
    write(zoo / "notes.txt", "")
    (zoo.parent / "empty").mkdir()
    with pytest.raises(FolderError) as caught:
        lt.load(f"{zoo.parent}/{name}")
    assert message in str(caught.value)


def test_a_home_that_nobody_has(zoo: Path) -> None:
    for use in (lt.Adapter.load, adapter(1).save, lt.load, tree().save, lt.check, lt.lock):
        with pytest.raises(FolderError, match=r"~nobody-of-that-name/x: no such user"):
            use("~nobody-of-that-name/x")


def test_a_path_of_another_kind() -> None:
    with pytest.raises(FolderError, match="3 is not the name of a folder"):
        lt.load(3)  # type: ignore[arg-type]


def test_tree_yml_is_not_overlooked(tmp_path: Path) -> None:
    nested(tmp_path, "fr")
    write(tmp_path / "tree.yml", "version: 1\nbase: x\n")
    assert "only tree.yaml is looked for" in refused(tmp_path, SpecError)
    assert lt.load(tmp_path / "tree.yml").base == "x"


def test_a_broken_lock_says_what_to_do(zoo: Path) -> None:
    write(zoo / "tree.lock", '{"version": 1, "nodes": {"fr": {"content": "x"}}}')
    text = refused(zoo, SpecError)
    assert "content: got 'x'" in text
    assert "lora-tree lock" in text
    write(zoo / "tree.lock", '{"version": 1, "nodes": {"../x": {}}}')
    assert "tree.lock" in refused(zoo, SpecError)


# ---------------------------------------------------------------------- stale
def test_a_changed_parent_makes_its_children_stale(zoo: Path) -> None:
    loaded = lt.load(zoo)
    loaded.update("fr", adapter=adapter(9))
    loaded.save(zoo)
    expected = "fr/legal: the lineage of fr has changed since it was trained"
    assert str(loaded["fr/legal"].stale).startswith(expected)
    with pytest.warns(lt.StaleWarning) as warned:
        again = lt.load(zoo)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert expected in str(warned[0].message)
    assert "fr/medical" in str(warned[0].message)
    assert "lora-tree lock --accept-stale" in str(warned[0].message)
    assert again["fr/legal"].stale is not None
    assert again["fr"].stale is None
    assert again["grp/x"].stale is None
    with pytest.raises(StaleError, match="fr/legal: the lineage of fr has changed"):
        lt.load(zoo, strict=True)
    assert {p.node for p in lt.check(zoo) if p.kind == "stale"} == {"fr/legal", "fr/medical"}


def test_staleness_survives_saving_and_copying(zoo: Path, tmp_path: Path) -> None:
    loaded = lt.load(zoo)
    loaded.update("fr", adapter=adapter(9))
    loaded.save(zoo)
    again = opened(zoo)
    again.save(zoo)
    again.save(tmp_path / "other")
    for folder in (zoo, tmp_path / "other"):
        with pytest.raises(StaleError):
            lt.load(folder, strict=True)
    retrained = opened(zoo)
    retrained.update("fr/legal", adapter=adapter(10))
    retrained.save(zoo)
    assert {p.node for p in lt.check(zoo)} == {"fr/medical"}
    lt.lock(zoo)
    assert {p.node for p in lt.check(zoo)} == {"fr/medical"}
    lt.lock(zoo, accept_stale=True)
    assert lt.check(zoo) == []


def test_putting_the_old_parent_back_heals(zoo: Path) -> None:
    loaded = lt.load(zoo)
    loaded.update("fr", adapter=adapter(9))
    loaded.save(zoo)
    loaded.update("fr", adapter=adapter(1))
    loaded.save(zoo)
    assert lt.check(zoo) == []
    assert loaded["fr/legal"].stale is None


def test_a_weight_on_the_way_counts_and_a_name_does_not(zoo: Path) -> None:
    loaded = lt.load(zoo)
    loaded.rename("fr", "french")
    loaded.save(zoo)
    assert lt.check(zoo) == []
    assert not (zoo / "fr").exists()
    text = (zoo / "tree.yaml").read_text().replace("  french:\n", "  french:\n    weight: 0.5\n")
    write(zoo / "tree.yaml", text)
    assert {(p.node, p.kind) for p in lt.check(zoo)} == {
        ("french/legal", "stale"),
        ("french/medical", "stale"),
    }


def stale(folder: Path) -> dict[str, str]:
    """Node → what its staleness is put down to."""
    problems = [problem for problem in lt.check(folder) if problem.kind == "stale"]
    return {problem.node: problem.text.partition(" trained: ")[2] for problem in problems}


def content_of(folder: Path) -> str:
    """The hash of an adapter's content, by the page."""
    parts = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (CONFIG, WEIGHTS)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def test_a_stale_node_says_which_ancestor_changed_and_how(tmp_path: Path) -> None:
    made = lt.AdapterTree()
    for seed, path in enumerate(("fr", "fr/law", "fr/law/eu", "de")):
        made.add(path, adapter=adapter(seed))
    made.save(tmp_path / "zoo")
    was = content_of(tmp_path / "zoo/fr")

    def change(**changes: Callable[[lt.AdapterTree], object]) -> dict[str, str]:
        (change,) = changes.values()
        shutil.copytree(tmp_path / "zoo", tmp_path / "changed")
        loaded = lt.load(tmp_path / "changed", strict=True)
        change(loaded)
        loaded.save(tmp_path / "changed")
        found = stale(tmp_path / "changed")
        assert found == {
            path: str(loaded[path].stale).partition(" trained: ")[2]
            for path in loaded
            if loaded[path].stale
        }
        assert stale(tmp_path / "changed") == found
        now[0] = content_of(tmp_path / "changed/fr") if (tmp_path / "changed/fr").exists() else ""
        shutil.rmtree(tmp_path / "changed")
        return found

    now = [""]
    found = change(content=lambda tree: tree.update("fr", adapter=adapter(9)))
    content = f"the content of fr (was {was[:12]}…, now {now[0][:12]}…)"
    assert found == {"fr/law": content, "fr/law/eu": content}

    weight = "the weight of fr/law (was 1.0, now 0.12345671)"
    assert change(weight=lambda tree: tree.update("fr/law", weight=0.12345671)) == {
        "fr/law/eu": weight
    }

    def both(tree: lt.AdapterTree) -> None:
        tree.update("fr", adapter=adapter(9), weight=0.5)
        tree.update("fr/law", weight=2.0)

    found = change(both=both)
    content = f"the content of fr (was {was[:12]}…, now {now[0][:12]}…); the weight of fr (was 1.0, now 0.5)"
    assert found == {
        "fr/law": content,
        "fr/law/eu": f"the weight of fr/law (was 1.0, now 2.0); {content}",
    }

    assert change(top=lambda tree: tree.move("fr/law", "law")) == {
        "law": "fr is no longer above it",
        "law/eu": "fr is no longer above it",
    }
    assert change(other=lambda tree: tree.move("fr/law/eu", "de/eu")) == {
        "de/eu": "de is above it now; fr is no longer above it; fr/law is no longer above it"
    }
    assert change(renamed=lambda tree: tree.rename("fr", "french")) == {}


def test_what_changed_is_told_after_saves_copies_and_locks_too(zoo: Path, tmp_path: Path) -> None:
    loaded = lt.load(zoo)
    loaded.update("fr", adapter=adapter(9))
    loaded.save(zoo)
    expected = stale(zoo)
    assert set(expected) == {"fr/legal", "fr/medical"}
    assert all(text.startswith("the content of fr (was ") for text in expected.values())
    lt.lock(zoo)
    assert stale(zoo) == expected
    again = opened(zoo)
    again.update("grp/x", adapter=adapter(10))
    again.save(zoo)
    again.save(tmp_path / "other")
    assert stale(zoo) == stale(tmp_path / "other") == expected


def test_a_lock_that_tells_another_lineage_than_its_hash_is_not_believed(zoo: Path) -> None:
    loaded = lt.load(zoo)
    loaded.update("fr", weight=0.5)
    loaded.save(zoo)
    assert set(stale(zoo).values()) == {"the weight of fr (was 1.0, now 0.5)"}
    lock = json.loads((zoo / "tree.lock").read_text())
    for step in lock["lineages"].values():
        step["weight"] = 0.75
    write(zoo / "tree.lock", json.dumps(lock))
    assert set(stale(zoo).values()) == {""}  # the hashes alone
    assert all("(on " in problem.text for problem in lt.check(zoo))


def test_a_fresh_node_that_never_trained_is_not_stale(tmp_path: Path) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(4, 3))
    made = lt.AdapterTree(base="one", defaults=dict(r=2, target_modules=["0"]))
    for path in ("fr", "fr/law", "fr/old"):
        made.add(path)
    model = lt.attach(made, base)
    made.save(tmp_path)

    def train(path: str) -> None:
        for parameter in model.trainable(path)[0]["params"]:
            with torch.no_grad():
                parameter.add_(1.0)
        model.trainable()

    train("fr/old")
    made.save(tmp_path)
    train("fr")
    made.save(tmp_path)
    assert set(stale(tmp_path)) == {"fr/old"}
    assert made["fr/law"].stale is None
    write(
        tmp_path / "tree.yaml",
        (tmp_path / "tree.yaml").read_text().replace("base: one", "base: two"),
    )
    assert set(stale(tmp_path)) == {"fr", "fr/old"}
    lt.lock(tmp_path)
    assert set(stale(tmp_path)) == {"fr", "fr/old"}
    train("fr/law")
    made.save(tmp_path / "other")
    train("fr")
    made.save(tmp_path / "other")
    assert set(stale(tmp_path / "other")) == {"fr/law", "fr/old"}
    (tmp_path / "tree.lock").unlink()
    lt.lock(tmp_path)  # of files that no lock knew: they are read
    train("fr")
    opened(tmp_path).save(tmp_path / "third")
    again = lt.load(tmp_path / "third")
    again.update("fr", weight=3.0)
    again.save(tmp_path / "third")
    assert set(stale(tmp_path / "third")) == {"fr/old"}


def test_what_a_node_was_trained_on_goes_with_its_files_when_they_are_moved_on_the_disk(
    zoo: Path,
) -> None:
    loaded = lt.load(zoo)
    loaded.update("fr", adapter=adapter(9))
    loaded.save(zoo)
    was = stale(zoo)
    (zoo / "fr/legal").rename(zoo / "fr/law")
    (zoo / "grp/x").rename(zoo / "fr/x")
    write(zoo / "tree.yaml", (zoo / "tree.yaml").read_text().replace("legal:", "law:"))
    lt.lock(zoo)
    assert stale(zoo) == {
        "fr/law": was["fr/legal"],
        "fr/medical": was["fr/medical"],
        "fr/x": "fr is above it now",
    }
    lt.lock(zoo, accept_stale=True)
    assert stale(zoo) == {}


def test_two_nodes_that_changed_places_on_the_disk_keep_what_they_were_trained_on(
    zoo: Path,
) -> None:
    # Of one size, and often of one tick of the clock: what a lock knows without reading them would be the same.
    os.utime(zoo / "grp/x/adapter_model.safetensors", ns=(1, 1))
    lt.lock(zoo)
    (zoo / "fr/legal").rename(zoo / "other")
    (zoo / "grp/x").rename(zoo / "fr/legal")
    (zoo / "other").rename(zoo / "grp/x")
    lt.lock(zoo)
    assert stale(zoo) == {"fr/legal": "fr is above it now", "grp/x": "fr is no longer above it"}


def test_moved_below_another_parent_is_stale(zoo: Path) -> None:
    loaded = lt.load(zoo)
    loaded.move("fr/legal", "legal")
    loaded.save(zoo)
    assert [(p.node, p.kind) for p in lt.check(zoo)] == [("legal", "stale")]


def test_another_base_makes_everything_stale(zoo: Path, tmp_path: Path) -> None:
    text = (zoo / "tree.yaml").read_text()
    write(zoo / "tree.yaml", text.replace("org/model", "org/other"))
    with pytest.raises(
        StaleError, match="fr: it was trained on org/model, the tree names org/other"
    ):
        lt.load(zoo, strict=True)
    changed = opened(zoo)
    changed.update("fr", adapter=adapter(1))
    changed.save(zoo)
    assert {p.node for p in lt.check(zoo)} == {"fr/legal", "fr/medical", "grp/x"}


def test_a_base_that_changes_on_disk(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write(base / "config.json", "{}")
    (base / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}" + bytes(100_000))
    made = tree()
    made.base = str(base)
    made.save(tmp_path / "zoo")
    lt.load(tmp_path / "zoo", strict=True)
    shutil.move(base, tmp_path / "away")
    lt.load(tmp_path / "zoo", strict=True)  # not at hand: nothing is known to have changed
    opened(tmp_path / "zoo").save(tmp_path / "zoo")
    shutil.move(tmp_path / "away", base)
    write(base / "config.json", "{ }")
    with pytest.raises(StaleError, match=r"the files of the base .* have changed"):
        lt.load(tmp_path / "zoo", strict=True)


def test_the_fingerprint_of_a_base_reads_little(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write(base / "config.json", "{}")
    with (base / "model.safetensors").open("wb") as file:
        file.write((1000).to_bytes(8, "little") + b" " * 1000)
        file.truncate(8 << 30)  # sparse: reading it whole would take seconds
    start = time.perf_counter()
    first = bases.fingerprint(base)
    assert time.perf_counter() - start < 1
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(500)
        file.write(b"x")
    assert first is not None
    assert bases.fingerprint(base) not in (None, first)
    assert bases.fingerprint(tmp_path / "none") is None


def by_the_page(base: Path) -> str:
    """The fingerprint as docs/folder.md describes it, step by step."""
    files = [
        file
        for file in base.rglob("*")
        if file.is_file() and len(file.relative_to(base).parts) <= 2
    ]
    whole = hashlib.sha256()
    for file in sorted(files, key=lambda file: list(file.relative_to(base).parts)):
        data, name = file.read_bytes(), file.relative_to(base).as_posix()
        line = f"{name} {len(data)}\n".encode()
        if name.endswith((".safetensors", ".bin", ".gguf")):
            number = int.from_bytes(data[:8], "little")
            plain = (
                not name.endswith(".safetensors")
                or number == 0
                or number > min(len(data) - 8, 100_000_000)
            )
            start = 0 if plain else 8 + number
            step = max((len(data) - start) // 32, 4096)
            samples = [data[at : at + 4096] for at in range(start, len(data), step)]
            whole.update(
                line + hashlib.sha256(data[:start] + b"".join(samples) + data[-4096:]).digest()
            )
        elif file.name == "config.json" or name.endswith(".index.json"):
            whole.update(line + data)
    return whole.hexdigest()


def test_the_fingerprint_is_what_the_page_says(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(size: int) -> bytes:
        return bytes(torch.randint(256, (size,), generator=generator).tolist())

    for name, data in {
        "config.json": b"{}",
        "model.safetensors.index.json": b"{ }",
        "tokenizer.json": b"not looked at",
        "model.safetensors": (5000).to_bytes(8, "little") + noise(205_003),
        "broken.safetensors": (5000).to_bytes(8, "little") + noise(100),
        "tiny.safetensors": b"abc",
        "a-b.bin": noise(5000),
        "a/b.bin": noise(140_000),
        "a/config.json": b"[]",
        "a/b/deeper.bin": b"not looked at",
        "z.gguf": b"",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert bases.fingerprint(tmp_path) == by_the_page(tmp_path)


def test_without_a_lock_nothing_is_stale_or_unlocked(zoo: Path) -> None:
    (zoo / "tree.lock").unlink()
    nudge(zoo / "fr" / WEIGHTS)
    lt.load(zoo, strict=True).adapter("fr")


# ---------------------------------------------------------------------- unlocked
def test_another_size_is_refused_at_load(zoo: Path) -> None:
    for path in ("fr", "grp/x"):
        with (zoo / path / CONFIG).open("a") as file:
            file.write(" ")
    text = refused(zoo, UnlockedError)
    assert f"fr: {zoo}/fr: {CONFIG} has" in text
    assert "grp/x" in text
    assert f"lora-tree lock {zoo}" in text


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


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"
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


# ---------------------------------------------------------------------- saving
def test_an_adapter_elsewhere_stays_there_unless_copied(tmp_path: Path) -> None:
    adapter(1).save(tmp_path / "out")
    made = lt.AdapterTree()
    made.add("fr", adapter=tmp_path / "out")
    made.save(tmp_path / "zoo")
    assert "adapter: ../out\n" in (tmp_path / "zoo/tree.yaml").read_text()
    assert not (tmp_path / "zoo/fr").exists()
    again = lt.load(tmp_path / "zoo", strict=True)
    again.save(tmp_path / "zoo")
    again.save(tmp_path / "a/b/c")
    assert "adapter: ../../../out\n" in (tmp_path / "a/b/c/tree.yaml").read_text()
    again.save(tmp_path / "zoo", copy=True)
    assert "adapter" not in (tmp_path / "zoo/tree.yaml").read_text()
    assert (tmp_path / "zoo/fr" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    shutil.rmtree(tmp_path / "out")
    assert value(lt.load(tmp_path / "zoo", strict=True)) == value(again)


def test_a_typo_in_a_folder_is_an_error_when_it_is_added(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no adapter there"):
        lt.AdapterTree().add("fr", adapter=tmp_path / "typo")


def test_what_a_save_wrote_goes_when_its_node_goes(zoo: Path) -> None:
    write(zoo / "fr/legal/notes.txt", "mine")
    loaded = lt.load(zoo)
    loaded.remove("fr", recursive=True)
    loaded.save(zoo)
    assert listing(zoo / "fr") == {"legal": None, "legal/notes.txt": b"mine"}
    assert lt.load(zoo, strict=True).paths() == ["de", "grp", "grp/x"]


def test_what_no_save_wrote_stays_and_would_come_back(tmp_path: Path) -> None:
    nested(tmp_path, "fr", "fr/legal", "de")
    for locked in (False, True):
        if locked:
            lt.lock(tmp_path)
        before = listing(tmp_path)
        loaded = lt.load(tmp_path)
        loaded.remove("fr/legal")
        with pytest.raises(
            FolderError, match="fr/legal: no node's any more, but no save wrote them"
        ):
            loaded.save(tmp_path)
        moved = lt.load(tmp_path)
        moved.rename("de", "german")
        with pytest.raises(FolderError, match="de: no node's any more"):
            moved.save(tmp_path)
        assert listing(tmp_path) == before
    loaded = lt.load(tmp_path)
    loaded.remove("fr/legal")
    loaded.add("fr/legal", group=True)
    loaded.save(tmp_path)  # said to be none: it does not come back, and stays
    assert not lt.load(tmp_path)["fr/legal"].has_adapter
    assert (tmp_path / "fr/legal" / WEIGHTS).exists()


def test_files_that_a_hand_changed_are_not_ours_any_more(zoo: Path) -> None:
    loaded = lt.load(zoo)
    loaded.remove("grp/x")
    nudge(zoo / "grp/x" / WEIGHTS)
    with pytest.raises(FolderError, match="grp/x: no node's any more"):
        loaded.save(zoo)


def test_a_trained_node_replaces_the_files_it_came_from_and_no_others(tmp_path: Path) -> None:
    nested(tmp_path / "zoo", "fr", "de")
    loaded = lt.load(tmp_path / "zoo")
    loaded.update("fr", adapter=adapter(9))
    loaded.save(tmp_path / "zoo")
    assert value(lt.load(tmp_path / "zoo", strict=True)) == value(loaded)
    made = lt.AdapterTree()
    made.add("de", adapter=adapter(3))
    with pytest.raises(
        FolderError,
        match=r"de: .*an adapter that no save wrote lies where this node's files belong",
    ):
        made.save(tmp_path / "zoo")
    other = lt.load(nested(tmp_path / "other", "it", "de"))
    with pytest.raises(
        FolderError,
        match=r"de: .*an adapter that no save wrote lies where this node's files belong",
    ):
        other.save(tmp_path / "zoo")


def test_swapping_two_nodes(zoo: Path) -> None:
    loaded = lt.load(zoo)
    expected = value(loaded)
    loaded.move("fr/legal", "fr/other")
    loaded.move("fr/medical", "fr/legal")
    loaded.move("fr/other", "fr/medical")
    loaded.save(zoo)
    again = value(lt.load(zoo, strict=True))
    assert again["fr/legal"] == expected["fr/medical"]
    assert again["fr/medical"] == expected["fr/legal"]


def test_a_comment_survives_where_nothing_changed(zoo: Path) -> None:
    text = (zoo / "tree.yaml").read_text()
    write(zoo / "tree.yaml", "# by hand\n" + text.replace("weight: 0.8", "weight: 8.0e-1"))
    loaded = lt.load(zoo)
    loaded.update("grp/x", adapter=adapter(12))
    loaded.save(zoo)
    assert (zoo / "tree.yaml").read_text().startswith("# by hand\n")
    loaded.update("grp/x", weight=2.0)
    loaded.save(zoo)
    assert not (zoo / "tree.yaml").read_text().startswith("#")


def test_the_yaml_of_another_tree_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "zoo/tree.yaml", "version: 1\nbase: precious\n")
    with pytest.raises(FolderError, match="of another tree, and no save wrote it"):
        tree().save(tmp_path / "zoo")
    assert (tmp_path / "zoo/tree.yaml").read_text() == "version: 1\nbase: precious\n"
    assert listing(tmp_path / "zoo").keys() == {"tree.yaml"}


def test_a_value_that_cannot_be_written_leaves_everything_as_it_was(
    zoo: Path, tmp_path: Path
) -> None:
    before = listing(zoo)
    loaded = lt.load(zoo)
    loaded.update("grp/x", adapter=lt.Adapter({}))
    for folder in (zoo, tmp_path / "new/one"):
        with pytest.raises(FormatError, match="grp/x: "):
            loaded.save(folder)
    assert listing(zoo) == before
    assert not (tmp_path / "new").exists()


def test_a_weight_alone_changes_only_text(zoo: Path) -> None:
    before = {
        name: (zoo / name).stat().st_ino for name, data in listing(zoo).items() if data is not None
    }
    loaded = lt.load(zoo)
    loaded.update("fr/medical", weight=0.25)
    loaded.save(zoo)
    changed = {name for name, inode in before.items() if (zoo / name).stat().st_ino != inode}
    assert changed == {"tree.yaml", "tree.lock"}


# ---------------------------------------------------------------------- two writers
def untouched(folder: Path, save: Callable[[], None], *, match: str) -> str:
    """The save is refused, and nothing in the folder has changed."""
    before = listing(folder)
    with pytest.raises(FolderError, match=match) as caught:
        save()
    assert listing(folder) == before
    return str(caught.value)


def test_a_save_does_not_undo_what_another_added(zoo: Path, tmp_path: Path) -> None:
    one, two = opened(zoo), opened(zoo)
    one.add("x", adapter=adapter(10))
    one.add("x/deep", adapter=adapter(11))
    one.save(zoo)
    two.add("y", adapter=adapter(12))
    text = untouched(
        zoo,
        lambda: two.save(zoo),
        match="zoo/x.*zoo/x/deep: written by somebody else since this tree was",
    )
    assert (
        f"open the tree again, lt.load('{zoo}'), and change that one; or save into another folder"
        in text
    )
    two.save(tmp_path / "other")
    assert "y" in opened(tmp_path / "other")
    again = opened(zoo)
    again.add("y", adapter=adapter(12))
    again.save(zoo)
    assert {"x", "x/deep", "y"} <= set(opened(zoo))
    one.save(tmp_path / "third")
    untouched(zoo, lambda: one.save(zoo), match="zoo/y: written by somebody else")


def test_a_save_does_not_undo_what_another_changed(zoo: Path) -> None:
    one, two = opened(zoo), opened(zoo)
    one.update("grp/x", adapter=adapter(10))
    one.save(zoo)
    two.update("grp/x", adapter=adapter(11))
    untouched(zoo, lambda: two.save(zoo), match="grp/x: .*written by somebody else")
    two.remove("grp", recursive=True)
    untouched(zoo, lambda: two.save(zoo), match="grp/x: written by somebody else")
    one.update("grp/x", adapter=adapter(12))
    one.save(zoo)


def test_a_save_does_not_undo_what_another_wrote_into_a_folder_without_a_lock(
    tmp_path: Path,
) -> None:
    one, two = opened(nested(tmp_path, "fr", "de")), opened(tmp_path)
    one.update("fr", adapter=adapter(10))
    one.save(tmp_path)
    two.update("fr", adapter=adapter(11))
    untouched(tmp_path, lambda: two.save(tmp_path), match="fr: .*written by somebody else")


def test_a_save_does_not_bring_back_what_another_took_out(zoo: Path) -> None:
    one, two, lazily = opened(zoo), opened(zoo), opened(zoo)
    assert two.adapter("fr/legal") is not None
    one.remove("fr/legal")
    one.save(zoo)
    untouched(zoo, lambda: two.save(zoo), match="fr/legal: .*taken out by somebody else")
    untouched(zoo, lambda: lazily.save(zoo), match="fr/legal: .*taken out by somebody else")
    two.update("fr/legal", adapter=adapter(10))
    untouched(zoo, lambda: two.save(zoo), match="fr/legal: .*taken out by somebody else")
    one.add("fr/legal", adapter=adapter(11))
    one.save(zoo)


def test_a_save_does_not_undo_a_line_of_yaml(zoo: Path) -> None:
    one, two = opened(zoo), opened(zoo)
    one.update("fr/medical", weight=0.5)
    one.save(zoo)
    two.update("fr/legal", weight=0.25)
    untouched(zoo, lambda: two.save(zoo), match=r"tree.yaml: written by somebody else")
    again = opened(zoo)
    write(zoo / "tree.yaml", (zoo / "tree.yaml").read_text() + "# a note\n")
    again.update("grp/x", adapter=adapter(10))
    again.update("de", weight=2.0)
    untouched(zoo, lambda: again.save(zoo), match=r"tree.yaml: written by somebody else")


def test_another_tree_is_not_overwritten(zoo: Path) -> None:
    other = lt.AdapterTree()
    other.add("it", adapter=adapter(10))
    text = untouched(
        zoo,
        lambda: other.save(zoo),
        match="zoo/fr, .*zoo/grp/x: of another tree, which this save would",
    )
    assert (
        "save into another folder; or open that tree and change it; or remove what is there first"
        in text
    )
    one = tree()
    one.update("fr", adapter=adapter(10))
    untouched(zoo, lambda: one.save(zoo), match="fr: .*zoo/fr: of another tree")
    untouched(zoo, lambda: tree(weight=0.5).save(zoo), match="tree.yaml: of another tree")
    before = listing(zoo)
    tree().save(zoo)  # the very same tree: nothing is lost
    assert before == {**listing(zoo), "tree.lock": before["tree.lock"]}
    shutil.rmtree(zoo / "fr")
    shutil.rmtree(zoo / "grp")
    (zoo / "tree.yaml").unlink()
    other.save(zoo)
    assert list(opened(zoo)) == ["it"]


def test_what_lock_accepted_since_the_opening_stays_accepted(zoo: Path) -> None:
    changed = opened(zoo)
    changed.update("fr", adapter=adapter(9))
    changed.save(zoo)
    loaded = opened(zoo)
    lt.lock(zoo, accept_stale=True)
    loaded.update("grp/x", adapter=adapter(10))
    loaded.save(zoo)
    assert lt.check(zoo) == []


# ---------------------------------------------------------------------- training
class Training:
    """A tree over a base of one layer, whose node fr trains."""

    def __init__(self, folder: Path) -> None:
        fresh, old = (
            lt.LowRank(torch.ones(2, 4), B) for B in (torch.zeros(3, 2), torch.ones(3, 2))
        )
        self.tree, self.folder = lt.AdapterTree(), folder
        self.tree.add("fr", adapter=lt.Adapter({"0": fresh}))
        self.tree.add("fr/legal", adapter=lt.Adapter({"0": old}))
        self.model = lt.attach(self.tree, torch.nn.Sequential(torch.nn.Linear(4, 3)))
        self.parameters = self.model.trainable("fr")[0]["params"]
        self.model.activate("fr", mode="unmerged")

    def step(self) -> None:
        """Change the factors in place, as an optimiser does."""
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(1.0)

    def saved(self, folder: Path | None = None) -> float:
        """Save, and say what a reader finds."""
        self.tree.save(folder or self.folder)
        found = opened(folder or self.folder).adapter("fr")
        assert found is not None
        return found.modules["0"].B.mean().item()


def test_what_was_trained_since_the_last_save_is_saved(tmp_path: Path) -> None:
    run = Training(tmp_path / "zoo")
    for steps in (1.0, 2.0, 3.0):
        run.step()
        assert run.saved() == steps
    run.step()
    assert run.saved(tmp_path / "other") == 4.0
    run.step()
    run.model.trainable()
    assert run.saved(tmp_path / "third") == 5.0
    assert run.saved() == 5.0


def test_a_save_between_two_steps_writes_only_what_changed(tmp_path: Path) -> None:
    run = Training(tmp_path / "zoo")
    run.step()
    run.saved()
    before = {path: path.stat().st_ino for path in run.folder.rglob("*")}
    run.saved()
    assert {path: path.stat().st_ino for path in run.folder.rglob("*")} == before
    run.step()
    run.saved()
    changed = {
        str(path.relative_to(run.folder))
        for path, inode in before.items()
        if path.stat().st_ino != inode
    }
    assert changed == {f"fr/{WEIGHTS}", f"fr/{CONFIG}", "tree.lock"}


def test_training_after_a_save_makes_the_children_stale_and_the_node_itself_fresh(
    tmp_path: Path,
) -> None:
    run = Training(tmp_path / "zoo")
    run.saved()
    run.tree.update("fr/legal", weight=0.5)
    run.step()
    run.saved()
    assert [(p.node, p.kind) for p in lt.check(run.folder)] == [("fr/legal", "stale")]
    run.parameters = run.model.trainable("fr/legal")[0]["params"]
    for _ in range(2):
        run.step()
        run.saved()
        assert lt.check(run.folder) == []


def test_a_tree_in_memory_outlives_its_files(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    tree().save(zoo)
    changed = opened(zoo)
    changed.update("fr", adapter=adapter(9))
    changed.save(zoo)
    loaded = opened(zoo)
    expected = value(loaded)
    shutil.rmtree(zoo)
    for folder in (tmp_path / "other", zoo):
        loaded.save(folder)
        assert value(opened(folder)) == expected
        assert {(p.node, p.kind) for p in lt.check(folder)} == {
            ("fr/legal", "stale"),
            ("fr/medical", "stale"),
        }
    shutil.rmtree(zoo / "fr/legal")
    loaded.save(zoo)
    assert value(opened(zoo)) == expected
    lazily = opened(tmp_path / "other")
    shutil.rmtree(tmp_path / "other/fr")
    with pytest.raises(FormatError, match="no adapter there"):
        lazily.save(tmp_path / "third")


# ---------------------------------------------------------------------- one adapter
def test_an_adapter_alone_appears_whole(tmp_path: Path) -> None:
    adapter(1).save(tmp_path / "deep/one")
    assert listing(tmp_path / "deep").keys() == {"one", f"one/{CONFIG}", f"one/{WEIGHTS}"}
    write(tmp_path / "deep/one/README.md", "mine")
    adapter(2).save(tmp_path / "deep/one")
    again = lt.Adapter.load(tmp_path / "deep/one")
    assert torch.equal(again.modules["q_proj"].A, adapter(2).modules["q_proj"].A)
    assert listing(tmp_path / "deep/one").keys() == {"README.md", CONFIG, WEIGHTS}


def test_a_tree_is_not_saved_into_a_hidden_file(tmp_path: Path) -> None:
    with pytest.raises(
        FolderError, match=r"fast\.yaml: a tree is not saved into a hidden file\n  name it fast"
    ):
        tree().save(tmp_path / ".fast.yaml")
    assert list(tmp_path.iterdir()) == []


def test_loading_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no adapter there"):
        lt.Adapter.load(tmp_path)
    adapter(1).save(tmp_path / "one")
    config = json.loads((tmp_path / "one" / CONFIG).read_text())
    write(tmp_path / "one" / CONFIG, json.dumps({**config, "use_dora": True}))
    with pytest.raises(UnsupportedAdapter):
        lt.Adapter.load(tmp_path / "one")


# ---------------------------------------------------------------------- check
def test_check_reads_every_adapter(tmp_path: Path) -> None:
    nested(tmp_path, "fr", "de")
    write(tmp_path / "fr" / CONFIG, "{")
    (tmp_path / "de" / WEIGHTS).write_bytes(b"x")
    assert lt.load(tmp_path).paths() == ["de", "fr"]
    assert [(p.node, p.kind) for p in lt.check(tmp_path)] == [("de", "adapter"), ("fr", "adapter")]


def test_check_names_the_modules_whose_numbers_are_none(tmp_path: Path) -> None:
    tree = lt.AdapterTree()
    A, B = torch.ones(2, 4), torch.ones(3, 2)
    tree.add(
        "fr", adapter=lt.Adapter({"q": lt.LowRank(A, B), "v": lt.LowRank(A * float("nan"), B)})
    )
    tree.add("fr/legal", adapter=lt.Adapter({"q": lt.LowRank(A, B.where(B != B, float("inf")))}))
    tree.save(tmp_path / "zoo")
    found = [(p.node, p.kind, p.text.split(": ")[1]) for p in lt.check(tmp_path / "zoo")]
    assert found == [("fr", "numbers", "v"), ("fr/legal", "numbers", "q")]
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
    with pytest.raises(FolderError, match="can't sweep it up: Permission denied"):
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
