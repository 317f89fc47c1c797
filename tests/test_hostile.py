"""What people who open others' trees, or serve strangers, are promised (docs/security.md), one hostile case a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shell import command, save_base

import lora_tree as lt

# ---------------------------------------------------------------- names that clients send

# ---------------------------------------------------------------- patterns: a bounded amount of work

# ---------------------------------------------------------------- a base's own code, and what an export copies
OWN_CODE = """
import os, sys
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

with open(os.environ["RAN"], "a") as ran:
    ran.write("x")
print("hello from the base")


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_code(tmp_path: Path) -> Path:
    """A tree over a base whose config, model and tokenizer are Python files of its own."""
    base = save_base(tmp_path / "base")
    (base / "own.py").write_text(OWN_CODE)
    for file, change in (
        (
            "config.json",
            {
                "model_type": "own",
                "architectures": ["OwnModel"],
                "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
            },
        ),
        (
            "tokenizer_config.json",
            {
                "tokenizer_class": "OwnTokenizer",
                "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
            },
        ),
    ):
        written = json.loads((base / file).read_text())
        (base / file).write_text(json.dumps(written | change))
    q = "model.layers.0.self_attn.q_proj"
    tree = lt.AdapterTree(base=str(base))
    tree.add("fr", adapter=lt.Adapter({q: lt.LowRank(torch.ones(2, 32), torch.ones(32, 2))}))
    tree.save(tmp_path / "zoo")
    (tmp_path / "rows.jsonl").write_text('{"path": "fr", "text": "def f"}\n')
    return tmp_path


def _over_own_code(folder: Path) -> dict[str, list[str | Path]]:
    zoo, base, rows = folder / "zoo", folder / "base", folder / "rows.jsonl"
    return {
        "check": ["check", zoo, "--base", base, "--json"],
        "generate": ["generate", zoo, "fr", "--prompt", "def ", "--max-new-tokens", "1"],
        "train": ["train", zoo, "--data", rows, "--steps", "1", "--json"],
        "eval": ["eval", zoo, "--data", rows, "--json"],
        "model": ["export", zoo, "fr", "--as", "model", "--out", folder / "model", "--json"],
    }


@pytest.mark.parametrize("name", ["check", "generate", "train", "eval", "model"])
def test_the_code_of_a_base_runs_only_on_the_users_own_word(own_code: Path, name: str) -> None:
    arguments = _over_own_code(own_code)[name]
    ran = own_code / "ran"
    env = {"RAN": str(ran), "HF_HOME": str(own_code / "hf")}
    # A "y" lies in the pipe for every question that anybody might ask.
    done = command(*arguments, stdin="y\n" * 20, env=env)
    assert not ran.exists()
    assert (done.returncode, done.stdout) == (1, "")
    assert "it needs Python code of the base's own, which is not run unasked" in done.stderr
    assert "--trust-remote-code" in done.stderr
    assert "[y/N]" not in done.stderr

    if name in ("train", "eval"):
        return  # they open a base as generate does
    done = command(*arguments, "--trust-remote-code", env=env)
    assert ran.exists()
    assert done.returncode == 0, done.stderr
    if "--json" in arguments:  # the base printed; the document stands alone all the same
        json.loads(done.stdout)
        assert "hello from the base" in done.stderr


# ---------------------------------------------------------------- escapes for the terminal

# ---------------------------------------------------------------- pipes, devices, and swaps between check and open

# ---------------------------------------------------------------- sizes

# ---------------------------------------------------------------- commit records

# ---------------------------------------------------------------- modes

# ---------------------------------------------------------------- outside the folder

# ---------------------------------------------------------------- numbers that are not finite

# ---------------------------------------------------------------- versions of our own files
