"""Which folders are nodes of a tree, which are passed over, and which are refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
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
    opened,
    refused,
    tree,
    untouched,
    value,
    write,
)

import lora_tree as lt
from lora_tree.errors import (
    FolderError,
    FormatError,
    LoraTreeError,
    SpecError,
)
from lora_tree.folder import notes, survey


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
        "version: 1\ndefaults: {target_modules: [q_proj]}\ntree:\n  fr: {weight: 0.5, children: "
        "{legal: {adapter: "
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


@pytest.mark.parametrize("named", ["zoo/fr", "zoo/fr/legal", "zoo/../zoo/de"])
def test_the_folder_of_a_node_is_copied_for_a_second_one(tmp_path: Path, named: str) -> None:
    """A tree.yaml that named it would take it from the first node."""
    made = lt.AdapterTree(base="org/model")
    for seed, path in enumerate(("de", "fr", "fr/legal")):
        made.add(path, adapter=adapter(seed))
    made.save(tmp_path / "zoo")
    before = value(lt.load(tmp_path / "zoo"))
    loaded = lt.load(tmp_path / "zoo")
    loaded.add("it", adapter=tmp_path / named)
    loaded.save(tmp_path / "zoo")
    again = lt.load(tmp_path / "zoo", strict=True)
    after = value(again)
    of = named.removeprefix("zoo/").removeprefix("../zoo/")
    assert after.pop("it") == before[of]
    assert after == before
    again.remove(of, recursive=True)  # each has files of its own
    again.save(tmp_path / "zoo")
    assert value(lt.load(tmp_path / "zoo"))["it"] == before[of]
    assert not lt.check(tmp_path / "zoo")


def test_a_node_takes_the_adapter_of_another_one_and_both_keep_theirs(tmp_path: Path) -> None:
    made = lt.AdapterTree(base="org/model")
    for seed, path in enumerate(("de", "fr")):
        made.add(path, adapter=adapter(seed))
    made.save(tmp_path)
    loaded = lt.load(tmp_path)
    wanted = value(loaded)["de"]
    loaded.update("fr", adapter=tmp_path / "de")
    loaded.save(tmp_path)
    after = value(lt.load(tmp_path, strict=True))
    assert after["de"] == after["fr"] == wanted


def test_a_yaml_that_takes_an_adapter_from_above_a_node_has_to_say_what_is_there(
    tmp_path: Path,
) -> None:
    nested(tmp_path, "fr", "fr/legal")
    yaml = "version: 1\ntree:\n  it: {adapter: fr}\n"
    write(tmp_path / "tree.yaml", yaml)
    assert "names this adapter for another node, and fr/legal" in refused(tmp_path, FolderError)
    write(tmp_path / "tree.yaml", yaml + "  fr: {}\n")
    assert lt.load(tmp_path)["fr"].has_adapter
    write(tmp_path / "tree.yaml", yaml + "  fr: {adapter: null}\n")
    assert not lt.load(tmp_path)["fr"].has_adapter


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


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("", "checkpoint-10"), "the output of a Trainer"),
        (("", "other"), "if PEFT saved several adapters here"),
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
        f"{zoo}/grp: the node grp of the tree {zoo}; its ancestors there don't count here"
    ]
    assert notes(zoo) == []
    for name in ("tree.yaml", "tree.lock"):
        (zoo / name).unlink()
    assert "if this folder is a node of a tree, open the folder above it" in refused(
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
    """What trainers leave: the final adapter of each run on top, its checkpoints with other files
    below.
    """
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
        tmp_path,
        lambda: loaded.save(tmp_path),
        match="french/checkpoint-500: the tree no longer has this node",
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
        "es": "use_dora", "a b": "not a valid node name", "half": "half an adapter",
        "lfs": "not a whole safetensors",
        "lfs/below": "lies below lfs", "latest": "a link to", "named": "no adapter there",
        "named/x": "lies below named", "named/y": "lies below named",
    }  # fmt: skip


def test_broken_folders_do_not_hide_the_others(tmp_path: Path) -> None:
    reasons = broken_zoo(tmp_path)
    with pytest.raises(LoraTreeError) as caught:
        lt.load(tmp_path)
    assert str(caught.value).splitlines()[-1] == (
        f"  to go on without them: lora_tree.load({str(tmp_path)!r}, skip_broken=True), or "
        "--skip-broken of eval, explore, export, generate, init and similar"
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
    """The files of a folder as huggingface_hub keeps them: links into the blobs of their
    repository.
    """
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
    told = r"org/legal: no such folder\n.*hub:org/legal names an adapter there"
    with pytest.raises(FormatError, match=told):
        lt.Adapter.load("org/legal")
    with pytest.raises(FormatError, match=told):
        lt.AdapterTree().add("fr", adapter="org/legal")
    with pytest.raises(FolderError, match=r"(?s)no such folder.*lora-tree pull org/zoo DIR"):
        lt.load("org/zoo")
    write(tmp_path / "zoo/tree.yaml", "version: 1\ntree:\n  fr:\n    adapter: org/legal\n")
    text = refused(tmp_path / "zoo", FormatError)
    assert f"tree.yaml:4:5: node fr: {tmp_path}/zoo/org/legal: no such folder" in text
    assert "hub:org/legal names an adapter there" in text
    for path in (".hidden/legal", "a/b/c", "legal"):
        with pytest.raises(FormatError, match="no adapter there") as caught:
            lt.Adapter.load(f"{tmp_path}/{path}" if path == "legal" else path)
        assert "hub:" not in str(caught.value)
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


def test_a_node_that_was_removed_while_it_is_served_says_so(zoo: Path) -> None:
    served, other = lt.load(zoo), lt.load(zoo)
    path = other.paths()[-1]
    other.remove(path)
    shutil.rmtree(zoo / path)
    with pytest.raises(FormatError, match="no adapter there") as caught:
        served.adapter(path)
    assert str(caught.value).endswith(
        "\n  it was there when the tree was opened: if a save has removed it since, "
        "open the tree again"
    )


@pytest.mark.parametrize("weights", ["absent", "a folder"])
def test_a_folder_whose_only_adapter_is_broken_is_not_called_empty(
    tmp_path: Path, weights: str
) -> None:
    adapter(1).save(tmp_path / "fr")
    (tmp_path / "fr/adapter_model.safetensors").unlink()
    if weights == "a folder":
        (tmp_path / "fr/adapter_model.safetensors").mkdir()
    assert "half an adapter" in refused(tmp_path, FormatError)
    tree, problems = survey(tmp_path)
    assert (len(tree), [problem.node for problem in problems]) == (0, ["fr"])
    with pytest.warns(lt.SkippedWarning, match="half an adapter"):
        assert lt.load(tmp_path, skip_broken=True).paths() == []


@pytest.mark.parametrize("name", ["mlp head", "ünïcode", "n" * 129])
def test_a_folder_with_another_name_can_be_named_in_tree_yaml(tmp_path: Path, name: str) -> None:
    adapter(1).save(tmp_path / name)
    text = refused(tmp_path, FolderError)
    assert "letters from a to z and A to Z" in text
    assert f"rename the folder, or name it in tree.yaml ({{adapter: {name}}})" in text
    write(tmp_path / "tree.yaml", f"version: 1\ntree: {{head: {{adapter: '{name}'}}}}\n")
    assert lt.load(tmp_path).paths() == ["head"]


def test_a_home_that_nobody_has(zoo: Path) -> None:
    for use in (lt.Adapter.load, adapter(1).save, lt.load, tree().save, lt.check, lt.lock):
        with pytest.raises(FolderError, match=r"~nobody-of-that-name/x: no such user"):
            use("~nobody-of-that-name/x")


def test_a_variable_that_was_not_set_is_not_the_current_folder() -> None:
    for use in (lt.Adapter.load, adapter(1).save, lt.load, tree().save, lt.check, lt.lock):
        with pytest.raises(FolderError, match=r"'' is not the name of a folder"):
            use("")


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
