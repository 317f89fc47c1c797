"""The verbs that change a tree keep its effective weights, against dense float64."""

from __future__ import annotations

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from dense import draw, gauged, zoo_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo import opened

import lora_tree as lt
from lora_tree.errors import (
    BudgetError,
    LoraTreeError,
    PathError,
    ShapeMismatch,
    SpecError,
    TreeError,
)

SEEDS = st.integers(0, 2**16)
WEIGHTS = st.lists(st.sampled_from([1.0, 0.5, -2.0]), min_size=7, max_size=7)
NAMES = ("fr", "fr/legal", "fr/legal/a", "fr/legal/b", "fr/medical", "de", "de/legal")


def family(seed: int = 0, weights: list[float] | None = None) -> lt.AdapterTree:
    """Seven nodes with a module of every layout, and a bias in every second one; and a group."""
    tree = lt.AdapterTree(base="org/model")
    for i, path in enumerate(NAMES):
        adapter = zoo_of(7 * seed + i, rank=1 + i % 2, without="conv" if i == 2 else "")
        if i % 2:
            q = adapter.modules["q_proj"]
            biased = {"q_proj": replace(q, bias=torch.arange(6.0) + i)}
            adapter = replace(adapter, modules=dict(adapter.modules) | biased)
        tree.add(path, adapter=adapter, weight=1.0 if weights is None else weights[i])
    tree.add("misc", group=True)
    return tree


def saved(folder: Path) -> lt.AdapterTree:
    """The seven nodes without biases (PEFT can't write them beside experts), saved and opened."""
    tree = lt.AdapterTree(base="org/model")
    for i, path in enumerate(NAMES):
        tree.add(path, adapter=zoo_of(i, rank=2))
    tree.save(folder)
    return lt.load(folder)


def effective(tree: lt.AdapterTree, path: str) -> dict[str, Tensor]:
    """The sum of a path, node by node, in float64; a bias has a name of its own."""
    found: dict[str, Tensor] = {}
    for node in tree.lineage(path):
        adapter = tree.adapter(node)
        for name, value in adapter.modules.items() if adapter is not None else ():
            scale = value.scale * tree[node].weight
            whole = (value.B.double() @ value.A.double()) * scale
            found[name] = found.get(name, torch.zeros_like(whole)) + whole
            if value.bias is not None:
                key = f"{name}.bias"
                found[key] = found.get(key, torch.zeros(())) + value.bias.double() * scale
    return found


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The Frobenius distance of two effective weights."""
    zero = torch.zeros((), dtype=torch.float64)
    names = {*one, *other}
    squares = [(one.get(n, zero) - other.get(n, zero)).square().sum() for n in names]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def kept(
    before: lt.AdapterTree, after: lt.AdapterTree, moved: dict[str, str], but: tuple[str, ...] = ()
) -> None:
    """Every path of before has its effective weight in after, but for rounding in fp32."""
    for path in before.paths():
        if path not in but:
            was = effective(before, path)
            assert apart(was, effective(after, moved.get(path, path))) <= 1e-5 * (
                1 + apart(was, {})
            ), path


# ---------------------------------------------------------------------- squash
@settings(max_examples=12)
@given(SEEDS, WEIGHTS)
def test_squash_makes_one_node_of_a_lineage(seed: int, weights: list[float]) -> None:
    tree = family(seed, weights)
    before = copy.copy(tree)
    for path, to in (("fr/legal/a", "flat"), ("fr/legal/a", "fr/flat"), ("fr/legal", "de/legal/x")):
        told = lt.squash(tree, path, to=to)
        wanted = effective(before, path)
        assert apart(effective(tree, to), wanted) <= 1e-5 * (1 + apart(wanted, {}))
        assert told.added == (to,)
        assert told.relative_error == 0.0
    kept(before, tree, {})


def test_squash_takes_nodes_of_both_lineages_once() -> None:
    tree = family()
    lt.squash(tree, "fr/legal/a", to="fr/legal/flat")
    flat, own = tree.adapter("fr/legal/flat"), tree.adapter("fr/legal/a")
    assert flat is not None
    assert own is not None
    assert flat.ranks == own.ranks


def test_squash_of_a_blend_and_to_a_rank() -> None:
    tree = family()
    blend = {"fr/legal": 0.5, "fr/medical": 0.5}
    told = lt.squash(tree, blend, to="mix", rank=2, dtype=torch.bfloat16)
    wanted = lt.AdapterTree()
    wanted.add("mix", adapter=tree.flatten(blend))
    error = apart(effective(tree, "mix"), effective(wanted, "mix"))
    assert told.errors["mix"].error == pytest.approx(error, rel=1e-6)
    assert set(tree.adapter("mix").ranks.values()) == {2}
    assert told.relative_error == pytest.approx(
        error / apart(effective(wanted, "mix"), {}), rel=1e-6
    )


def test_squash_refuses_what_it_can_t_do() -> None:
    tree = family()
    refused(tree, lambda: lt.squash(tree, "fr", to="fr"), TreeError, "fr exists already")
    refused(tree, lambda: lt.squash(tree, "fr", to="x/y"), PathError, "no node 'x'")
    refused(
        tree,
        lambda: lt.squash(tree, "fr", to="fr/same"),
        SpecError,
        "adds nothing to the nodes above fr/same",
    )
    refused(tree, lambda: lt.squash(tree, "misc", to="x"), SpecError, "it adds nothing")
    refused(tree, lambda: lt.squash(tree, "fr", to="x", rank=0), SpecError, "at least 1")
    tree.update("fr/medical", adapter=lt.Adapter({"q_proj": draw(0, 2, out=9)}))
    refused(
        tree,
        lambda: lt.squash(tree, "fr/medical", to="x"),
        ShapeMismatch,
        "fr and fr/medical: q_proj",
    )


def refused(
    tree: lt.AdapterTree, call: Callable[[], object], kind: type[LoraTreeError], text: str
) -> None:
    """It raises, and the tree is what it was."""
    before = {path: (tree[path].weight, tree.adapter(path)) for path in tree.paths()}
    with pytest.raises(kind, match=text):
        call()
    assert {path: (tree[path].weight, tree.adapter(path)) for path in tree.paths()} == before


# ---------------------------------------------------------------------- split
@settings(max_examples=12)
@given(SEEDS, WEIGHTS)
def test_split_by_rank_keeps_every_child(seed: int, weights: list[float]) -> None:
    tree = family(seed, weights)
    before = copy.copy(tree)
    told = lt.split(tree, "fr/legal", to="fr/legal/rest", rank=1)
    assert told.moved == {"fr/legal/a": "fr/legal/rest/a", "fr/legal/b": "fr/legal/rest/b"}
    moved = dict(told.moved) | {"fr/legal": "fr/legal/rest"}
    kept(before, tree, moved)
    assert told.relative_error < 1e-6
    stays, rest = (tree.adapter(path) for path in ("fr/legal", "fr/legal/rest"))
    best = before.adapter("fr/legal").truncate(1)
    assert lt.deviation(best, stays).relative_error < 1e-6
    assert set(rest.ranks.values()) == {1}


@settings(max_examples=12)
@given(SEEDS)
def test_split_by_module_keeps_every_child(seed: int) -> None:
    tree = family(seed)
    before = copy.copy(tree)
    told = lt.split(tree, "fr", to="fr/rest", modules=["mlp", "c_*"])
    kept(before, tree, dict(told.moved) | {"fr": "fr/rest"})
    assert set(tree.adapter("fr/rest").modules) == {"block.mlp", "c_attn"}
    assert "block.mlp" not in tree.adapter("fr").modules
    assert told.relative_error == 0.0


def test_split_refuses_what_it_can_t_do() -> None:
    tree = family()
    split = lambda **how: lambda: lt.split(tree, "fr", **({"to": "fr/x"} | how))  # noqa: E731
    refused(tree, split(), SpecError, "one of the two")
    refused(tree, split(rank=1, modules=["q"]), SpecError, "one of the two")
    refused(tree, split(rank=8), SpecError, "nothing would move")
    refused(tree, split(modules=["nope"]), SpecError, "'nope' names no module")
    refused(tree, split(modules=["*"]), SpecError, "all of it would move")
    refused(tree, split(to="de/x", rank=1), PathError, "de/x is no child of fr")
    refused(tree, split(to="fr/legal", rank=1), TreeError, "exists already")
    refused(tree, lambda: lt.split(tree, "misc", to="misc/x", rank=1), TreeError, "misc: a group")


def test_a_node_that_its_weights_switch_off_is_not_squashed_into_an_empty_one() -> None:
    tree = lt.AdapterTree()
    tree.add("fr", adapter=zoo_of(1), weight={"*": 0.0})
    refused(tree, lambda: lt.squash(tree, "fr", to="x"), SpecError, "adds nothing to the nodes")


# ---------------------------------------------------------------------- pick and rebase
def test_pick_copies_increments_and_says_where_they_are_from() -> None:
    tree = family(0, [1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0])
    told = lt.pick(tree, "fr/legal", to="de/fr-legal")
    assert tree.adapter("de/fr-legal") is tree.adapter("fr/legal")
    assert tree["de/fr-legal"].weight == 0.5
    assert told.added == ("de/fr-legal",)
    assert "trained on the ancestors of fr/legal" in told.notes[0]
    assert lt.pick(tree, "fr/legal", to="fr/again").notes == ()
    refused(tree, lambda: lt.pick(tree, "misc", to="de/x"), TreeError, "misc: a group")
    refused(tree, lambda: lt.pick(tree, "fr", to="de"), TreeError, "de exists already")


def test_a_picked_node_is_stale_where_it_was_not_trained(tmp_path: Path) -> None:
    tree = saved(tmp_path / "zoo")
    before = copy.copy(tree)
    lt.pick(tree, "fr/legal", to="de/picked")
    lt.pick(tree, "fr/legal", to="fr/picked")
    foretold = lt.made_stale(before, tree)
    tree.save(tmp_path / "zoo")
    again = opened(tmp_path / "zoo")
    assert [path for path in again.paths() if again[path].stale] == foretold == ["de/picked"]


@pytest.mark.parametrize("below", ["other", "de/other"])
def test_a_tree_hung_below_a_node_is_stale_where_that_has_an_adapter(
    tmp_path: Path, below: str
) -> None:
    tree, other = saved(tmp_path / "zoo"), saved(tmp_path / "other")
    before = copy.copy(tree)
    lt.graft(tree, below, other)
    foretold = lt.made_stale(before, tree)
    tree.save(tmp_path / "zoo")
    again = opened(tmp_path / "zoo")
    assert [path for path in again.paths() if again[path].stale] == foretold
    assert bool(foretold) == (below == "de/other")


@settings(max_examples=12)
@given(SEEDS, WEIGHTS)
def test_rebase_keeps_every_effective_weight(seed: int, weights: list[float]) -> None:
    for to in ("de/legal/moved", "moved", "fr/medical/moved", "misc/moved"):
        tree = family(seed, weights)
        before = copy.copy(tree)
        told = lt.rebase(tree, "fr/legal", to=to)
        kept(before, tree, dict(told.moved))
        assert told.relative_error == 0.0
        assert told.moved["fr/legal/a"] == f"{to}/a"


def test_rebase_between_equal_lineages_moves_and_changes_nothing() -> None:
    tree = family()
    tree.add("fr/g", group=True)
    adapter = tree.adapter("fr/legal")
    told = lt.rebase(tree, "fr/legal", to="fr/g/law")
    assert tree.adapter("fr/g/law") is adapter
    assert told.changed == ()


def test_a_group_that_has_to_make_up_gets_an_adapter() -> None:
    tree = family()
    tree.add("fr/g", group=True)
    tree.add("fr/g/x", adapter=zoo_of(99))
    before = copy.copy(tree)
    told = lt.rebase(tree, "fr/g", to="de/g")
    kept(before, tree, dict(told.moved))
    assert told.changed == ("de/g",)


def test_rebase_to_a_rank_tells_its_error() -> None:
    tree = family()
    before = copy.copy(tree)
    told = lt.rebase(tree, "fr/legal", to="de/legal/moved", rank=2)
    error = apart(effective(before, "fr/legal"), effective(tree, "de/legal/moved"))
    assert told.errors["de/legal/moved"].error == pytest.approx(error, rel=1e-5)
    assert error > 0.1


def test_rebase_refuses_what_it_can_t_do() -> None:
    tree = family(0, [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    tree.add("fr/new", r=4, target_modules=["q_proj"])
    refused(
        tree, lambda: lt.rebase(tree, "fr/legal", to="de/x"), SpecError, "fr/legal: its weight is 0"
    )
    refused(tree, lambda: lt.rebase(tree, "fr/new", to="de/x"), SpecError, "fr/new: a fresh node")
    refused(tree, lambda: lt.rebase(tree, "fr/medical", to="de"), TreeError, "de exists already")
    refused(tree, lambda: lt.rebase(tree, "fr", to="fr/legal/x"), TreeError, "below itself")
    refused(tree, lambda: lt.rebase(tree, "fr", to="nope/x"), PathError, "no node 'nope'")
    assert lt.rebase(tree, "de/legal", to="de/Legal").moved == {"de/legal": "de/Legal"}


@settings(max_examples=12)
@given(SEEDS, WEIGHTS)
def test_a_retrained_parent_leaves_its_children_as_they_were(
    seed: int, weights: list[float]
) -> None:
    tree = family(seed, weights)
    tree.add("fr/g", group=True)
    tree.add("fr/g/x", adapter=zoo_of(99), weight=0.5)
    before = copy.copy(tree)
    old = tree.adapter("fr")
    told = lt.rebase_all(tree, "fr", adapter=zoo_of(seed + 50), weight=3.0)
    kept(before, tree, {}, but=("fr", "fr/g"))
    assert set(told.changed) == {"fr", "fr/legal", "fr/medical", "fr/g/x"}
    again = copy.copy(before)
    again.update("fr", adapter=tree.adapter("fr"), weight=3.0)
    lt.rebase_all(again, "fr", was=old, was_weight=before["fr"].weight)
    kept(before, again, {}, but=("fr", "fr/g"))


def test_rebase_all_wants_a_difference_and_names_fresh_children() -> None:
    tree = family()
    tree.add("fr/new", r=4, target_modules=["q_proj"])
    refused(
        tree, lambda: lt.rebase_all(tree, "fr"), SpecError, "neither its adapter nor its weight"
    )
    told = lt.rebase_all(tree, "fr", weight=2.0, rank=3)
    assert told.notes == ("fr/new: fresh, so it starts from fr as it is now",)
    assert told.relative_error > 0.0
    assert tree["fr"].weight == 2.0


def test_a_model_s_nodes_are_not_changed_below_it() -> None:
    """An attached model that uses a node refuses the change, and the tree is what it was."""
    tree = lt.AdapterTree()
    for i, path in enumerate(("fr", "fr/legal", "fr/medical", "de")):
        tree.add(path, adapter=lt.Adapter({"q": draw(i, 2)}))
    model = lt.attach(tree, torch.nn.Sequential(OrderedDict(q=torch.nn.Linear(8, 6))))
    model.activate("fr/legal")
    used = "active on an attached model"
    refused(tree, lambda: lt.split(tree, "fr", to="fr/x", rank=1), TreeError, used)
    refused(tree, lambda: lt.rebase(tree, "fr", to="de/fr"), TreeError, used)
    refused(tree, lambda: lt.rebase_all(tree, "fr", weight=2.0), TreeError, used)
    refused(tree, lambda: lt.hoist(tree, "fr"), TreeError, used)
    refused(tree, lambda: lt.compress(tree, rank=1), TreeError, used)
    lt.squash(tree, "fr/legal", to="flat")  # it reads the nodes and adds another one
    lt.pick(tree, "fr/legal", to="de/legal")
    model.deactivate()
    lt.compress(tree, rank=1)


# ---------------------------------------------------------------------- staleness
def test_what_keeps_its_effective_weight_is_not_stale(tmp_path: Path) -> None:
    """A plain move makes a node stale, and one that keeps the effective weight does not."""
    for verb, stale in (
        (lambda tree: tree.move("fr/legal", "de/moved"), {"de/moved", "de/moved/a", "de/moved/b"}),
        (lambda tree: lt.rebase(tree, "fr/legal", to="de/moved"), set()),
        (lambda tree: lt.split(tree, "fr", to="fr/rest", rank=1), set()),
        (lambda tree: lt.hoist(tree, "fr"), set()),
        (lambda tree: lt.hoist(tree, "fr", into="fr/law"), set()),
        (lambda tree: lt.rebase_all(tree, "fr", adapter=zoo_of(50)), set()),
    ):
        folder = tmp_path / f"zoo{len(list(tmp_path.iterdir()))}"
        tree = saved(folder)
        verb(tree)
        tree.save(folder)
        again = opened(folder)
        assert {path for path in again.paths() if again[path].stale} == stale


def test_a_stale_node_stays_stale_below_what_moved(tmp_path: Path) -> None:
    tree = saved(tmp_path / "zoo")
    tree.update("fr/legal", weight=0.5)
    tree.save(tmp_path / "zoo")
    tree = opened(tmp_path / "zoo")
    assert tree["fr/legal/a"].stale
    lt.rebase(tree, "fr/legal", to="de/moved")
    tree.save(tmp_path / "zoo")
    again = opened(tmp_path / "zoo")
    assert {path for path in again.paths() if again[path].stale} == {"de/moved/a", "de/moved/b"}


# ---------------------------------------------------------------------- hoist
@settings(max_examples=12)
@given(SEEDS, WEIGHTS)
def test_hoist_keeps_every_effective_weight(seed: int, weights: list[float]) -> None:
    for how in (
        {},
        {"rank": 1},
        {"method": "ties", "density": 0.5},
        {"method": "dare_ties", "density": 0.5, "space": "knots"},
    ):
        tree = family(seed, weights)
        before = copy.copy(tree)
        told = lt.hoist(tree, "fr", **how)
        kept(before, tree, {}, but=("fr",))
        assert told.relative_error < 1e-5
        assert told.changed == ("fr", "fr/legal", "fr/medical")
        between = copy.copy(before)
        told = lt.hoist(between, "fr", ["fr/legal", "fr/medical"], into="fr/law", **how)
        kept(before, between, dict(told.moved))
        assert told.added == ("fr/law",)
        assert told.moved["fr/legal/a"] == "fr/law/legal/a"


def test_what_is_hoisted_at_full_rank_is_the_mean() -> None:
    tree = family()
    lt.hoist(tree, "fr", into="fr/law")
    mean = family().flatten({"fr/legal": 0.5, "fr/medical": 0.5})
    wanted = lt.AdapterTree()
    wanted.add("x", adapter=mean)
    shared = effective(tree, "fr/law")
    assert apart(shared, effective(wanted, "x")) < 1e-4


def siblings(ranks: tuple[int, int], size: int, count: int = 4) -> lt.AdapterTree:
    """Children that share an increment of a rank, with a rest of another one."""
    tree = lt.AdapterTree()
    tree.add("fr", group=True)
    common = draw(1, ranks[0], out=size, into=size + 2)
    for i in range(count):
        rest = draw(10 + i, ranks[1], out=size, into=size + 2)
        tree.add(f"fr/n{i}", adapter=lt.Adapter({"q": lt.concat([common, rest.scaled(0.5)])}))
    return tree


@pytest.mark.parametrize(
    ("size", "count", "most"),
    [(12, 4, 0.02), (90, 20, 1e-5)],  # the larger one has cores that are too large for an SVD
)
def test_a_shared_part_is_found_again(size: int, count: int, most: float) -> None:
    """Children that share rank 3 and have rests of rank 2: fitting in turn finds both."""
    tree = siblings((3, 2), size, count)
    before = copy.copy(tree)
    told = lt.hoist(tree, "fr", rank=3, leaf_rank=2)
    assert told.relative_error < most
    assert set(tree.adapter("fr/n0").ranks.values()) == {2}
    assert set(tree.adapter("fr").ranks.values()) == {3}
    for path in before.leaves():
        error = apart(effective(before, path), effective(tree, path))
        assert told.errors[path].error == pytest.approx(error, rel=1e-4, abs=1e-5)


def test_a_leaf_that_has_nothing_of_its_own_left_stays_a_node(tmp_path: Path) -> None:
    tree = lt.AdapterTree()
    tree.add("fr", group=True)
    for name in ("a", "b"):
        tree.add(f"fr/{name}", adapter=zoo_of(1))
    lt.hoist(tree, "fr")
    assert len(tree.adapter("fr/a")) == 1
    tree.save(tmp_path / "zoo")
    again = lt.load(tmp_path / "zoo")
    assert lt.deviation(zoo_of(1), again.flatten("fr/a")).relative_error < 1e-6


def test_hoist_refuses_what_it_can_t_do() -> None:
    tree = family()
    refused(tree, lambda: lt.hoist(tree, ""), TreeError, "the root is the bare base")
    refused(tree, lambda: lt.hoist(tree, "fr", ["fr/legal"]), SpecError, "at least two siblings")
    refused(
        tree, lambda: lt.hoist(tree, "fr", ["fr/legal", "de"]), PathError, "de: not children of fr"
    )
    refused(tree, lambda: lt.hoist(tree, "fr", into="de/x"), PathError, "de/x is no child of fr")
    refused(tree, lambda: lt.hoist(tree, "fr", into="fr/legal"), TreeError, "exists already")
    refused(tree, lambda: lt.hoist(tree, "fr", leaf_rank=1, method="ties"), SpecError, "leaf_rank")
    refused(tree, lambda: lt.hoist(tree, "fr", method="tise"), SpecError, "did you mean 'ties'")
    refused(tree, lambda: lt.hoist(tree, "", into="x"), TreeError, "misc: a group")
    tree.add("fr/g", group=True)
    refused(tree, lambda: lt.hoist(tree, "fr"), TreeError, "fr/g: a group")
    refused(
        tree,
        lambda: lt.hoist(tree, "fr", ["fr/legal", "fr/medical"]),
        TreeError,
        "fr/g: also below fr",
    )
    tree.update("fr/legal", weight=0.0)
    refused(
        tree,
        lambda: lt.hoist(tree, "fr", ["fr/legal", "fr/medical"], into="fr/x"),
        SpecError,
        "fr/legal: its weight is 0",
    )
    tree.update("fr", weight=0.0)
    refused(
        tree, lambda: lt.hoist(tree, "fr", ["fr/legal", "fr/medical"]), SpecError, "weight is 0"
    )


# ---------------------------------------------------------------------- compress
def spectra(tree: lt.AdapterTree) -> dict[tuple[str, str], Tensor]:
    found = {}
    for path in tree.paths():
        adapter = tree.adapter(path)
        for name, value in adapter.modules.items() if adapter is not None else ():
            whole = value.B.double() @ value.A.double() * value.scale
            found[path, name] = (
                torch.linalg.svdvals(whole).square().reshape(-1, min(value.shape[-2:])).sum(0)
            )
    return found


@settings(max_examples=12)
@given(SEEDS, WEIGHTS)
def test_a_byte_budget_is_spent_where_it_lowers_the_error_most(
    seed: int, weights: list[float]
) -> None:
    """No choice of ranks of the same bytes has a lower error: all of them are tried."""
    tree = lt.AdapterTree()
    for i, path in enumerate(("a", "a/x", "b")):
        modules = {n: draw(9 * seed + 3 * i + j, 2, out=4, into=4) for j, n in enumerate("qv")}
        tree.add(path, adapter=lt.Adapter(modules), weight=weights[i])
    before = copy.copy(tree)
    unit = 4 * 8  # every module has the same size, so that the knapsack is solved by sorting
    found = lt.compress(tree, budget_bytes=7 * unit)
    assert found.bytes_after == 7 * unit
    shares = {path: weights[i] ** 2 for i, path in enumerate(("a", "a/x", "b"))}
    lost = {}
    for place, squares in spectra(before).items():
        lost[place] = [float(squares[k:].sum()) * shares[place[0]] for k in range(3)]
    best = min(
        sum(lost[place][k] for place, k in zip(lost, ranks, strict=True))
        for ranks in itertools.product(range(3), repeat=6)
        if sum(ranks) == 7 and all(sum(ranks[i : i + 2]) for i in (0, 2, 4))
    )
    assert found.error**2 <= best * (1 + 1e-6) + 1e-9


@settings(max_examples=12)
@given(SEEDS)
def test_compress_tells_the_error_that_it_makes(seed: int) -> None:
    tree = family(seed)
    before = copy.copy(tree)
    found = lt.compress(tree, ["de/*", "fr/legal/*"], max_error=0.4)
    assert found.relative_error <= 0.4
    squares = 0.0
    for path in ("de/legal", "fr/legal/a", "fr/legal/b"):
        alone = [lt.AdapterTree(), lt.AdapterTree()]
        for one, source in zip(alone, (before, tree), strict=True):
            one.add("x", adapter=source.adapter(path))
        error = apart(effective(alone[0], "x"), effective(alone[1], "x"))
        squares += error**2
        if path in found.edited.errors:
            assert found.edited.errors[path].error == pytest.approx(error, rel=1e-5)
    assert found.error == pytest.approx(squares**0.5, rel=1e-4)
    assert found.bytes_after < found.bytes_before
    assert tree.adapter("fr") is before.adapter("fr")


def test_a_parent_counts_once_for_every_leaf_and_by_its_weight() -> None:
    """One rank more than the least: it goes where the squared error times its share is largest."""
    for weight, best in ((0.1, "a"), (2.0, "a/y")):
        tree = lt.AdapterTree()
        leaf = lt.Adapter({"q": draw(1, 2)})
        tree.add("a", adapter=leaf.scaled(0.8))  # 0.64 of the leaf's, and two leaves: 1.28
        tree.add("a/x", adapter=leaf)
        tree.add("a/y", adapter=leaf, weight=weight)
        found = lt.compress(tree, budget_bytes=4 * 14 * 4)
        ranks = {path: each["q"] for path, each in found.ranks.items()}
        assert ranks == {"a": 1, "a/x": 1, "a/y": 1} | {best: 2}


def test_a_bias_stays_though_its_module_is_worth_little() -> None:
    small = replace(draw(2, 2, scale=1e-3), bias=torch.ones(6))
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"q": draw(1, 2), "v": small}))
    found = lt.compress(tree, max_error=0.5)
    assert "v" in found.ranks["a"]
    kept_bias = tree.adapter("a").modules["v"]
    assert torch.allclose(kept_bias.bias * kept_bias.scale, torch.full((6,), 1e-3))


def test_compress_to_a_rank_and_a_dtype() -> None:
    tree = family()
    found = lt.compress(tree, rank=1, dtype=torch.bfloat16)
    assert all(rank == 1 for ranks in found.ranks.values() for rank in ranks.values())
    assert all(tree.adapter(path).modules["q_proj"].dtype == torch.bfloat16 for path in NAMES)
    assert tree.adapter("fr/legal").modules["q_proj"].bias is not None
    again = lt.compress(tree, rank=1)
    assert again.edited.changed == ()
    assert again.error == pytest.approx(0.0, abs=1e-9)


def test_an_error_of_zero_cuts_only_what_holds_nothing() -> None:
    x = draw(1, 2)
    padded = x.padded(5)
    tree = lt.AdapterTree()
    tree.add("a", adapter=lt.Adapter({"q": padded}))
    found = lt.compress(tree, max_error=1e-7)
    assert found.ranks == {"a": {"q": 2}}
    assert lt.deviation(lt.Adapter({"q": x}), tree.adapter("a")).relative_error < 1e-6


@settings(max_examples=12)
@given(SEEDS)
def test_inputs_decide_what_a_cut_costs(seed: int) -> None:
    """The best cut under rows of inputs, against the SVD of the dense ΔW C^½: the least error."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(40, 8, generator=g).double() * torch.tensor([5.0, 3, 1, 1, 1, 0.1, 0.1, 0.1])
    value = draw(seed, 4)
    whole = value.B.double() @ value.A.double() * value.scale
    for moment, C in (
        (X, X.mT @ X / 40),
        (X.mT @ X / 40, X.mT @ X / 40),
        (X.square().mean(0), torch.diag(X.square().mean(0))),
    ):
        tree = lt.AdapterTree()
        tree.add("a", adapter=lt.Adapter({"q": value}))
        found = lt.compress(tree, rank=2, moments={"q": moment})
        after = tree.adapter("a").modules["q"]
        gap = after.dense(dtype=torch.float64) - whole
        error = float(torch.trace(gap @ C @ gap.mT).sqrt())
        root = torch.linalg.cholesky(C)
        least = float(torch.linalg.svdvals(whole @ root)[2:].square().sum().sqrt())
        assert error == pytest.approx(least, rel=1e-4)
        assert found.error == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighed", [False, True])
def test_rounded_factors_count_in_the_error_of_compress(
    dtype: torch.dtype | None, own: torch.dtype, weighed: bool
) -> None:
    tree = lt.AdapterTree()
    for seed, path in enumerate(("a", "a/b", "a/c")):
        # The second rank is small, so that cutting it costs less than rounding the first one.
        value = draw(seed, 2)
        value = replace(value, A=value.A * torch.tensor([[1.0], [1e-4]])).to(dtype=own)
        bias = torch.ones(6, dtype=own)
        tree.add(path, adapter=lt.Adapter({"q": replace(value, bias=bias)}), weight=0.5)
    C = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64)) if weighed else torch.eye(8)
    before = {path: tree.adapter(path).modules["q"] for path in tree.paths()}
    moments = {"q": C.diagonal()} if weighed else None
    found = lt.compress(tree, rank=1, dtype=dtype, moments=moments)
    lost = whole = 0.0
    for path, value in before.items():
        counts = 0.5**2 * (2 if path == "a" else 1)  # two leaves inherit the error of "a"
        old, new = (oracle.dense(v) for v in (value, tree.adapter(path).modules["q"]))
        lost += counts * float(torch.trace((old - new) @ C.double() @ (old - new).mT))
        whole += counts * float(torch.trace(old @ C.double() @ old.mT))
    assert found.error == pytest.approx(math.sqrt(lost), rel=1e-6)
    assert found.relative_error == pytest.approx(math.sqrt(lost / whole), rel=1e-6)


def test_compress_refuses_what_it_can_t_do() -> None:
    tree = family()
    compress = lambda **how: lambda: lt.compress(tree, **how)  # noqa: E731
    refused(tree, compress(), SpecError, "one of the three")
    refused(tree, compress(rank=1, max_error=0.1), SpecError, "one of the three")
    refused(tree, compress(max_error=1.0), SpecError, "0 ≤ max_error < 1")
    refused(tree, compress(budget_bytes=10), BudgetError, "the budget is 10")
    refused(tree, compress(paths=["misc"], rank=1), SpecError, "no node with an adapter")
    refused(
        tree,
        compress(rank=1, moments={"q_proj": torch.ones(3)}),
        ShapeMismatch,
        r"q_proj: moments: got \(3,\)",
    )


# ---------------------------------------------------------------------- gauge and order
@settings(max_examples=12)
@given(SEEDS)
def test_neither_gauge_nor_order_matters(seed: int) -> None:
    """The same values with other factors, added in another order, give the same weights."""

    def twin() -> lt.AdapterTree:
        tree = lt.AdapterTree(base="org/model")
        for path in ("fr", "fr/medical", "fr/legal"):
            adapter = zoo_of(NAMES.index(path) + seed, rank=2)
            tree.add(path, adapter=gauged(adapter, seed))
        return tree

    def plain() -> lt.AdapterTree:
        tree = lt.AdapterTree(base="org/model")
        for path in ("fr", "fr/legal", "fr/medical"):
            tree.add(path, adapter=zoo_of(NAMES.index(path) + seed, rank=2))
        return tree

    verbs: list[Callable[[lt.AdapterTree], object]] = [
        lambda t: lt.squash(t, "fr/legal", to="x", rank=2),
        lambda t: lt.split(t, "fr", to="fr/x", rank=1),
        lambda t: lt.rebase(t, "fr/legal", to="x", rank=2),
        lambda t: lt.hoist(t, "fr", rank=1, leaf_rank=1),
        lambda t: lt.hoist(t, "fr", method="ties", density=0.5),
        lambda t: lt.compress(t, max_error=0.3),
        lambda t: lt.merge_paths(
            t, ["fr/legal", "fr/medical"], to="fr/m", density=0.7, space="knots"
        ),
    ]
    for verb in verbs:
        one, other = plain(), twin()
        verb(one)
        verb(other)
        assert one.paths() == other.paths()
        for path in one.paths():
            was = effective(one, path)
            assert apart(was, effective(other, path)) <= 2e-3 * (1 + apart(was, {})), path
