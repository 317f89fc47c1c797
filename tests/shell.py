"""The command line as a person or a script meets it, and a small base that it can run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_tree.cli import main
from lora_tree.demo import bytelevel


def command(
    *arguments: str | Path, stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``lora-tree`` in a process of its own, with ``stdin`` in a pipe."""
    return subprocess.run(
        [sys.executable, "-m", "lora_tree.cli", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **(env or {})},
        timeout=300,
    )


# Imports what the commands need, then runs each in a fork of itself: [arguments, environment, in],
# from files named by its number, into files named by its number.
EACH_IN_A_FORK = """
import json, os, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from lora_tree.cli import main
from lora_tree.cli.commands import check, eval, export, generate, train

folder = Path(sys.argv[1])
codes = []
for number, (arguments, environment) in enumerate(json.loads((folder / "all").read_text())):
    child = os.fork()
    if child == 0:
        for stream, name in enumerate(("in", "out", "err")):
            how = os.O_RDONLY if name == "in" else os.O_WRONLY | os.O_CREAT
            os.dup2(os.open(folder / f"{number}.{name}", how), stream)
        os.environ.update(environment)
        main(arguments)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def commands(
    folder: Path,
    *each: tuple[Sequence[str | Path], dict[str, str]],
    stdin: str = "",
    env: dict[str, str] | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """Run several ``lora-tree`` commands, each in a process of its own, as `command` runs one.

    Their processes are forks of one that has imported torch and transformers, which takes seconds.

    Args:
        folder: an empty one, for their streams.
        each: arguments, and what to add to the environment of this command alone.
        stdin: of each.
        env: added to the environment before anything is imported.
    """
    folder.mkdir()
    told = []
    for arguments, more in each:
        told.append(([str(word) for word in arguments], more))
    (folder / "all").write_text(json.dumps(told))
    for number in range(len(told)):
        (folder / f"{number}.in").write_text(stdin)
    done = subprocess.run(
        [sys.executable, "-c", EACH_IN_A_FORK, str(folder)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **(env or {})},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = []
    for number, code in enumerate(json.loads(done.stdout)):
        out, err = ((folder / f"{number}.{name}").read_text() for name in ("out", "err"))
        found.append(subprocess.CompletedProcess(told[number][0], code, out, err))
    return found


def save_base(folder: Path, *, hidden: int = 32) -> Path:
    """A Llama over bytes with random weights, and its tokenizer, as transformers saves them."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    bytelevel.save_base(bytelevel.new_base(hidden=hidden, layers=1, window=32), folder)
    return folder


def fresh_zoo(folder: Path, base: Path, **defaults: object) -> Path:
    """A folder with a tree.yaml of fresh nodes over a base: fr with two children, and de."""
    folder.mkdir()
    spec = {
        "version": 1,
        "base": str(base),
        "defaults": defaults,
        "tree": {"fr": {"children": {"legal": {}, "medical": {}}}, "de": {}},
    }
    (folder / "tree.yaml").write_text(json.dumps(spec))  # JSON is YAML
    return folder


class Shell:
    """One command in this process: its exit code, stdout and stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        with warnings.catch_warnings(), pytest.raises(SystemExit) as exit_:
            warnings.simplefilter("default")
            main([str(argument) for argument in arguments])
        printed = self._capsys.readouterr()
        code = exit_.value.code
        assert isinstance(code, int)
        assert "Traceback" not in printed.err
        return code, printed.out, printed.err


def answer(shell: Shell, *arguments: str | Path) -> Any:
    code, out, err = shell(*arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)
