"""Nodes whose lineage or base has changed since they were trained, and the words about them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from zoo import CONFIG, WEIGHTS, adapter, nudge, opened, tree, write

import lora_tree as lt
from lora_tree.errors import StaleError
from lora_tree.folder.reading import bases


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
    lines = str(warned[0].message).splitlines()  # a node a line: there may be hundreds
    assert [line.split(":")[0].strip() for line in lines[:2]] == ["stale", "fr/medical"]
    assert "lora-tree lock --accept-stale" in str(warned[0].message)
    assert again["fr/legal"].stale is not None
    assert again["fr"].stale is None
    assert again["grp/x"].stale is None
    with pytest.raises(StaleError, match="fr/legal: the lineage of fr has changed"):
        lt.load(zoo, strict=True)
    assert {p.node for p in lt.check(zoo) if p.kind == "stale"} == {"fr/legal", "fr/medical"}


def test_a_warning_of_many_stale_nodes_does_not_fill_the_screen(tmp_path: Path) -> None:
    made = lt.AdapterTree()
    made.add("fr", adapter=adapter(1))
    for number in range(30):
        made.add(f"fr/x{number}", adapter=adapter(2))
    made.save(tmp_path)
    made.update("fr", adapter=adapter(9))
    made.save(tmp_path)
    with pytest.warns(lt.StaleWarning) as warned:
        lt.load(tmp_path)
    lines = str(warned[0].message).splitlines()
    assert len(lines) == 22
    assert lines[20] == f"  and 10 more: lora-tree check {tmp_path} lists all of them"
    (tmp_path / "tree.lock").unlink()
    for weights in tmp_path.glob("fr/*/adapter_model.safetensors"):
        weights.write_bytes(b"x" * 16)
    with pytest.warns(lt.SkippedWarning) as warned:
        lt.load(tmp_path, skip_broken=True)
    assert str(warned[0].message).count("\n") < 70
    assert f"and 10 more: lora-tree check {tmp_path} lists all" in str(warned[0].message)


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
    content = (
        f"the content of fr (was {was[:12]}…, now {now[0][:12]}…); "
        "the weight of fr (was 1.0, now 0.5)"
    )
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
    # Of one size, and often of one tick of the clock: what a lock knows without reading them would
    # be the same.
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
