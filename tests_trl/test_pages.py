"""The README's and docs/training.md's snippets with trl and a quantised base run, on tiny ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from small import base, pairs, tokenizer

import lora_tree as lt

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    """The snippets of a page that need packages of this folder's environment."""
    return re.findall(r"^```py\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tree in ``zoo/`` and its base in ``base/``."""
    monkeypatch.chdir(tmp_path)
    tree = lt.AdapterTree(defaults=dict(r=4, target_modules=["q_proj", "v_proj"]))
    for path in ("fr", "fr/legal", "de"):
        tree.add(path)
    lt.attach(tree, base()).detach()
    tree.save("zoo/")
    base().save_pretrained("base")
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_dpo_against_the_parent(page: str, here: Path) -> None:
    (block,) = (block for block in blocks(page) if "TreeDPOTrainer" in block)
    # The page leaves these to trl's defaults, which ask for a GPU, and three epochs.
    block = block.replace("beta=0.1", "beta=0.1, max_steps=2, use_cpu=True, report_to=[]")
    before = lt.load("zoo/").adapter("fr/legal")
    exec(block, {"base": base(), "pairs": pairs(), "tokenizer": tokenizer()})
    after = lt.load("zoo/").adapter("fr/legal")
    assert before is not None
    assert after is not None
    assert any(not torch.equal(v.B, after.modules[n].B) for n, v in before.modules.items())


def test_a_quantised_base(here: Path) -> None:
    (block,) = (block for block in blocks("docs/training.md") if "BitsAndBytesConfig" in block)
    exec(block.replace("org/model", "base"), {"lt": lt})


def test_the_pages_have_no_block_that_is_not_run() -> None:
    assert len(blocks("README.md")) == 1
    assert len(blocks("docs/training.md")) == 2
