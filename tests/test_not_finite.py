"""Files with NaN or infinities: a save takes no node with them in."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shell import Shell
from zoo import adapter, listing

import lora_tree as lt
from lora_tree.errors import FormatError, SpecError
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
    module = {
        "peft": r"mid \(lora_A\)",
        "head": r"score.weight \(override\)",
        "kohya": r"unet.mid \(lora_B\)",
    }[kind]
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
    assert "new: mid (lora_A): a factor holds NaN or an infinity" in told
    assert lt.load(tmp_path / "zoo").paths() == []


@BROKEN
@pytest.mark.parametrize("kind", ["peft", "head"])
def test_a_node_of_another_tree_and_another_adapter_of_a_node_are_new(
    tmp_path: Path, number: float, kind: str, shell: Shell
) -> None:
    broken_files(tmp_path / "other", number, kind)
    lt.lock(tmp_path / "other")
    tree = lt.AdapterTree()
    tree.add("ok", adapter=adapter(1))
    tree.save(tmp_path / "zoo")
    before = listing(tmp_path / "zoo")
    lt.graft(tree, "sub", lt.load(tmp_path / "other"))
    with pytest.raises(FormatError, match=r"^sub/a: .* a factor holds NaN or an infinity"):
        tree.save(tmp_path / "zoo")
    code, _, told = shell("set", tmp_path / "zoo", "ok", "--adapter", tmp_path / "other/a")
    assert (code, "ok: " in told, "a factor holds NaN" in told) == (1, True, True)
    assert listing(tmp_path / "zoo") == before


@BROKEN
@pytest.mark.parametrize("trained", [False, True])
def test_a_save_takes_no_such_numbers_from_memory(
    tmp_path: Path, number: float, trained: bool
) -> None:
    tree = lt.AdapterTree()
    tree.add("ok", adapter=adapter(1))
    tree.save(tmp_path / "zoo")
    before = listing(tmp_path / "zoo")
    B = torch.ones(6, 2)
    B[0, 0] = number
    own = lt.Adapter({"q": lt.LowRank(torch.ones(2, 6), B)})
    if trained:
        own = own.with_tensors(lambda tensor: torch.nn.Parameter(tensor))
    tree.update("ok", adapter=own)
    with pytest.raises(FormatError, match=r"^ok: q \(lora_B\): a factor holds NaN or an infinity"):
        tree.save(tmp_path / "zoo")
    assert listing(tmp_path / "zoo") == before


def test_a_broken_node_of_the_tree_can_be_moved(tmp_path: Path) -> None:
    files = broken_files(tmp_path / "files", math.nan, "peft")
    (tmp_path / "zoo").mkdir()
    text = f"version: 1\ntree:\n  broken: {{adapter: {files}}}\n"
    (tmp_path / "zoo/tree.yaml").write_text(text)
    tree = lt.load(tmp_path / "zoo")
    tree.rename("broken", "later")
    tree.save(tmp_path / "zoo")
    assert lt.load(tmp_path / "zoo").paths() == ["later"]


def zoo_with(number: float, where: str) -> lt.AdapterTree:
    """p, and below it x, of which one tensor holds the number, and y."""
    tree = lt.AdapterTree()
    for seed, path in enumerate(("p", "p/x", "p/y")):
        q, k = (listed(seed + 10 * i) for i in range(2))
        overrides = {}
        if path == "p/x" and where == "override":
            overrides["head.weight"] = lt.Override(torch.full((2, 3), number))
        elif path == "p/x":
            parts = {"lora_A": k.A, "lora_B": k.B, "lora_bias": torch.ones(6)}
            parts[where][0] = number
            k = lt.LowRank(parts["lora_A"], parts["lora_B"], 1.0, parts["lora_bias"])
        tree.add(path, adapter=lt.Adapter({"q": q, "k": k}, overrides=overrides))
    return tree


def listed(seed: int) -> lt.LowRank:
    draw = torch.Generator().manual_seed(seed)
    return lt.LowRank(torch.randn(2, 6, generator=draw), torch.randn(6, 2, generator=draw))


VERBS: dict[str, Callable[[lt.AdapterTree], object]] = {
    "flatten": lambda tree: tree.flatten("p/x"),
    "flatten, cut": lambda tree: tree.flatten("p/x", rank=1),
    "flatten, rounded": lambda tree: tree.flatten("p/x", dtype=torch.bfloat16),
    "squash": lambda tree: lt.squash(tree, "p/x", to="n"),
    "split": lambda tree: lt.split(tree, "p/x", to="p/x/n", modules=["q"]),
    "rebase": lambda tree: lt.rebase(tree, "p/x", to="n"),
    "rebase_all": lambda tree: lt.rebase_all(tree, "p", weight=0.5),
    "compress": lambda tree: lt.compress(tree, rank=1),
    "hoist": lambda tree: lt.hoist(tree, "p"),
    "absorb": lambda tree: lt.absorb(tree, "n", lt.Adapter({"q": listed(9)})),
    "similar": lambda tree: lt.similar(tree),
}


@BROKEN
@pytest.mark.parametrize("where", ["lora_A", "lora_B", "lora_bias", "override"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_refuses_such_a_node_by_node_module_and_tensor(
    verb: str, where: str, number: float
) -> None:
    tree = zoo_with(number, where)
    before = {path: (tree[path].weight, tree.adapter(path)) for path in tree.paths()}
    name = "head.weight" if where == "override" else "k"
    with pytest.raises(
        SpecError, match=rf"^p/x: {name}: the .* not finite: {where} holds NaN or an infinity\n"
    ):
        VERBS[verb](tree)
    assert {path: (tree[path].weight, tree.adapter(path)) for path in tree.paths()} == before


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
