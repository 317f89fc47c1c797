"""Growing a tree of flat adapters, and absorbing one: against dense float64 sums."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from dense import dense, draw, gauged, zoo_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lora_tree as lt
from lora_tree.algebra.clusters import Join, average_linkage
from lora_tree.algebra.families import families_of
from lora_tree.algebra.shared_fit import Pair, SharedProblem
from lora_tree.algebra.stack import stack_of
from lora_tree.errors import BudgetError, PathError, ShapeMismatch, SpecError, TreeError

SEEDS = st.integers(0, 2**16)


def family(
    seed: int = 0, *, groups: int = 2, members: int = 3, noise: float = 0.0
) -> lt.AdapterTree:
    """Flat adapters that share a part of rank 3 with all, and one of rank 2 with their group."""
    tree = lt.AdapterTree(base="org/model")
    for group in range(groups):
        for member in range(members):
            one = 1000 * seed + 100 * group + member
            modules: dict[str, lt.LowRank] = {}
            for i, name in enumerate(("q_proj", "v_proj")):
                parts = [
                    draw(1000 * seed + 900 + i, 3, out=48, into=64, scale=1.0),
                    draw(1000 * seed + 100 * group + 50 + i, 2, out=48, into=64, scale=0.8),
                    draw(7 * one + i, 1, out=48, into=64, scale=0.6),
                ]
                if noise:
                    parts.append(draw(7 * one + i + 3, 4, out=48, into=64, scale=noise))
                modules[name] = lt.concat(parts)
            tree.add(
                f"{('fr', 'de')[group]}-{member}", adapter=lt.Adapter(modules, base="org/model")
            )
    return tree


def effective(tree: lt.AdapterTree, path: str) -> dict[str, Tensor]:
    """The sum of a path, node by node, in float64."""
    found: dict[str, Tensor] = {}
    for node in tree.lineage(path):
        adapter = tree.adapter(node)
        for name, value in adapter.modules.items() if adapter is not None else ():
            found[name] = found.get(name, torch.zeros(())) + dense(value) * tree[node].weight
    return found


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    zero = torch.zeros((), dtype=torch.float64)
    squares = [(one.get(n, zero) - other.get(n, zero)).square().sum() for n in {*one, *other}]
    return float(torch.stack(squares).sum().sqrt())


# ---------------------------------------------------------------------- grow
def test_grow_finds_what_all_and_what_groups_share() -> None:
    tree = family()
    before = copy.copy(tree)
    grown = lt.grow(tree, max_error=1e-4)
    # Rank 6 of each adapter is 3 of all, 2 of its group and 1 of its own.
    assert {path: tree.adapter(path).ranks["q_proj"] for path in tree.paths()} == {
        "shared": 3,
        "shared/fr": 2,
        "shared/de": 2,
        **{f"shared/{g}/{g}-{i}": 1 for g in ("fr", "de") for i in range(3)},
    }
    assert grown.edited.added == ("shared", "shared/de", "shared/fr")
    assert grown.bytes_before == 6 * 2 * 6 * 112 * 4
    assert grown.bytes_after == (3 + 2 * 2 + 6 * 1) * 2 * 112 * 4
    for old, new in grown.edited.moved.items():
        wanted = effective(before, old)
        assert apart(wanted, effective(tree, new)) <= 1e-4 * apart(wanted, {})


@settings(max_examples=6)
@given(SEEDS, st.sampled_from([0.05, 0.2, 0.5]))
def test_the_certificate_is_the_dense_error(seed: int, most: float) -> None:
    tree = family(seed, noise=0.3)
    before = copy.copy(tree)
    grown = lt.grow(tree, max_error=most)
    relative = []
    for old in before.paths():
        new = grown.edited.moved.get(old, old)
        wanted = effective(before, old)
        error = apart(wanted, effective(tree, new))
        told = grown.edited.errors[new]
        assert told.error == pytest.approx(error, rel=1e-4, abs=1e-5)
        assert told.norm == pytest.approx(apart(wanted, {}), rel=1e-6)
        relative.append(error / apart(wanted, {}))
    assert grown.relative_error == pytest.approx(math.hypot(*relative) / 6**0.5, rel=1e-4)
    assert grown.relative_error <= most
    total = sum(adapter.nbytes for p in tree.paths() if (adapter := tree.adapter(p)) is not None)
    assert grown.bytes_after == total < grown.bytes_before


def test_at_equal_bytes_the_error_is_less_than_that_of_flat_adapters() -> None:
    tree = family(3, noise=0.2)
    flat = copy.copy(tree)
    grown = lt.grow(tree, budget_bytes=22_000)
    assert 0.8 * 22_000 < grown.bytes_after <= 22_000
    assert grown.relative_error < 0.6 * lt.compress(flat, budget_bytes=22_000).relative_error


def test_neither_the_gauge_nor_the_order_matters() -> None:
    one, other = family(5, noise=0.2), lt.AdapterTree(base="org/model")
    for i, path in enumerate(reversed(one.paths())):
        adapter = one.adapter(path)
        assert adapter is not None
        # Back to fp32, or the bytes would be those of float64.
        other.add(path, adapter=gauged(adapter, i).to(dtype=torch.float32))
    first, second = (lt.grow(tree, max_error=0.2) for tree in (one, other))
    assert first.edited.moved == second.edited.moved
    assert first.bytes_after == second.bytes_after
    assert first.relative_error == pytest.approx(second.relative_error, rel=1e-3)


def test_the_objective_falls_and_every_part_is_the_best_for_the_others() -> None:
    tree = family(7, noise=0.3)
    values = [tree.adapter(path).modules["q_proj"] for path in tree.paths()]
    joins = average_linkage(1.0 - lt.similar(tree).cosines)
    families = families_of(joins, 6, 2)
    values = [values[i] for i in families.order]
    stack, weights = stack_of(values), torch.rand(6).double() + 0.5
    got = SharedProblem(stack, families, weights, "q_proj").fit(0.5)

    def part(pair: Pair) -> Tensor:
        return dense(stack.value(*pair))

    wholes = [dense(value) for value in values]
    for leaf, home in enumerate(families.homes):
        above = sum(part(got.shared[n]) for n in families.lineage(home))
        rest = wholes[leaf] - above
        S = torch.linalg.svdvals(rest)
        keep = int((weights[leaf] * S.square() > 0.5).sum())
        assert got.leaves[leaf][0].shape[-1] == keep
        lost = (rest - part(got.leaves[leaf])).square().sum()
        assert float(lost) == pytest.approx(float(S[keep:].square().sum()), rel=1e-6, abs=1e-9)
        assert float(got.squares[leaf]) == pytest.approx(float(lost), rel=1e-6, abs=1e-9)
    for shared, (first, last) in enumerate(families.spans):
        # What the node is the best part of: the mean of what all others leave over.
        mean = torch.zeros_like(wholes[0])
        for leaf in range(first, last):
            others = [n for n in families.lineage(families.homes[leaf]) if n != shared]
            rest = wholes[leaf] - part(got.leaves[leaf])
            mean += weights[leaf] * (rest - sum(part(got.shared[n]) for n in others))
        mean /= weights[first:last].sum()
        S = torch.linalg.svdvals(mean)
        gains = weights[first:last].sum() * S.square()
        # One more round would change the ranks only of what lies at the price itself.
        assert abs(int((gains > 0.5).sum()) - got.shared[shared][0].shape[-1]) <= 1


def test_by_norm_the_error_of_all_counts_and_not_that_of_each() -> None:
    tree = family(3, noise=0.2)
    tree.update("fr-0", weight=0.05)
    before, alike = copy.copy(tree), copy.copy(tree)
    told = {}
    for name, each in (("norm", tree), ("alike", alike)):
        grown = lt.grow(each, budget_bytes=20_000, by_norm=name == "norm")
        lost, whole = [], []
        for old, new in grown.edited.moved.items():
            wanted = effective(before, old)
            lost.append(apart(wanted, effective(each, new)))
            whole.append(apart(wanted, {}))
        told[name] = math.hypot(*lost) / math.hypot(*whole)
        if name == "norm":
            assert grown.relative_error == pytest.approx(told[name], rel=1e-4)
    assert told["norm"] < told["alike"]


def weighted(difference: dict[str, Tensor], moments: dict[str, Tensor]) -> float:
    squares = [((d @ moments[n]) * d).sum() for n, d in difference.items()]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("members", [3, 12])  # fewer ranks than the weight has columns, and more
def test_moments_weigh_the_error_by_what_it_does_to_outputs(members: int) -> None:
    draws = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, 64, dtype=torch.float64)
    rows = torch.randn(400, 64, generator=draws, dtype=torch.float64) * scales
    full = dict.fromkeys(("q_proj", "v_proj"), rows.T @ rows / 400)
    found = {}
    for name, moments in (
        ("plain", None),
        ("full", full),
        ("rows", dict.fromkeys(full, rows)),
        ("diagonal", {n: C.diagonal() for n, C in full.items()}),
    ):
        tree = family(3, members=members, noise=0.2)
        before = copy.copy(tree)
        grown = lt.grow(tree, budget_bytes=2_500 * members, by_norm=True, moments=moments)
        lost, whole = [], []
        for old in before.paths():
            wanted = effective(before, old)
            got = effective(tree, grown.edited.moved.get(old, old))
            zero = torch.zeros((), dtype=torch.float64)
            lost.append(weighted({n: wanted[n] - got.get(n, zero) for n in wanted}, full))
            whole.append(weighted(wanted, full))
        found[name] = math.hypot(*lost) / math.hypot(*whole)
        if name in ("full", "rows"):
            assert grown.relative_error == pytest.approx(found[name], rel=1e-3)
    assert found["full"] < 0.96 * found["plain"]
    assert found["rows"] == pytest.approx(found["full"], rel=1e-3)
    assert found["full"] <= found["diagonal"] < found["plain"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rounded_factors_are_a_part_of_the_error_under_moments(dtype: torch.dtype) -> None:
    tree = family(3)
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows *= torch.logspace(0, -1, 64, dtype=torch.float64)
    C = rows.T @ rows / 200
    before = copy.copy(tree)
    grown = lt.grow(tree, max_error=1e-3, dtype=dtype, by_norm=True, moments={"q_proj": C})
    both = {"q_proj": C, "v_proj": torch.eye(64, dtype=torch.float64)}
    lost, whole = [], []
    for old in before.paths():
        wanted = effective(before, old)
        got = effective(tree, grown.edited.moved.get(old, old))
        lost.append(weighted({name: wanted[name] - got[name] for name in wanted}, both))
        whole.append(weighted(wanted, both))
    error = math.hypot(*lost) / math.hypot(*whole)
    assert grown.relative_error == pytest.approx(error, rel=1e-4)


def test_moments_of_another_size_and_infinite_ones_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"q_proj: moments: got \(3,\)"):
        lt.grow(family(), max_error=0.1, moments={"q_proj": torch.ones(3)})
    for moment, says in (
        (torch.full((64,), math.nan), "not finite"),
        (torch.eye(64) - 0.5, "negative eigenvalues"),
    ):
        with pytest.raises(SpecError, match=rf"v_proj: moments: .*{says}"):
            lt.grow(family(), max_error=0.1, moments={"v_proj": moment})


def test_biases_batches_and_layouts_go_through() -> None:
    tree = lt.AdapterTree(base="org/model")
    for i in range(4):
        adapter = zoo_of(i)
        q = replace(adapter.modules["q_proj"], bias=torch.arange(6.0) + i)
        tree.add(f"n{i}", adapter=replace(adapter, modules={**adapter.modules, "q_proj": q}))
    tree.update("n1", weight=-2.0)
    before = copy.copy(tree)
    grown = lt.grow(tree, max_error=1e-5)
    assert grown.relative_error < 1e-5
    for old in before.paths():
        new = grown.edited.moved.get(old, old)
        wanted = effective(before, old)
        assert apart(wanted, effective(tree, new)) <= 2e-5 * apart(wanted, {})
        assert tree[new].weight == 1.0


def test_a_weight_per_module_and_a_head_of_its_own_stay() -> None:
    tree = family(13)
    head = lt.Override(torch.ones(3, 64))
    first = tree.adapter("fr-0")
    assert first is not None
    tree.update("fr-0", adapter=replace(first, overrides={"score.weight": head}))
    tree.update("fr-1", weight={"default": 1.0, "v_proj": 0.5})
    wanted = {path: tree.flatten(path) for path in tree.paths()}
    grown = lt.grow(tree, max_error=1e-4)
    for old, new in grown.edited.moved.items():
        whole = {name: dense(value) for name, value in wanted[old].modules.items()}
        assert apart(whole, effective(tree, new)) <= 2e-4 * apart(whole, {})
    assert tree.adapter(grown.edited.moved["fr-0"]).overrides["score.weight"] is head


def test_a_named_adapter_that_replaces_a_tensor_of_a_shared_part_is_refused() -> None:
    tree = family()
    first = tree.adapter("fr-0")
    assert first is not None
    head = lt.Override(torch.ones(48, 64))
    tree.update("fr-0", adapter=replace(first, overrides={"q_proj.weight": head}))
    with pytest.raises(SpecError, match=r"fr-0: replaces q_proj\.weight"):
        lt.grow(tree, tree.paths(), max_error=0.1)


def test_adapters_with_nothing_in_common_get_no_parent() -> None:
    tree = lt.AdapterTree()
    for i in range(3):
        A = torch.zeros(1, 9)
        A[0, i] = 1.0
        tree.add(f"n{i}", adapter=lt.Adapter({"q": lt.LowRank(A, torch.eye(9)[:, i : i + 1])}))
    grown = lt.grow(tree, max_error=1e-3)
    assert (grown.edited.added, grown.edited.moved) == ((), {})
    assert tree.paths() == ["n0", "n1", "n2"]


def test_with_few_working_bytes_files_are_read_again_and_the_bound_is_kept() -> None:
    whole, parts = family(9, noise=0.2), family(9, noise=0.2)
    told: list[tuple[int, int]] = []
    one = lt.grow(whole, max_error=0.2)
    other = lt.grow(
        parts, max_error=0.2, working_bytes=1, progress=lambda d, n: told.append((d, n))
    )
    # Other prices are tried, several for each time that the files are read.
    assert other.edited.moved == one.edited.moved
    assert 0.9 * 0.2 < other.relative_error <= 0.2
    assert other.bytes_after == pytest.approx(one.bytes_after, rel=0.05)
    assert told[:2] == [(1, 2), (2, 2)]


def test_narrow_factors_are_read_exactly_whatever_their_scale() -> None:
    tree = lt.AdapterTree()
    for seed in range(3):
        value = draw(seed, 2, out=48, into=64)
        B = value.B.to(torch.bfloat16)
        narrow = lt.LowRank(value.A.to(torch.bfloat16), B, scale=0.3)
        tree.add(f"n{seed}", adapter=lt.Adapter({"q": narrow}))
    assert lt.grow(tree, max_error=1e-6, dtype=torch.float64).relative_error < 1e-6


def test_rounded_factors_are_a_part_of_the_error() -> None:
    tree = family(11)
    grown = lt.grow(tree, max_error=1e-6, dtype=torch.bfloat16)
    assert tree.adapter("shared").modules["q_proj"].dtype == torch.bfloat16
    assert 1e-4 < grown.relative_error < 1e-2


@pytest.mark.parametrize(
    ("change", "given", "error", "says"),
    [
        ("", {}, SpecError, "one of the two"),
        ("", {"max_error": 0.1, "budget_bytes": 9}, SpecError, "one of the two"),
        ("", {"max_error": 1.0}, SpecError, "0 ≤ max_error < 1"),
        ("", {"max_error": 0.1, "depth": 0}, SpecError, "depth"),
        ("", {"budget_bytes": 100}, BudgetError, "bytes"),
        ("", {"max_error": 0.1, "paths": ["fr-0"]}, SpecError, "two flat adapters"),
        ("", {"max_error": 0.1, "paths": ["zz"]}, PathError, "zz"),
        ("child", {"max_error": 0.1, "paths": ["fr-0", "fr-1"]}, TreeError, "fr-0: has children"),
        ("child", {"max_error": 0.1, "paths": ["fr-0/x", "fr-1"]}, PathError, "fr-0/x"),
        ("group", {"max_error": 0.1, "paths": ["g", "fr-1"]}, TreeError, "g: a group"),
        ("shape", {"max_error": 0.1}, ShapeMismatch, "q_proj"),
    ],
)
def test_what_can_not_grow_is_refused_and_changes_nothing(
    change: str, given: dict[str, object], error: type[Exception], says: str
) -> None:
    tree = family()
    if change == "child":
        tree.add("fr-0/x", adapter=zoo_of(1))
    if change == "group":
        tree.add("g", group=True)
    if change == "shape":
        tree.add("odd", adapter=lt.Adapter({"q_proj": draw(1, 2, out=9, into=9)}))
    before = [(path, tree.adapter(path)) for path in tree.paths()]
    with pytest.raises(error, match=says):
        lt.grow(tree, **given)
    assert [(path, tree.adapter(path)) for path in tree.paths()] == before


def test_names_of_shared_nodes_say_what_their_leaves_share() -> None:
    def label(names: Sequence[str]) -> str:
        tree = lt.AdapterTree()
        for i, name in enumerate(names):
            modules = {"q": lt.concat([draw(1, 2), draw(10 + i, 1, scale=0.1)])}
            tree.add(name, adapter=lt.Adapter(modules))
        return lt.grow(tree, max_error=1e-3).edited.added[0]

    assert label(["fr-legal", "fr-loans"]) == "fr"
    assert label(["customer07", "customer12"]) == "customer"
    assert label(["legal", "medical"]) == "shared"
    assert label(["fr", "fr-legal"]) == "fr-2"


def test_levels_that_are_too_many_are_left_out_from_below() -> None:
    joins = [Join(0, 1, 0.1, 2), Join(2, 4, 0.3, 3), Join(3, 5, 0.9, 4)]
    assert families_of(joins, 4, 3).above == (-1, 0, 1)
    assert families_of(joins, 4, 2).spans == ((0, 4), (0, 3))
    assert families_of(joins, 4, 1).homes == (0, 0, 0, 0)


# ---------------------------------------------------------------------- absorb
def grown_family() -> lt.AdapterTree:
    tree = family()
    lt.grow(tree, max_error=1e-4)
    return tree


@pytest.mark.parametrize("group", ["fr", "de"])
def test_a_new_adapter_is_absorbed_by_its_group(group: str) -> None:
    tree = grown_family()
    near = effective(tree, f"shared/{group}")
    own = draw(77, 1, out=48, into=64, scale=0.6)
    shared = tree.flatten(f"shared/{group}")
    new = shared.map(lambda value: lt.concat([value, own]))
    told = lt.absorb(tree, "new", new, rank=1)
    assert told.parent == f"shared/{group}"
    assert told.edited.added == (f"shared/{group}/new",)
    assert tree.adapter(f"shared/{group}/new").ranks == {"q_proj": 1, "v_proj": 1}
    wanted = {name: near[name] + dense(own) for name in near}
    assert apart(wanted, effective(tree, f"shared/{group}/new")) < 1e-4 * apart(wanted, {})


def test_what_is_left_below_each_node_is_the_dense_distance() -> None:
    tree = grown_family()
    tree.update("shared/fr", weight=0.5)
    new = lt.Adapter({"q_proj": draw(5, 3, out=48, into=64)})
    told = lt.absorb(tree, "new", new, max_error=0.3)
    wanted = {"q_proj": dense(new.modules["q_proj"])}
    for path, left in told.left.items():
        got = effective(tree, path) if path else {}
        assert left == pytest.approx(apart(wanted, got) / apart(wanted, {}), rel=1e-6)
    assert list(told.left.values()) == sorted(told.left.values())
    path = told.edited.added[0]
    error = apart(wanted, effective(tree, path))
    assert told.edited.errors[path].error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"name": "a/b"}, PathError, "a/b"),
        ({"under": "nowhere"}, PathError, "nowhere"),
        ({"name": "fr-0", "under": "shared/fr"}, TreeError, "exists already"),
        ({"scale": 0.0}, SpecError, "adds nothing"),
        ({"out": 9}, ShapeMismatch, "q_proj"),
        ({"rank": 0}, SpecError, "rank"),
    ],
)
def test_what_can_not_be_absorbed_is_refused(
    given: dict[str, object], error: type[Exception], says: str
) -> None:
    tree = grown_family()
    count = len(tree)
    name, out, scale = (given.pop(k, v) for k, v in (("name", "n"), ("out", 48), ("scale", 1.0)))
    if name == "fr-0":
        new = tree.flatten("shared/fr/fr-1")
    else:
        new = lt.Adapter({"q_proj": draw(5, 3, out=out, into=64, scale=scale)})
    with pytest.raises(error, match=says):
        lt.absorb(tree, name, new, **given)
    assert len(tree) == count
