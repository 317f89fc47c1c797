"""The objects that a tree keeps: each is visited by every full garbage collection."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from oracle import low_rank
from torch import nn

import lora_tree as lt
from lora_tree.folder.adapters.source import FolderSource

SITES, LEAVES = 40, 6


def family() -> lt.AdapterTree:
    """Return one node, and nodes below it, with factors at every site and weights that scale."""
    draw = torch.Generator().manual_seed(0)
    tree = lt.AdapterTree()
    for path in ("fr", *(f"fr/{i}" for i in range(LEAVES))):
        modules = {str(i): low_rank(4, 4, seed=draw) for i in range(SITES)}
        tree.add(path, adapter=lt.Adapter(modules), weight=0.5)
    return tree


def tracked(kind: type) -> int:
    """Return how many objects of a type the garbage collector visits."""
    gc.collect()
    return sum(type(each) is kind for each in gc.get_objects())


def test_a_path_that_is_kept_has_no_dictionary_for_each_term() -> None:
    base = nn.Sequential(*(nn.Linear(4, 4) for _ in range(SITES)))
    tree = family()
    model = lt.attach(tree, base)
    model.activate("fr", mode="unmerged")
    before = tracked(dict)
    for path in tree.leaves():
        model.activate(path, mode="unmerged")
        model.activate(path)
    terms = 2 * SITES * LEAVES
    assert tracked(dict) - before < terms / 2


def test_adapters_share_what_they_do_not_have() -> None:
    one, other = (family().adapter("fr") for _ in range(2))
    assert one is not None
    assert other is not None
    for name in ("config", "unchanged", "nesting", "errors", "overrides"):
        assert getattr(one, name) is getattr(other, name), name


def test_siblings_of_an_opened_tree_share_the_lineage_that_they_were_trained_on(
    tmp_path: Path,
) -> None:
    family().save(tmp_path / "zoo")
    lineages = set()
    tree = lt.load(tmp_path / "zoo")
    for path in tree.leaves():
        source = tree[path].source
        assert isinstance(source, FolderSource)
        assert source.trained is not None
        assert source.trained.on.steps is not None
        assert [step.node for step in source.trained.on.steps] == ["fr"]
        lineages.add(id(source.trained.on))
    assert len(lineages) == 1
