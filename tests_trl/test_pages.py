"""What docs/training.md shows with trl and with a quantised base runs, on tiny ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from small import base, pairs, tokenizer

import lora_tree as lt

PAGE = Path(__file__).parent.parent / "docs/training.md"
BLOCKS = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


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


def test_dpo_against_the_parent(here: Path) -> None:
    (block,) = (block for block in BLOCKS if "TreeDPOTrainer" in block)
    # The page leaves these to trl's defaults, which ask for a GPU, and three epochs.
    block = block.replace("beta=0.1", "beta=0.1, max_steps=2, use_cpu=True, report_to=[]")
    before = lt.load("zoo/").adapter("fr/legal")
    exec(block, {"base": base(), "pairs": pairs(), "tokenizer": tokenizer()})
    after = lt.load("zoo/").adapter("fr/legal")
    assert before is not None
    assert after is not None
    assert any(not torch.equal(v.B, after.modules[n].B) for n, v in before.modules.items())


def test_a_quantised_base(here: Path) -> None:
    (block,) = (block for block in BLOCKS if "BitsAndBytesConfig" in block)
    exec(block.replace("org/model", "base"), {"lt": lt})


def test_the_page_has_no_block_that_is_not_run() -> None:
    assert len(BLOCKS) == 2
