"""Working on a tree from the shell: what a command prints, what it saves, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from dense import zoo_of
from shell import Shell, answer

import lora_tree as lt


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """fr (1) → legal (2, half), medical (3); misc, a group; de, the same as fr."""
    tree = lt.AdapterTree(base="org/model")
    tree.add("fr", adapter=zoo_of(1))
    tree.add("fr/legal", adapter=zoo_of(2), weight=0.5)
    tree.add("fr/medical", adapter=zoo_of(3))
    tree.add("misc", group=True)
    tree.add("de", adapter=zoo_of(1))
    tree.save(tmp_path / "zoo")
    return tmp_path / "zoo"


# ---------------------------------------------------------------------- diff
def test_diff_tells_what_moved(shell: Shell, zoo: Path) -> None:
    code, out, err = shell("diff", zoo, "fr/legal", "fr/medical")
    assert (code, err) == (0, "")
    assert out.startswith("fr/legal → fr/medical: moved ")
    assert "block.mlp" in out
    assert shell("diff", zoo, "fr", "de")[1] == "fr and de are the same\n"
    told = answer(shell, "diff", zoo, "fr/legal", "fr/medical")
    wanted = lt.diff_paths(lt.load(zoo), "fr/legal", "fr/medical")
    assert told["moved"] == wanted.moved
    assert told["modules"]["q_proj"]["cosine"] == wanted.modules["q_proj"].cosine
    assert "and 4 more modules" in shell("diff", zoo, "fr", "fr/legal", "--most", "1")[1]


def test_diff_compares_trees(shell: Shell, zoo: Path, tmp_path: Path) -> None:
    tree = lt.load(zoo)
    tree.update("fr/legal", adapter=zoo_of(5), weight=1.0)
    tree.remove("misc")
    tree.save(tmp_path / "other")
    code, out, _ = shell("diff", zoo, "--with", tmp_path / "other")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "only in the first: misc"
    assert lines[1] == "fr/legal: weight 0.5 → 1"
    assert lines[2].startswith("fr/legal: moved ")
    assert shell("diff", zoo, "--with", zoo)[1] == "the two trees are the same\n"
    both = answer(shell, "diff", zoo, "fr/legal", "--with", tmp_path / "other")
    assert both["moved"] > 0.0
    assert both["a"] == f"{zoo}: fr/legal"


def test_diff_needs_two_sides(shell: Shell, zoo: Path) -> None:
    assert "name two paths, or a second tree" in shell("diff", zoo, "fr")[2]
    code, _, err = shell("diff", zoo, "fr", "fr/leagl")
    assert code == 1
    assert "did you mean 'fr/legal'?" in err


# ---------------------------------------------------------------------- similar
def test_similar_lists_pairs_and_clusters(shell: Shell, zoo: Path, tmp_path: Path) -> None:
    code, out, err = shell("similar", zoo, "--picture", tmp_path / "map.svg")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "4 adapters, exact"
    assert lines[1] == "  1.000   de   fr"
    assert "alike: de, fr" in lines
    assert lines[-1] == "like no other by 0.5: 2"
    ElementTree.fromstring((tmp_path / "map.svg").read_text())
    told = answer(shell, "similar", zoo, "fr", "de", "--cosine", "1.0", "--sketch")
    assert told["names"] == ["de", "fr"]
    assert told["cosines"][0][1] == pytest.approx(1.0, abs=1e-6)
    lineage = answer(shell, "similar", zoo, "fr/*", "--of", "lineage")
    wanted = lt.similar(lt.load(zoo), ["fr/*"], of="lineage").cosines.tolist()
    assert lineage["cosines"] == wanted
