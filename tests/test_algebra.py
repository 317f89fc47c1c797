"""The algebra of a tree: joint bases, deviations, diffs and likeness, against dense float64."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from dense import conv, dense, draw, gauged, zoo_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lora_tree as lt
import lora_tree.algebra.gram as gram_module
from lora_tree.algebra.clusters import average_linkage, groups
from lora_tree.algebra.core import angles, effective_rank, energy, joint, spectrum
from lora_tree.algebra.gram import gram
from lora_tree.algebra.likeness import _lineage_outline
from lora_tree.errors import BaseMismatch, ShapeMismatch, SpecError

SEEDS = st.integers(0, 2**32 - 1)
BATCHES = st.sampled_from([(), (3,)])


# ---------------------------------------------------------------------- joint bases
@given(SEEDS, BATCHES, st.integers(1, 6), st.integers(1, 6))
def test_joint_bases_hold_every_increment(
    seed: int, batch: tuple[int, ...], r: int, s: int
) -> None:
    """The ranks together may exceed the sizes, where the bases are as wide as the whole space."""
    values = [draw(seed, r, batch=batch), draw(seed + 1, s, batch=batch, scale=-0.3)]
    both = joint(values)
    for value, core in zip(values, both.cores, strict=True):
        torch.testing.assert_close(both.value(core).dense(), dense(value), rtol=1e-9, atol=1e-9)
    eye = torch.eye(both.Q_B.shape[-1], dtype=torch.float64)
    torch.testing.assert_close(both.Q_B.mT @ both.Q_B, eye.expand(*batch, *eye.shape))


@given(SEEDS, BATCHES)
def test_a_spectrum_is_that_of_the_dense_matrix(seed: int, batch: tuple[int, ...]) -> None:
    value = draw(seed, 3, batch=batch)
    wanted = torch.linalg.svdvals(dense(value))
    torch.testing.assert_close(spectrum(value), wanted[..., :3])
    kept = wanted[..., :2].square().sum() / wanted.square().sum()
    assert energy(spectrum(value), 2) == pytest.approx(float(kept))


def test_the_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.ones(5)) == 5.0
    assert effective_rank(torch.tensor([3.0, 0.0])) == 1.0
    assert effective_rank(torch.zeros(3)) == 0.0
    assert 1.0 < effective_rank(torch.tensor([3.0, 1.0])) < 2.0


@given(SEEDS)
def test_principal_angles_are_those_of_the_dense_column_spaces(seed: int) -> None:
    x, y = draw(seed, 2), draw(seed + 1, 3)
    found = angles(x, y)
    for got, one, other in zip(
        found, (dense(x), dense(x).mT), (dense(y), dense(y).mT), strict=True
    ):
        bases = [torch.linalg.svd(each)[0][:, :rank] for each, rank in ((one, 2), (other, 3))]
        wanted = torch.linalg.svdvals(bases[0].mT @ bases[1]).clamp(max=1.0).acos()
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def test_a_small_angle_is_not_lost_in_rounding() -> None:
    """The cosine of 1e-6 differs from 1 by 5e-13, of which acos keeps three digits."""
    x = lt.LowRank(torch.eye(1, 4).double(), torch.eye(3, 1).double())
    tilted = torch.tensor([[1.0], [1e-6], [0.0]], dtype=torch.float64)
    out, into = angles(x, lt.LowRank(x.A, tilted))
    assert float(out) == pytest.approx(1e-6, rel=1e-9)
    assert float(into) == 0.0


def test_directions_that_the_product_does_not_have_do_not_count() -> None:
    A = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    column = torch.tensor([[1.0], [0.3], [-2.0], [0.7]])
    twice = lt.LowRank(A, column * torch.tensor([[1.0, 0.37]]))  # rank 2 in its factors, 1 in fact
    out, into = angles(twice, twice)
    assert (len(out), len(into)) == (1, 1)
    nothing = lt.LowRank(torch.zeros(1, 5), torch.ones(4, 1))
    assert len(angles(nothing, twice)[0]) == 0


# ---------------------------------------------------------------------- deviations
@given(SEEDS)
def test_a_deviation_is_the_dense_distance(seed: int) -> None:
    one, other = zoo_of(seed), zoo_of(seed + 1, without="block.mlp")
    told = lt.deviation(one, other)
    total = 0.0
    for name, value in one.modules.items():
        theirs = other.modules.get(name)
        apart = dense(value) - (dense(theirs) if theirs is not None else 0.0)
        assert told.errors[name] == pytest.approx(float(apart.norm()), rel=1e-9)
        total += float(apart.square().sum())
    assert told.error == pytest.approx(math.sqrt(total), rel=1e-9)
    assert told.relative_error == pytest.approx(told.error / told.norm)


def test_something_in_the_place_of_nothing_is_infinitely_wrong() -> None:
    told = lt.Deviation({"q": 1.0}, {"q": 0.0})
    assert told.relative_error == math.inf
    assert lt.Deviation().relative_error == 0.0


# ---------------------------------------------------------------------- diff
@given(SEEDS)
def test_the_diff_of_a_value_with_itself_is_nothing(seed: int) -> None:
    x = zoo_of(seed)
    assert lt.diff(x, x).is_nothing
    again = lt.diff(x, gauged(x, seed))
    assert again.is_nothing
    assert again.cosine == pytest.approx(1.0)
    assert all(max(m.angles_out) < 1e-5 for m in again.modules.values())


@given(SEEDS)
def test_a_diff_is_what_the_dense_matrices_say(seed: int) -> None:
    a, b = zoo_of(seed), zoo_of(seed + 1, rank=1)
    found = lt.diff(a, b)
    inner = norm_a = norm_b = 0.0
    for name, module in found.modules.items():
        x, y = dense(a.modules[name]), dense(b.modules[name])
        cosine = float((x * y).sum() / x.norm() / y.norm())
        assert module.norm_a == pytest.approx(float(x.norm()))
        assert module.moved == pytest.approx(float((y - x).norm()))
        assert module.cosine == pytest.approx(cosine, abs=1e-9)
        inner += float((x * y).sum())
        norm_a, norm_b = math.hypot(norm_a, float(x.norm())), math.hypot(norm_b, float(y.norm()))
    assert found.cosine == pytest.approx(inner / norm_a / norm_b, abs=1e-9)
    assert sum(module.share for module in found.modules.values()) == pytest.approx(1.0)


def test_a_bias_counts_as_one_more_column() -> None:
    x = lt.LowRank(torch.eye(1, 4), torch.eye(3, 1), 2.0, torch.tensor([0.0, 3.0, 0.0]))
    found = lt.diff(lt.Adapter({"q": x}), lt.Adapter({"q": lt.LowRank(x.A, x.B, 2.0)}))
    assert found.modules["q"].norm_a == pytest.approx(math.hypot(2.0, 6.0))
    assert found.moved == pytest.approx(6.0)


def test_a_module_of_one_side_alone_is_zero_on_the_other() -> None:
    x = draw(0, 2)
    found = lt.diff(lt.Adapter({"q": x}), lt.Adapter({"v": x}))
    assert found.modules["q"].norm_b == 0.0
    assert found.modules["q"].cosine is None
    assert found.moved == pytest.approx(math.sqrt(2.0) * x.norm())
    assert lt.diff(lt.Adapter({}), lt.Adapter({})).is_nothing


def test_carried_tensors_that_differ_are_named() -> None:
    a, b = (
        lt.Adapter({"q": draw(0, 2)}, unchanged={"bias": torch.full((3,), x)}) for x in (1.0, 2.0)
    )
    assert lt.diff(a, b).carried == ("bias",)
    assert not lt.diff(a, b).is_nothing
    assert lt.diff(a, a).is_nothing


def test_a_diff_of_what_is_not_of_one_base_is_refused() -> None:
    x, y = draw(0, 2), draw(0, 2, out=9)
    with pytest.raises(ShapeMismatch, match=r"^q: \(6, 8\) \(linear\) and \(9, 8\)"):
        lt.diff(lt.Adapter({"q": x}), lt.Adapter({"q": y}))
    two = "model.layers.0.q", "model.language_model.layers.0.q"
    with pytest.raises(BaseMismatch, match="two names of one module"):
        lt.diff(*(lt.Adapter({name: x}) for name in two))
    with pytest.raises(SpecError, match="compares two adapters, got AdapterTree"):
        lt.diff(lt.AdapterTree(), lt.Adapter({}))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"^q: the factors have no numbers"):
        lt.diff(lt.Adapter({"q": x.to(device="meta")}), lt.Adapter({"q": x}))
    broken = lt.LowRank(torch.full((1, 8), torch.nan), torch.ones(6, 1))
    with pytest.raises(SpecError, match=r"^q: the factors are not finite"):
        lt.diff(lt.Adapter({"q": broken}), lt.Adapter({"q": x}))


def family() -> lt.AdapterTree:
    tree = lt.AdapterTree()
    tree.add("fr", adapter=zoo_of(1))
    tree.add("fr/legal", adapter=zoo_of(2), weight=0.5)
    tree.add("fr/medical", adapter=zoo_of(3))
    tree.add("misc", group=True)
    return tree


def test_paths_are_compared_by_what_they_add_to_the_base() -> None:
    tree = family()
    found = lt.diff_paths(tree, "fr/legal", "fr/medical")
    legal, medical = tree.flatten("fr/legal"), tree.flatten("fr/medical")
    assert found.moved == pytest.approx(lt.deviation(legal, medical).error, rel=1e-6)
    assert found.norm_a == pytest.approx(0.5 * lt.diff(zoo_of(2), lt.Adapter({})).norm_a)
    assert lt.diff_paths(tree, "fr", "fr").is_nothing
    assert lt.diff_paths(tree, "fr", {"fr": 1.0}).is_nothing
    assert lt.diff_paths(tree, "", "misc").is_nothing
    assert lt.diff_paths(tree, "", "fr").norm_b == pytest.approx(
        lt.diff(zoo_of(1), lt.Adapter({})).norm_a
    )


def test_trees_are_compared_node_by_node() -> None:
    one, other = family(), family()
    assert lt.diff_trees(one, other).is_nothing
    other.update("fr/legal", weight=1.0)
    other.update("fr/medical", adapter=zoo_of(4))
    other.add("de", group=True)
    other.base = "org/other"
    found = lt.diff_trees(one, other)
    assert (found.only_a, found.only_b) == ((), ("de",))
    assert found.base == (None, "org/other")
    assert found.weights == {"fr/legal": (0.5, 1.0)}
    assert [path for path, node in found.nodes.items() if not node.is_nothing] == ["fr/medical"]
    assert not found.is_nothing
    assert found.as_dict()["only_b"] == ["de"]


# ---------------------------------------------------------------------- similar
def dense_cosines(adapters: list[lt.Adapter]) -> Tensor:
    rows = []
    for adapter in adapters:
        parts = [dense(value).flatten() for _, value in sorted(adapter.modules.items())]
        rows.append(torch.nn.functional.normalize(torch.cat(parts), dim=0))
    return torch.stack(rows) @ torch.stack(rows).mT


@given(SEEDS, st.integers(2, 9))
def test_likeness_is_that_of_the_dense_matrices(seed: int, count: int) -> None:
    adapters = [zoo_of(seed + i, rank=1 + i % 3) for i in range(count)]
    named = {f"n{i}": adapter for i, adapter in enumerate(adapters)}
    found = lt.similar(named, exact=True)
    torch.testing.assert_close(found.cosines, dense_cosines(adapters), rtol=1e-9, atol=1e-9)
    turned = lt.similar({n: gauged(a, 1) for n, a in reversed(named.items())}, exact=True)
    torch.testing.assert_close(turned.cosines.flip(0, 1), found.cosines, rtol=1e-6, atol=1e-6)


def test_chunks_do_not_change_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {f"n{i}": zoo_of(i, rank=1 + i % 3) for i in range(11)}
    whole = lt.similar(named, exact=True).cosines
    monkeypatch.setattr("lora_tree.algebra.gram._CHUNK", 3)
    torch.testing.assert_close(lt.similar(named, exact=True).cosines, whole, rtol=1e-9, atol=1e-12)


def test_a_sketch_is_as_near_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_tree.algebra.gram._MOST_SIDE", 24)
    named = {f"n{i}": wide(i) for i in range(30)}
    exact, sketched = (lt.similar(named, exact=how) for how in (True, False))
    apart = (exact.cosines - sketched.cosines)[~torch.eye(30, dtype=torch.bool)]
    rms = float(apart.square().mean().sqrt())
    assert exact.error == 0.0
    assert 0.0 < rms < 1.5 * sketched.error < 0.5
    torch.testing.assert_close(sketched.norms, exact.norms, rtol=1e-5, atol=0.0)
    few = {name: named[name] for name in ("n3", "n1")}
    # The maps are drawn from the modules' names, so other adapters beside them change nothing.
    torch.testing.assert_close(
        lt.similar(few, exact=False).cosines[0, 1], sketched.cosines[3, 1], rtol=1e-5, atol=1e-6
    )


def test_small_modules_are_sketched_exactly() -> None:
    named = {f"n{i}": lt.Adapter({"q": draw(i, 2)}) for i in range(5)}
    exact, sketched = (lt.similar(named, exact=how) for how in (True, False))
    torch.testing.assert_close(sketched.cosines, exact.cosines, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exact", [True, False])
def test_biases_and_experts_and_kernels_count(exact: bool) -> None:
    bias = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    x = lt.LowRank(draw(1, 2).A, draw(1, 2).B, 0.5, bias)
    named = {
        "a": lt.Adapter({"q": x, "e": draw(2, 2, batch=(3,)), "c": conv(3)}),
        "b": lt.Adapter({"q": x.scaled(2.0), "e": draw(2, 2, batch=(3,)), "c": conv(4)}),
    }
    found = lt.similar(named, exact=exact)
    norms = [lt.diff(adapter, lt.Adapter({})).norm_a for adapter in named.values()]
    assert found.norms.tolist() == pytest.approx(norms, rel=1e-5)
    wanted = lt.diff(named["a"], named["b"]).cosine
    assert float(found.cosines[0, 1]) == pytest.approx(wanted, abs=1e-6 if exact else 0.2)


@pytest.mark.parametrize("exact", [True, False])
def test_the_matrices_of_a_batch_do_not_run_together(exact: bool) -> None:
    """The same two experts in another order: nearly orthogonal, though their sums are equal."""
    x = draw(1, 3, batch=(2,), out=40, into=40)
    swapped = lt.LowRank(x.A.flip(0), x.B.flip(0), x.scale)
    found = lt.similar({"a": lt.Adapter({"e": x}), "b": lt.Adapter({"e": swapped})}, exact=exact)
    assert abs(float(found.cosines[0, 1])) < 0.4


def wide(seed: int) -> lt.Adapter:
    g = torch.Generator().manual_seed(seed)
    common = torch.Generator().manual_seed(seed % 3)
    modules = {}
    for name in ("q", "v", "o"):
        A = torch.randn(4, 80, generator=g) + torch.randn(4, 80, generator=common)
        B = torch.randn(70, 4, generator=g) + torch.randn(70, 4, generator=common)
        modules[name] = lt.LowRank(A, B)
    return lt.Adapter(modules)


def test_clusters_are_found_and_stand_side_by_side() -> None:
    found = lt.similar({f"n{i}": wide(i) for i in range(9)}, exact=True)
    assert found.groups(0.1) == [["n0", "n3", "n6"], ["n1", "n4", "n7"], ["n2", "n5", "n8"]]
    order = [int(name[1:]) % 3 for name in found.order()]
    assert order in (
        [a] * 3 + [b] * 3 + [c] * 3 for a in (0, 1, 2) for b in (0, 1, 2) for c in (0, 1, 2)
    )
    pairs = found.nearest(3)
    assert all(int(one[1:]) % 3 == int(other[1:]) % 3 for one, other, _ in pairs)
    assert len(found.groups(1.0)) == 9
    assert len(found.groups(-1.0)) == 1
    with pytest.raises(SpecError, match="between -1 and 1"):
        found.groups(2.0)


@given(SEEDS, st.integers(1, 14))
def test_average_linkage_is_what_the_slow_way_finds(seed: int, count: int) -> None:
    points = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).double()
    apart = torch.cdist(points, points)
    joins = average_linkage(apart)
    clusters = {i: [i] for i in range(count)}
    for step in range(count - 1):
        distance = {
            (a, b): float(apart[clusters[a]][:, clusters[b]].mean())
            for a in clusters
            for b in clusters
            if a < b
        }
        nearest = min(distance, key=lambda pair: distance[pair])
        assert joins[step].distance == pytest.approx(distance[nearest])
        assert {joins[step].left, joins[step].right} == set(nearest)
        clusters[count + step] = sorted(clusters.pop(nearest[0]) + clusters.pop(nearest[1]))
        assert joins[step].size == len(clusters[count + step])
    assert groups(joins, count, math.inf) == ([list(range(count))] if count else [])


def test_ties_are_joined_all_the_same() -> None:
    joins = average_linkage(torch.ones(7, 7))
    assert [join.distance for join in joins] == [1.0] * 6
    assert joins[-1].size == 7


def test_a_zero_adapter_is_like_nothing() -> None:
    nothing = lt.LowRank(torch.ones(1, 8), torch.zeros(6, 1))
    named = {
        "a": lt.Adapter({"q": draw(0, 2)}),
        "b": lt.Adapter({"q": nothing}),
        "c": lt.Adapter({}),
    }
    for exact in (True, False):
        found = lt.similar(named, exact=exact)
        assert found.cosines.equal(torch.eye(3, dtype=torch.float64))
    assert lt.similar({}).groups() == []
    assert lt.similar({}).nearest() == []


def test_what_is_not_comparable_is_refused_by_name() -> None:
    x, y = lt.Adapter({"q": draw(0, 2)}), lt.Adapter({"q": draw(0, 2, out=9)})
    for exact in (True, False):
        with pytest.raises(ShapeMismatch, match="a and b: q:"):
            lt.similar({"a": x, "b": y}, exact=exact)
        broken = lt.LowRank(torch.full((1, 8), torch.inf), torch.ones(6, 1))
        with pytest.raises(SpecError, match=r"b.*not finite"):
            lt.similar({"a": x, "b": lt.Adapter({"q": broken})}, exact=exact)
        with pytest.raises(SpecError, match=r"a: q: the factors have no numbers"):
            lt.similar({"a": x.to(device="meta")}, exact=exact)
    with pytest.raises(SpecError, match="expected 'own' or 'lineage'"):
        lt.similar({"a": x}, of="all")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="are for a tree"):
        lt.similar({"a": x}, ["a"])
    with pytest.raises(SpecError, match="takes name → Adapter"):
        lt.similar({"a": 1})  # type: ignore[dict-item]


def test_a_tree_s_nodes_are_read_once_and_not_kept(tmp_path: Path) -> None:
    family().save(tmp_path / "zoo")
    tree = lt.load(tmp_path / "zoo")
    found = lt.similar(tree)
    assert found.names == ("fr", "fr/legal", "fr/medical")
    assert all(tree[path].loaded is None for path in tree)
    torch.testing.assert_close(found.cosines, dense_cosines([zoo_of(i) for i in (1, 2, 3)]))
    lineage = lt.similar(tree, ["fr/*"], of="lineage")
    flats = [family().flatten(path) for path in ("fr/legal", "fr/medical")]
    torch.testing.assert_close(lineage.cosines, dense_cosines(flats))


def test_too_many_products_are_sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {f"n{i}": wide(i) for i in range(4)}
    monkeypatch.setattr("lora_tree.algebra.gram.EXACT_STEPS", 1.0)
    assert lt.similar(named).error > 0.0
    assert lt.similar(named, exact=True).error == 0.0
    names = list(named)
    assert gram(names, named.__getitem__, named.__getitem__, exact=None).error > 0.0


def test_the_cost_of_lineages_is_that_of_their_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = lt.AdapterTree()
    path = ""
    for depth in range(3):
        path = f"{path}/n{depth}".lstrip("/")
        tree.add(path, adapter=zoo_of(depth, rank=2 + depth, without="conv" if depth else ""))
    names = tree.paths()
    for name in names:
        assert _lineage_outline(tree, name).ranks == tree.flatten(name).ranks
    flats = {name: tree.flatten(name) for name in names}
    counted: list[float] = []
    whole = gram_module._steps
    monkeypatch.setattr(
        gram_module, "_steps", lambda outlines: counted.append(whole(outlines)) or 0
    )
    lt.similar(tree, of="lineage")
    lt.similar(flats)
    assert counted[0] == counted[1]


# ---------------------------------------------------------------------- names that are a guess
def two_orders(sizes: tuple[int, int]) -> tuple[lt.Adapter, lt.Adapter]:
    """An adapter whose parameters are known, and the same one from a file that left them open."""
    up, down = (
        lt.LowRank(v.A, v.B, v.scale, layout=lt.Layout("parameter"))
        for v in (draw(i, 2, batch=(2,), out=size) for i, size in enumerate(sizes))
    )
    known = lt.Adapter({"x.up": up, "x.down": down}, nesting={"x": ("down", "up")})
    guess = lt.Adapter(
        {"x.up": down, "x.down": up}, nesting={"x": ("up", "down")}, assumed=frozenset({"x"})
    )
    return known, guess


@pytest.mark.parametrize("sizes", [(6, 6), (6, 5)], ids=["of one shape", "of two shapes"])
def test_a_guessed_order_is_settled_before_adapters_are_compared(sizes: tuple[int, int]) -> None:
    known, guess = two_orders(sizes)
    for a, b in ((known, guess), (guess, known)):
        assert lt.diff(a, b).is_nothing
        assert lt.deviation(a, b).error == 0.0
        for exact in (True, False):
            found = lt.similar({"a": a, "b": b}, exact=exact).cosines
            equal = lt.similar({"a": known, "b": known}, exact=exact).cosines
            torch.testing.assert_close(found, equal)
    tree = lt.AdapterTree()
    tree.add("a", adapter=known)
    tree.add("a/b", adapter=guess)
    tree.add("c", adapter=guess)
    for exact in (True, False):
        found = lt.similar(tree, ["a/b", "c"], of="lineage", exact=exact).cosines
        equal = lt.similar({"a/b": known.scaled(2.0), "c": known}, exact=exact).cosines
        torch.testing.assert_close(found, equal)


# ---------------------------------------------------------------------- the picture
def test_a_name_is_never_markup() -> None:
    hostile = '"><script>alert(1)</script>\x1b[2J'
    found = lt.similar({hostile: zoo_of(1), "b": zoo_of(2)})
    picture = found.picture()
    root = ElementTree.fromstring(picture)
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(text and text.startswith('"><script>') for text in texts)
    assert "<script" not in picture
    assert "\x1b" not in picture


def test_a_picture_of_many_stays_small() -> None:
    many = {f"n{i}": lt.Adapter({"q": draw(i, 1)}) for i in range(150)}
    picture = lt.similar(many).picture()
    assert picture.count("<rect") == 120 * 120
    ElementTree.fromstring(picture)
    assert ElementTree.fromstring(lt.similar({}).picture()) is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(SEEDS, st.integers(2, 9))
def test_distances_that_are_not_symmetric_are_refused(
    dtype: torch.dtype, seed: int, count: int
) -> None:
    draws = torch.Generator().manual_seed(seed)
    apart = torch.rand(count, count, generator=draws, dtype=dtype) + 0.5
    apart = (apart + apart.mT) / 2
    wanted = average_linkage(apart)
    row, column = torch.randperm(count, generator=draws)[:2].tolist()
    rounded = apart.clone()
    rounded[row, column] *= 1.0 + 1e-7
    assert len(average_linkage(rounded)) == len(wanted)
    apart[row, column] += 1e-3
    with pytest.raises(SpecError, match="not symmetric have no clusters"):
        average_linkage(apart)


@pytest.mark.parametrize(
    ("distances", "said"),
    [
        (torch.tensor([[0.0, math.nan], [math.nan, 0.0]]), "not finite"),
        (torch.full((3, 3), math.inf), "not finite"),
        (torch.rand(3, 4), r"got \(3, 4\), expected a square matrix"),
        (torch.rand(3), r"got \(3,\), expected a square matrix"),
    ],
)
def test_what_is_no_matrix_of_distances_is_refused(distances: Tensor, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        average_linkage(distances)


def test_the_diagonal_of_distances_is_not_read() -> None:
    apart = torch.rand(4, 4)
    apart = apart + apart.mT
    wanted = average_linkage(apart)
    assert average_linkage(apart.fill_diagonal_(math.nan)) == wanted
    assert average_linkage(torch.zeros(0, 0)) == average_linkage(torch.zeros(1, 1)) == []
