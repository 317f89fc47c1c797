"""Nodes whose adapter is on the model hub: fetched once, locked by their commit, and noticed when a
branch moves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from loopback_hub import GUEST, LoopbackHub, running_hub, talking_to
from shell import Shell, answer
from test_single_files import diffusers, kohya
from zoo import CONFIG, WEIGHTS, adapter, listing, refused, write

import lora_tree as lt
from lora_tree.errors import (
    FolderError,
    FormatError,
    HubError,
    LoraTreeError,
    SpecError,
    UnlockedError,
)
from lora_tree.folder.hub_name import parse_hub_name
from lora_tree.integrations.hub import client as hub_client

pytest.importorskip("huggingface_hub", reason="an extra of its own")
from huggingface_hub import constants, hf_hub_download, snapshot_download


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """org/one: an adapter at the top; org/many: legal/, styles/ink.safetensors, diffusers' soft."""
    with running_hub() as made:
        talking_to(made, tmp_path / "home", monkeypatch)
        adapter(1).save(tmp_path / "one")
        made.repo("org/one", tmp_path / "one")
        adapter(2).save(tmp_path / "many/legal")
        kohya(tmp_path / "many/styles/ink.safetensors")
        diffusers(tmp_path / "many/soft")
        made.repo("org/many", tmp_path / "many")
        yield made


@pytest.fixture
def zoo(tmp_path: Path, hub: LoopbackHub) -> Path:
    text = "version: 1\n# ours\ntree:\n  fr:\n    adapter: hub:org/one@main\n    weight: 0.5\n"
    text += "  legal: {adapter: hub:org/many/legal}\n"
    text += "  ink: {adapter: hub:org/many/styles/ink.safetensors}\n"
    text += "  soft: {adapter: 'hub:org/many/soft'}\n"
    write(tmp_path / "zoo/tree.yaml", text)
    return tmp_path / "zoo"


def moved(hub: LoopbackHub, folder: Path, seed: int) -> str:
    """Push another adapter to the branch of org/one, and return the commit."""
    shutil.rmtree(folder)
    adapter(seed).save(folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return hub.repos["org/one"].commit(files, message="retrained")


def same(one: lt.Adapter | None, other: lt.Adapter) -> bool:
    return one is not None and all(
        torch.equal(one.modules[name].dense(), value.dense())
        for name, value in other.modules.items()
    )


# ---------------------------------------------------------------------- names
@pytest.mark.parametrize(
    ("text", "repository", "revision", "path"),
    [
        ("hub:org/name", "org/name", None, ""),
        ("hub:org/name@v2", "org/name", "v2", ""),
        ("hub:org/name@v2/a/b", "org/name", "v2", "a/b"),
        ("hub:org/name/a/x.safetensors", "org/name", None, "a/x.safetensors"),
        ("hub:org/name@refs/pr/1/a", "org/name", "refs/pr/1", "a"),
        ("hub:org/name@feature%2Fx/a/", "org/name", "feature/x", "a"),
    ],
)
def test_a_name_says_repository_revision_and_path(
    text: str, repository: str, revision: str | None, path: str
) -> None:
    name = parse_hub_name(text)
    assert name is not None
    assert (name.repository, name.revision, name.path) == (repository, revision, path)
    assert parse_hub_name(str(name)) == name


@pytest.mark.parametrize(
    "text", ["hub:", "hub:org", "hub:org/name@", "hub:org/name/../x", "hub:a b/c"]
)
def test_what_is_no_name_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="expected: hub:org/name"):
        parse_hub_name(text)
    write(tmp_path / "tree.yaml", f"version: 1\ntree:\n  fr: {{adapter: '{text}'}}\n")
    assert "tree.yaml:3" in refused(tmp_path, FormatError)


# ---------------------------------------------------------------------- opened
def test_a_tree_opens_adapters_of_the_hub(zoo: Path, tmp_path: Path) -> None:
    tree = lt.load(zoo)
    assert tree.paths() == ["fr", "ink", "legal", "soft"]
    assert same(tree.adapter("fr"), adapter(1))
    assert same(tree.adapter("legal"), adapter(2))
    assert same(tree.adapter("ink"), lt.Adapter.load(tmp_path / "many/styles/ink.safetensors"))
    assert tree["fr"].weight == 0.5
    assert same(lt.Adapter.load("hub:org/one"), adapter(1))


def test_only_the_files_of_the_node_are_fetched(hub: LoopbackHub, zoo: Path) -> None:
    write(zoo / "tree.yaml", "version: 1\ntree: {legal: {adapter: hub:org/many/legal}}\n")
    lt.load(zoo)
    got = {line.split("/")[-1] for line in hub.asked_for("^GET .*resolve")}
    assert got == {CONFIG, WEIGHTS}


# ---------------------------------------------------------------------- the lock
def test_the_commit_is_locked_and_a_branch_that_moves_is_noticed(
    hub: LoopbackHub, zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(capsys)
    first = hub.repos["org/one"].branches["main"]
    lt.lock(zoo)
    lock = json.loads((zoo / "tree.lock").read_text())["nodes"]["fr"]
    assert lock["hub"] == {"adapter": "hub:org/one@main", "commit": first}
    second = moved(hub, tmp_path / "one", 7)
    # What is locked is used, whatever the branch says now, and without a word to the hub.
    asked = len(hub.asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_client, "hub_answers", lambda: pytest.fail("the hub was looked for"))
        assert same(lt.load(zoo).adapter("fr"), adapter(1))
    assert len(hub.asked) == asked
    told = answer(shell, "check", zoo)
    assert told["problems"] == []
    (note,) = told["notes"]
    assert f"fr: hub:org/one@main has moved on to {second[:12]}…" in note
    assert "lora-tree lock takes the new one" in note
    code, out, _ = shell("lock", zoo)
    assert (code, "fr" in out) == (0, True)
    assert same(lt.load(zoo).adapter("fr"), adapter(7))
    assert answer(shell, "check", zoo)["notes"] == []


def test_another_cache_has_other_times_and_the_same_adapter(
    hub: LoopbackHub, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lt.lock(zoo)
    moved(hub, tmp_path / "one", 7)
    talking_to(hub, tmp_path / "another-home", monkeypatch)
    assert lt.check(zoo) == []
    assert same(lt.load(zoo).adapter("fr"), adapter(1))


def test_an_adapter_in_the_cache_that_was_changed_is_noticed(zoo: Path) -> None:
    lt.lock(zoo)
    tree = lt.load(zoo)
    file = tree["fr"].source.files().now[WEIGHTS][0]
    data = bytearray(Path(file).read_bytes())
    data[-1] ^= 1
    Path(file).write_bytes(bytes(data))
    with pytest.raises(LoraTreeError, match=r"not the files that tree\.lock speaks of"):
        lt.load(zoo).adapter("fr")
    assert {p.kind for p in lt.check(zoo)} == {"unlocked"}


def test_another_name_in_tree_yaml_is_not_the_locked_commit(hub: LoopbackHub, zoo: Path) -> None:
    lt.lock(zoo)
    text = (zoo / "tree.yaml").read_text().replace("hub:org/one@main", "hub:org/many/legal")
    write(zoo / "tree.yaml", text)
    assert "fr: " in refused(zoo, UnlockedError)
    lt.lock(zoo)
    assert same(lt.load(zoo).adapter("fr"), adapter(2))


# ---------------------------------------------------------------------- saved
def test_a_save_keeps_the_name_and_the_commit(hub: LoopbackHub, zoo: Path, tmp_path: Path) -> None:
    lt.lock(zoo)
    locked = json.loads((zoo / "tree.lock").read_text())["nodes"]
    moved(hub, tmp_path / "one", 7)
    tree = lt.load(zoo)
    text = (zoo / "tree.yaml").read_bytes()
    tree.save(zoo)
    assert (zoo / "tree.yaml").read_bytes() == text
    tree.add("fr/more", adapter=adapter(3))
    tree.add("es", adapter="hub:org/many/legal")
    tree.save(zoo)
    again = json.loads((zoo / "tree.lock").read_text())["nodes"]
    assert again["fr"]["hub"] == locked["fr"]["hub"]
    assert again["es"]["hub"]["adapter"] == "hub:org/many/legal"
    assert same(lt.load(zoo).adapter("fr"), adapter(1))
    assert same(lt.load(zoo).adapter("es"), adapter(2))
    said = (zoo / "tree.yaml").read_text()
    assert "hub:org/one@main" in said
    assert "hub:org/many/legal" in said
    assert "snapshots" not in said
    tree.save(tmp_path / "whole", copy=True)
    assert "hub:" not in (tmp_path / "whole/tree.lock").read_text()
    assert same(lt.load(tmp_path / "whole", outside=False).adapter("fr"), adapter(1))


def test_a_push_sends_the_name_and_a_pull_fetches_nothing_of_it(
    hub: LoopbackHub, zoo: Path, tmp_path: Path
) -> None:
    adapter(4).save(zoo / "own")
    lt.lock(zoo)
    with pytest.warns(DeprecationWarning, match="content="):
        pushed = lt.push(zoo, "org/zoo", progress=False)
    assert not [path for path in pushed.added if path.startswith(("fr", "ink", "legal", "soft"))]
    shutil.rmtree(tmp_path / "home")
    asked = len(hub.asked)
    lt.pull("org/zoo", tmp_path / "there", progress=False)
    assert not [line for line in hub.asked[asked:] if "org/one" in line or "org/many" in line]
    assert same(lt.load(tmp_path / "there").adapter("fr"), adapter(1))
    with pytest.raises(FolderError, match=r"fr: adapter: hub:org/one@main is on the model hub"):
        lt.load(tmp_path / "there", outside=False)


# ---------------------------------------------------------------------- errors
def test_what_the_hub_lacks_is_told_with_the_node_and_the_line(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(named: str) -> str:
        write(tmp_path / "bad/tree.yaml", f"version: 1\ntree:\n  fr: {{adapter: '{named}'}}\n")
        text = refused(tmp_path / "bad", FormatError)
        assert "tree.yaml:3" in text
        assert "node fr" in text
        return text

    assert "no such repository of models" in told("hub:org/nothing")
    assert "no branch, tag or commit 'nope'" in told("hub:org/one@nope")
    text = told("hub:org/many")
    assert "no adapter there" in text
    assert "it holds legal: name one, like hub:org/many/legal" in text
    assert "no adapter there" in told("hub:org/many/styles/pencil.safetensors")
    hub.repo("org/gated", gated=True)
    monkeypatch.setenv("HF_TOKEN", GUEST)
    assert "accept them at" in told("hub:org/gated")
    # A node that can't be fetched is left out like any that can't be used.
    write(
        tmp_path / "bad/tree.yaml",
        "version: 1\ntree: {fr: {adapter: hub:org/nothing}, one: {adapter: hub:org/one}}\n",
    )
    with pytest.warns(lt.SkippedWarning, match="org/nothing"):
        assert lt.load(tmp_path / "bad", skip_broken=True).paths() == ["one"]


def test_without_the_hub_what_was_fetched_is_used(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lt.lock(zoo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(lt.load(zoo).adapter("fr"), adapter(1))
    assert lt.check(zoo) == []
    lt.lock(zoo)
    (zoo / "tree.lock").unlink()
    assert same(lt.load(zoo).adapter("fr"), adapter(1))
    assert lt.load(zoo).paths() == ["fr", "ink", "legal", "soft"]
    shutil.rmtree(tmp_path / "home")
    assert "HF_HUB_OFFLINE is set" in refused(zoo, FormatError)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        lt.Adapter.load("hub:org/one")


@pytest.mark.parametrize("is_listed", [False, True], ids=["one file", "one file of a list"])
def test_what_the_cache_has_in_part_is_fetched(
    is_listed: bool, hub: LoopbackHub, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a PeftConfig.from_pretrained leaves it, or a download that was interrupted."""
    write(zoo / "tree.yaml", "version: 1\ntree: {fr: {adapter: hub:org/one}}\n")
    lt.lock(zoo)
    head = hub.repos["org/one"].branches["main"]
    talking_to(hub, tmp_path / "another-home", monkeypatch)
    if is_listed:
        # huggingface_hub 2 notes the files of the commit, too.
        snapshot_download("org/one", allow_patterns=[CONFIG], revision=head)
    else:
        hf_hub_download("org/one", CONFIG, revision=head)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        text = refused(zoo, FormatError)
        assert f"org/one: {head} is not whole in the cache" in text
        assert "and HF_HUB_OFFLINE is set" in text
        assert f"it lacks {WEIGHTS}\n" in text
        assert "half an adapter" not in text
    # The hub refuses: its reason is told, and not that the cache has half of it.
    hub.broken = {"(GET /api/models|HEAD )/?org/one": 400}
    assert "org/one: the hub answered 400" in refused(zoo, FormatError)
    hub.broken = {}
    assert same(lt.load(zoo).adapter("fr"), adapter(1))
    assert lt.check(zoo) == []


def test_an_adapter_that_is_half_on_the_hub_is_refused_as_in_a_folder(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    adapter(1).save(tmp_path / "half")
    (tmp_path / "half" / WEIGHTS).unlink()
    hub.repo("org/half", tmp_path / "half")
    with pytest.raises(FormatError, match=f"half an adapter: {CONFIG} without {WEIGHTS}"):
        lt.Adapter.load("hub:org/half")


@pytest.mark.parametrize(
    ("choices", "there", "whole"),
    [
        ([["a", "b"], ["a", "c"], ["d"]], "ab", True),
        ([["a", "b"], ["a", "c"], ["d"]], "ac", True),
        ([["a", "b"], ["a", "c"], ["d"]], "d", True),
        ([["a", "b"], ["a", "c"], ["d"]], "abcd", True),
        # The cache may lack the other half of a choice that counts for more.
        ([["a", "b"], ["a", "c"], ["d"]], "ad", False),
        ([["a", "b"], ["c"]], "bc", False),
        ([["a", "b"], ["a", "c"], ["d"]], "a", False),
        ([["a", "b"], ["a", "c"], ["d"]], "b", False),
        ([["a", "b"], ["a", "c"], ["d"]], "", False),
        ([["sub/a", "sub/b"]], ["sub/a", "sub/b"], True),
        ([["sub/a", "sub/b"]], ["sub/a", "b"], False),
        ([[]], "a", False),
    ],
)
def test_the_cache_answers_only_for_what_is_whole(
    choices: list[list[str]],
    there: Sequence[str],
    whole: bool,
    hub: LoopbackHub,
    tmp_path: Path,
) -> None:
    for name in "abcd":
        write(tmp_path / "any" / name, name)
        write(tmp_path / "any/sub" / name, name)
    repo = hub.repo("org/any", tmp_path / "any")
    commit = repo.branches["main"]
    for name in there:
        hf_hub_download("org/any", name)
    client = hub_client.HubClient("org/any", what="a test")
    for revision in ("main", commit):
        found = client.cached(revision, choices)
        assert (found is not None) == (whole and bool(there))
        if found is not None:
            assert found.commit == commit
            assert (found.folder / there[0]).is_file()
    assert client.cached("0" * 40, choices) is None


def test_the_add_command_takes_one(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(capsys)
    adapter(3).save(tmp_path / "zoo/own")
    told = answer(shell, "add", tmp_path / "zoo", "fr", "hub:org/one")
    assert told["notes"] == ["hub:org/one: from the model hub"]
    assert "hub:org/one" in (tmp_path / "zoo/tree.yaml").read_text()
    before = listing(tmp_path / "zoo")
    code, _, err = shell("add", tmp_path / "zoo", "de", "hub:org/nothing")
    assert (code, "no such repository" in err) == (1, True)
    assert listing(tmp_path / "zoo") == before
