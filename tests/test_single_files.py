"""An adapter that is one file of another program, as a node: opened, locked, checked, saved,
copied, pushed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from shell import Shell, answer
from zoo import adapter, listing, nudge, refused, untouched, write

import lora_tree as lt
from lora_tree.errors import FolderError, FormatError, LoraTreeError, UnlockedError

KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
DIFFUSERS = "unet.mid_block.attentions.0.proj_in"


def kohya(file: Path, seed: int = 0) -> Path:
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        f"{KOHYA}.lora_down.weight": torch.randn(2, 6, generator=draw),
        f"{KOHYA}.lora_up.weight": torch.randn(5, 2, generator=draw),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, file)
    return file


def diffusers(folder: Path) -> Path:
    folder.mkdir(parents=True)
    tensors = {
        f"{DIFFUSERS}.lora_A.weight": torch.ones(2, 6),
        f"{DIFFUSERS}.lora_B.weight": torch.ones(5, 2),
    }
    safetensors.torch.save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


def dense(tree: lt.AdapterTree, path: str) -> torch.Tensor:
    (value,) = tree.adapter(path).modules.values()
    return value.dense()


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """style: a file beside the folder; own: one in it; soft: a folder of diffusers; below: an
    ordinary node.
    """
    kohya(tmp_path / "downloads/style.safetensors")
    kohya(tmp_path / "zoo/files/own.safetensors", 1)
    diffusers(tmp_path / "downloads/soft")
    text = "version: 1\ntree:\n"
    text += "  style:\n    adapter: ../downloads/style.safetensors\n    weight: 0.5\n"
    text += "  own: {adapter: files/own.safetensors}\n  soft: {adapter: ../downloads/soft}\n"
    write(tmp_path / "zoo/tree.yaml", text)
    return tmp_path / "zoo"


# ---------------------------------------------------------------------- opened and locked
def test_tree_yaml_names_a_file(zoo: Path, tmp_path: Path) -> None:
    tree = lt.load(zoo)
    assert tree.paths() == ["own", "soft", "style"]
    assert torch.equal(
        dense(tree, "style"), dense(one(tmp_path / "downloads/style.safetensors"), "x")
    )
    assert tree["style"].weight == 0.5
    assert tree.outline("own").numel == 2 * 6 + 5 * 2
    assert lt.check(zoo) == []


def one(file: Path) -> lt.AdapterTree:
    tree = lt.AdapterTree()
    tree.add("x", adapter=lt.Adapter.load(file))
    return tree


def test_the_lock_vouches_for_the_file(zoo: Path, tmp_path: Path) -> None:
    lt.lock(zoo)
    lock = json.loads((zoo / "tree.lock").read_text())["nodes"]
    assert (
        lock["style"]["file"]["size"] == (tmp_path / "downloads/style.safetensors").stat().st_size
    )
    assert "config" not in lock["style"]
    before = (zoo / "tree.lock").read_bytes()
    assert lt.check(zoo) == []
    lt.lock(zoo)
    assert (zoo / "tree.lock").read_bytes() == before
    # Another time alone is no other content.
    os.utime(tmp_path / "downloads/style.safetensors", ns=(1, 1))
    assert lt.load(zoo).paths() == ["own", "soft", "style"]
    nudge(tmp_path / "downloads/style.safetensors")
    assert "style: " in refused(zoo, UnlockedError)
    assert {problem.kind for problem in lt.check(zoo)} == {"unlocked"}
    lt.lock(zoo)
    assert lt.check(zoo) == []


def test_a_file_that_changes_between_opening_and_reading_is_noticed(
    zoo: Path, tmp_path: Path
) -> None:
    lt.lock(zoo)
    tree = lt.load(zoo)
    nudge(tmp_path / "downloads/style.safetensors")
    with pytest.raises(UnlockedError, match=r"style\.safetensors: not the files that tree\.lock"):
        tree.adapter("style")


def test_a_node_below_a_file_grows_stale_with_it(zoo: Path, tmp_path: Path) -> None:
    tree = lt.load(zoo)
    tree.add("style/knight", adapter=tree.adapter("style"))
    tree.save(zoo)
    assert lt.check(zoo) == []
    kohya(tmp_path / "downloads/style.safetensors", 5)
    lt.lock(zoo)
    assert {p.node: p.kind for p in lt.check(zoo)} == {"style/knight": "stale"}


def test_mlx_s_config_counts_as_its_weights_do(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 8, generator=draw), torch.randn(8, 2, generator=draw)
    made = lt.Adapter({"model.layers.0.self_attn.q_proj": lt.LowRank(A, B, scale=2.0)})
    made.save(tmp_path / "mlx", form="mlx")
    write(tmp_path / "zoo/tree.yaml", "version: 1\ntree: {fr: {adapter: ../mlx}}\n")
    lt.lock(tmp_path / "zoo")
    assert lt.check(tmp_path / "zoo") == []
    assert torch.equal(dense(lt.load(tmp_path / "zoo"), "fr"), dense(one(tmp_path / "mlx"), "x"))
    tree = lt.load(tmp_path / "zoo")
    config = tmp_path / "mlx/adapter_config.json"
    text = config.read_text()
    write(config, text.replace("1.0", "3.0"))
    assert config.read_text() != text
    assert "fr: " in refused(tmp_path / "zoo", UnlockedError)
    with pytest.raises(UnlockedError, match="not the files that"):
        tree.adapter("fr")


@pytest.mark.parametrize("how", ["pickle", "stranger", "half", "gone", "cut"])
def test_what_is_no_adapter_is_told_by_its_line(zoo: Path, tmp_path: Path, how: str) -> None:
    names = {"pickle": "a.bin", "half": "adapter_model.safetensors"}
    file = tmp_path / "downloads" / names.get(how, "a.safetensors")
    if how == "pickle":
        file.write_bytes(b"x")
    elif how != "gone":
        safetensors.torch.save_file({"x": torch.ones(2)}, file)
    if how == "cut":
        file.write_bytes(kohya(file).read_bytes()[:-4])
    write(zoo / "tree.yaml", f"version: 1\ntree:\n  bad: {{adapter: ../downloads/{file.name}}}\n")
    said = {
        "pickle": "pickles, which can run code",
        "stranger": "no adapter of a known format: its keys are x",
        "half": "expected a folder|not a folder",
        "gone": "no such file",
        "cut": "cut short|bytes",
    }[how]
    text = refused(zoo, FormatError) if how != "cut" else str([p.text for p in lt.check(zoo)])
    assert any(part in text for part in said.split("|")), text
    if how != "cut":
        assert "tree.yaml:3" in text


def test_a_stranger_s_tree_may_not_name_a_file_outside(zoo: Path) -> None:
    with pytest.raises(FolderError, match="outside=False"):
        lt.load(zoo, outside=False)


# ---------------------------------------------------------------------- not named
def test_an_adapter_in_one_file_that_nothing_names_is_noted(
    shell: Shell, zoo: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    adapter(1).save(flat / "fr")
    style = (tmp_path / "downloads").rglob("*.safetensors")
    (flat / "my style.safetensors").write_bytes(next(iter(style)).read_bytes())
    safetensors.torch.save_file({"w": torch.ones(2)}, flat / "model.safetensors")  # no adapter
    note = (
        "passed over my style.safetensors: only PEFT folders are nodes by themselves; to add one: "
        f"lora-tree add {flat} NAME '{flat}/my style.safetensors'"
    )
    for command in ("show", "check"):
        assert answer(shell, command, flat)["notes"] == [note]
    assert answer(shell, "check", zoo)["notes"] == []  # here tree.yaml names each
    shell("add", flat, "style", flat / "my style.safetensors")
    assert answer(shell, "check", flat)["notes"] == []


def test_a_folder_of_mlx_lm_is_not_called_half_a_peft_folder(tmp_path: Path) -> None:
    adapter(1).save(tmp_path / "zoo/fr", form="mlx")
    text = refused(tmp_path / "zoo", FormatError)
    assert f"{tmp_path}/zoo/fr: mlx-lm wrote this adapter, and only PEFT folders are nodes" in text
    assert "name it in tree.yaml ({adapter: fr}), or move it away" in text
    write(tmp_path / "zoo/tree.yaml", "version: 1\ntree: {french: {adapter: fr}}\n")
    assert lt.load(tmp_path / "zoo").paths() == ["french"]


# ---------------------------------------------------------------------- saved
def test_a_save_names_the_file_and_leaves_it(zoo: Path, tmp_path: Path) -> None:
    before = listing(tmp_path / "downloads")
    text = (zoo / "tree.yaml").read_bytes()
    tree = lt.load(zoo)
    tree.save(zoo)
    assert (zoo / "tree.yaml").read_bytes() == text
    tree.add("more", adapter=adapter(3))
    tree.save(zoo)
    again = lt.load(zoo)
    assert again.paths() == ["more", "own", "soft", "style"]
    assert torch.equal(dense(again, "style"), dense(tree, "style"))
    tree.save(tmp_path / "elsewhere")
    moved = lt.load(tmp_path / "elsewhere")
    assert torch.equal(dense(moved, "own"), dense(tree, "own"))
    assert "../downloads/style.safetensors" in (tmp_path / "elsewhere/tree.yaml").read_text()
    assert listing(tmp_path / "downloads") == before


def test_a_copy_brings_it_in_as_a_peft_folder(zoo: Path, tmp_path: Path) -> None:
    tree = lt.load(zoo)
    wanted = dense(tree, "style"), dense(tree, "soft")
    tree.save(tmp_path / "whole", copy=True)
    (tmp_path / "downloads/style.safetensors").unlink()
    again = lt.load(tmp_path / "whole", outside=False)
    assert (tmp_path / "whole/style/adapter_config.json").is_file()
    assert torch.equal(dense(again, "style"), wanted[0])
    assert torch.equal(dense(again, "soft"), wanted[1])
    assert again["style"].weight == 0.5


def test_one_that_trains_is_saved_as_a_folder_of_its_own(zoo: Path, tmp_path: Path) -> None:
    before = listing(tmp_path / "downloads")
    tree = lt.load(zoo)
    trained = tree.adapter("style").map(lambda v: v.with_tensors(torch.nn.Parameter))
    tree.update("style", adapter=trained)
    with torch.no_grad():
        next(iter(trained.modules.values())).B.add_(1)
    tree.save(zoo)
    again = lt.load(zoo)
    assert (zoo / "style/adapter_config.json").is_file()
    assert torch.equal(dense(again, "style"), dense(tree, "style"))
    assert listing(tmp_path / "downloads") == before


def test_a_file_that_is_gone_is_not_saved_over(zoo: Path, tmp_path: Path) -> None:
    tree = lt.load(zoo)
    (tmp_path / "downloads/style.safetensors").unlink()
    with pytest.raises(LoraTreeError, match=r"style: .*style\.safetensors: no such file"):
        tree.save(zoo)
    untouched(zoo, lambda: _raise_folder(tree, zoo), match="style")


def _raise_folder(tree: lt.AdapterTree, zoo: Path) -> None:
    try:
        tree.save(zoo)
    except FormatError as error:
        raise FolderError(str(error)) from error


# ---------------------------------------------------------------------- the command line
def test_the_commands_take_a_file(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(capsys)
    new = kohya(tmp_path / "downloads/new.safetensors", 7)
    told = answer(shell, "add", zoo, "style/new", new)
    assert told["notes"] == [f"{new}: kohya: its keys begin with lora_unet_ or lora_te_"]
    assert "new.safetensors" in (zoo / "tree.yaml").read_text()
    assert not (zoo / "style/new").exists()
    code, out, _ = shell("show", zoo)
    assert (code, "style" in out) == (0, True)
    code, out, _ = shell("add", zoo, "copied", new, "--copy")
    assert code == 0
    assert (zoo / "copied/adapter_model.safetensors").is_file()
