"""Squash, rebase, diff and their kin on nodes that replace tensors: handled to the bit, or refused
by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import low_rank
from test_overrides import PATHS, Net, head, summed, without_embeddings, zoo

import lora_tree as lt
from lora_tree.errors import SpecError

pytestmark = pytest.mark.filterwarnings("ignore::lora_tree.OverrideWarning")


def state(tree: lt.AdapterTree, path: str) -> dict[str, torch.Tensor]:
    base = Net().double()
    model = lt.attach(tree, base)
    model.activate(path)
    found = copy.deepcopy(base.state_dict())
    model.detach()
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("to", ["new", "top/new", "top/fr/new"])
def test_a_squashed_node_is_the_path_or_refused_by_name(path: str, to: str) -> None:
    """Below a node whose override the path does not have, nothing can bring the base's own back."""
    tree = without_embeddings(zoo())
    wanted = summed(tree, path).state_dict()
    below_fr, on_fr = to == "top/fr/new", path.startswith("top/fr")
    if below_fr and not on_fr:
        with pytest.raises(SpecError, match=r"top/fr: replaces .* can't undo that"):
            lt.squash(tree, path, to=to)
        return
    if path == to.rpartition("/")[0]:
        with pytest.raises(SpecError, match="adds nothing"):
            lt.squash(tree, path, to=to)
        return
    lt.squash(tree, path, to=to)
    same(state(tree, to), dict(wanted))


def test_a_node_that_is_rebased_keeps_its_effective_weight() -> None:
    tree = without_embeddings(zoo())
    wanted = {path: summed(tree, path).state_dict() for path in ("top/fr/legal", "top/fr/legal/x")}
    lt.rebase(tree, "top/fr/legal", to="legal")  # takes fr's head along
    same(state(tree, "legal"), dict(wanted["top/fr/legal"]))
    same(state(tree, "legal/x"), dict(wanted["top/fr/legal/x"]))
    tree = without_embeddings(zoo())
    wanted["top/de"] = summed(tree, "top/de").state_dict()
    lt.rebase(tree, "top/de", to="de")  # has a head of its own, above which nothing counts
    same(state(tree, "de"), dict(wanted["top/de"]))
    with pytest.raises(SpecError, match=r"top/fr: replaces embed\.weight, .* can't undo that"):
        lt.rebase(tree, "de", to="top/fr/de")


def test_a_part_of_a_node_leaves_its_overrides_where_they_are() -> None:
    tree = without_embeddings(zoo())
    wanted = {path: summed(tree, path).state_dict() for path in PATHS}
    lt.split(tree, "top/fr", to="top/fr/rest", modules=["score"])
    assert tree.adapter("top/fr").overrides
    assert not tree.adapter("top/fr/rest").overrides
    same(state(tree, "top/fr/rest"), dict(wanted["top/fr"]))
    same(state(tree, "top/fr/rest/legal/x"), dict(wanted["top/fr/legal/x"]))


@pytest.mark.parametrize(
    ("verb", "text"),
    [
        (
            lambda tree: lt.merge_paths(tree, ["top/fr", "top/de"], to="top/m"),
            r"top/fr: replaces .*, and can't be merged: replacements do not add up",
        ),
        (
            lambda tree: lt.hoist(tree, "top", ["top/fr", "top/de"], into="top/m"),
            r"top/(fr|de): replaces score\.\w+, and increments of score would move above that",
        ),
        (
            lambda tree: lt.rebase_all(
                tree,
                "top/fr",
                adapter=lt.Adapter({"lin": low_rank(6, 6, seed=1)}, overrides=head(9)),
            ),
            r"top/fr: replaces .*, and can't be changed while its children stay",
        ),
    ],
)
def test_what_would_need_a_mean_of_replacements_is_refused(
    verb: Callable[[lt.AdapterTree], Any], text: str
) -> None:
    tree = without_embeddings(zoo())
    before = {path: tree.adapter(path) for path in tree.paths()}
    with pytest.raises(SpecError, match=text):
        verb(tree)
    assert all(tree.adapter(path) is adapter for path, adapter in before.items())
    assert tree.paths() == list(before)


def test_siblings_share_what_none_of_them_replaces() -> None:
    tree = without_embeddings(zoo())
    for path in ("top/fr", "top/de"):
        adapter = tree.adapter(path)
        assert adapter is not None
        tree.update(
            path,
            adapter=lt.Adapter({"lin": adapter.modules["lin"]}, overrides=adapter.overrides),
        )
    wanted = {path: summed(tree, path).state_dict() for path in PATHS}
    lt.hoist(tree, "top", ["top/fr", "top/de"], into="top/both")
    same(state(tree, "top/both/fr/legal"), dict(wanted["top/fr/legal"]))
    same(state(tree, "top/both/de"), dict(wanted["top/de"]))
    assert not tree.adapter("top/both").overrides


def test_compress_cuts_factors_and_keeps_overrides_within_the_budget() -> None:
    tree = without_embeddings(zoo())
    replaced = sum(
        override.nbytes for p in tree.paths() for override in tree.adapter(p).overrides.values()
    )
    done = lt.compress(tree, budget_bytes=replaced + 800)
    assert done.bytes_after <= replaced + 800 < done.bytes_before
    for path in tree.paths():
        before = zoo().adapter(path).overrides
        after = tree.adapter(path).overrides
        assert before.keys() == after.keys()
        assert all(torch.equal(o.values, after[name].values) for name, o in before.items())


def test_a_difference_tells_what_is_replaced_otherwise() -> None:
    tree = zoo()
    found = lt.diff_paths(tree, "top/fr", "top/fr/legal/x")
    assert found.overrides == ("embed.weight", "score.bias", "score.weight")
    assert not lt.diff_paths(tree, "top/fr", "top/fr").overrides
    assert lt.diff_paths(tree, "top/fr/medical", "top/fr").overrides == ()
    # top's increment of the head counts under top alone
    assert lt.diff_paths(tree, "top", "top/de").modules["score"].norm_a > 0
    other = zoo()
    other.update("top/de", adapter=lt.Adapter(tree.adapter("top/de").modules, overrides=head(8)))
    assert lt.diff_trees(tree, other).nodes["top/de"].overrides == ("score.bias", "score.weight")
    assert lt.diff_trees(tree, zoo()).is_nothing


def test_flat_adapters_with_heads_are_absorbed_and_grow_with_their_heads() -> None:
    tree = without_embeddings(zoo())
    flat = tree.flatten("top/de")
    wanted = summed(tree, "top/de").state_dict()
    done = lt.absorb(tree, "again", flat, under="top")
    same(state(tree, f"{done.parent}/again"), dict(wanted))
    plain = lt.AdapterTree()
    for name in ("a", "b", "c"):
        plain.add(name, adapter=lt.Adapter({"lin": low_rank(6, 6, seed=1)}, overrides=head(1)))
    heads = {name: plain.adapter(name).overrides["score.weight"] for name in plain.paths()}
    grown = lt.grow(plain, max_error=0.1)
    for name, place in grown.edited.moved.items():
        assert plain.adapter(place).overrides["score.weight"] is heads[name]


def test_a_weight_that_switches_an_override_is_no_change_that_children_make_up_for() -> None:
    head = {"head.weight": lt.Override(torch.ones(3, 4))}
    tree = lt.AdapterTree()
    tree.add("top", adapter=lt.Adapter({"q": low_rank(3, 4, seed=1)}, overrides=head), weight=0.0)
    tree.add("top/a", adapter=lt.Adapter({"q": low_rank(3, 4, seed=2)}))
    with pytest.raises(SpecError, match=r"top: replaces head\.weight, and can't be changed"):
        lt.rebase_all(tree, "top", weight=1.0)
    tree.update("top", weight=1.0)
    with pytest.raises(SpecError, match=r"top: replaces head\.weight, and can't be changed"):
        lt.rebase_all(tree, "top", weight=0.0)
    lt.rebase_all(tree, "top", weight=0.5)  # it stays whole
    assert set(tree.flatten("top/a").overrides) == {"head.weight"}


def test_a_node_that_is_switched_off_can_not_take_a_head_along() -> None:
    head = {"head.weight": lt.Override(torch.ones(3, 4))}
    tree = lt.AdapterTree()
    tree.add("top", adapter=lt.Adapter({}, overrides=head))
    tree.add("top/a", adapter=lt.Adapter({"q": low_rank(3, 4, seed=2)}), weight=0.0)
    with pytest.raises(SpecError, match="top/a: its weight is 0, so its increments can't make up"):
        lt.rebase(tree, "top/a", to="a")
    # Its own head does not count either, so it does not stand for the one that is lost.
    own = lt.Adapter({"q": low_rank(3, 4, seed=2)}, overrides=head)
    tree.add("b", adapter=own, weight=0.0)
    with pytest.raises(SpecError, match=r"top: replaces head\.weight"):
        lt.rebase(tree, "b", to="top/b")


def test_a_node_that_only_replaces_tensors_is_not_taken_for_an_empty_one() -> None:
    tree, other = lt.AdapterTree(), lt.AdapterTree()
    for each, seed in ((tree, 1), (other, 2)):
        each.add("top", adapter=lt.Adapter({}, overrides=head(seed)))
    assert tree.adapter("top")
    assert not lt.Adapter({})
    tree.add("top/a", adapter=lt.Adapter({"q": low_rank(3, 4, seed=2)}))
    told = lt.diff_trees(tree, other)
    assert told.nodes["top"].overrides == ("score.bias", "score.weight")
    lt.compress(tree, rank=1)
    assert set(tree.adapter("top").overrides) == {"score.weight", "score.bias"}
    tree.add("b", adapter=lt.Adapter({"q": low_rank(3, 4, seed=3)}))
    with pytest.raises(SpecError, match=r"top: replaces score\.bias"):
        lt.rebase(tree, "b", to="top/b")
