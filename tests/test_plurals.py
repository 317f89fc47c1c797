"""A count and its noun agree, in messages and in what commands print."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import random_adapter
from shell import Shell

import lora_tree as lt
from benchmarks.forms import measured
from lora_tree.errors import agreeing, plural


def test_a_count_and_its_noun_agree() -> None:
    counted = [plural(n, "row") for n in (0, 1, 2, 1234)]
    assert counted == ["0 rows", "1 row", "2 rows", "1,234 rows"]
    assert [plural(n, "leaf", "leaves") for n in (1, 3)] == ["1 leaf", "3 leaves"]
    assert [plural(n, "line is", "lines are") for n in (1, 3)] == ["1 line is", "3 lines are"]
    assert [agreeing(n, "was", "were") for n in (0, 1, 2)] == ["were", "was", "were"]


def one_module(seed: int) -> lt.Adapter:
    return random_adapter({"q_proj": (8, 8)}, seed, base="org/model")


def test_a_tree_of_one_is_told_in_the_singular(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(capsys)
    one_module(1).save(tmp_path / "one")

    def told(*arguments: str | Path) -> str:
        code, out, err = shell(*arguments)
        assert code == 0, err
        return out

    zoo = tmp_path / "zoo"
    told("init", zoo, "--base", "org/model")
    assert "added fr: an adapter of 1 module, r=2" in told("add", zoo, "fr", tmp_path / "one")
    assert "1 node over org/model, " in told("show", zoo)
    assert f"{tmp_path / 'again'}: a tree of 1 node over org/model" in told(
        "init", tmp_path / "again", "--from", zoo
    )
    assert "a tree of 1 node" in told("add", zoo, "grp", zoo)
    told("add", zoo, "de", tmp_path / "one")
    tree = lt.load(zoo)
    tree.update("fr", adapter=one_module(2))
    tree.remove("grp", recursive=True)
    tree.save(zoo)
    assert "1 more node has one version; name it to see it" in told("log", zoo)


def test_values_of_one_are_told_in_the_singular() -> None:
    tree = lt.AdapterTree()
    tree.add("fr", adapter=one_module(1))
    assert repr(tree).startswith("AdapterTree(1 node, ")
    assert repr(one_module(1)).startswith("Adapter(1 module, r=2, ")
    override = lt.Override(torch.ones(1, 4), rows=(3,))
    assert repr(override) == "Override(1×4, 1 row, float32)"
    owner = lt.Adapter({}, overrides={"embed.weight": override})
    assert repr(owner).startswith("Adapter(0 modules, r=-, 1 override, ")


def test_a_benchmark_of_one_is_told_in_the_singular() -> None:
    assert ", 1 token a row, 32 → 48: " in str(measured((8, 4, 2, 1), (32, 48), 0.0))
