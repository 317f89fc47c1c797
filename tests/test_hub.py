"""Trees on the model hub, through the real huggingface_hub, against a hub on the loopback
(`loopback_hub`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import GUEST, LoopbackHub, environment, running_hub, talking_to
from sampling import slow
from shell import Shell, answer, command
from zoo import CONFIG, WEIGHTS, adapter, listing, nested, opened, value, write

import lora_tree as lt
from lora_tree.errors import FolderError, HubError, LoraTreeError, SpecError, UnlockedError
from lora_tree.export.checkpoint import base_folder
from lora_tree.folder import disk

pytest.importorskip("huggingface_hub", reason="an extra of its own")
from huggingface_hub import constants, hf_hub_download

pytestmark = pytest.mark.filterwarnings(
    # of huggingface_hub's own upload, which httpx would rather have otherwise
    "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"
)

NODES = ("fr", "fr/legal", "fr/medical", "grp/x")
FILES = {f"{node}/{name}" for node in NODES for name in (CONFIG, WEIGHTS)}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with running_hub() as made:
        talking_to(made, tmp_path / "home", monkeypatch)
        yield made


def push(folder: Path, **how: object) -> lt.Pushed:
    return lt.push(folder, "org/zoo", progress=False, **how)  # type: ignore[arg-type]


def pull(folder: Path, **how: object) -> lt.Pulled:
    return lt.pull("org/zoo", folder, progress=False, **how)  # type: ignore[arg-type]


def without_origin(folder: Path) -> dict[str, bytes | None]:
    return {
        name: data for name, data in listing(folder).items() if not name.startswith(".lora_tree")
    }


# ---------------------------------------------------------------------- there and back
def test_a_tree_comes_back_as_it_went(hub: LoopbackHub, zoo: Path, tmp_path: Path) -> None:
    before = without_origin(zoo)
    pushed = push(zoo, private=True)
    assert set(pushed.added) == {*FILES, "tree.yaml", "tree.lock", "README.md", "lora_tree.svg"}
    assert hub.repos["org/zoo"].private
    assert without_origin(zoo) == before
    pulled = pull(tmp_path / "there")
    assert set(pulled.new) == {*FILES, "tree.yaml", "tree.lock"}
    assert without_origin(tmp_path / "there") == before
    assert value(lt.load(tmp_path / "there")) == value(lt.load(zoo))


def test_nothing_but_the_tree_leaves_the_machine(hub: LoopbackHub, zoo: Path) -> None:
    others = (
        ".training/checkpoint-20/optimizer.safetensors",
        ".runs/1/metrics.jsonl",
        ".lora_tree/versions/1f/adapter_model.safetensors",
        "fr/checkpoint-500/adapter_model.safetensors",
        "fr/checkpoint-500/adapter_config.json",
        "fr/optimizer.pt",
        "fr/README.md",
        "id_ed25519",
        ".env",
        "data.jsonl",
        "other.yaml",
        "cache/flat/model.bin",
    )
    for name in others:
        write(zoo / name, "a secret")
    push(zoo)
    head = hub.repos["org/zoo"].head()
    assert not {name for name in head if name in others}
    assert not [name for name, data in head.items() if b"a secret" in data]


def test_a_push_is_one_commit_of_what_differs(hub: LoopbackHub, zoo: Path) -> None:
    push(zoo)
    repo = hub.repos["org/zoo"]
    repo.commit({**repo.head(), "notes/mine.txt": b"mine"})  # on the hub's own page
    count = len(repo.commits)
    assert push(zoo).commit == repo.branches["main"]
    assert len(repo.commits) == count
    changed = lt.load(zoo)
    changed.update("fr/legal", adapter=adapter(9))
    changed.remove("fr/medical")
    changed.save(zoo)
    told = push(zoo, message="better")
    assert len(repo.commits) == count + 1
    assert repo.messages[repo.branches["main"]] == "better"
    assert {"fr/legal/" + WEIGHTS, "tree.lock"} <= set(told.replaced)
    assert not [path for path in told.replaced if path.startswith(("fr/adapter", "grp"))]
    assert set(told.deleted) == {"fr/medical/" + CONFIG, "fr/medical/" + WEIGHTS}
    assert repo.head()["notes/mine.txt"] == b"mine"


def test_a_dry_run_writes_nothing(hub: LoopbackHub, zoo: Path, tmp_path: Path) -> None:
    told = push(zoo, dry_run=True)
    assert told.commit is None
    assert set(told.added) > FILES
    assert not hub.repos
    push(zoo)
    before = dict(hub.repos["org/zoo"].commits)
    changed = lt.load(zoo)
    changed.update("fr", adapter=adapter(9))
    changed.save(zoo)
    assert "fr/" + WEIGHTS in push(zoo, dry_run=True).replaced
    assert hub.repos["org/zoo"].commits == before
    asked = len(hub.asked)
    assert set(pull(tmp_path / "there", dry_run=True).new) == {*FILES, "tree.yaml", "tree.lock"}
    assert not (tmp_path / "there").exists()
    assert not [line for line in hub.asked[asked:] if WEIGHTS in line]


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("wrong", ["lock", "missing", "longer", "target", "blocked"])
def test_a_pull_and_its_dry_run_refuse_the_same(
    hub: LoopbackHub, zoo: Path, tmp_path: Path, wrong: str, dry_run: bool
) -> None:
    push(zoo)
    files = dict(hub.repos["org/zoo"].head())
    there = tmp_path / "there"
    kind: type[LoraTreeError] = UnlockedError
    names = "fr/legal"
    if wrong == "lock":
        files["tree.lock"] = b"{"
        kind, names = SpecError, r"tree\.lock"
    elif wrong == "missing":
        del files[f"fr/legal/{WEIGHTS}"], files[f"fr/legal/{CONFIG}"]
    elif wrong == "longer":
        files[f"fr/legal/{WEIGHTS}"] += b" "
    elif wrong == "target":
        there.write_text("mine")
        kind, names = FolderError, "there"
    else:
        write(there / "fr", "mine")
        kind, names = FolderError, "fr"
    hub.repos["org/zoo"].commit(files)
    before = listing(tmp_path / "there") if there.is_dir() else there.exists()
    with pytest.raises(kind, match=names):
        pull(there, dry_run=dry_run)
    assert before == (listing(there) if there.is_dir() else there.exists())


def test_a_folder_without_lock_or_yaml_is_locked_on_the_way(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    folder = nested(tmp_path / "flat", "a", "a/b")
    push(folder)
    assert not (folder / "tree.lock").exists()
    pull(tmp_path / "there")
    assert lt.check(tmp_path / "there") == []
    assert lt.load(tmp_path / "there").base == "org/model"


def test_a_branch_is_pushed_and_pulled_by_name(hub: LoopbackHub, zoo: Path, tmp_path: Path) -> None:
    push(zoo)
    main = hub.repos["org/zoo"].branches["main"]
    changed = lt.load(zoo)
    changed.remove("fr/legal")
    changed.save(zoo)
    told = push(zoo, branch="smaller")
    assert set(told.deleted) == {"fr/legal/" + CONFIG, "fr/legal/" + WEIGHTS}
    assert hub.repos["org/zoo"].branches["main"] == main
    pull(tmp_path / "small", revision="smaller")
    pull(tmp_path / "old", revision=main)
    assert "fr/legal" not in lt.load(tmp_path / "small")
    assert "fr/legal" in lt.load(tmp_path / "old")


# ---------------------------------------------------------------------- the base's name
def local_base(tmp_path: Path) -> Path:
    write(tmp_path / "base" / "config.json", "{}")
    folder = tmp_path / "local"
    made = lt.AdapterTree(base=str(tmp_path / "base"))
    for seed, path in enumerate(("fr", "fr/legal", "de")):
        own = adapter(seed)
        made.add(path, adapter=lt.Adapter(own.modules, base=str(tmp_path / "base")))
    made.save(folder)
    text = (
        (folder / "tree.yaml").read_text()
        if (folder / "tree.yaml").exists()
        else "version: 1\nbase: ../base\n"
    )
    write(folder / "tree.yaml", "# ours\n" + text + "# the end\n")
    lt.lock(folder)
    return folder


def test_a_base_that_is_a_folder_is_refused_without_its_name_on_the_hub(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    folder = local_base(tmp_path)
    with pytest.raises(SpecError, match=r"a folder of this machine.*\n  .*--base-name org/model"):
        push(folder)
    with pytest.raises(SpecError, match="a folder of this machine, or no hub id"):
        push(folder, base_name=str(tmp_path / "base"))
    assert not hub.repos


def test_the_base_goes_by_its_name_and_the_lock_says_what_it_said(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    folder = local_base(tmp_path)
    changed = lt.load(folder)
    changed.update("fr", adapter=adapter(7))  # so fr/legal is stale
    changed.save(folder)
    before = without_origin(folder)
    told = push(folder, base_name="org/model")
    assert told.base == "org/model"
    assert {"tree.yaml", "de/" + CONFIG} <= set(told.renamed)
    assert without_origin(folder) == before
    head = hub.repos["org/zoo"].head()
    assert not [name for name, data in head.items() if str(tmp_path).encode() in data]
    there = head["tree.yaml"].decode()
    assert there.startswith("# ours\n")
    assert there.endswith("# the end\n")
    pull(tmp_path / "there")
    got = opened(tmp_path / "there")
    assert (got.base, got.adapter("de").base) == ("org/model", "org/model")
    kinds = {problem.node: problem.kind for problem in lt.check(tmp_path / "there")}
    assert kinds == {"fr/legal": "stale"}
    old = opened(folder)
    assert [v for k, v in value(got).items() if k] == [v for k, v in value(old).items() if k]


def test_an_adapter_outside_of_the_folder_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    adapter(1).save(tmp_path / "elsewhere")
    write(tmp_path / "zoo/tree.yaml", "version: 1\ntree: {fr: {adapter: ../elsewhere}}\n")
    with pytest.raises(
        FolderError, match=r"fr: outside of the tree's folder(.|\n)*save\(copy=True\)"
    ):
        push(tmp_path / "zoo")
    lt.load(tmp_path / "zoo").save(tmp_path / "zoo", copy=True)
    assert "fr/" + WEIGHTS in push(tmp_path / "zoo").added


# ---------------------------------------------------------------------- the model card
def test_the_card_can_be_found_and_shows_the_tree(hub: LoopbackHub, zoo: Path) -> None:
    from huggingface_hub import ModelCard

    push(zoo, license="apache-2.0", tags=["law"])
    head = hub.repos["org/zoo"].head()
    card = ModelCard(head["README.md"].decode())
    assert card.data.base_model == "org/model"
    assert card.data.base_model_relation == "adapter"
    assert card.data.library_name == "lora_tree"
    assert card.data.license == "apache-2.0"
    assert {"lora", "lora_tree", "law"} <= set(card.data.tags)
    assert "| fr/legal |  | 0.8 | 2 |" in card.text
    assert "![the tree](lora_tree.svg)" in card.text
    assert head["lora_tree.svg"].startswith(b"<svg")


def test_the_words_of_the_owner_stay(hub: LoopbackHub, zoo: Path) -> None:
    push(zoo)
    repo = hub.repos["org/zoo"]
    card = repo.head()["README.md"].decode()
    mine = card.replace("# zoo", "# Our laws\n\nAsk Ada.").replace("- lora\n", "- lora\n- ours\n")
    mine = mine.replace("---\nbase", "---\nlanguage: fr\nbase") + "\nThe *end*.\n"
    repo.commit({**repo.head(), "README.md": mine.encode()})
    changed = lt.load(zoo)
    changed.remove("fr/legal")
    changed.save(zoo)
    push(zoo)
    after = repo.head()["README.md"].decode()
    assert "# Our laws\n\nAsk Ada." in after
    assert after.endswith("\nThe *end*.\n")
    assert "language: fr" in after
    assert "- ours" in after
    assert "fr/legal" not in after
    assert "fr/medical" in after
    # A card without our part, and without metadata, gets both.
    repo.commit({**repo.head(), "README.md": b"Only words.\n"})
    push(zoo)
    after = repo.head()["README.md"].decode()
    assert after.startswith("---\n")
    assert "Only words." in after
    assert after.count("fr/medical") == 1


def test_broken_metadata_is_the_owners_to_mend(hub: LoopbackHub, zoo: Path) -> None:
    push(zoo)
    repo = hub.repos["org/zoo"]
    repo.commit({**repo.head(), "README.md": b"---\n- [\n---\nwords\n"})
    with pytest.raises(SpecError, match=r"README.md: its metadata can't be read"):
        push(zoo)


# ---------------------------------------------------------------------- nobody's work is undone
def test_a_push_over_somebody_elses_is_refused(hub: LoopbackHub, zoo: Path, tmp_path: Path) -> None:
    push(zoo)
    pull(tmp_path / "theirs")
    theirs = lt.load(tmp_path / "theirs")
    theirs.update("fr/legal", adapter=adapter(9))
    theirs.save(tmp_path / "theirs")
    push(tmp_path / "theirs")
    mine = lt.load(zoo)
    mine.update("fr/medical", adapter=adapter(8))
    mine.save(zoo)
    before = dict(hub.repos["org/zoo"].commits)
    with pytest.raises(HubError, match=r"fr/legal.*changed by another push since(.|\n)*--force"):
        push(zoo)
    shutil.copytree(zoo, tmp_path / "copy", ignore=shutil.ignore_patterns(".lora_tree"))
    with pytest.raises(HubError, match="of a tree that this folder has not pulled"):
        push(tmp_path / "copy")
    assert hub.repos["org/zoo"].commits == before
    push(zoo, force=True)
    assert hub.repos["org/zoo"].head()["tree.lock"] == (zoo / "tree.lock").read_bytes()


def test_two_pushes_in_one_moment_make_one_commit(
    hub: LoopbackHub, zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(zoo)
    repo = hub.repos["org/zoo"]
    changed = lt.load(zoo)
    changed.remove("fr/legal")
    changed.save(zoo)
    from lora_tree.integrations.hub.client import HubClient

    commit = HubClient.commit

    def second(self: HubClient, *args: object, **how: object) -> str:
        repo.commit({**repo.head(), "theirs.txt": b"x"})  # between the look and the commit
        return commit(self, *args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(HubClient, "commit", second)
    with pytest.raises(HubError, match=r"another push came in between(.|\n)*push again"):
        push(zoo)
    assert "fr/legal/" + WEIGHTS in repo.head()


def test_a_pull_brings_a_folder_up_to_date(hub: LoopbackHub, zoo: Path, tmp_path: Path) -> None:
    push(zoo)
    there = tmp_path / "there"
    pull(there)
    write(there / "notes.txt", "mine")
    changed = lt.load(zoo)
    changed.update("fr/legal", adapter=adapter(9))
    changed.remove("fr/medical")
    changed.add("es", adapter=adapter(5))
    changed.save(zoo)
    push(zoo)
    told = pull(there)
    assert "fr/legal/" + WEIGHTS in told.replaced
    assert "es/" + CONFIG in told.new
    assert set(told.deleted) == {"fr/medical/" + CONFIG, "fr/medical/" + WEIGHTS}
    assert (there / "notes.txt").read_text() == "mine"
    assert value(lt.load(there)) == value(lt.load(zoo))
    assert not (there / "fr/medical").exists()


@pytest.mark.parametrize("how", ["changed", "added", "no tree"])
def test_a_pull_replaces_nothing_that_it_could_not_bring_back(
    hub: LoopbackHub, zoo: Path, tmp_path: Path, how: str
) -> None:
    push(zoo)
    there = tmp_path / "there"
    if how == "no tree":
        write(there / "tree.yaml", "version: 1\n")
    else:
        pull(there)
        mine = lt.load(there)
        if how == "changed":
            mine.update("fr/legal", adapter=adapter(9))
        else:
            mine.add("mine", adapter=adapter(9))
        mine.save(there)
    changed = lt.load(zoo)
    changed.update("fr/legal", adapter=adapter(5))
    changed.save(zoo)
    push(zoo)
    before = listing(there)
    place = {"changed": "fr/legal/", "added": "mine/", "no tree": "tree.yaml"}[how]
    with pytest.raises(
        FolderError, match=f"{place}(.|\n)*could not be brought back(.|\n)*another folder"
    ):
        pull(there)
    assert listing(there) == before


# ---------------------------------------------------------------------- all or nothing
@pytest.mark.parametrize("into", ["new", "old"])
def test_a_pull_that_fails_anywhere_leaves_the_old_or_the_new(
    hub: LoopbackHub, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, into: str
) -> None:
    push(zoo)
    there = tmp_path / "there"
    if into == "old":
        pull(there)
    old = without_origin(there) if there.exists() else {}
    changed = lt.load(zoo)
    changed.update("fr/legal", adapter=adapter(9))
    changed.save(zoo)
    push(zoo)
    new = without_origin(zoo)
    for name in ("copy", "write", "rename", "sync"):
        real = getattr(disk, name)
        for at in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 10_000):
            kept = tmp_path / "kept"
            shutil.rmtree(kept, ignore_errors=True)
            if there.exists():
                shutil.copytree(there, kept)
            left = [at]

            def broken(*args: object, **how: object) -> object:
                left[0] -= 1  # noqa: B023
                if left[0] < 0:  # noqa: B023
                    raise OSError(28, "No space left on device")
                return real(*args, **how)  # noqa: B023

            with monkeypatch.context() as patch:
                patch.setattr(disk, name, broken)
                try:
                    pull(there)
                    done = True
                except (LoraTreeError, OSError):
                    done = False
            if there.exists():
                assert value(opened(there)) == value(opened(zoo if _is(there, new) else kept))
            else:
                assert not old
            assert not done or _is(there, new)
            shutil.rmtree(there, ignore_errors=True)
            if old:
                shutil.copytree(kept, there)
            if done and left[0] >= 0:
                break
        else:
            pytest.fail(f"{name} is called more often than this test counts")


def _is(folder: Path, files: dict[str, bytes | None]) -> bool:
    lock = folder / "tree.lock"
    staged = [file for file in folder.rglob("stage-*/*") if file.read_bytes() == files["tree.lock"]]
    return bool(staged) or (lock.exists() and lock.read_bytes() == files["tree.lock"])


def test_a_killed_pull_leaves_nothing_half(hub: LoopbackHub, zoo: Path, tmp_path: Path) -> None:
    push(zoo)
    hub.stalled = f"GET .*grp/x/{WEIGHTS}"
    there = tmp_path / "there"
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_tree.cli", "pull", "org/zoo", str(there)],
        env={**os.environ, **environment(hub, tmp_path / "other-home")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while not hub.asked_for(hub.stalled) and time.monotonic() < until:
            time.sleep(0.05)
        assert hub.asked_for(hub.stalled)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert not there.exists()
    hub.stalled = ""
    pull(there)
    assert value(lt.load(there)) == value(lt.load(zoo))


# ---------------------------------------------------------------------- errors
def test_what_the_hub_refuses_is_said_with_what_to_do(
    hub: LoopbackHub, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(zoo, private=True)
    hub.repo("org/gated", gated=True)
    there = tmp_path / "there"

    def told(repository: str, **how: object) -> str:
        with pytest.raises(HubError) as caught:
            lt.pull(repository, there, progress=False, **how)  # type: ignore[arg-type]
        assert not there.exists()
        return str(caught.value)

    assert "no branch, tag or commit 'nope'" in told("org/zoo", revision="nope")
    assert "org/nothing: no such repository of models" in told("org/nothing")
    monkeypatch.setenv("HF_TOKEN", GUEST)
    assert "one that this token may not see" in told("org/zoo")
    text = told("org/gated")
    assert "gated" in text
    assert f"accept them at {hub.url}/org/gated, then log in" in text
    with pytest.raises(HubError, match=r"this account may not do that(.|\n)*hf auth login"):
        lt.push(zoo, "org/new", progress=False)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert "the hub knows no such token" in told("org/zoo")
    monkeypatch.delenv("HF_TOKEN")
    text = told("org/zoo")
    assert "a private one, and there is no token" in text
    assert "hf auth login, or set HF_TOKEN" in text


def test_without_the_hub_the_cache_answers(
    hub: LoopbackHub, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(zoo)
    pull(tmp_path / "one")
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pull(tmp_path / "two")
    assert without_origin(tmp_path / "two") == without_origin(tmp_path / "one")
    with pytest.raises(
        HubError, match=r"org/other: main is not whole in the cache.*HF_HUB_OFFLINE is set"
    ):
        lt.pull("org/other", tmp_path / "three", progress=False)
    with pytest.raises(HubError, match=r"needs the hub, and HF_HUB_OFFLINE is set"):
        push(zoo)
    assert len(hub.asked) == asked
    # The same where nothing listens at the endpoint.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    pull(tmp_path / "four")
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:9 does not answer"):
        push(zoo)


def test_a_pull_of_what_the_cache_has_in_part_names_what_it_lacks(
    hub: LoopbackHub, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(zoo)
    pull(tmp_path / "one", dry_run=True)  # fetches tree.yaml and tree.lock
    hf_hub_download("org/zoo", f"fr/{CONFIG}")
    for name in (CONFIG, WEIGHTS):
        hf_hub_download("org/zoo", f"grp/x/{name}")
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        for dry_run in (False, True):
            with pytest.raises(HubError) as error:
                pull(tmp_path / "one", dry_run=dry_run)
            assert "is not whole in the cache" in str(error.value)
            assert "it lacks fr, fr/legal, fr/medical\n" in str(error.value)
        assert not (tmp_path / "one").exists()
    pull(tmp_path / "one")
    assert without_origin(tmp_path / "one") == without_origin(zoo)


def test_a_base_that_the_cache_has_in_part_is_told_from_one_without_weights(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    write(tmp_path / "base/config.json", "{}")
    write(tmp_path / "base/model.safetensors.index.json", json.dumps(index))
    for shard in index["weight_map"].values():
        write(tmp_path / "base" / shard, "numbers")
    hub.repo("org/base", tmp_path / "base")

    def lacking() -> str:
        with pytest.raises(SpecError, match="org/base: incomplete in the hub's cache") as error:
            base_folder(lt.AdapterTree(), "org/base")
        assert "fetch it once while the hub answers" in str(error.value)
        return str(error.value)

    hf_hub_download("org/base", "config.json")
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "lacks model.safetensors;" in lacking()
    for name in ("model.safetensors.index.json", "model-2.safetensors"):
        hf_hub_download("org/base", name)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "lacks model-1.safetensors;" in lacking()
    online = base_folder(lt.AdapterTree(), "org/base")
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert base_folder(lt.AdapterTree(), "org/base") == online


def test_a_hub_that_breaks_leaves_nothing(hub: LoopbackHub, zoo: Path, tmp_path: Path) -> None:
    hub.repo("org/zoo")
    before = dict(hub.repos["org/zoo"].commits)
    for request in (
        "POST /api/models/org/zoo/preupload",
        "POST .*objects/batch",
        "POST .*/commit/",
    ):
        hub.broken = {request: 400}
        with pytest.raises(HubError, match="org/zoo: "):
            push(zoo)
        assert hub.repos["org/zoo"].commits == before
    hub.broken = {}
    push(zoo)
    hub.broken = {f"GET /org/zoo/resolve/.*/grp/x/{WEIGHTS}": 400}
    with pytest.raises(HubError):
        pull(tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_gitignore_that_drops_a_file_is_noticed(hub: LoopbackHub, zoo: Path) -> None:
    hub.repo("org/zoo").ignored = "medical/.*safetensors"
    with pytest.raises(
        HubError,
        match=r"fr/medical/adapter_model.safetensors: missing from the commit(.|\n)*\.gitignore",
    ):
        push(zoo)


@pytest.mark.parametrize("name", ["zoo", "a/b/c", "org/..", "org/zoo name", ""])
def test_an_id_that_is_none_is_refused_before_anything(
    hub: LoopbackHub, zoo: Path, tmp_path: Path, name: str
) -> None:
    for call in (lambda: lt.push(zoo, name), lambda: lt.pull(name, tmp_path / "there")):
        with pytest.raises(SpecError, match="expected: org/"):
            call()
    assert not hub.asked


# ---------------------------------------------------------------------- a stranger's repository
def test_what_is_no_tree_is_told_apart(hub: LoopbackHub, tmp_path: Path) -> None:
    adapter(1).save(tmp_path / "one")
    hub.repo("org/one", tmp_path / "one")
    with pytest.raises(FolderError, match=r"one adapter, not a tree(.|\n)*hub:org/one"):
        lt.pull("org/one", tmp_path / "there")
    hub.repo("org/none")
    with pytest.raises(FolderError, match=r"no tree: no tree\.yaml"):
        lt.pull("org/none", tmp_path / "there")
    assert not hub.asked_for("safetensors")


@pytest.mark.parametrize("where", ["../../../../../../../../etc", "/etc", ".git/x"])
def test_a_tree_that_reaches_out_of_its_folder_is_refused(
    hub: LoopbackHub, zoo: Path, tmp_path: Path, where: str
) -> None:
    if where.startswith("."):
        nested(zoo, where)
    write(zoo / "tree.yaml", f"version: 1\ntree: {{bad: {{adapter: {where}}}}}\n")
    hub.repo("org/zoo", zoo)
    for dry_run in (True, False):
        with pytest.raises(
            LoraTreeError, match=r"leads out of|no such folder|hidden|no adapter there"
        ):
            pull(tmp_path / "there", dry_run=dry_run)
    assert not (tmp_path / "there").exists()


def test_files_that_are_not_those_of_the_lock_are_refused(
    hub: LoopbackHub, zoo: Path, tmp_path: Path
) -> None:
    adapter(9).save(zoo / "fr/legal")
    hub.repo("org/zoo", zoo)
    with pytest.raises(UnlockedError, match=r"fr/legal(.|\n)*its owners have to push it again"):
        pull(tmp_path / "there")
    assert not (tmp_path / "there").exists()


# ---------------------------------------------------------------------- the command line
def test_the_commands_say_what_they_did(
    hub: LoopbackHub, zoo: Path, tmp_path: Path, shell: Shell
) -> None:
    code, out, _ = shell("push", zoo, "org/zoo", "--private", "--license", "mit", "--json")
    assert code == 0
    assert json.loads(out)["commit"] == hub.repos["org/zoo"].branches["main"]
    assert hub.repos["org/zoo"].private
    code, out, _ = shell("push", zoo, "org/zoo")
    assert (code, "up to date" in out) == (0, True)
    pulled = answer(shell, "pull", "org/zoo", tmp_path / "there")
    assert set(pulled["new"]) == {*FILES, "tree.yaml", "tree.lock"}
    code, out, _ = shell("pull", "org/zoo", tmp_path / "more", "--quiet")
    assert (code, "+ fr/legal/adapter_config.json" in out) == (0, True)
    code, _, err = shell("pull", "org/nothing", tmp_path / "no")
    assert code == 1
    assert err.startswith("error: org/nothing: no such repository")


@slow
def test_the_environment_of_huggingface_hub_counts(
    hub: LoopbackHub, zoo: Path, tmp_path: Path
) -> None:
    env = environment(hub, tmp_path / "other-home")
    push(zoo)
    done = command("pull", "org/zoo", tmp_path / "there", "--json", env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"] == hub.repos["org/zoo"].branches["main"]
    assert value(lt.load(tmp_path / "there")) == value(lt.load(zoo))
    done = command("pull", "org/zoo", tmp_path / "again", env={**env, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
