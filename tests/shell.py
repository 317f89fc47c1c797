"""The command line as a person or a script meets it, and a small base that it can run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers

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
