"""The help of the command line: its examples run, its topics are true, a shell completes its
words.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import shell
import torch
from loopback_hub import running_hub, talking_to

import lora_tree as lt
from lora_tree.cli import main
from lora_tree.cli.application import COMMANDS
from lora_tree.cli.examples import EXAMPLES
from lora_tree.cli.help_topics import TOPICS
from lora_tree.demo import FULL, QUICK
from lora_tree.runs.rows import WAYS


def adapter(seed: int) -> lt.Adapter:
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for name in ("q_proj", "v_proj"):
        A, B = torch.randn(2, 32, generator=draw), torch.randn(32, 2, generator=draw)
        modules[f"model.layers.0.self_attn.{name}"] = lt.LowRank(0.1 * A, 0.1 * B)
    return lt.Adapter(modules)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the examples expect it."""
    place = tmp_path_factory.mktemp("place")
    shell.save_base(place / "models/base")
    tree = lt.AdapterTree(base="models/base")
    for seed, path in enumerate(("fr", "fr/legal", "fr/medical", "de")):
        tree.add(path, adapter=adapter(seed))
    tree.save(place / "zoo")
    shutil.copytree(place / "zoo", place / "zoo-before")
    flat = lt.AdapterTree(base="models/base")
    for path in ("one", "two"):
        flat.add(path, adapter=adapter(len(path)))
    flat.save(place / "flat-zoo")
    adapter(9).save(place / "downloads/tax")
    (place / "rows.jsonl").write_text(
        '{"path": "fr/legal", "prompt": "art. ", "completion": "1382"}\n'
        '{"path": "de", "text": "guten tag"}\n'
    )
    return place


def run(line: str) -> int:
    words = shlex.split(line.partition(">")[0])
    assert words[0] == "lora-tree"
    with warnings.catch_warnings(), pytest.raises(SystemExit) as exit_:
        warnings.simplefilter("default")
        main(words[1:])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def outcome(capsys: pytest.CaptureFixture[str], line: str) -> str:
    code = run(line)
    printed = capsys.readouterr()
    assert code == 0, f"{line}: {printed.err}"
    return printed.out


# ---------------------------------------------------------------------- examples
def test_every_command_has_an_example() -> None:
    assert EXAMPLES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "demo"])
def test_the_examples_of_a_command_run(
    name: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if name in ("promote", "retrain", "runs"):  # they take what the example of train left
        outcome(capsys, *EXAMPLES["train"])
    if name in ("log", "restore", "gc", "diff"):  # they tell of what these replaced
        for before in (*EXAMPLES["set"], *(EXAMPLES["rm"] if name != "diff" else ())):
            outcome(capsys, before)
    if name == "extract":
        outcome(capsys, "lora-tree export zoo/ fr --as model --out models/tuned")
    if name == "check":
        merged = "--as model --base models/base --out merged/legal"
        outcome(capsys, f"lora-tree export zoo/ fr/legal {merged}")
    if name == "llama-args":
        pytest.importorskip("gguf", reason="an extra of its own")
        outcome(capsys, "lora-tree export zoo/ --as gguf --nodes --base models/base --out gguf")
    if name == "retrain":  # which fails where nothing noted how a node was trained
        outcome(capsys, *EXAMPLES["rm"][1:])
    if name in ("rebase", "retrain"):  # what stands on fr is stale then
        tree = lt.load("zoo")
        tree.update("fr", adapter=adapter(8))
        tree.save("zoo")
    with contextlib.ExitStack() as closing:
        if name in ("push", "pull"):
            talking_to(closing.enter_context(running_hub()), tmp_path / "home", monkeypatch)
        if name == "pull":
            outcome(capsys, EXAMPLES["push"][-1])
        for line in EXAMPLES[name]:
            assert line.startswith(f"lora-tree {name} ") or line == f"lora-tree {name}"
            assert outcome(capsys, line).strip()


def test_the_example_of_the_demo_is_its_quick_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    module = importlib.import_module("lora_tree.cli.commands.demo")
    monkeypatch.setattr(module, "run", lambda folder, **how: sizes.append(how["size"]) or "done")
    for line in EXAMPLES["demo"]:
        assert run(line) == 0
    assert sizes == [QUICK] != [FULL]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_examples_whole(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = outcome(capsys, f"lora-tree {name} --help")
    for line in EXAMPLES[name]:
        assert line in [one.strip() for one in shown.splitlines()]


@pytest.mark.parametrize("name", ["show", "train", "vllm-args"])
def test_help_on_a_command_is_what_the_command_says(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = outcome(capsys, f"lora-tree {name} --help")
    assert outcome(capsys, f"lora-tree help {name}") == shown


# ---------------------------------------------------------------------- topics
def test_topics_are_listed_and_name_only_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    listed = outcome(capsys, "lora-tree help")
    for topic in TOPICS:
        assert f"lora-tree help {topic} " in listed
        text = outcome(capsys, f"lora-tree help {topic}")
        for command in re.findall(r"lora-tree ([a-z-]+)", text):
            assert command in COMMANDS
        assert all(len(line) <= 100 for line in text.splitlines())


def test_a_topic_that_is_not_there_is_told_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("lora-tree help pahts") == 1
    assert "no help on 'pahts'; did you mean 'paths'?" in capsys.readouterr().err


def test_the_rows_of_the_topic_are_rows(tmp_path: Path) -> None:
    rows = [line for line in TOPICS["data"][1].splitlines() if line.startswith("{")]
    columns = [set(re.findall(r'"(\w+)":', row)) - {"path", "role", "content"} for row in rows]
    # Every way that the reader of rows knows, and no other.
    assert sorted(map(sorted, columns)) == sorted(map(sorted, WAYS))


# ---------------------------------------------------------------------- a shell
def lora_tree(*arguments: str, **environment: str) -> str:
    """What a new process prints; it must not have waited for torch where it says so."""
    code = (
        "import sys\nfrom lora_tree.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert "Traceback" not in done.stderr
    if arguments[:1] != ("show",) and "show --" not in environment.get("COMP_WORDS", ""):
        assert done.stderr.strip().endswith("False")
    return done.stdout


def test_a_completion_script_is_printed() -> None:
    script = lora_tree(
        "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )
    assert "complete -o" in script
    assert "_LORA_TREE_COMPLETE=complete_bash" in script


def test_a_shell_completes_commands_and_their_options() -> None:
    how = {"_LORA_TREE_COMPLETE": "complete_bash"}
    assert lora_tree(COMP_WORDS="lora-tree pro", COMP_CWORD="1", **how).split() == ["promote"]
    options = lora_tree(COMP_WORDS="lora-tree show --", COMP_CWORD="2", **how).split()
    assert {"--depth", "--filter", "--svg", "--json"} <= set(options)


def test_help_needs_no_torch() -> None:
    assert "patterns" in lora_tree("help")
    assert "a blend" in lora_tree("help", "paths")


# ---------------------------------------------------------------------- quiet
@pytest.mark.parametrize("command", ["train", "eval", "export"])
def test_quiet_leaves_out_progress_and_notes(
    command: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    lines = {
        "train": "lora-tree train zoo/ de --data rows.jsonl --base models/base --steps 3",
        "eval": "lora-tree eval zoo/ de --data rows.jsonl --base models/base",
        "export": "lora-tree export zoo/ --all --out export/leaves",
    }
    assert run(f"{lines[command]} --quiet") == 0
    quiet = capsys.readouterr()
    assert quiet.out
    assert quiet.err == ""
    if command == "train":
        assert run(f"{lines[command]} --seed 1") == 0
        told = capsys.readouterr().err
        assert "what trains:" in told
        assert "training 3/3" in told
