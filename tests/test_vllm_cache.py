"""The folder of flattened paths that an engine reads: named by content, bounded, safe for many at
once; and what of the plugin needs no vLLM.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from front import LoRARequest, adapter, folder_of, front_end, served_zoo, waits
from sampling import slow
from zoo import opened

import lora_tree as lt
from lora_tree.cli import main
from lora_tree.errors import FolderError, FormatError, PathError
from lora_tree.folder import Problem, survey
from lora_tree.integrations.flat_cache import FlatCache, FlatForm, NoRoom
from lora_tree.integrations.flat_cache import cache as flat_cache
from lora_tree.integrations.vllm import plugin, register, server_args
from lora_tree.integrations.vllm.client_names import NameRules
from lora_tree.integrations.vllm.settings import PluginSettings
from lora_tree.integrations.vllm.tree_view import Surveyed

ROOM = (1 << 20) + 4096  # what one small adapter is counted as while room is made


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return served_zoo(tmp_path / "zoo")


def cache(at: Path, **more: object) -> FlatCache:
    return FlatCache(at / "cache", **{"budget_bytes": 1 << 30, "form": FlatForm(8), **more})  # type: ignore[arg-type]


def content(kept: FlatCache, zoo: Path, path: str) -> str:
    return kept.content(*survey(zoo), path).name


def there(at: Path) -> set[str]:
    return {entry.name for entry in (at / "cache").iterdir() if not entry.name.startswith(".")}


def locks_of(at: Path) -> set[str]:
    return {entry.name for entry in (at / "cache" / ".locks").iterdir()}


def test_a_path_is_what_the_tree_flattens_to(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path)
    found = kept.get(*survey(zoo), "fr/legal")
    assert found.folder.name == found.content
    assert found.name == f"fr/legal@{found.content[:16]}"
    wanted, got = opened(zoo).flatten("fr/legal"), lt.Adapter.load(found.folder)
    assert torch.equal(got.modules["up"].dense(), wanted.modules["up"].dense())
    blend = kept.get(*survey(zoo), "fr/legal:0.5+de:0.5")
    dense = opened(zoo).flatten({"fr/legal": 0.5, "de": 0.5}).modules["up"].dense()
    torch.testing.assert_close(lt.Adapter.load(blend.folder).modules["up"].dense(), dense)
    again = kept.get(*survey(zoo), "fr/legal")
    assert (again.folder, again.error) == (found.folder, None)  # nothing was made


def test_content_follows_what_a_path_is_and_nothing_else(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path)
    before = {
        path: content(kept, zoo, path) for path in ("fr", "fr/legal", "de", "fr/legal:0.5+de:0.5")
    }
    assert len(set(before.values())) == 4
    shutil.copytree(zoo, tmp_path / "copy")
    assert {path: content(kept, tmp_path / "copy", path) for path in before} == before
    tree = opened(zoo)
    tree.update("fr/legal", adapter=adapter(9))
    tree.save(zoo)
    after = {path: content(kept, zoo, path) for path in before}
    assert {path for path in before if before[path] != after[path]} == {
        "fr/legal",
        "fr/legal:0.5+de:0.5",
    }
    tree.update("de", weight=0.5)
    tree.save(zoo)
    assert content(kept, zoo, "de") != after["de"]
    assert content(cache(tmp_path, form=FlatForm(16)), zoo, "fr") != after["fr"]


def test_a_rank_over_the_engine_s_is_recompressed(zoo: Path, tmp_path: Path) -> None:
    found = cache(tmp_path, form=FlatForm(3)).get(*survey(zoo), "fr/legal")
    assert lt.Adapter.load(found.folder).ranks == {"up": 3}
    assert found.error is not None
    assert found.error > 0.01
    with pytest.raises(lt.errors.SpecError, match="needs rank 4"):
        cache(tmp_path, form=FlatForm(3, max_error=1e-6)).get(*survey(zoo), "fr/medical")


def test_what_a_form_refuses_is_refused_whatever_is_there_already(
    zoo: Path, tmp_path: Path
) -> None:
    found = cache(tmp_path, form=FlatForm(1)).get(*survey(zoo), "fr")
    assert found.error is not None
    assert found.error > 0.01
    with pytest.raises(lt.errors.SpecError, match="needs rank 2"):
        cache(tmp_path, form=FlatForm(1, max_error=0.01)).get(*survey(zoo), "fr")
    assert there(tmp_path) == {found.folder.name}


def test_what_is_broken_is_refused_and_the_rest_is_served(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path)
    weights = zoo / "fr" / "legal" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(FolderError, match=r"unlocked: fr/legal: .* bytes, the lock says"):
        kept.get(*survey(zoo), "fr/legal")
    assert kept.get(*survey(zoo), "fr/medical").folder.is_dir()
    with pytest.raises(FormatError, match=r"fr/legal: .*the header describes"):
        lt.lock(zoo, accept_stale=True)
    (zoo / "tree.lock").unlink()
    with pytest.raises(FormatError, match="the header describes"):
        kept.get(*survey(zoo), "fr/legal")
    with pytest.raises(PathError, match="did you mean 'fr/legal'"):
        kept.get(*survey(zoo), "fr/legl")
    tree = lt.AdapterTree()
    tree.add("grp", group=True)
    tree.save(tmp_path / "empty")
    with pytest.raises(FormatError, match="nothing to serve"):
        kept.get(*survey(tmp_path / "empty"), "grp")


def test_a_stale_node_is_served_and_said(zoo: Path, tmp_path: Path) -> None:
    tree = opened(zoo)
    tree.update("fr", adapter=adapter(9))
    tree.save(zoo)
    kept = cache(tmp_path)
    assert "fr/legal: the lineage of fr has changed" in kept.get(*survey(zoo), "fr/legal").stale[0]
    assert kept.get(*survey(zoo), "fr").stale == ()


def test_the_cache_never_holds_more_than_its_budget(zoo: Path, tmp_path: Path) -> None:
    dropped: list[str] = []

    def unload(path: str) -> bool:
        dropped.append(path)
        return True

    kept = cache(tmp_path, budget_bytes=ROOM, grace_s=0.2)
    first = kept.get(*survey(zoo), "fr")
    room_for_one = kept.nbytes + ROOM - 4096 - 1
    tight = cache(tmp_path, budget_bytes=room_for_one, grace_s=0.2, unload=unload)
    with pytest.raises(NoRoom, match="no room for"):
        tight.get(*survey(zoo), "de")  # kept uses the one, and is asked for nothing
    kept.forget("fr")
    time.sleep(0.3)
    kept.report_use()
    assert tight.get(*survey(zoo), "de").folder.is_dir()
    assert not first.folder.exists()
    assert len(there(tmp_path)) == 1
    with pytest.raises(NoRoom, match=r"1 adapter that is in use takes"):
        tight.get(*survey(zoo), "fr/legal")
    assert not dropped  # it was used a moment ago
    time.sleep(0.3)
    assert tight.get(*survey(zoo), "fr/legal").folder.is_dir()
    assert dropped == ["de"]
    assert len(there(tmp_path)) == 1


def test_what_was_used_longest_ago_makes_room_whenever_it_was_resolved(
    zoo: Path, tmp_path: Path
) -> None:
    kept = cache(tmp_path, budget_bytes=3 * ROOM, grace_s=0.1)
    for path in ("fr", "de"):
        kept.get(*survey(zoo), path)
    kept.budget_bytes = kept.nbytes + ROOM - 4096 - 1
    time.sleep(0.15)
    kept.use("fr")  # the first that was resolved is the last that was used
    time.sleep(0.15)
    kept.get(*survey(zoo), "fr/medical")
    assert set(kept.served) == {"fr", "fr/medical"}


def test_what_running_requests_read_is_not_taken_away(zoo: Path, tmp_path: Path) -> None:
    reading: set[str] = set()
    kept = cache(tmp_path, budget_bytes=3 * ROOM, grace_s=0.0, is_read=reading.__contains__)
    long_ago = kept.get(*survey(zoo), "fr")
    reading.add(long_ago.content)
    kept.get(*survey(zoo), "de")
    kept.budget_bytes = kept.nbytes + ROOM - 4096 - 1
    kept.get(*survey(zoo), "fr/medical")
    assert set(kept.served) == {"fr", "fr/medical"}
    kept.forget("fr")  # replaced, say: its requests run on
    kept.get(*survey(zoo), "de")
    assert long_ago.folder.is_dir()
    reading.clear()
    kept.get(*survey(zoo), "fr/legal")
    assert not long_ago.folder.exists()


@slow
def test_a_process_that_ended_holds_nothing(zoo: Path, tmp_path: Path) -> None:
    assert Forked(MANY, zoo, tmp_path / "cache").end()[0] == 0
    assert len([name for name in locks_of(tmp_path) if name.endswith(".held")]) == 1
    kept = cache(tmp_path, form=FlatForm(4), budget_bytes=(1 << 20) + 500)
    assert not folder_of(kept).in_use_elsewhere()
    assert len([name for name in locks_of(tmp_path) if name.endswith(".held")]) == 1
    kept.get(*survey(zoo), "fr")
    assert there(tmp_path) == set(kept.served.values())  # the four made room


def test_what_was_replaced_stays_for_requests_on_their_way(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path, budget_bytes=2 * ROOM, grace_s=60)
    old = kept.get(*survey(zoo), "fr")
    tree = opened(zoo)
    tree.update("fr", adapter=adapter(9))
    tree.save(zoo)
    new = kept.get(*survey(zoo), "fr")
    assert old.folder.is_dir()
    assert new.folder.is_dir()
    assert kept.served == {"fr": new.content}


def test_what_one_request_failed_at_stays_held_for_another(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, other, real = cache(tmp_path, grace_s=0), cache(tmp_path), FlatCache._ensure
    asked: list[object] = []

    def ensure(self: FlatCache, *args: Any) -> float | None:
        asked.append(args)
        if len(asked) == 2:  # while the first is at work
            raise FolderError("no room")
        with pytest.raises(FolderError, match="no room"):
            kept.get(*survey(zoo), "fr")
        kept.report_use()
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(FlatCache, "_ensure", ensure)
        found = kept.get(*survey(zoo), "fr")
    assert kept.served == {"fr": found.content}
    assert folder_of(other).in_use_elsewhere() == {found.content: False}
    kept.forget("fr")
    kept.report_use()
    assert folder_of(other).in_use_elsewhere() == {}


def test_what_is_forgotten_while_it_is_asked_for_stays_held(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, other, real = cache(tmp_path, grace_s=0), cache(tmp_path), FlatCache._ensure
    kept.get(*survey(zoo), "fr")

    def ensure(self: FlatCache, *args: Any) -> float | None:
        kept.forget("fr")
        kept.report_use()
        assert folder_of(other).in_use_elsewhere()
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(FlatCache, "_ensure", ensure)
        found = kept.get(*survey(zoo), "fr:1")  # the same content under another name
    assert kept.served == {"fr:1": found.content}
    assert found.content in folder_of(other).in_use_elsewhere()


def test_what_nobody_could_make_is_held_no_longer(zoo: Path, tmp_path: Path) -> None:
    kept, other = cache(tmp_path, budget_bytes=1), cache(tmp_path)
    with pytest.raises(FolderError, match="no room"):
        kept.get(*survey(zoo), "fr")
    kept.report_use()
    assert not folder_of(other).in_use_elsewhere()


MANY = """
import sys, pathlib
from lora_tree.folder import survey
from lora_tree.integrations.flat_cache import FlatCache, FlatForm
kept = FlatCache(sys.argv[2], budget_bytes=1 << 30, form=FlatForm(8))
for path in ("fr", "fr/legal", "fr/medical", "de"):
    print(kept.get(*survey(sys.argv[1]), path).folder, flush=True)
"""


def test_threads_and_processes_ask_at_once(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path)
    processes = [Forked(MANY, zoo, tmp_path / "cache") for _ in range(3)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: kept.get(*survey(zoo), "fr/legal").folder, range(8)))
    ended = {process.end() for process in processes}
    assert len(set(found)) == 1
    ((code, printed),) = ended
    assert code == 0
    assert len(printed.splitlines()) == 4
    assert len(there(tmp_path)) == 4
    for entry in there(tmp_path):
        lt.Adapter.load(tmp_path / "cache" / entry)


@pytest.fixture(params=[0, errno.ENOSYS], ids=["flock", "no flock"])
def flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """What flock answers: nothing, or that the file system has none."""
    code: int = request.param

    def refuse(file: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    if code:
        monkeypatch.setattr(fcntl, "flock", refuse)
    return code


REFUSED = """
import fcntl, os, warnings
warnings.simplefilter("ignore")
def refuse(file, operation):
    raise OSError({code}, os.strerror({code}))
if {code}:
    fcntl.flock = refuse
"""


@pytest.mark.filterwarnings("ignore:.*this file system has no flock:RuntimeWarning")
def test_processes_share_a_cache_with_and_without_flock(
    flock: int, zoo: Path, tmp_path: Path
) -> None:
    code = REFUSED.format(code=flock) + MANY + "import signal; signal.pause()\n"
    other = Forked(code, zoo, tmp_path / "cache")
    try:
        theirs = {Path(other.stdout.readline().strip()) for _ in range(4)}
        kept = cache(tmp_path, form=FlatForm(4), budget_bytes=(1 << 20) + 500)  # room for one
        with pytest.raises(NoRoom, match="4 adapters that are in use"):
            kept.get(*survey(zoo), "fr")  # in another form
        assert all(folder.is_dir() for folder in theirs)
    finally:
        other.kill()
    assert kept.get(*survey(zoo), "fr").folder.is_dir()
    assert not any(folder.exists() for folder in theirs)
    kept.close()
    assert {name for name in locks_of(tmp_path) if ".held" in name} == set()


def test_what_version_1_left_counts_and_goes_first(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path)
    kept.get(*survey(zoo), "fr")
    earlier = tmp_path / "cache" / f"fr.legal-{'1f0c' * 8}"
    shutil.copytree(kept.folder / kept.served["fr"], earlier)
    os.utime(earlier, (0, 0))
    for name in ("1f0c" * 8, "1f0c" * 8 + ".make"):  # its locks, one or two for each name
        (tmp_path / "cache" / ".locks" / name).touch()
    kept.budget_bytes = kept.nbytes + ROOM - 4096 - 1
    kept.get(*survey(zoo), "de")
    assert not earlier.exists()
    assert kept.served.keys() == {"fr", "de"}
    assert not any(name.startswith("1f0c") for name in locks_of(tmp_path))


def test_a_folder_that_can_not_be_looked_at_is_asked_once_in_an_interval(tmp_path: Path) -> None:
    looks: list[int] = []

    def look() -> tuple[lt.AdapterTree, list[Problem]]:
        looks.append(len(looks))
        raise (OSError("stale file handle") if len(looks) == 1 else FolderError("no such folder"))

    seen = Surveyed(look, every_s=0.2)
    for said in ("can't be read: OSError: stale file handle", "no such folder"):
        with pytest.raises(lt.errors.LoraTreeError, match=said):
            seen.now()
        for ask in (seen.now, seen.recent):
            with pytest.raises(lt.errors.LoraTreeError, match=said):
                ask()
        time.sleep(0.25)
    assert seen.recent() is None
    assert len(looks) == 2


def test_servers_that_were_started_over_and_over_leave_one_list(zoo: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert Forked(MANY, zoo, tmp_path / "cache").end()[0] == 0
    assert len([name for name in locks_of(tmp_path) if name.endswith(".held")]) == 1


@pytest.mark.parametrize("operation", ["flock", "fsync", "rename", "mkdir"])
def test_what_the_disk_refuses_while_a_path_is_added_names_a_file_and_harms_nothing(
    operation: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = cache(tmp_path)
    kept.get(*survey(zoo), "de")
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    module = fcntl if operation == "flock" else os
    real, calls = getattr(module, operation), [0]

    def refuse(*args: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **more)

    monkeypatch.setattr(module, operation, refuse)
    failed = 0
    for failing in range(1, 30):  # noqa: B007, `refuse` reads it
        calls[0] = 0
        try:
            kept.get(*survey(zoo), "fr/legal")
        except FolderError as error:
            assert str(tmp_path / "cache") in str(error)
            failed += 1
        else:
            break
        assert kept.served.keys() == {"de"}
        for entry in there(tmp_path):  # nothing is there by half
            lt.Adapter.load(tmp_path / "cache" / entry)
    assert failed >= 1
    assert lt.Adapter.load(kept.folder / kept.served["fr/legal"]).ranks == {"up": 4}
    if files:
        assert len(os.listdir("/proc/self/fd")) == files


def test_a_killed_writer_s_stage_is_cleared_away(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path)
    left = tmp_path / "cache" / f".fr-x.{'0' * 32}"
    left.mkdir()
    (left / "half").touch()
    kept.get(*survey(zoo), "fr")
    assert not left.exists()


# ----------------------------------------------------------- vllm-args, and the plugin without vLLM
def test_the_server_s_arguments(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = server_args(zoo, cache=tmp_path / "c")
    assert (made.rank, made.flags[:3]) == (4, ("--enable-lora", "--max-lora-rank", "8"))
    assert made.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert made.environment["LORA_TREE_VLLM_ZOO"] == str(zoo)
    assert server_args(zoo, cache="c", max_rank=17).flags[2] == "32"
    with pytest.raises(SystemExit):
        main(["vllm-args", str(zoo), "--cache", str(tmp_path / "c"), "--max-rank", "1"])
    printed = capsys.readouterr()
    assert f"export LORA_TREE_VLLM_ZOO={zoo}\n" in printed.out
    assert "--max-lora-rank 1 " in printed.out
    assert printed.err == (
        "the largest Σr of a path is 4: such paths are recompressed to rank 1, "
        "and refused where that loses more than 0.05 in a module (--max-error)\n"
    )
    with pytest.raises(SystemExit):
        main(["vllm-args", str(zoo), "--json"])
    assert '"--max-lora-rank"' in capsys.readouterr().out


def test_the_server_s_arguments_name_the_base_and_the_bounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = lt.AdapterTree(base="org/model")
    tree.add("fr", adapter=adapter(1))
    tree.save(tmp_path / "zoo")
    asked = [
        "vllm-args",
        str(tmp_path / "zoo"),
        "--max-error",
        "0.2",
        "--allow",
        "fr/**",
        "--allow",
        "de",
    ]
    with pytest.raises(SystemExit):
        main([*asked, "--blends", "--outside", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["base"] == "org/model"
    settings = PluginSettings.of(said["environment"])
    assert (settings.max_error, settings.outside) == (0.2, True)
    assert settings.names == NameRules(blends=True, allow=("fr/**", "de"))
    with pytest.raises(SystemExit):
        main(asked)
    printed = capsys.readouterr()
    assert " --model org/model --enable-lora " in printed.out
    assert "export LORA_TREE_VLLM_MAX_ERROR=0.2\n" in printed.out
    assert "BLENDS" not in printed.out
    assert printed.err == "no path of the tree matches --allow de\n"
    with pytest.raises(SystemExit):
        main(["vllm-args", str(tmp_path / "zoo"), "--allow", "[a-z]*"])
    assert "'[a-z]*' is neither a path nor a pattern" in capsys.readouterr().err


def test_the_server_s_arguments_leave_out_what_is_broken_and_say_so(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cut", "de"):
        adapter(3).save(zoo / name)
    file = zoo / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    (zoo / "tree.lock").unlink(missing_ok=True)
    whole = server_args(zoo, cache="c", allow=("fr/**", "de"))
    assert whole.problems == ()  # nobody may ask for the broken one
    made = server_args(zoo, cache="c")
    assert [problem.node for problem in made.problems] == ["cut"]
    assert (made.rank, made.flags) == (whole.rank, whole.flags)
    with pytest.raises(SystemExit):
        main(["vllm-args", str(zoo), "--allow", "cut", "--allow", "it", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["unmatched"] == ["it"]
    (problem,) = said["problems"]
    assert (problem["node"], problem["kind"]) == ("cut", "adapter")
    assert "the header describes" in problem["text"]


def test_the_plugin_does_nothing_where_no_tree_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_TREE_VLLM_ZOO", raising=False)
    register()
    monkeypatch.setenv("LORA_TREE_VLLM_ZOO", "zoo")
    with pytest.raises(
        lt.errors.MissingExtra, match=r"needs vllm\.lora\.resolver, which is not installed"
    ):
        register()


# -------------------------------------------------------------------- the plugin around a front end
def rewritten(zoo: Path, path: str, seed: int) -> tuple[bytes, bytes]:
    """(The weights, the lock) that a node's new adapter of the same size would have in this
    tree.
    """
    copy = zoo.with_name("copy")
    shutil.copytree(zoo, copy)
    tree = opened(copy)
    tree.update(path, adapter=adapter(seed))
    tree.save(copy)
    weights, lock = (
        (copy / path / "adapter_model.safetensors").read_bytes(),
        (copy / "tree.lock").read_bytes(),
    )
    shutil.rmtree(copy)
    return weights, lock


@pytest.mark.parametrize("first", ["the lock", "the weights", "half of the weights"])
def test_paths_go_on_as_they_were_while_files_do_not_fit_the_lock(
    first: str, zoo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    names = ["fr", "fr/legal", "fr/medical"]
    weights, lock = rewritten(zoo, "fr", 9)
    file = zoo / "fr" / "adapter_model.safetensors"
    with front_end(zoo, tmp_path / "cache") as front:
        before = front.answers(*names)
        if first == "the lock":
            (zoo / "tree.lock").write_bytes(lock)
        else:
            file.write_bytes(weights if first == "the weights" else weights[: len(weights) // 2])
        waits(
            lambda: "'fr/medical' stays in its old version" in caplog.text,
            "nothing was said",
        )
        time.sleep(0.5)  # ten more looks
        assert front.answers(*names) == before
        assert front.answers("de") != [None]
        assert (
            len([text for text in caplog.messages if "'fr/legal' stays in its old version" in text])
            == 1
        )
        file.write_bytes(weights)
        (zoo / "tree.lock").write_bytes(lock)
        waits(
            lambda: not set(front.answers(*names)) & set(before), "the whole files were not taken"
        )
        after = dict(zip(names, front.answers(*names), strict=True))
    tree = opened(zoo)
    for path, content in after.items():
        got = lt.Adapter.load(tmp_path / "cache" / str(content)).modules["up"].dense()
        assert torch.equal(got, tree.flatten(path).modules["up"].dense())


def test_files_that_come_back_as_they_were_are_served_on_without_a_swap(
    zoo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = zoo / "fr" / "adapter_model.safetensors"
    whole = file.read_bytes()
    with front_end(zoo, tmp_path / "cache") as front:
        front.answers("fr")
        file.write_bytes(whole[:50])
        waits(lambda: "'fr' stays in its old version" in caplog.text, "nothing was said")
        file.write_bytes(whole)
        waits(lambda: "the files of 'fr' are whole again" in caplog.text, "nor this")
        assert len(front.loaded) == 1


def test_what_an_engine_can_not_load_leaves_what_it_has_in_use(
    zoo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with front_end(zoo, tmp_path / "cache") as front:
        before = front.answers("fr", "de")
        front.fails = True
        tree = opened(zoo)
        tree.update("fr", adapter=adapter(9))
        tree.update("de", weight=0.5)
        tree.save(zoo)
        for path in ("de", "fr"):  # the one's failure does not keep the other from being tried
            said = f"'{path}' stays in its old version: the engine can't load it"
            waits(lambda said=said: said in caplog.text, said)  # type: ignore[misc]
        assert front.answers("fr", "de") == before
        kept = front.resolver._cache
        assert kept is not None
        assert set(before) <= kept.in_use.keys()  # no other path may take their place
        front.fails = False
        waits(lambda: not set(front.answers("fr", "de")) & set(before), "they were not taken later")


def test_a_path_that_left_the_tree_or_is_locked_though_it_is_a_dora_is_no_longer_served(
    zoo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with front_end(zoo, tmp_path / "cache") as front:
        assert None not in front.answers("fr/legal", "de")
        tree = opened(zoo)
        tree.remove("de")
        tree.save(zoo)
        waits(lambda: front.answers("de") == [None], "a node that is gone was served")
        line = "'de' is no longer served: no node 'de' in the tree"
        waits(lambda: line in caplog.text, "nothing was logged")
        config = zoo / "fr" / "legal" / "adapter_config.json"  # whole, and of a kind that is no sum
        config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
        lt.lock(zoo, accept_stale=True)
        waits(lambda: front.answers("fr/legal") == [None], "a broken node was served")
        waits(lambda: "'fr/legal' is no longer served" in caplog.text, "nothing was logged")
        assert front.answers("fr") != [None]


def test_clients_see_the_path_they_asked_for_and_engines_never_one_name_twice(
    zoo: Path, tmp_path: Path
) -> None:
    with front_end(zoo, tmp_path / "cache") as front:
        front.lora_requests["own@v2"] = LoRARequest("own@v2", 99, str(tmp_path / "own"))
        front.answers("fr/legal", "fr")
        for seed in (9, 1, 9):  # there, back and there again
            old = front.answers("fr/legal")
            tree = opened(zoo)
            tree.update("fr", adapter=adapter(seed))
            tree.save(zoo)
            waits(lambda old=old: front.answers("fr/legal") != old, "no swap")  # type: ignore[misc]
        names = [request.lora_name for request in front.loaded]
        assert len(set(names)) == len(names) >= 5
        shown = {front.model_name(request) for request in front.lora_requests.values()}
        listed = asyncio.run_coroutine_threadsafe(front.show_available_models(), front.loop).result(
            10
        )
        assert shown == {"fr", "fr/legal", "own@v2"}
        assert {card.id for card in listed.data} == shown | {"base"}
        assert front.model_name(None) == "base"


def test_a_recompression_that_loses_more_than_the_bound_is_refused(
    zoo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with front_end(zoo, tmp_path / "cache", max_rank="3") as front:
        assert None not in front.answers("fr", "de")
        assert front.answers("fr/legal", "fr/legal") == [None, None]
    exact, cut = opened(zoo).flatten("fr/legal"), lt.load(zoo).flatten("fr/legal", 3)
    off = (cut.modules["up"].dense() - exact.modules["up"].dense()).norm() / exact.modules[
        "up"
    ].dense().norm()
    assert off > 0.05
    assert "needs rank 4" in caplog.text
    with front_end(
        zoo, tmp_path / "cache", max_rank="3", max_error=str(float(off) * 1.01)
    ) as front:
        assert None not in front.answers("fr/legal")


def test_what_fits_the_engine_s_rank_is_exact_whatever_may_be_lost(
    zoo: Path, tmp_path: Path
) -> None:
    with front_end(zoo, tmp_path / "cache", max_rank="8", max_error="0.9") as front:
        (content,) = front.answers("fr/legal")
    got = lt.Adapter.load(tmp_path / "cache" / str(content)).modules["up"].dense()
    assert torch.equal(got, opened(zoo).flatten("fr/legal").modules["up"].dense())


def test_a_path_refused_for_its_numbers_is_not_made_again(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr(
        flat_cache,
        "portable",
        lambda *args, **more: made.append(args) or lt.portable(*args, **more),
    )
    with front_end(zoo, tmp_path / "cache", max_rank="3") as front:
        front.answers("fr/legal")
        once = len(made)
        assert front.answers(*["fr/legal"] * 20) == [None] * 20
        assert len(made) == once


def test_what_an_engine_is_loading_and_what_it_still_has_meanwhile_stay(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is in use but for that: no grace, no running requests, and no room for another."""
    monkeypatch.setattr(plugin, "SHORT_GRACE_S", 0.0)
    monkeypatch.setattr(plugin, "ROOM_S", 0.0)
    with front_end(zoo, tmp_path / "cache") as front:
        (had,) = front.answers("fr")
        kept = front.resolver._cache
        assert kept is not None
        front.is_slow = True
        tree = opened(zoo)
        tree.update("fr", adapter=adapter(9))
        tree.save(zoo)
        waits(lambda: set(kept.served.values()) != {had}, "no swap began")
        loading = front.start("de")
        waits(lambda: len(kept.served) == 2, "nothing is loaded")
        kept.budget_bytes = kept.nbytes + (1 << 20)  # one more does not fit
        assert front.answers("fr") == [had]
        other = front.start("fr/legal")
        assert other.result(30) is None
        assert (tmp_path / "cache" / str(had)).is_dir()
        front.is_slow = False
        request = loading.result(30)
        assert request is not None
        assert Path(request.lora_path).is_dir()
        waits(lambda: front.answers("fr") != [had], "no swap")
        assert front.answers("fr/legal") != [None]  # now there is something to let go of


def test_a_front_end_that_can_not_be_told_keeps_what_it_has(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "GRACE_S", 0.0)
    monkeypatch.setattr(plugin, "ROOM_S", 0.0)
    monkeypatch.setattr(plugin, "find_serving_models", lambda: None)
    with front_end(zoo, tmp_path / "cache", cache_bytes=str((1 << 20) + 500)) as front:
        (first,) = front.answers("fr")
        assert front.answers("de", "fr") == [None, first]
        tree = opened(zoo)
        tree.remove("fr", recursive=True)
        tree.save(zoo)
        time.sleep(0.5)
        assert front.answers("fr") == [first]
        assert (tmp_path / "cache" / str(first)).is_dir()


def test_a_path_that_waits_for_room_is_made_once(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr(
        flat_cache,
        "portable",
        lambda *args, **more: made.append(args) or lt.portable(*args, **more),
    )
    monkeypatch.setattr(plugin, "SHORT_GRACE_S", 3.0)
    one = str((1 << 20) + 500)
    with front_end(zoo, tmp_path / "cache", cache_bytes=one) as front:
        assert None not in front.answers("fr", "de")  # it waits until the first is idle
        assert len(made) == 3  # for the first, in vain, and when there was room


@pytest.mark.parametrize("saves", range(3))
def test_a_path_asked_for_right_after_a_save_is_the_saved_one(
    zoo: Path, tmp_path: Path, saves: int
) -> None:
    with front_end(zoo, tmp_path / "cache", poll_s="1") as front:
        assert None not in front.answers("de")  # the tree was looked at
        tree = opened(zoo)
        tree.update("fr", adapter=adapter(9 + saves))
        tree.save(zoo)
        (content,) = front.answers("fr")
    assert content is not None
    got = lt.Adapter.load(tmp_path / "cache" / content).modules["up"].dense()
    assert torch.equal(got, opened(zoo).flatten("fr").modules["up"].dense())


def test_settings_that_make_no_sense_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = {"LORA_TREE_VLLM_ZOO": "zoo", "LORA_TREE_VLLM_CACHE": "cache"}
    assert PluginSettings.of(fine).max_error == 0.05
    assert not PluginSettings.of(fine).names.blends
    for name, text in (
        ("CACHE_BYTES", "10GiB"),
        ("MAX_ERROR", "nan"),
        ("BLENDS", "some"),
        ("ALLOW", "fr/[a-z]"),
    ):
        with pytest.raises(lt.errors.SpecError, match=f"LORA_TREE_VLLM_{name}"):
            PluginSettings.of(fine | {f"LORA_TREE_VLLM_{name}": text})
    with pytest.raises(lt.errors.SpecError, match="LORA_TREE_VLLM_CACHE is not"):
        PluginSettings.of({"LORA_TREE_VLLM_ZOO": "zoo"})


@pytest.mark.parametrize(
    ("pattern", "fits", "others"),
    [
        ("fr/*", ["fr/legal", "fr/x-1"], ["fr", "fr/legal/eu", "de", "afr/legal"]),
        ("fr/**", ["fr", "fr/legal", "fr/legal/eu/court"], ["de", "fra", "fra/legal"]),
        ("**", ["fr", "de/tech"], []),
        ("**/eu", ["eu", "fr/legal/eu"], ["fr/legal", "fr/eu/x", "fr/neu"]),
        ("fr/**/eu-*", ["fr/eu-1", "fr/a/b/eu-"], ["fr/eu", "eu-1", "fr/eu-1/x"]),
        ("cust-?/a*", ["cust-1/a", "cust-x/abc"], ["cust-12/a", "cust-/a", "cust-1/ba"]),
    ],
)
def test_patterns_of_paths(pattern: str, fits: list[str], others: list[str]) -> None:
    rules = NameRules(allow=("zz", pattern))
    assert [path for path in fits + others if rules.allows(path)] == fits


def test_many_stars_cost_no_more_than_the_lengths_multiplied() -> None:
    rules = NameRules(allow=("/".join(["**", "a"] * 32), "*a" * 40))
    began = time.monotonic()
    assert not rules.allows("/".join(["a"] * 63 + ["b"]))
    assert not rules.allows("a" * 127 + "b")
    assert time.monotonic() - began < 1
