"""The shell: every command over small folders, what it prints, what it exits with, and never a
traceback.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import shell as processes
import torch
import transformers
from oracle import random_adapter, shapes_of
from sampling import slow
from shell import Shell, answer
from zoo import listing

import lora_tree as lt
from lora_tree import extras
from lora_tree.cli import main
from lora_tree.cli.application import COMMANDS
from lora_tree.cli.interrupts import noted_interrupts
from lora_tree.demo import bytelevel

TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    bytelevel.save_base(bytelevel.new_base(hidden=32, layers=1, window=32), folder)
    return folder


def adapter(base: Path, seed: int, r: int = 2) -> lt.Adapter:
    return random_adapter(shapes_of(bytelevel.open_base(base), *TARGETS), seed, r=r)


@pytest.fixture
def zoo(base: Path, tmp_path: Path) -> Path:
    tree = lt.AdapterTree(base=str(base))
    tree.add("fr", adapter=adapter(base, 1))
    tree.add("fr/legal", adapter=adapter(base, 2, r=3), weight=0.5)
    tree.add("fr/medical", adapter=adapter(base, 3))
    tree.add("misc", group=True)
    tree.save(tmp_path / "zoo")
    return tmp_path / "zoo"


# ---------------------------------------------------------------------- show
def test_show_draws_the_tree(shell: Shell, zoo: Path) -> None:
    code, out, _ = shell("show", zoo)
    lines = out.splitlines()
    assert code == 0
    drawn = ["├── fr ", "│   ├── legal ", "│   └── medical ", "└── misc "]
    assert all(line.startswith(name) for line, name in zip(lines[1:5], drawn, strict=True))
    assert "0.5" in lines[2]
    assert "group" in lines[4]
    assert "4 nodes over" in lines[5]


def test_show_tells_programs_the_same(shell: Shell, zoo: Path, base: Path) -> None:
    told = answer(shell, "show", zoo)
    assert told["base"] == str(base)
    fr, legal, _, misc = told["nodes"]
    assert fr == {
        "path": "fr",
        "kind": "adapter",
        "weight": 1.0,
        "modules": 2,
        "ranks": [2],
        "parameters": 256,
        "bytes": 1024,
        "stale": None,
        "overrides": [],
    }
    assert (legal["weight"], legal["ranks"]) == (0.5, [3])
    assert (misc["kind"], misc["parameters"]) == ("group", 0)


def test_a_stale_node_is_shown_in_the_table_and_elsewhere_warned_of_once(
    shell: Shell, zoo: Path, base: Path
) -> None:
    tree = lt.load(zoo)
    tree.update("fr", adapter=adapter(base, 9))
    tree.save(zoo)
    code, out, err = shell("show", zoo)
    assert (code, err) == (0, "")
    assert out.count("stale: ") == 2
    code, _, err = shell("diff", zoo, "fr@1", "fr")  # opens the tree twice
    assert code == 0
    assert err.startswith("warning: stale: fr/legal")
    assert err.count("warning: ") == 1
    assert ".py:" not in err


# ---------------------------------------------------------------------- check and lock
def test_check_of_a_sound_tree_is_quiet(shell: Shell, zoo: Path, base: Path) -> None:
    assert shell("check", zoo, "--base", base)[:2] == (0, f"{zoo}: all is well\n")
    assert answer(shell, "check", zoo) == {"folder": str(zoo), "problems": [], "notes": []}


def test_check_lists_every_problem_and_exits_with_1(shell: Shell, zoo: Path) -> None:
    for node in ("fr/legal", "fr/medical"):
        (zoo / node / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    code, out, _ = shell("check", zoo)
    assert code == 1
    assert "fr/legal" in out
    assert "fr/medical" in out
    assert out.splitlines()[-1].endswith("problems")


def test_check_of_a_base_names_the_module_that_does_not_fit(
    shell: Shell, zoo: Path, base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    bytelevel.save_base(bytelevel.new_base(hidden=64, layers=1, window=32), other)
    code, out, _ = shell("check", zoo, "--base", other)
    assert code == 1
    assert (
        "fr: model.layers.0.self_attn.q_proj: A is (2, 32) and B (32, 2), this base needs (2, 64)"
        in out
    )
    assert "6 problems" in out


def test_check_of_a_base_names_the_target_that_takes_no_delta(
    shell: Shell, base: Path, tmp_path: Path
) -> None:
    tree = lt.AdapterTree()
    tree.add("fr", target_modules=["q_proj", "input_layernorm"])
    tree.save(tmp_path / "zoo")
    assert shell("check", tmp_path / "zoo")[0] == 0
    code, out, _ = shell("check", tmp_path / "zoo", "--base", base)
    assert code == 1
    assert (
        "base: fr: model.layers.0.input_layernorm: a LlamaRMSNorm can't have an increment\n" in out
    )
    assert out.splitlines()[-1] == "1 problem"


def test_check_names_the_nodes_that_do_not_add_up(shell: Shell, base: Path, tmp_path: Path) -> None:
    q, v = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
    tree = lt.AdapterTree(base=str(base))
    tree.add("fr", adapter=adapter(base, 1))
    tree.add("fr/grp", adapter=lt.Adapter({v: lt.LowRank(torch.ones(1, 32), torch.ones(32, 1))}))
    tree.add(
        "fr/grp/odd", adapter=lt.Adapter({q: lt.LowRank(torch.ones(1, 16), torch.ones(32, 1))})
    )
    tree.add(
        "de", adapter=lt.Adapter({q: lt.LowRank(torch.ones(1, 16), torch.ones(32, 1))})
    )  # alone it is right
    tree.save(tmp_path / "zoo")
    told = f"fr/grp/odd: {q}: (32, 16) (linear) here and (32, 32) (linear) in fr do not add up"
    assert shell("check", tmp_path / "zoo")[:2] == (1, f"shape: {told}\n1 problem\n")
    code, out, _ = shell("check", tmp_path / "zoo", "--base", base, "--json")
    problems = json.loads(out)["problems"]
    assert (code, problems[0]) == (1, {"node": "fr/grp/odd", "kind": "shape", "text": told})
    assert [(p["node"], p["kind"]) for p in problems[1:]] == [
        ("de", "base"),
        ("fr/grp/odd", "base"),
    ]


def test_check_of_a_stale_tree_says_so_once(shell: Shell, zoo: Path, base: Path) -> None:
    tree = lt.load(zoo)
    tree.update("fr", adapter=adapter(base, 9))
    tree.save(zoo)
    code, out, err = shell("check", zoo, "--base", base)
    assert (code, err) == (1, "")
    assert out.count("fr/legal") == 1


def test_changed_files_are_refused_until_they_are_locked(
    shell: Shell, zoo: Path, base: Path
) -> None:
    adapter(base, 7).save(zoo / "fr" / "medical")
    code, _, err = shell("show", zoo)
    assert code == 1
    assert "lora-tree lock" in err
    assert shell("lock", zoo)[0] == 0
    assert shell("show", zoo)[0] == 0
    assert shell("lock", zoo, "--accept-stale")[0] == 0


def test_show_lists_what_cannot_be_used_in_red_beside_the_others(
    shell: Shell, zoo: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(base, 5).save(zoo / "my adapter")
    adapter(base, 6).save(zoo / "it")
    config = json.loads((zoo / "it/adapter_config.json").read_text())
    (zoo / "it/adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    (zoo / "tree.lock").unlink()
    code, out, err = shell("show", zoo)
    assert code == 1
    assert "'my adapter' is not a valid node name" in err
    rows = {line.partition("── ")[2].split()[0]: line for line in out.splitlines() if "──" in line}
    assert list(rows) == ["fr", "legal", "medical", "it", "misc", "my"]
    assert "use_dora" in rows["it"]
    assert "is not a valid node name" in rows["my"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, coloured, _ = shell("show", zoo)
    red = [line for line in coloured.splitlines() if "\x1b[31m" in line]
    assert [("my adapter" in line, "use_dora" in line) for line in red[:2]] == [
        (False, True),
        (True, False),
    ]
    monkeypatch.delenv("FORCE_COLOR")
    code, out, _ = shell("show", zoo, "--json")
    told = json.loads(out)
    assert code == 1
    assert [(row["path"], row["kind"]) for row in told["nodes"] if row["kind"] == "broken"] == [
        ("it", "broken"), ("my adapter", "broken")
    ]  # fmt: skip
    assert {(problem["node"], problem["kind"]) for problem in told["problems"]} == {
        ("it", "adapter"), ("my adapter", "folder")
    }  # fmt: skip
    assert len(told["nodes"]) == 6


def test_a_path_is_exported_though_another_node_is_broken(
    shell: Shell, zoo: Path, tmp_path: Path
) -> None:
    expected = lt.load(zoo).flatten("fr/legal")
    (zoo / "fr/medical/adapter_model.safetensors").write_bytes(b"x")
    arguments = ("export", zoo, "fr/legal", "--out", tmp_path / "out", "--as", "peft")
    code, _, err = shell(*arguments)
    assert code == 1
    assert "--skip-broken" in err
    code, _, err = shell(*arguments, "--skip-broken")
    assert code == 0
    assert "left out: fr/medical" in err
    got = lt.Adapter.load(tmp_path / "out")
    for name, value in expected.modules.items():
        torch.testing.assert_close(got.modules[name].dense(), value.dense())
    code, _, err = shell("export", zoo, "fr/medical", "--out", tmp_path / "no", "--skip-broken")
    assert code == 1
    assert "no node 'fr/medical' in the tree" in err


def test_a_tree_begins_with_the_whole_adapters_of_a_folder_that_has_broken_ones(
    shell: Shell, zoo: Path, tmp_path: Path
) -> None:
    (zoo / "tree.lock").unlink()
    broken = zoo / "fr/medical/adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-8])
    offer = (
        f"  lora-tree check {zoo} lists all that is broken; to go on without it: --skip-broken\n"
    )
    for command in (
        ["init", tmp_path / "mine", "--from", zoo],
        ["similar", zoo],
        ["export", zoo, "--all", "--workers", "1", "--out", tmp_path / "out"],
    ):
        code, out, err = shell(*command)
        assert (code, out, err.endswith(offer)) == (1, "", True), err
        assert err.startswith(f"error: fr/medical: {broken}: ")
    assert not (tmp_path / "mine").exists()
    code, out, err = shell("init", tmp_path / "mine", "--from", zoo, "--skip-broken")
    assert code == 0
    assert "left out: fr/medical" in err
    assert lt.load(tmp_path / "mine").paths() == ["fr", "fr/legal", "misc"]
    code, _, err = shell("init", tmp_path / "own", "--skip-broken")
    assert (code, "--skip-broken is only for --from" in err) == (1, True)


def test_no_line_of_a_table_ends_in_blanks_off_a_terminal(
    shell: Shell, zoo: Path, tmp_path: Path
) -> None:
    (zoo / "tree.lock").unlink()
    broken = zoo / "fr/medical/adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-8])
    for command in (["show", zoo], ["diff", zoo, "fr", "fr/legal"]):
        _, out, _ = shell(*command)
        assert len(out.splitlines()) > 1
        assert [line for line in out.splitlines() if line != line.rstrip()] == []


def test_show_and_check_say_in_a_line_that_steps_of_a_run_are_passed_over(
    shell: Shell, base: Path, tmp_path: Path
) -> None:
    for step in ("", "checkpoint-10", "checkpoint-20"):
        adapter(base, 1).save(tmp_path / "runs/fr" / step)
    line = (
        "note: fr: passed over fr/checkpoint-10, fr/checkpoint-20: "
        "a step of its training run, not a node"
    )
    for command in ("show", "check"):
        code, out, _ = shell(command, tmp_path / "runs")
        assert code == 0
        assert line in out.splitlines()
        assert answer(shell, command, tmp_path / "runs")["notes"] == [line.removeprefix("note: ")]


def test_lock_says_what_it_accepts_and_what_was_moved(shell: Shell, zoo: Path, base: Path) -> None:
    assert answer(shell, "lock", zoo) == {
        "folder": str(zoo), "nodes": 3, "accepted": [], "moved": {}, "gone": [], "stale": {}
    }  # fmt: skip
    (zoo / "fr/medical").rename(zoo / "medical")
    adapter(base, 5).save(zoo / "it")
    expected = {
        "accepted": ["it", "medical"],
        "moved": {"medical": "fr/medical"},
        "gone": ["fr/medical"],
    }
    told = json.loads(shell("lock", zoo, "--json")[1])
    assert {key: told[key] for key in expected} == expected
    assert list(told["stale"]) == ["medical"]
    assert "fr is no longer above it" in told["stale"]["medical"]
    (zoo / "medical").rename(zoo / "fr/medical")
    code, out, _ = shell("lock", zoo)
    assert code == 0
    assert out.splitlines()[1:] == [
        "accepted: fr/medical",
        "moved: fr/medical has the files of medical, and takes over what they were trained on",
        "gone: medical",
    ]


# ---------------------------------------------------------------------- export
def test_an_exported_path_is_what_the_tree_flattens_to(
    shell: Shell, zoo: Path, tmp_path: Path
) -> None:
    told = answer(shell, "export", zoo, "fr/legal", "--as", "peft", "--out", tmp_path / "flat")
    assert (told["ranks"], told["error"], told["modules"]) == ([5], 0.0, 2)
    assert (told["dtype"], told["rounded"]) == (None, False)
    ours, theirs = lt.load(zoo).flatten("fr/legal"), lt.Adapter.load(tmp_path / "flat")
    for name, value in ours.modules.items():
        assert torch.equal(value.dense(), theirs.modules[name].dense())


def test_a_blend_is_truncated_and_rounded_when_asked(
    shell: Shell, zoo: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    code, out, _ = shell(
        "export",
        zoo,
        "fr/legal:0.5+fr/medical:0.5",
        "--as",
        "peft",
        "--out",
        flat,
        "--rank",
        "3",
        "--dtype",
        "bf16",
    )
    assert code == 0
    assert "r=3, relative error at most" in out
    assert out.endswith(" in a module, then rounded to bf16\n")
    read = lt.Adapter.load(flat)
    assert set(read.ranks.values()) == {3}
    assert {value.dtype for value in read.modules.values()} == {torch.bfloat16}


def test_an_export_that_is_rounded_is_not_called_exact(
    shell: Shell, zoo: Path, tmp_path: Path
) -> None:
    code, out, _ = shell(
        "export", zoo, "fr", "--as", "peft", "--out", tmp_path / "flat", "--dtype", "bf16"
    )
    assert (code, out) == (0, f"fr → {tmp_path}/flat: 2 modules, r=2, rounded to bf16\n")
    told = answer(
        shell, "export", zoo, "fr", "--as", "peft", "--out", tmp_path / "fp16", "--dtype", "fp16"
    )
    assert (told["error"], told["dtype"], told["rounded"]) == (0.0, "fp16", True)
    lt.Adapter.load(tmp_path / "fp16").save(tmp_path / "narrow" / "fr")
    assert shell(
        "export",
        tmp_path / "narrow",
        "fr",
        "--as",
        "peft",
        "--out",
        tmp_path / "again",
        "--dtype",
        "fp16",
    )[1].endswith(", exact\n")  # it was fp16 before


def test_a_portable_adapter_is_told_with_its_error(shell: Shell, zoo: Path, tmp_path: Path) -> None:
    full = "--complete"
    told = answer(
        shell,
        "export",
        zoo,
        "fr/legal",
        full,
        "--out",
        tmp_path / "flat",
        "--ceil-rank",
        "--dtype",
        "bf16",
    )
    q, k, v = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert (told["as"], told["rank"], told["modules"], told["added"]) == ("portable", 8, 3, [k])
    assert told["errors"].keys() == {q, v}
    assert 0 < told["error"] <= told["worst"] == max(told["errors"].values())
    again = shell(
        "export", zoo, "fr/legal", full, "--out", tmp_path / "cut", "--rank", "3", "--per-module"
    )
    out = again[1].splitlines()
    assert "3 modules (1 of them zeros), r=3, relative error " in out[0]
    assert [line.split()[1] for line in out[1:]] == [q, v]
    assert shell("export", zoo, "fr", full, "--out", tmp_path / "one")[1].endswith(
        "3 modules (1 of them zeros), r=2, exact\n"
    )


def test_an_adapter_on_q_and_v_is_exported_as_it_is_and_a_line_says_so(
    shell: Shell, zoo: Path, base: Path, tmp_path: Path
) -> None:
    left = "; no node changes k_proj: left as they are"
    assert shell("export", zoo, "fr", "--out", tmp_path / "one")[1].endswith(
        f"2 modules, r=2, exact{left}\n"
    )
    told = answer(shell, "export", zoo, "fr", "--out", tmp_path / "plain")
    assert (told["modules"], told["added"]) == (2, [])
    assert told["incomplete"] == ["model.layers.0.self_attn.k_proj"]
    # what SGLang needs is said only where v is missing beside q
    fr = adapter(base, 1)
    alone = lt.AdapterTree()
    alone.add(
        "fr",
        adapter=lt.Adapter(
            {name: value for name, value in fr.modules.items() if name.endswith("q_proj")}
        ),
    )
    alone.save(tmp_path / "q")
    out = shell("export", tmp_path / "q", "fr", "--out", tmp_path / "two")[1]
    assert out.endswith(
        "k_proj, v_proj: left as they are (SGLang needs v_proj where q_proj is: --complete adds "
        "zeros)\n"
    )
    flags = ("--complete", "--shape", "k_proj=16x32", "--shape", "v_proj=16x32")
    assert (
        answer(shell, "export", tmp_path / "q", "fr", *flags, "--out", tmp_path / "three")[
            "modules"
        ]
        == 3
    )
    code, _, err = shell(
        "export",
        tmp_path / "q",
        "fr",
        "--complete",
        "--shape",
        "k_proj:16",
        "--out",
        tmp_path / "x",
    )
    assert (code, "expected NAME=OUTxIN" in err) == (1, True)


def test_every_leaf_is_exported_with_progress(shell: Shell, zoo: Path, tmp_path: Path) -> None:
    code, out, err = shell("export", zoo, "--all", "--out", tmp_path / "leaves")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["fr/legal", "fr/medical"]
    assert len(answer(shell, "export", zoo, "--all", "--out", tmp_path / "more")["exports"]) == 2
    for wrong in (["fr", "--all"], [], ["--all", "--as", "peft"], ["--all", "--as", "model"]):
        assert shell("export", zoo, *wrong, "--out", tmp_path / "x")[0] == 1


def test_a_merged_checkpoint_from_the_shell(
    shell: Shell, zoo: Path, base: Path, tmp_path: Path
) -> None:
    told = answer(shell, "export", zoo, "fr/legal", "--as", "model", "--out", tmp_path / "model")
    model = bytelevel.open_base(base)
    lt.attach(lt.load(zoo), model).activate("fr/legal")
    merged = bytelevel.open_base(tmp_path / "model")
    assert len(told["changed"]) == 2
    assert all(torch.equal(t, merged.state_dict()[name]) for name, t in model.state_dict().items())
    code, out, _ = shell(
        "export", zoo, "fr", "--as", "model", "--base", base, "--out", tmp_path / "other"
    )
    assert (code, "2 tensors changed" in out) == (0, True)
    assert (
        "exists already"
        in shell("export", zoo, "fr", "--as", "model", "--out", tmp_path / "other")[2]
    )


@pytest.mark.parametrize(
    ("number", "arguments", "message"),
    [
        (
            1e6,
            ("fr", "--dtype", "fp16"),
            "error: fr: {q}: a factor goes up to 1e+06, float16 to 65504\n",
        ),
        (
            float("nan"),
            ("fr", "--rank", "1"),
            "error: fr: {q}: the factors are not finite: lora_A holds NaN or an infinity",
        ),
        (
            1.0,
            ("fr:1e308+fr/legal:1.7e308",),
            "error: fr: its coefficient (1e+308 + 1.7e+308) · 1 is too large",
        ),
    ],
)
def test_an_export_that_is_not_finite_is_refused(
    shell: Shell,
    base: Path,
    tmp_path: Path,
    number: float,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    q = "model.layers.0.self_attn.q_proj"
    # A save of a tree would refuse NaN.
    own = lt.Adapter({q: lt.LowRank(torch.full((2, 32), number), torch.ones(32, 2))})
    own.save(tmp_path / "zoo/fr")
    adapter(base, 1).save(tmp_path / "zoo/fr/legal")
    code, out, err = shell("export", tmp_path / "zoo", *arguments, "--out", tmp_path / "flat")
    assert (code, out) == (1, "")
    assert err.startswith(message.format(q=q))
    assert not (tmp_path / "flat").exists()


def test_bounds_that_make_no_sense_are_refused(shell: Shell, zoo: Path, tmp_path: Path) -> None:
    code, _, err = shell("export", zoo, "fr", "--out", tmp_path / "flat", "--rank", "0")
    assert code == 1
    assert err.startswith("error: ")
    assert "rank must be at least 1, got 0" in err
    assert not (tmp_path / "flat").exists()


@pytest.mark.parametrize(
    "out", ["zoo", "zoo/", "zoo/fr", "zoo/new/one", "zoo/../zoo/x", "linked", "linked/x"]
)
def test_an_export_into_the_tree_s_own_folder_is_refused(
    shell: Shell, zoo: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(zoo.parent)
    Path("linked").symlink_to("zoo", target_is_directory=True)
    before = listing(zoo)
    for tree in ("zoo", "zoo/tree.yaml", "linked"):
        code, _, err = shell("export", tree, "fr/legal", "--out", out)
        assert code == 1
        assert err.startswith(
            f"error: --out {out} is in the tree's own folder, where an adapter is a node\n"
        )
    assert listing(zoo) == before
    assert shell("check", zoo)[0] == 0


def test_an_export_into_the_base_s_own_folder_is_refused(
    shell: Shell, zoo: Path, base: Path
) -> None:
    before = listing(base)
    for out in (base, f"{base}/", base / ".." / base.name):
        code, _, err = shell("export", zoo, "fr/legal", "--out", out)
        assert code == 1
        assert "is the base's own folder: an adapter there counts as one of the base's" in err
    assert listing(base) == before
    assert shell("check", zoo)[0] == 0


def test_an_export_over_an_adapter_that_lives_elsewhere_is_refused(
    shell: Shell, base: Path, tmp_path: Path
) -> None:
    adapter(base, 1).save(tmp_path / "elsewhere" / "fr")
    tree = lt.AdapterTree()
    tree.add("fr", adapter=tmp_path / "elsewhere" / "fr")
    tree.save(tmp_path / "zoo")
    before = listing(tmp_path)
    code, _, err = shell(
        "export", tmp_path / "zoo", "fr", "--out", tmp_path / "elsewhere" / "fr", "--rank", "1"
    )
    assert code == 1
    assert "would write over the files of fr, " in err
    assert listing(tmp_path) == before
    assert (
        shell(
            "export",
            tmp_path / "zoo",
            "fr",
            "--as",
            "peft",
            "--out",
            tmp_path / "elsewhere" / "flat",
        )[0]
        == 0
    )


@pytest.mark.parametrize("out", ["", " "])
def test_an_export_to_nowhere_is_refused(
    shell: Shell, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, _, err = shell("export", zoo, "fr/legal", "--out", out)
    what = "error: --out says where to write, and it is missing or empty"
    assert (code, err.splitlines()[0]) == (1, what)
    assert not list(Path().iterdir())


def test_a_change_to_a_module_that_had_no_increment_is_told_in_words(
    shell: Shell, tmp_path: Path
) -> None:
    both = {"up": lt.LowRank(torch.ones(1, 4), torch.ones(4, 1))}
    seven = lt.LowRank(torch.rand(2, 4), torch.rand(4, 2))
    tree = lt.AdapterTree()
    tree.add("p", group=True)
    tree.add("p/a", adapter=lt.Adapter({**both, "down": seven}))
    tree.add("p/b", adapter=lt.Adapter(both))
    tree.save(tmp_path / "zoo")
    code, out, _ = shell("hoist", tmp_path / "zoo", "p", "--rank", "3")
    assert (code, "inf" in out) == (0, False)
    assert "; down had no increment before, and has one now" in out


@pytest.mark.parametrize("form", [["fr/legal"], ["fr/legal", "--as", "peft"], ["--all"]])
def test_an_export_writes_over_an_adapter_only_if_it_is_asked_to(
    shell: Shell, zoo: Path, tmp_path: Path, form: list[str]
) -> None:
    trained = tmp_path / "out" / "fr/legal" if form == ["--all"] else tmp_path / "out"
    lt.Adapter.load(zoo / "fr").save(trained)  # not an export: nothing else has these factors
    before = {file.name: file.read_bytes() for file in trained.iterdir()}
    code, out, err = shell("export", zoo, *form, "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err == (
        f"error: {trained}: there is an adapter already\n"
        "  name another place; or write over it with --replace, after which it can't be restored\n"
    )
    assert {file.name: file.read_bytes() for file in trained.iterdir()} == before
    assert shell("export", zoo, *form, "--out", tmp_path / "out", "--replace")[0] == 0
    assert {file.name: file.read_bytes() for file in trained.iterdir()} != before


def test_an_export_says_so_where_a_file_lies_in_its_place(
    shell: Shell, zoo: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for more in ([], ["--replace"]):
        code, _, err = shell("export", zoo, "fr/legal", "--out", tmp_path / "notes.txt", *more)
        assert (code, err.splitlines()[0]) == (
            1,
            f"error: {tmp_path}/notes.txt: a file, but the adapter is written as a folder",
        )
    one_file = ["--as", "kohya", "--out", tmp_path / "notes.txt"]
    assert "there is a file already" in shell("export", zoo, "fr/legal", *one_file)[2]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_export_of_all_leaves_that_fails_says_which_it_has_written(
    shell: Shell, tmp_path: Path
) -> None:
    for name, value in {"good": 1.0, "lost": math.nan}.items():
        factors = lt.LowRank(torch.full((2, 4), value), torch.ones(4, 2))
        lt.Adapter({"up": factors}).save(tmp_path / "flat" / name)
    # One worker, so that the good leaf is on the disk before the other fails.
    code, out, err = shell(
        "export", tmp_path / "flat", "--all", "--workers", "1", "--out", tmp_path / "out"
    )
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last == f"  1 of 2 leaves was written in {tmp_path}/out, and is kept: good"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good"]


# ---------------------------------------------------------------------- generate
@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_generate_writes_what_the_model_writes_at_the_path(
    shell: Shell, zoo: Path, base: Path, mode: str
) -> None:
    model = bytelevel.open_base(base).eval()
    attached = lt.attach(lt.load(zoo), model)
    attached.activate("fr/legal")
    ids = torch.tensor([list(b"def ")])
    expected = model.generate(
        input_ids=ids, attention_mask=ids != -1, max_new_tokens=8, do_sample=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    told = (
        "generate",
        zoo,
        "fr/legal",
        "--base",
        base,
        "--prompt",
        "def ",
        "--max-new-tokens",
        "8",
        "--mode",
        mode,
    )
    code, out, _ = shell(*told)
    assert code == 0
    assert out == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"


def test_generate_knows_the_base_of_the_tree(shell: Shell, zoo: Path) -> None:
    told = (
        "generate",
        zoo,
        "",
        "--prompt",
        "def ",
        "--max-new-tokens",
        "1",
        "--temperature",
        "1",
        "--seed",
        "3",
    )
    first, second = shell(*told), shell(*told)
    assert first == second
    assert first[0] == 0


def test_a_typo_in_a_path_is_told_before_a_model_is_loaded(shell: Shell, zoo: Path) -> None:
    code, _, err = shell("generate", zoo, "fr/legl", "--base", "/nowhere", "--prompt", "x")
    assert code == 1
    assert "did you mean 'fr/legal'?" in err


def test_a_prompt_without_tokens_is_told_before_a_model_is_loaded(
    shell: Shell, zoo: Path, broken: Path
) -> None:
    code, out, err = shell("generate", zoo, "fr", "--base", broken / "weights", "--prompt", "")
    assert (code, out) == (1, "")
    assert err.startswith("error: the prompt has no tokens")


# ---------------------------------------------------------------------- bases that are none
@pytest.fixture(scope="module")
def broken(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bases, each named by what is wrong with it."""
    folder = tmp_path_factory.mktemp("broken")
    config = json.loads((base / "config.json").read_text())
    for name in ("tokenizer", "kind", "weights", "heads", "architecture"):
        shutil.copytree(base, folder / name)
    (folder / "empty").mkdir()
    for file in (folder / "tokenizer").glob("tokenizer*"):
        file.unlink()
    weights = folder / "weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    for name, change in (
        ("kind", {"model_type": "nonsuch"}),
        ("heads", {"num_attention_heads": 0}),
        ("architecture", {"architectures": ["pipeline"]}),
    ):
        (folder / name / "config.json").write_text(json.dumps(config | change))
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "transformers can't open its tokenizer: "),
        (
            "nowhere",
            "transformers can't open its tokenizer: no such folder, and not a hub id, ",
        ),
        ("tokenizer", "transformers can't open its tokenizer: "),
        ("kind", "transformers can't open the model: "),
        ("weights", "transformers can't open the model: SafetensorError: "),
        ("heads", "transformers can't open "),
    ],
)
def test_generate_over_a_base_that_is_none_is_one_message(
    shell: Shell, zoo: Path, broken: Path, name: str, message: str
) -> None:
    code, out, err = shell("generate", zoo, "fr", "--base", broken / name, "--prompt", "x")
    assert (code, out) == (1, "")
    assert f"error: {broken / name}: {message}" in err
    assert err.endswith("\n  name the folder or the hub id of a transformers model: --base MODEL\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "transformers can't read its config.json: "),
        ("kind", "transformers can't read its config.json: "),
        ("heads", "transformers can't "),
        (
            "architecture",
            "its config.json names no architecture that transformers has: ['pipeline']",
        ),
    ],
)
def test_check_of_a_base_that_is_none_is_one_message(
    shell: Shell, zoo: Path, broken: Path, name: str, message: str
) -> None:
    code, out, err = shell("check", zoo, "--base", broken / name)
    assert (code, out) == (1, "")
    assert f"error: {broken / name}: {message}" in err


@pytest.mark.parametrize(("typed", "meant"), [("basse", "base"), ("basse/model", None)])
def test_a_folder_that_a_mistyped_base_may_mean_is_named(
    shell: Shell, zoo: Path, base: Path, monkeypatch: pytest.MonkeyPatch, typed: str, meant: str
) -> None:
    assert base.name == "base"
    monkeypatch.chdir(base.parent)
    code, _, err = shell("check", zoo, "--base", typed)
    assert code == 1
    assert ("there is a folder 'base'" in err) is (meant is not None)


def test_a_model_that_fails_at_its_work_is_one_message(shell: Shell, zoo: Path) -> None:
    code, _, err = shell("generate", zoo, "fr", "--prompt", "x", "--temperature", "1e-45")
    assert code == 1
    assert "the model can't continue the prompt: " in err


@slow
def test_a_hub_that_does_not_answer_is_asked_once(zoo: Path, base: Path, tmp_path: Path) -> None:
    """Its client would ask six times, with pauses, before it looks into its cache: nothing of that
    is on stderr.
    """
    home = tmp_path / "hf"
    repository = home / "hub" / "models--org--cached"
    shutil.copytree(base, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    cached, other = processes.commands(
        tmp_path / "streams",
        (("check", zoo, "--base", "org/cached"), {}),
        (("check", zoo, "--base", "org/other"), {}),
        env={
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(home),
            "no_proxy": "*",
        },
    )
    assert "Retry" not in cached.stderr + other.stderr
    assert cached.stdout.splitlines()[-1].endswith("all is well")
    assert other.returncode == 1
    assert (
        "the hub does not answer, so only models fetched before can be opened by hub id\n"
        in other.stderr
    )


# ---------------------------------------------------------------------- errors
def test_a_missing_folder_is_one_clear_message(shell: Shell, tmp_path: Path) -> None:
    code, out, err = shell("show", tmp_path / "nowhere")
    assert (code, out) == (1, "")
    assert err == f"error: {tmp_path}/nowhere: no such folder or tree.yaml\n"


@pytest.mark.parametrize(
    "words",
    [
        ("show", ""),
        ("lock", ""),
        ("rm", "", "fr"),
        ("init", "new", "--from", ""),
        ("add", "zoo", "x", ""),
        ("diff", "zoo", "--with", ""),
        ("train", "zoo", "--data", "rows.jsonl", "--run", ""),
    ],
)
def test_a_variable_of_the_shell_that_is_not_set_is_not_the_current_folder(
    shell: Shell, zoo: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(zoo.parent)
    before = listing(zoo.parent)
    code, out, err = shell(*words)
    assert (code, out) == (2, "")
    assert "'' is not the name of a folder or a file" in " ".join(err.replace("│", " ").split())
    assert listing(zoo.parent) == before


def test_a_missing_extra_is_told_with_its_pip_line(
    shell: Shell, zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    code, _, err = shell("generate", zoo, "fr", "--prompt", "x")
    assert code == 1
    assert err == (
        "error: generate needs transformers, which is not installed\n  pip install "
        "'lora_tree[transformers]'\n"
    )


def test_a_failing_file_operation_is_a_message(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importlib.import_module("lora_tree.cli.commands.lock"), "relock", full)
    code, _, err = shell("lock", "zoo")
    assert (code, err) == (1, "error: [Errno 28] No space left on device\n")


def test_an_error_that_nobody_foresaw_is_a_message_too(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(importlib.import_module("lora_tree.cli.commands.lock"), "relock", odd)
    monkeypatch.delenv("LORA_TREE_TRACEBACK", raising=False)
    assert shell("lock", "zoo") == (
        1,
        "",
        "error: ZeroDivisionError: of all things\n"
        "  this should not happen; LORA_TREE_TRACEBACK=1 in the environment shows where it did\n",
    )


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_a_traceback_is_shown_to_who_asks_for_it(
    zoo: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    shown: bool,
) -> None:
    monkeypatch.setenv("LORA_TREE_TRACEBACK", value)
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(zoo), "fr:x", "--out", "flat"])
    err = capsys.readouterr().err
    assert exit_.value.code == 1
    assert (
        "Traceback" in err and "ValueError: could not convert" not in err and "SpecError" in err
    ) is shown
    assert "error: blend 'fr:x': 'x' is not a number" in err


def test_an_interrupt_exits_with_130(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        importlib.import_module("lora_tree.cli.commands.lock"), "relock", interrupted
    )
    code, out, err = shell("lock", "zoo")
    assert (code, out, err) == (130, "", "")


ENDED_WITHIN_AN_IMPORT = """
import importlib, os, sys, time
import lora_tree.cli

signal = int(sys.argv.pop())

def import_error(*_, **__):
    try:
        os.kill(os.getpid(), signal)
        time.sleep(60)
    except BaseException as error:
        raise ModuleNotFoundError("Could not import module") from error

importlib.import_module("lora_tree.cli.commands.lock").relock = import_error
lora_tree.cli.main()
"""


@slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["interrupt", "terminate"]
)
def test_a_signal_has_its_code_where_a_package_turns_its_exception_into_an_error(
    how: int, code: int
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", ENDED_WITHIN_AN_IMPORT, "lock", "zoo", str(int(how))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, "", "")


def test_wrong_usage_exits_with_2(shell: Shell) -> None:
    code, _, err = shell("shwo")
    assert code == 2
    assert "shwo" in err


@slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize(
    ("how", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143)],
    ids=["interrupt", "terminate"],
)
def test_a_demo_that_is_ended_leaves_nothing(tmp_path: Path, how: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_tree.cli", "demo", str(tmp_path / "zoo")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.iterdir()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- encodings
@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[..., str]]:
    """A stdout of an encoding, strict as Python makes it; then a command whose output is read back
    from it.
    """

    def told(encoding: str) -> Callable[..., str]:
        raw = io.BytesIO()
        monkeypatch.setattr(
            sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict")
        )

        def run(*arguments: str | Path) -> str:
            with pytest.raises(SystemExit) as exit_:
                main([str(argument) for argument in arguments])
            assert exit_.value.code == 0
            sys.stdout.flush()
            written = raw.getvalue().decode(encoding)
            raw.seek(0)
            raw.truncate()
            return written

        return run

    return told


def test_a_stdout_that_holds_only_ascii_gets_the_rest_escaped(
    stream: Callable[[str], Callable[..., str]], zoo: Path, tmp_path: Path
) -> None:
    run = stream("ascii")
    assert "\\u251c\\u2500\\u2500 fr " in run("show", zoo)
    assert run("export", zoo, "fr", "--out", tmp_path / "flat").startswith("fr \\u2192 ")
    assert lt.Adapter.load(tmp_path / "flat").ranks
    assert "→" in json.dumps(
        json.loads(run("schema")), ensure_ascii=False
    )  # still JSON, and the same
    assert run("generate", zoo, "", "--prompt", "é", "--max-new-tokens", "1").startswith("\\xe9")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_a_folder_whose_name_is_no_text_can_be_told_of(
    stream: Callable[[str], Callable[..., str]], shell: Shell, zoo: Path, tmp_path: Path
) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/zoo\xff[b]")
    zoo.rename(odd)
    code, _, err = shell("show", odd + "x")
    assert code == 1
    assert "zoo\\udcff[b]x: no such folder" in err
    run = stream("utf-8")
    assert "zoo\\udcff[b]" in run("show", odd)
    assert json.loads(run("show", odd, "--json"))["folder"] == odd
    assert run("check", odd) == f"{tmp_path}/zoo\\udcff[b]: all is well\n"
    assert run("lock", odd) == f"locked {tmp_path}/zoo\\udcff[b]\n"
    assert "\\udcff" in run("export", odd, "fr", "--out", odd.replace("zoo", "flat"))


# ---------------------------------------------------------------------- small things
def test_the_version_is_that_of_the_package(shell: Shell) -> None:
    assert shell("--version") == (0, f"lora-tree {lt.__version__}\n", "")


@pytest.mark.parametrize("asked", ["--version", "--help"])
def test_what_needs_no_torch_does_not_wait_for_it(asked: str) -> None:
    code = (
        "import sys\nfrom lora_tree.cli import main\n"
        "try: main([sys.argv[1]])\nexcept SystemExit: assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, asked], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "lora-tree" in done.stdout or "generate" in done.stdout


def test_the_list_of_commands_says_what_each_says_of_itself(shell: Shell) -> None:
    listed = " ".join(shell("--help")[1].replace("│", " ").split())
    for name, place in COMMANDS.items():
        module, _, function = place.partition(":")
        own = getattr(importlib.import_module(f"lora_tree.cli.commands.{module}"), function).__doc__
        assert f"{name} {' '.join(own.split())}" in listed


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_while_torch_is_imported_shows_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_tree", "show", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


@pytest.mark.parametrize("ignored", [True, False])
def test_a_training_in_the_background_goes_on_through_the_ctrl_c_of_another(ignored: bool) -> None:
    code = (
        "import os, signal\n"
        "from lora_tree.cli.interrupts import noted_interrupts\n"
        "with noted_interrupts() as interrupted:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(interrupted())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else None,
    )
    assert (done.stdout, done.returncode) == (f"{0 if ignored else 130}\n", 0)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(("first", "second"), [("INT", "TERM"), ("TERM", "INT"), ("TERM", "TERM")])
def test_a_second_signal_does_what_it_does_where_none_is_noted(first: str, second: str) -> None:
    code = (
        "import os, signal, sys\n"
        "from lora_tree.cli.interrupts import noted_interrupts\n"
        "def earlier(number, frame): sys.exit(f'earlier {number}')\n"
        "signal.signal(signal.SIGINT, earlier)\n"
        "signal.signal(signal.SIGTERM, earlier)\n"
        "with noted_interrupts() as noted:\n"
        f"    os.kill(os.getpid(), signal.SIG{first})\n"
        "    print(noted(), flush=True)\n"
        f"    os.kill(os.getpid(), signal.SIG{second})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    number = {"INT": 2, "TERM": 15}
    assert done.stdout == f"{128 + number[first]}\n"
    assert (done.stderr, done.returncode) == (f"earlier {number[second]}\n", 1)


def test_a_handler_that_python_does_not_know_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that embeds Python may have set it in C; Python tells None, and can't put it
    back.
    """
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with noted_interrupts():
            assert signal.signal(signal.SIGINT, signal.SIG_DFL) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_the_background_can_be_tested_too(tmp_path: Path) -> None:
    """A shell starts it with SIGINT ignored; conftest.py takes that back for what the tests
    start.
    """
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        "import signal, subprocess, sys\n"
        "def test_it():\n"
        "    code = 'import signal; print(signal.getsignal(signal.SIGINT) is "
        "signal.default_int_handler)'\n"
        "    assert subprocess.run([sys.executable, '-c', code], capture_output=True, "
        "text=True).stdout == 'True\\n'\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.returncode == 0, done.stdout


def test_the_schema_accepts_what_the_library_does(shell: Shell) -> None:
    code, out, _ = shell("schema")
    schema = json.loads(out)
    assert code == 0
    words = {"version", "base", "defaults", "cache", "versions", "versions_budget", "tree"}
    assert set(schema["properties"]) == words
    assert schema["additionalProperties"] is False


def test_every_command_explains_itself(shell: Shell) -> None:
    for command in ("show", "check", "lock", "export", "generate", "vllm-args", "schema", "demo"):
        code, out, _ = shell(command, "--help")
        assert code == 0
        assert "Usage:" in out


def test_weights_per_module_are_set_and_shown(shell: Shell, zoo: Path) -> None:
    text = "*.q_proj=0.5,default=2"
    code, out, _ = shell("set", zoo, "fr/legal", "--weight", text)
    assert (code, "weight {*.q_proj=0.5,default=2}" in out) == (0, True)
    code, out, _ = shell("show", zoo)
    assert "by module" in out
    assert "weight of fr/legal: {*.q_proj=0.5,default=2}" in out
    nodes = {line["path"]: line for line in answer(shell, "show", zoo)["nodes"]}
    assert nodes["fr/legal"]["weight"] == {"default": 2.0, "*.q_proj": 0.5}
    for wrong, said in (("x", "'x' is not a number"), ("*.k_prj=1", "matches no module")):
        code, _, err = shell("set", zoo, "fr/legal", "--weight", wrong)
        assert code == 1
        assert said in err
    lt.load(zoo)
