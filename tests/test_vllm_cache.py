"""The folder of flattened paths that an engine reads: named by content, bounded, safe for many at once; and what of the
plugin needs no vLLM."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_tree as lt
from lora_tree.cli import main
from lora_tree.errors import FolderError, FormatError, PathError
from lora_tree.folder import survey
from lora_tree.integrations.flatcache import FlatCache, Form
from lora_tree.integrations.vllm import register, server_args

ROOM = (1 << 20) + 4096  # what one small adapter is counted as while room is made


def adapter(seed: int, r: int = 2) -> lt.Adapter:
    g = torch.Generator().manual_seed(seed)
    return lt.Adapter({"up": lt.LowRank(torch.randn(r, 8, generator=g), torch.randn(6, r, generator=g))})


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    tree = lt.AdapterTree()
    for seed, path in enumerate(("fr", "fr/legal", "fr/medical", "de")):
        tree.add(path, adapter=adapter(seed))
    tree.save(tmp_path / "zoo")
    return tmp_path / "zoo"


def cache(at: Path, **more: object) -> FlatCache:
    return FlatCache(at / "cache", **{"budget_bytes": 1 << 30, "form": Form(8), **more})  # type: ignore[arg-type]


def content(kept: FlatCache, zoo: Path, path: str) -> str:
    return kept.content(*survey(zoo), path)[0]


def there(at: Path) -> set[str]:
    return {entry.name for entry in (at / "cache").iterdir() if not entry.name.startswith(".")}


def test_a_path_is_what_the_tree_flattens_to(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path)
    found = kept.get(zoo, "fr/legal")
    assert found.folder.name == f"fr.legal-{found.content}"
    assert found.name == f"fr/legal@{found.content[:16]}"
    wanted, got = lt.load(zoo).flatten("fr/legal"), lt.Adapter.load(found.folder)
    assert torch.equal(got.modules["up"].dense(), wanted.modules["up"].dense())
    blend = kept.get(zoo, "fr/legal:0.5+de:0.5")
    dense = lt.load(zoo).flatten({"fr/legal": 0.5, "de": 0.5}).modules["up"].dense()
    torch.testing.assert_close(lt.Adapter.load(blend.folder).modules["up"].dense(), dense)
    again = kept.get(zoo, "fr/legal")
    assert (again.folder, again.error) == (found.folder, None)  # nothing was made


def test_content_follows_what_a_path_is_and_nothing_else(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path)
    before = {path: content(kept, zoo, path) for path in ("fr", "fr/legal", "de", "fr/legal:0.5+de:0.5")}
    assert len(set(before.values())) == 4
    shutil.copytree(zoo, tmp_path / "copy")
    assert {path: content(kept, tmp_path / "copy", path) for path in before} == before
    tree = lt.load(zoo)
    tree.update("fr/legal", adapter=adapter(9))
    tree.save(zoo)
    after = {path: content(kept, zoo, path) for path in before}
    assert {path for path in before if before[path] != after[path]} == {"fr/legal", "fr/legal:0.5+de:0.5"}
    tree.update("de", weight=0.5)
    tree.save(zoo)
    assert content(kept, zoo, "de") != after["de"]
    assert content(cache(tmp_path, form=Form(16)), zoo, "fr") != after["fr"]


def test_a_rank_over_the_engine_s_is_recompressed(zoo: Path, tmp_path: Path) -> None:
    found = cache(tmp_path, form=Form(3)).get(zoo, "fr/legal")
    assert lt.Adapter.load(found.folder).ranks == {"up": 3}
    assert found.error is not None
    assert found.error > 0.01
    with pytest.raises(lt.errors.SpecError, match="needs rank 4"):
        cache(tmp_path, form=Form(3, max_error=1e-6)).get(zoo, "fr/medical")


def test_what_a_form_refuses_is_refused_whatever_is_there_already(zoo: Path, tmp_path: Path) -> None:
    found = cache(tmp_path, form=Form(1)).get(zoo, "fr")
    assert found.error is not None
    assert found.error > 0.01
    with pytest.raises(lt.errors.SpecError, match="needs rank 2"):
        cache(tmp_path, form=Form(1, max_error=0.01)).get(zoo, "fr")
    assert there(tmp_path) == {found.folder.name}


def test_what_is_broken_is_refused_and_the_rest_is_served(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path)
    weights = zoo / "fr" / "legal" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(FolderError, match=r"unlocked: fr/legal: .* bytes, the lock says"):
        kept.get(zoo, "fr/legal")
    assert kept.get(zoo, "fr/medical").folder.is_dir()
    lt.lock(zoo, accept_stale=True)
    with pytest.raises(FormatError, match="the header describes"):
        kept.get(zoo, "fr/legal")
    with pytest.raises(PathError, match="did you mean 'fr/legal'"):
        kept.get(zoo, "fr/legl")
    tree = lt.AdapterTree()
    tree.add("grp", group=True)
    tree.save(tmp_path / "empty")
    with pytest.raises(FormatError, match="nothing to serve"):
        kept.get(tmp_path / "empty", "grp")


def test_a_stale_node_is_served_and_said(zoo: Path, tmp_path: Path) -> None:
    tree = lt.load(zoo)
    tree.update("fr", adapter=adapter(9))
    tree.save(zoo)
    kept = cache(tmp_path)
    assert "fr/legal: the lineage of fr has changed" in kept.get(zoo, "fr/legal").stale[0]
    assert kept.get(zoo, "fr").stale == ()


def test_the_cache_never_holds_more_than_its_budget(zoo: Path, tmp_path: Path) -> None:
    dropped: list[str] = []
    kept = cache(tmp_path, budget_bytes=ROOM, grace_s=0.2, let_go=dropped.append)
    first = kept.get(zoo, "fr")
    tight = cache(tmp_path, budget_bytes=kept.nbytes + ROOM - 4096 - 1, grace_s=0.2, let_go=dropped.append)
    with pytest.raises(FolderError, match="no room for"):
        tight.get(zoo, "de")  # kept holds the one, and is asked for nothing
    kept.forget("fr")
    time.sleep(0.3)
    kept._close_released()
    assert tight.get(zoo, "de").folder.is_dir()
    assert not first.folder.exists()
    assert len(there(tmp_path)) == 1
    with pytest.raises(FolderError, match=r"1 adapters that are being served"):
        tight.get(zoo, "fr/legal")
    assert dropped == ["de"]  # vLLM is made to ask again, and after the grace there is room
    time.sleep(0.3)
    assert tight.get(zoo, "fr/legal").folder.is_dir()
    assert len(there(tmp_path)) == 1


def test_what_was_replaced_stays_for_requests_on_their_way(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path, budget_bytes=2 * ROOM, grace_s=60)
    old = kept.get(zoo, "fr")
    tree = lt.load(zoo)
    tree.update("fr", adapter=adapter(9))
    tree.save(zoo)
    new = kept.get(zoo, "fr")
    assert old.folder.is_dir()
    assert new.folder.is_dir()
    assert kept.served == {"fr": new.content}


def test_what_one_request_failed_at_stays_held_for_another(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, other, real, asked = cache(tmp_path), cache(tmp_path), FlatCache._make, []

    def make(self: FlatCache, *args: Any) -> float | None:
        asked.append(args)
        if len(asked) == 2:  # while the first is at work
            raise FolderError("no room")
        with pytest.raises(FolderError, match="no room"):
            kept.get(zoo, "fr")
        kept._close_released()  # as a third does that makes room
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(FlatCache, "_make", make)
        found = kept.get(zoo, "fr")
    assert kept.served == {"fr": found.content}
    assert not other._take_away(found.folder)
    kept._grace_s = 0
    kept.forget("fr")
    kept._close_released()
    assert other._take_away(found.folder)


def test_what_is_forgotten_while_it_is_asked_for_stays_held(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, other, real = cache(tmp_path, grace_s=0), cache(tmp_path), FlatCache._make
    kept.get(zoo, "fr")

    def make(self: FlatCache, *args: Any) -> float | None:
        kept.forget("fr")
        kept._close_released()
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(FlatCache, "_make", make)
        found = kept.get(zoo, "fr:1")  # the same content under another name
    assert kept.served == {"fr:1": found.content}
    assert not other._take_away(found.folder)


def test_what_nobody_could_make_is_held_no_longer(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path, budget_bytes=1)
    with pytest.raises(FolderError, match="no room"):
        kept.get(zoo, "fr")
    kept._close_released()
    assert not kept._held


MANY = """
import sys, pathlib
from lora_tree.integrations.flatcache import FlatCache, Form
kept = FlatCache(sys.argv[2], budget_bytes=1 << 30, form=Form(8))
for path in ("fr", "fr/legal", "fr/medical", "de"):
    print(kept.get(sys.argv[1], path).folder)
"""


def test_threads_and_processes_ask_at_once(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path)
    code = [sys.executable, "-c", MANY, str(zoo), str(tmp_path / "cache")]
    with ThreadPoolExecutor(12) as pool:
        processes = [pool.submit(subprocess.run, code, capture_output=True, text=True, check=True) for _ in range(3)]
        found = list(pool.map(lambda _: kept.get(zoo, "fr/legal").folder, range(8)))
        printed = {job.result().stdout for job in processes}
    assert len(set(found)) == 1
    assert len(printed) == 1
    assert len(there(tmp_path)) == 4
    for entry in there(tmp_path):
        lt.Adapter.load(tmp_path / "cache" / entry)


def test_a_killed_writer_s_stage_is_cleared_away(zoo: Path, tmp_path: Path) -> None:
    kept = cache(tmp_path)
    left = tmp_path / "cache" / f".fr-x.{'0' * 32}"
    left.mkdir()
    (left / "half").touch()
    kept.get(zoo, "fr")
    assert not left.exists()


# ---------------------------------------------------------------------- vllm-args, and the plugin without vLLM
def test_the_server_s_arguments(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert printed.err == "the largest Σr of a path is 4: such paths are recompressed to rank 1\n"
    with pytest.raises(SystemExit):
        main(["vllm-args", str(zoo), "--json"])
    assert '"--max-lora-rank"' in capsys.readouterr().out


def test_the_plugin_does_nothing_where_no_tree_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_TREE_VLLM_ZOO", raising=False)
    register()
    monkeypatch.setenv("LORA_TREE_VLLM_ZOO", "zoo")
    with pytest.raises(lt.errors.MissingExtra, match=r"needs vllm\.lora\.resolver, which is not installed"):
        register()
