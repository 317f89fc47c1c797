"""Files with NaN or infinities: a save takes no node with them in."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shell import Shell
from zoo import adapter, listing

import lora_tree as lt
from lora_tree.errors import FormatError
from lora_tree.lowrank.magnitude import all_finite

BROKEN = pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])


def broken_files(folder: Path, number: float, kind: str) -> Path:
    """An adapter's files with one number that is not finite, of PEFT or of another program."""
    A, B = torch.ones(2, 6), torch.ones(6, 2)
    (A if kind == "peft" else B)[1, 1] = number
    folder.mkdir()
    if kind == "kohya":
        file = folder / "style.safetensors"
        tensors = {"lora_unet_mid.lora_down.weight": A, "lora_unet_mid.lora_up.weight": B}
        save_file(tensors, file)
        return file
    made = lt.Adapter({"ok": lt.LowRank(torch.ones(2, 6), B), "mid": lt.LowRank(A, B)})
    if kind == "head":
        head = lt.Override(torch.full((2, 6), number))
        made = lt.Adapter(
            {"ok": lt.LowRank(torch.ones(2, 6), torch.ones(6, 2))}, overrides={"score.weight": head}
        )
    made.save(folder / "a")
    return folder / "a"


@BROKEN
@pytest.mark.parametrize("kind", ["peft", "head", "kohya"])
@pytest.mark.parametrize("copy", [False, True])
def test_a_save_adds_no_files_whose_numbers_are_not_finite(
    tmp_path: Path, number: float, kind: str, copy: bool
) -> None:
    files = broken_files(tmp_path / "files", number, kind)
    tree = lt.AdapterTree()
    tree.add("ok", adapter=adapter(1))
    tree.save(tmp_path / "zoo")
    before = listing(tmp_path / "zoo")
    tree.add("ok/new", adapter=files)
    module = {"peft": "mid", "head": "score.weight", "kohya": "unet.mid"}[kind]
    with pytest.raises(
        FormatError,
        match=rf"^ok/new: {module}: a factor holds NaN or an infinity, .*: {files}\n.*train it",
    ):
        tree.save(tmp_path / "zoo", copy=copy)
    assert listing(tmp_path / "zoo") == before
    # A save fails because of what it adds, and never because of a node that is there already.
    tree.remove("ok/new")
    tree.save(tmp_path / "zoo")


@BROKEN
def test_a_node_that_is_there_already_does_not_keep_others_from_being_saved(
    tmp_path: Path, number: float
) -> None:
    files = broken_files(tmp_path / "files", number, "peft")
    (tmp_path / "zoo").mkdir()
    text = f"version: 1\ntree:\n  broken: {{adapter: {files}}}\n"
    (tmp_path / "zoo/tree.yaml").write_text(text)
    tree = lt.load(tmp_path / "zoo")
    tree.add("good", adapter=adapter(1))
    tree.save(tmp_path / "zoo")
    (problem,) = lt.check(tmp_path / "zoo")
    assert (problem.node, problem.kind) == ("broken", "numbers")


def test_a_tree_that_holds_such_a_node_is_saved_elsewhere(tmp_path: Path) -> None:
    files = broken_files(tmp_path / "zoo", math.nan, "peft")
    assert files == tmp_path / "zoo/a"
    lt.load(tmp_path / "zoo").save(tmp_path / "copy")
    (problem,) = lt.check(tmp_path / "copy")
    assert (problem.node, problem.kind) == ("a", "numbers")


def test_the_command_adds_no_files_whose_numbers_are_not_finite(
    tmp_path: Path, shell: Shell
) -> None:
    files = broken_files(tmp_path / "files", math.nan, "peft")
    lt.AdapterTree().save(tmp_path / "zoo")
    code, _, told = shell("add", tmp_path / "zoo", "new", files)
    assert code == 1
    assert "new: mid: a factor holds NaN or an infinity" in told
    assert lt.load(tmp_path / "zoo").paths() == []


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    for shape in ((), (7,), (33, 65), (3, 5, 2)):
        fine = torch.full(shape, 3.0).to(dtype)
        assert all_finite([fine, fine.new_zeros(0)])
        largest = torch.full(shape, torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
        assert all_finite([largest, -largest.double().to(torch.float64)])
        for number in (math.nan, math.inf, -math.inf):
            if dtype == torch.float8_e4m3fn and not math.isnan(number):
                continue  # it has no infinities
            for place in {0, fine.numel() // 2, fine.numel() - 1}:
                broken = fine.double().flatten()
                broken[place] = number
                broken = broken.view(shape).to(dtype)
                assert not all_finite([fine, broken])
                assert not all_finite([broken.mT if broken.ndim > 1 else broken])
