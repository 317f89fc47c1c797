"""The command line as a person or a script meets it, and a small base that it can run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
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
