"""The folder is the tree: round trips of trees, and adapters saved by themselves."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from zoo import CONFIG, WEIGHTS, adapter, listing, tree, value, write

import lora_tree as lt
from lora_tree.errors import (
    FolderError,
    FormatError,
    UnsupportedAdapter,
)


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
    # Of this process alone: what else the machine does must not fail the test.
    start = time.process_time()
    assert len(lt.load(many)) == 1010
    assert time.process_time() - start < 1.5


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
