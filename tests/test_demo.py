"""The demo at toy size: it runs, what it prints was measured, and it leaves nothing
half-written.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from sampling import slow

import lora_tree as lt
from lora_tree.demo import QUICK, Report, bytelevel, run
from lora_tree.demo.corpus import find_corpus
from lora_tree.demo.learning import as_one_row, bits_per_byte, evenly_spread
from lora_tree.demo.staging import demo_folders
from lora_tree.errors import FolderError
from lora_tree.folder import load


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str]:
    console = Console(file=io.StringIO(), width=120)
    report = run(tmp_path_factory.mktemp("demo") / "zoo", size=QUICK, console=console)
    console.print(report)
    return report, console.file.getvalue()  # type: ignore[attr-defined]


@slow
def test_every_node_is_measured_on_every_domain_and_beats_the_base_on_its_own(
    demo: tuple[Report, str],
) -> None:
    report, _ = demo
    tree = load(report.folders[0])
    assert list(report.bits) == ["base", *tree.paths()]
    assert all(
        len(row) == len(report.domains) and all(map(math.isfinite, row))
        for row in report.bits.values()
    )
    for column, domain in enumerate(report.domains):
        if domain in tree:
            assert report.bits[domain][column] < report.bits["base"][column]


def test_the_exported_leaf_is_the_same_in_peft(demo: tuple[Report, str]) -> None:
    report, _ = demo
    assert report.peft_difference < 1e-5 * report.peft_largest


def test_what_is_printed_is_what_was_measured(demo: tuple[Report, str]) -> None:
    report, printed = demo
    for row in report.bits.values():
        assert all(f"{bits:.2f}" in printed for bits in row)
    assert report.leaf in printed
    assert f"{report.peft_difference:.1e}" in printed


def test_a_run_leaves_its_three_folders_and_nothing_else(demo: tuple[Report, str]) -> None:
    report, _ = demo
    assert sorted(p.name for p in report.folders[0].parent.iterdir()) == [
        "zoo",
        "zoo-base",
        "zoo-export",
    ]


def test_every_node_learned_something(demo: tuple[Report, str]) -> None:
    zoo = demo[0].folders[0]
    for path in load(zoo).paths():
        B = [
            v
            for k, v in load_file(zoo / path / "adapter_model.safetensors").items()
            if "lora_B" in k
        ]
        assert B
        assert all(tensor.abs().max() > 0 for tensor in B)


def test_byte_b_is_token_b_and_text_comes_back(demo: tuple[Report, str]) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo[0].folders[1])
    text = "def f(x):\n\treturn '×–α'  # \x00\x7f\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == bytelevel.END


def test_the_same_seed_trains_the_same_adapters(tmp_path: Path) -> None:
    size = QUICK.__class__(
        hidden=32, layers=1, r=2, base_steps=2, tree_steps=2, windows=1, leaves=2
    )
    before = torch.random.get_rng_state()
    reports = [
        run(tmp_path / name, size=size, console=Console(file=io.StringIO()), seed=3)
        for name in ("a", "b")
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    assert reports[0].bits == reports[1].bits
    factors = [
        load_file(tmp_path / name / "docs" / "adapter_model.safetensors") for name in ("a", "b")
    ]
    assert all(torch.equal(factors[0][key], factors[1][key]) for key in factors[0])


# ---------------------------------------------------------------------- parts
def test_nothing_held_out_is_trained_on() -> None:
    base, leaves = find_corpus()
    for domain in (base, *leaves):
        assert domain.held_out
        assert not set(domain.train) & set(domain.held_out)
    assert all("/" in leaf.path for leaf in leaves)
    assert len({leaf.path.split("/")[0] for leaf in leaves}) >= 2


def test_a_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="too few sources of the standard library"):
        find_corpus(tmp_path)


def test_bits_per_byte_of_a_model_that_knows_nothing_is_the_entropy_of_its_vocabulary() -> None:
    class Uniform:
        def __call__(self, input_ids: torch.Tensor) -> object:
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, bytelevel.VOCABULARY)})

    windows = evenly_spread(as_one_row([b"abc" * 50, b"xyz" * 50]), windows=5, length=16)
    assert windows.shape == (5, 16)
    assert bits_per_byte(Uniform(), windows, at_once=2) == pytest.approx(
        math.log2(bytelevel.VOCABULARY)
    )


# ---------------------------------------------------------------------- whole or not at all
def test_a_folder_that_the_demo_did_not_make_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zoo-base").mkdir()
    with pytest.raises(FolderError, match="zoo-base exists, and the demo did not make it"):
        run(tmp_path / "zoo", size=QUICK, console=Console(file=io.StringIO()))
    assert [p.name for p in tmp_path.iterdir()] == ["zoo-base"]


def test_an_interrupted_run_leaves_what_was_there(tmp_path: Path) -> None:
    targets = [tmp_path / "zoo", tmp_path / "zoo-base"]
    with demo_folders(targets) as folders:
        (folders[0] / "file").write_text("first")
    with pytest.raises(KeyboardInterrupt):
        _interrupted(targets)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["zoo", "zoo-base"]
    assert (tmp_path / "zoo" / "file").read_text() == "first"


def _interrupted(targets: list[Path]) -> None:
    with demo_folders(targets) as folders:
        (folders[0] / "file").write_text("half")
        raise KeyboardInterrupt


def test_its_own_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "zoo"
    for text in ("first", "second"):
        with demo_folders([target]) as (folder,):
            (folder / text).write_text(text)
    assert sorted(p.name for p in target.iterdir()) == [".lora-tree-demo", "second"]


def test_the_tree_that_is_written_is_an_ordinary_one(demo: tuple[Report, str]) -> None:
    zoo, base, export = demo[0].folders
    assert lt.Adapter.load(export).numel > 0
    assert json.loads((base / "config.json").read_text())["model_type"] == "llama"
    assert Path(load(zoo).base or "") == base
