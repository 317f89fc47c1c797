"""What is no tree, no adapter or no number is refused by every verb, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense import zoo_of

import lora_tree as lt
from lora_tree.errors import PathError, SpecError


def zoo() -> lt.AdapterTree:
    tree = lt.AdapterTree()
    for seed, path in enumerate(("fr", "fr/legal", "de")):
        tree.add(path, adapter=zoo_of(seed))
    return tree


ON_A_TREE: dict[str, Callable[[Any], object]] = {
    "squash": lambda tree: lt.squash(tree, "fr", to="x"),
    "split": lambda tree: lt.split(tree, "fr", to="fr/x", rank=1),
    "pick": lambda tree: lt.pick(tree, "fr", to="x"),
    "graft": lambda tree: lt.graft(tree, "x", zoo()),
    "graft, other": lambda tree: lt.graft(zoo(), "x", tree),
    "rebase": lambda tree: lt.rebase(tree, "fr", to="x"),
    "rebase_all": lambda tree: lt.rebase_all(tree, "fr", weight=0.5),
    "hoist": lambda tree: lt.hoist(tree, "", into="x"),
    "merge_paths": lambda tree: lt.merge_paths(tree, ["fr", "de"], to="x"),
    "compress": lambda tree: lt.compress(tree, rank=1),
    "grow": lambda tree: lt.grow(tree, max_error=0.1),
    "absorb": lambda tree: lt.absorb(tree, "x", zoo_of(7)),
    "diff_paths": lambda tree: lt.diff_paths(tree, "fr", "de"),
    "diff_trees": lambda tree: lt.diff_trees(zoo(), tree),
}


@pytest.mark.parametrize("verb", ON_A_TREE)
def test_the_name_of_a_folder_is_no_tree(verb: str) -> None:
    with pytest.raises(SpecError, match="expected an AdapterTree, got str") as caught:
        ON_A_TREE[verb]("zoo/")
    assert "lora_tree.load" in str(caught.value)


ON_ADAPTERS: dict[str, Callable[[Any], object]] = {
    "absorb": lambda adapter: lt.absorb(zoo(), "x", adapter),
    "rebase_all": lambda adapter: lt.rebase_all(zoo(), "fr", was=adapter),
    "deviation, wanted": lambda adapter: lt.deviation(adapter, zoo_of(1)),
    "deviation, got": lambda adapter: lt.deviation(zoo_of(1), adapter),
}


@pytest.mark.parametrize("verb", ON_ADAPTERS)
def test_the_name_of_a_folder_is_no_adapter(verb: str) -> None:
    with pytest.raises(SpecError, match="expected an Adapter, got str") as caught:
        ON_ADAPTERS[verb]("new/fr")
    assert "Adapter.load" in str(caught.value)


@pytest.mark.parametrize("bound", ["0.1", True, float("nan"), 1.0, -0.1])
def test_a_bound_that_is_no_part_of_a_whole_is_refused(bound: Any) -> None:
    with pytest.raises(SpecError, match="max_error: expected a part of the whole"):
        lt.compress(zoo(), max_error=bound)
    with pytest.raises(SpecError, match="max_error: expected a part of the whole"):
        lt.grow(zoo(), max_error=bound)


@pytest.mark.parametrize("density", ["0.5", True, float("nan"), 0.0, 1.1])
def test_a_density_that_is_no_part_of_the_numbers_is_refused(density: Any) -> None:
    with pytest.raises(SpecError, match="density: expected a part of the numbers"):
        lt.merge([zoo_of(1), zoo_of(2)], density=density)


@pytest.mark.parametrize(
    "moment",
    [[1.0] * 8, torch.full((8,), float("nan")), -torch.ones(8), -torch.eye(8)],
    ids=["a list", "nan", "a negative diagonal", "a negative matrix"],
)
def test_a_moment_that_is_no_mean_of_squares_is_refused(moment: Any) -> None:
    tree = zoo()
    before = {path: tree.adapter(path) for path in tree.paths()}
    with pytest.raises(SpecError, match=r"fr: q_proj: moments: "):
        lt.compress(tree, ["fr"], rank=1, moments={"q_proj": moment})
    assert {path: tree.adapter(path) for path in tree.paths()} == before


def test_similar_takes_a_tree_or_adapters_by_name() -> None:
    strange: Any
    for strange in (3, "zoo/", [zoo_of(1)]):
        with pytest.raises(SpecError, match="similar compares the nodes of a tree"):
            lt.similar(strange)


def test_one_pattern_is_not_taken_for_its_letters() -> None:
    tree = zoo()
    calls: list[Callable[[], object]] = [
        lambda: tree.matching("fr"),
        lambda: lt.similar(tree, "fr/*"),
        lambda: lt.compress(tree, "fr", rank=1),
        lambda: lt.hoist(tree, "", "fr", into="x"),
    ]
    for call in calls:
        with pytest.raises(PathError, match="expected a list of paths or patterns, got the string"):
            call()


LISTS: dict[str, Callable[[lt.AdapterTree, lt.TreeModel, Any], object]] = {
    "matching": lambda tree, model, paths: tree.matching(paths),
    "similar": lambda tree, model, paths: lt.similar(tree, paths),
    "prefetch": lambda tree, model, paths: model.prefetch(paths),
    "route": lambda tree, model, paths: model.route(paths).__enter__(),
}


@pytest.mark.parametrize("verb", LISTS)
def test_a_number_is_no_list_of_paths(verb: str) -> None:
    tree = lt.AdapterTree()
    tree.add("fr", adapter=lt.Adapter({"0": lt.LowRank(torch.ones(1, 3), torch.ones(2, 1))}))
    model = lt.attach(tree, torch.nn.Sequential(torch.nn.Linear(3, 2)))
    with pytest.raises(SpecError, match=r"expected .*, got 3$"):
        LISTS[verb](tree, model, 3)
    assert model.active == ""
