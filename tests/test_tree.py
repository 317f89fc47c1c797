"""The tree: names, order, lineages, blends and flattening."""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_adapter

import lora_tree as lt
from lora_tree.blend import spelled
from lora_tree.errors import (
    BaseMismatch,
    FolderError,
    PathError,
    ShapeMismatch,
    SpecError,
    TreeError,
)
from lora_tree.formats.peft import FILES
from lora_tree.formats.peft_read import PICKLE


def adapter(seed: int, **shapes: tuple[int, int]) -> lt.Adapter:
    dotted = {name.replace("_", "."): shape for name, shape in shapes.items()}
    return random_adapter(dotted, seed, r=seed % 3 + 1, scale=0.5 + seed)


def family() -> lt.AdapterTree:
    tree = lt.AdapterTree(base="org/model")
    for seed, path in enumerate(("fr", "fr/legal", "fr/medical", "fr/legal/seven", "de")):
        tree.add(path, adapter=adapter(seed, q=(4, 5), v=(3, 5)), weight=1.0 - seed / 10)
    return tree


PATHS = st.lists(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map("/".join), max_size=12
)


def grown(paths: list[str]) -> lt.AdapterTree:
    tree = lt.AdapterTree()
    for path in paths:
        names = path.split("/")
        for i in range(len(names)):
            above = "/".join(names[: i + 1])
            if above not in tree:
                tree.add(above, group=True)
    return tree


@given(PATHS, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_does_not_depend_on_the_order_of_adding(
    paths: list[str], rng: random.Random
) -> None:
    one = grown(paths)
    rng.shuffle(paths)
    assert grown(paths).paths() == one.paths()


@given(PATHS)
@settings(max_examples=100, deadline=None)
def test_lineages_agree_with_the_graph(paths: list[str]) -> None:
    tree = grown(paths)
    everything = ["", *tree.paths()]
    assert set(everything) == set(tree.graph)
    for path in tree.paths():
        assert tree.lineage(path) == nx.shortest_path(tree.graph, "", path)[1:]
        assert set(tree.paths(path)) == nx.descendants(tree.graph, path)
        for other in everything:
            assert tree.common_ancestor(path, other) == nx.lowest_common_ancestor(
                tree.graph, path, other
            )
    preorder = list(nx.dfs_preorder_nodes(tree.graph, "", sort_neighbors=sorted))
    assert tree.paths() == preorder[1:]


def test_a_blend_gives_every_node_the_weight_that_passes_through_it() -> None:
    tree = family()
    assert tree.coefficients("fr/legal/seven") == {
        "fr": 1.0,
        "fr/legal": 0.9,
        "fr/legal/seven": 0.7,
    }
    assert tree.coefficients({"fr/legal": 0.1, "fr/medical": 0.2, "fr": 0.7}) == {
        "fr": 1.0,  # 0.1 + 0.2 + 0.7, without the last bit that a plain sum loses
        "fr/legal": 0.1 * 0.9,
        "fr/medical": 0.2 * 0.8,
    }
    assert tree.coefficients("") == {}
    assert tree.coefficients({"fr": 1.0, "": 3.0}) == {"fr": 1.0}
    assert tree.coefficients({"fr/legal": 1.0, "fr/medical": -1.0}) == {
        "fr/legal": 0.9,
        "fr/medical": -0.8,
    }


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        ({}, "empty blend"),
        ({"fr": float("inf")}, "finite"),
        ({"fr": True}, "finite"),
        ("fr:x", "'x' is not a number"),
        ("fr:1+fr:2", "occurs twice"),
        ("fr:0.5,de:0.5", "paths are joined by a plus"),
        (7, "expected a path"),
        ("fr/", "not a valid node name"),
        ("fr//legal", "not a valid node name"),
        ("fr/leagl", "did you mean 'fr/legal'"),
        ("legal", "did you mean 'fr/legal'"),
        ("de/leagl", "did you mean 'fr/legal'"),
        ("../fr", "not a valid node name"),
        ("fr/*", r"but a pattern\n  one path is wanted here"),
    ],
)
def test_a_blend_that_makes_no_sense_is_refused(blend: lt.Blend, message: str) -> None:
    with pytest.raises((PathError, SpecError), match=message):
        family().coefficients(blend)


WEIGHTS = st.floats(allow_nan=False, allow_infinity=False)
BLENDS = st.dictionaries(st.sampled_from(["", "fr", "fr/legal", "fr-x", "de"]), WEIGHTS, min_size=1)


@given(BLENDS)
def test_the_one_spelling_of_a_blend_reads_back_to_the_same_weights_to_the_bit(
    blend: dict[str, float],
) -> None:
    meant = {path: weight for path, weight in blend.items() if path and weight}
    read = {path: weight for path, weight in lt.parse_blend(spelled(blend)).items() if path}
    assert read == meant  # plain Python floats, which are equal only to themselves
    assert spelled(spelled(blend)) == spelled(blend)
    assert spelled(dict(reversed(blend.items()))) == spelled(blend)


@given(BLENDS, BLENDS)
def test_two_blends_are_spelled_alike_exactly_where_they_mean_the_same(
    one: dict[str, float], other: dict[str, float]
) -> None:
    meant = [
        {path: weight for path, weight in blend.items() if path and weight}
        for blend in (one, other)
    ]
    assert (spelled(one) == spelled(other)) == (meant[0] == meant[1])
    near = {path: math.nextafter(weight, 0.0) for path, weight in one.items()}
    for path, weight in near.items():
        if path and weight and weight != one[path]:
            assert spelled(near) != spelled(one)


def test_weights_of_one_value_have_one_spelling_however_they_are_written() -> None:
    assert {spelled(f"fr:{written}") for written in ("1", "1.", "1.0", "1.00", "1e0")} == {"fr"}
    assert {spelled(f"fr:{written}+de:.5") for written in ("2", "2.0", "20e-1")} == {
        "de:0.5+fr:2.0"
    }
    assert lt.parse_blend(spelled({"fr": 1e22, "de": 1e-7})) == {"fr": 1e22, "de": 1e-7}


@pytest.mark.parametrize(
    "blend", ["fr/legal/seven", "fr", {"fr/legal/seven": 0.3, "fr/medical": 0.7}, "de:2"]
)
def test_flattening_is_the_dense_sum(blend: lt.Blend) -> None:
    tree = family()
    flat = tree.flatten(blend)
    assert not flat.errors
    for name in ("q", "v"):
        expected = sum(
            c * a.modules[name].scale * (a.modules[name].B.double() @ a.modules[name].A.double())
            for node, c in tree.coefficients(blend).items()
            for a in (tree.adapter(node),)
            if a is not None
        )
        torch.testing.assert_close(
            flat.modules[name].dense(dtype=torch.float64), expected, rtol=1e-6, atol=1e-6
        )


def test_flattening_to_a_rank_or_an_error_says_what_it_cost() -> None:
    tree = family()
    exact = {
        n: v.dense(dtype=torch.float64) for n, v in tree.flatten("fr/legal/seven").modules.items()
    }
    for flat in (tree.flatten("fr/legal/seven", 2), tree.flatten("fr/legal/seven", max_error=0.4)):
        for name, value in flat.modules.items():
            error = float(
                (value.dense(dtype=torch.float64) - exact[name]).norm() / exact[name].norm()
            )
            assert flat.errors.get(name, 0.0) == pytest.approx(error, abs=1e-6)
        assert flat.error == max(flat.errors.values(), default=0.0)
    assert set(tree.flatten("fr/legal/seven", 2).ranks.values()) == {2}
    assert tree.flatten("fr/legal/seven", max_error=0.4).error <= 0.4
    assert tree.flatten("fr", dtype=torch.bfloat16).modules["q"].A.dtype == torch.bfloat16


def test_flattening_nodes_that_do_not_fit_together_names_them_and_the_module() -> None:
    tree = family()
    tree.add("fr/between", adapter=adapter(2, v=(3, 5)))
    tree.add("fr/between/odd", adapter=adapter(1, q=(4, 6)))
    with pytest.raises(
        ShapeMismatch, match=r"^fr and fr/between/odd: q: \(4, 5\) \(linear\) and \(4, 6\)"
    ):
        tree.flatten("fr/between/odd")
    tree.add("de/other", adapter=replace(adapter(1), unchanged={"q.bias": torch.ones(2)}))
    tree.update("de", adapter=replace(adapter(1), unchanged={"q.bias": torch.zeros(2)}))
    with pytest.raises(
        BaseMismatch, match=r"^de and de/other: q\.bias: two adapters carry different values"
    ):
        tree.flatten("de/other")


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 65504), (torch.float8_e4m3fn, 448)])
def test_a_factor_that_a_dtype_can_not_hold_is_refused(dtype: torch.dtype, largest: float) -> None:
    tree = lt.AdapterTree()
    tree.add("fr", adapter=lt.Adapter({"q": lt.LowRank(torch.full((1, 2), 1e5), torch.ones(2, 1))}))
    with pytest.raises(
        SpecError, match=rf"^fr: q: a factor goes up to 1e\+05, {str(dtype)[6:]} to {largest}\n"
    ):
        tree.flatten("fr", dtype=dtype)
    assert not tree.flatten("fr", dtype=torch.float64).rounded
    assert tree.adapter("fr").to(device="meta", dtype=dtype).modules["q"].dtype == dtype  # type: ignore[union-attr]
    tree.update(
        "fr", adapter=lt.Adapter({"q": lt.LowRank(torch.full((1, 2), torch.inf), torch.ones(2, 1))})
    )
    with pytest.raises(SpecError, match=r"^fr: q: the factors are not finite: lora_A"):
        tree.flatten("fr", dtype=dtype)


def test_rounding_is_told_and_only_where_a_number_changed() -> None:
    half, third = torch.full((1, 2), 0.5), torch.full((1, 2), 1 / 3)
    tree = lt.AdapterTree()
    tree.add(
        "fr", adapter=lt.Adapter({"q": lt.LowRank(half, half.mT), "v": lt.LowRank(half, third.mT)})
    )
    assert tree.flatten("fr").rounded == set()
    assert tree.flatten("fr", dtype=torch.float32).rounded == set()
    assert tree.flatten("fr", dtype=torch.bfloat16).rounded == {"v"}
    assert tree.flatten("fr", 1, dtype=torch.float16).rounded == {"v"}


def test_a_scale_that_makes_finite_factors_infinite_is_refused() -> None:
    tree = lt.AdapterTree()
    large = lt.Adapter({"q": lt.LowRank(torch.full((1, 2), 1e30), torch.full((2, 1), 1e30))})
    tree.add("fr", adapter=large)
    tree.add("fr/legal", adapter=large, weight=1e10)
    for arguments in ({}, {"rank": 1}, {"dtype": torch.bfloat16}):
        with pytest.raises(
            SpecError,
            match=r"^fr, fr/legal: q: the factors are finite, but not their scales times B",
        ):
            tree.flatten("fr/legal", **arguments)  # type: ignore[arg-type]
    tree.add("de", adapter=large, weight=1e308)
    tree.update("de", adapter=large.scaled(10))
    with pytest.raises(SpecError, match=r"^de: q: scale must be finite"):
        tree.flatten("de")


def test_factors_that_were_never_finite_are_named() -> None:
    tree = family()
    tree.add(
        "fr/broken",
        adapter=lt.Adapter({"q": lt.LowRank(torch.full((2, 5), torch.nan), torch.ones(4, 2))}),
    )
    with pytest.raises(SpecError, match=r"^fr/broken: q: the factors are not finite"):
        tree.flatten("fr/broken", 1)
    with pytest.raises(SpecError, match=r"^fr/broken: q: the factors are not finite"):
        tree.flatten("fr/broken")


@pytest.mark.parametrize(
    "blend", ["fr:1e308+fr/legal:1.7e308", {"fr/legal": 1.7e308, "fr/medical": 1.7e308}]
)
def test_a_coefficient_too_large_for_a_float_is_refused(blend: lt.Blend) -> None:
    with pytest.raises(
        SpecError, match=r"^fr: its coefficient \(.* \+ .*\) · 1 is too large for a float$"
    ):
        family().coefficients(blend)
    tree = family()
    tree.update("de", weight=1e10)
    with pytest.raises(
        SpecError, match=r"^de: its coefficient \(1e\+300\) · 1e\+10 is too large for a float$"
    ):
        tree.flatten({"de": 1e300})
    with pytest.raises(SpecError, match="must be a finite number"):
        tree.flatten({"de": 10**5000})


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".a", "a.", "a b", "ä", "con", "NUL.txt", "a" * 129, "a/b/", "x\n", "-\0"],
)
def test_a_name_that_is_no_safe_file_name_is_refused(name: str) -> None:
    with pytest.raises(PathError):
        lt.AdapterTree().add(name)


@pytest.mark.parametrize("name", [*FILES, PICKLE, "Adapter_Config.json"])
def test_a_name_of_an_adapter_s_file_is_refused_at_every_depth(name: str) -> None:
    tree = family()
    for parent in ("", "fr/"):
        with pytest.raises(
            PathError,
            match=r"is not a valid node name: it is that of an adapter's file .*\n  choose",
        ):
            tree.add(f"{parent}{name}")
    with pytest.raises(PathError, match="is that of an adapter's file"):
        tree.rename("fr/legal", name)


@pytest.mark.parametrize(
    "name", ["tree.yaml", "tree.yml", "tree.lock", "other.yml.lock", "Tree.Lock"]
)
def test_a_name_of_a_tree_s_file_is_refused_at_the_top_alone(name: str) -> None:
    tree = family()
    for change in (
        lambda: tree.add(name),
        lambda: tree.move("fr/legal", name),
        lambda: tree.rename("fr", name),
    ):
        with pytest.raises(
            PathError, match=r"is not a valid name for a node at the top: .*\n  choose another name"
        ):
            change()
    assert tree.add(f"fr/{name}").name == name


def test_changes_that_can_not_be_made_are_refused_and_change_nothing() -> None:
    tree = family()
    before = tree.paths()
    for change, message in (
        (lambda: tree.add("fr"), "exists already"),
        (lambda: tree.add("FR"), "only by case"),
        (lambda: tree.add("it/legal"), r"no node 'it'.*\n  add it first, .*FOLDER it --group"),
        (lambda: tree.move("de", "law/de"), r"no node 'law' in the tree, below which law/de would"),
        # the topmost of several that are missing: it has to be added first
        (
            lambda: tree.add("it/law/tax"),
            r"no node 'it' in the tree, below which(.|\n)*R it --group",
        ),
        (lambda: tree.matching(["zz*"]), r"'zz\*' matches no node\n  the tree has: de, fr"),
        (lambda: tree.add("it", weight=float("nan")), "finite"),
        (lambda: tree.add("it", rank=8), "unknown key 'rank'"),
        (
            lambda: tree.add("it", adapter=adapter(0, q=(4, 5)), r=8),
            "has an adapter, or is a group",
        ),
        (lambda: tree.remove("fr"), "has children: fr/legal, fr/legal/seven, fr/medical"),
        (lambda: tree.remove("nl"), "no node 'nl'"),
        (lambda: tree.lineage("fr/*"), "one path is wanted here, and this is a pattern"),
        (lambda: tree.move("fr", "fr/legal/fr"), "below itself"),
        (lambda: tree.move("fr", "de"), "exists already"),
        (lambda: tree.move("fr", ""), "root"),
        (lambda: tree.rename("fr", "a/b"), "not a valid node name"),
        (lambda: tree.update("de", weight=float("inf")), "finite"),
        (lambda: tree[""], "root"),
    ):
        with pytest.raises((PathError, TreeError, SpecError), match=message):
            change()
    assert tree.paths() == before


def test_moving_takes_the_children_along() -> None:
    tree = family()
    held = {path: tree.adapter(path) for path in tree}
    tree.move("fr/legal", "de/law")
    assert tree.paths() == ["de", "de/law", "de/law/seven", "fr", "fr/medical"]
    assert tree.adapter("de/law/seven") is held["fr/legal/seven"]
    tree.rename("fr", "FR")
    assert tree.children() == ["FR", "de"]
    tree.remove("de", recursive=True)
    assert tree.paths() == ["FR", "FR/medical"]


NAMES = st.sampled_from(["a", "b", "c", "A"])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_history_of_changes_leaves_what_a_plain_dict_of_paths_says(data: st.DataObject) -> None:
    """The oracle: path → (adapter, weight, stale?), changed by hand, with no rule but the ones
    written here.
    """
    tree, held = lt.AdapterTree(), {}

    def some() -> str:
        return data.draw(st.sampled_from(sorted(held)))

    def somewhere() -> str:
        above, name = data.draw(st.sampled_from(["", *sorted(held)])), data.draw(NAMES)
        return f"{above}/{name}" if above else name

    def taken(path: str, but: str | None = None) -> bool:
        return any(path.casefold() == other.casefold() for other in held if other != but)

    def subtree(path: str) -> list[str]:
        return [p for p in held if (p + "/").startswith(path + "/")]

    for step in range(data.draw(st.integers(1, 14))):
        verb = (
            data.draw(st.sampled_from(["add", "add", "move", "rename", "update", "remove"]))
            if held
            else "add"
        )
        before = dict(held)
        try:
            if verb == "add":
                path, own, weight = somewhere(), adapter(step, q=(4, 5)), 1.0 - step / 8
                refused = taken(path)
                tree.add(path, adapter=own, weight=weight)
                held[path] = own, weight
            elif verb == "update":
                path, own = some(), data.draw(st.sampled_from([None, adapter(step, q=(4, 5))]))
                weight, refused = data.draw(st.sampled_from([None, 0.25])), False
                tree.update(path, adapter=own, weight=weight)
                held[path] = own or held[path][0], held[path][1] if weight is None else weight
            elif verb == "remove":
                path, recursive = some(), data.draw(st.booleans())
                refused = len(subtree(path)) > 1 and not recursive
                tree.remove(path, recursive=recursive)
                held = {p: value for p, value in held.items() if p not in subtree(path)}
            else:
                path = some()
                above, name = path.rpartition("/")[0], data.draw(NAMES)
                to = somewhere() if verb == "move" else f"{above}/{name}".lstrip("/")
                refused = to != path and ((to + "/").startswith(path + "/") or taken(to, but=path))
                tree.move(path, to) if verb == "move" else tree.rename(path, name)
                moved = {to + p[len(path) :]: held[p] for p in subtree(path)}
                held = {p: value for p, value in held.items() if p not in subtree(path)} | moved
        except TreeError:
            assert refused
            assert held == before
        else:
            assert not refused
        assert tree.paths() == sorted(held, key=lambda p: p.split("/"))
        assert {p: (tree.adapter(p), tree[p].weight) for p in tree} == held
        assert all(tree[p].path == p and set(tree.children(p)) == _children(held, p) for p in tree)
    for path in held:
        terms = [(p, held[p][1], held[p][0]) for p in tree.lineage(path) if held[p][1] != 0.0]
        assert tree.terms(path) == terms
        if terms:
            exact = sum(c * a.modules["q"].dense(dtype=torch.float64) for _, c, a in terms)
            flat = tree.flatten(path).modules["q"].dense(dtype=torch.float64)
            torch.testing.assert_close(flat, exact, rtol=1e-6, atol=1e-6)


def _children(paths: Iterable[str], above: str) -> set[str]:
    return {path for path in paths if path.rpartition("/")[0] == above}


def test_a_node_keeps_what_it_says_wherever_it_goes() -> None:
    tree = lt.AdapterTree(defaults=dict(target_modules=["q"]))
    tree.add("fr", r=3, weight=0.5)
    tree.add("fr/grp", group=True, weight=0.25)
    tree.add("fr/grp/x", adapter=adapter(1, q=(4, 5)))
    before = {path: tree[path] for path in tree}
    tree.move("fr/grp", "law")
    tree.rename("fr", "French")
    assert {path: tree[path] for path in tree}.keys() == {"French", "law", "law/x"}
    for was, is_ in (("fr", "French"), ("fr/grp", "law"), ("fr/grp/x", "law/x")):
        old, new = before[was], tree[is_]
        assert (new.path, new.name) == (is_, is_.rpartition("/")[2])
        assert (new.weight, new.loaded, new.fresh) == (old.weight, old.loaded, old.fresh)
    assert tree.coefficients("law/x") == {"law": 0.25, "law/x": 1.0}
    assert before["fr"].path == "fr"  # a node is a value: the one held before has not moved


def test_coefficients_follow_every_change_of_the_tree() -> None:
    tree = lt.AdapterTree()
    for path in ("fr", "fr/legal", "de"):
        tree.add(path, group=True)

    def at(path: str) -> dict[str, Any]:
        return tree.coefficients(path)

    assert at("fr/legal") == {"fr": 1.0, "fr/legal": 1.0}
    at("fr/legal").clear()  # the caller's own
    assert at("fr/legal") == {"fr": 1.0, "fr/legal": 1.0}
    copied = copy.deepcopy(tree)
    tree.update("fr", weight=0.5)
    assert at("fr/legal") == {"fr": 0.5, "fr/legal": 1.0}
    assert copied.coefficients("fr/legal") == {"fr": 1.0, "fr/legal": 1.0}
    tree.move("fr/legal", "de/legal")
    assert at("de/legal") == {"de": 1.0, "de/legal": 1.0}
    with pytest.raises(PathError):
        at("fr/legal")
    tree.remove("de", recursive=True)
    with pytest.raises(PathError):
        at("de/legal")
    tree.add("de", group=True, weight=3.0)
    tree.add("de/legal", group=True)
    assert at("de/legal") == {"de": 3.0, "de/legal": 1.0}
    assert at("") == {}


def test_another_adapter_or_weight_changes_that_node_and_no_other() -> None:
    tree = family()
    before = {path: tree[path] for path in tree}
    own = adapter(7, q=(4, 5), v=(3, 5))
    assert tree.update("fr/legal", adapter=own) is tree["fr/legal"]
    assert (tree["fr/legal"].loaded, tree["fr/legal"].weight) == (own, before["fr/legal"].weight)
    tree.update("fr/legal", weight=0)
    assert (tree["fr/legal"].loaded, tree["fr/legal"].weight) == (own, 0.0)
    assert tree.coefficients("fr/legal/seven") == {"fr": 1.0, "fr/legal/seven": 0.7}
    assert all(tree[path] is before[path] for path in tree if path != "fr/legal")
    assert tree.children("fr/legal") == ["fr/legal/seven"]


def test_the_tree_can_not_be_changed_through_its_graph() -> None:
    tree = family()
    node = tree["fr"]
    with pytest.raises(nx.NetworkXError):
        tree.graph.add_node("x")
    tree.graph.nodes["fr"]["node"] = None
    tree.graph.nodes["fr"].clear()
    tree.graph.graph["name"] = "x"
    assert tree["fr"] is node
    assert tree.graph.nodes["fr"] == {"node": node}
    assert not tree.graph.graph


@pytest.mark.parametrize(
    "what", [lt.LowRank(torch.ones(2, 5), torch.ones(4, 2)), {"q": 1}, 3, b"fr"]
)
def test_an_adapter_is_an_adapter_or_its_folder(what: Any) -> None:
    tree = family()
    for change in (lambda: tree.add("es", adapter=what), lambda: tree.update("fr", adapter=what)):
        with pytest.raises(
            SpecError,
            match=f"(es|fr): expected an Adapter or the folder of one, got {type(what).__name__}",
        ):
            change()
    assert "es" not in tree
    assert same(tree["fr"].loaded, family()["fr"].loaded)


def test_a_folder_is_named_by_a_string_or_a_path() -> None:
    tree, name = family(), "is not the name of a folder"
    for nothing in (
        lambda: tree.save(None),  # type: ignore[arg-type]
        lambda: lt.Adapter.load(None),  # type: ignore[arg-type]
        lambda: adapter(0, q=(4, 5)).save(b"fr"),  # type: ignore[arg-type]
        lambda: lt.load(None),  # type: ignore[arg-type]
    ):
        with pytest.raises(FolderError, match=name):
            nothing()


@pytest.mark.parametrize("defaults", ["x", 3, ["r"], [("r", 8)]])
def test_defaults_are_a_mapping(defaults: Any) -> None:
    with pytest.raises(
        SpecError, match=r"defaults: expected a mapping like dict\(r=16, lora_alpha=32\), got"
    ):
        lt.AdapterTree(defaults=defaults)


@pytest.mark.parametrize("modules", [None, [lt.LowRank(torch.ones(2, 5), torch.ones(4, 2))]])
def test_an_adapters_modules_are_a_mapping(modules: Any) -> None:
    with pytest.raises(
        SpecError, match="an adapter's modules are a mapping from names to LowRanks, got"
    ):
        lt.Adapter(modules)


def pickled(value: object) -> object:
    return pickle.loads(pickle.dumps(value))


def same(x: lt.Adapter | None, y: lt.Adapter | None) -> bool:
    """The same value, in tensors of its own."""
    assert x is not None
    assert y is not None
    assert x is not y
    assert (x.base, x.config, x.nesting, x.assumed, x.errors, x.rounded) == (
        *(y.base, y.config, y.nesting, y.assumed, y.errors, y.rounded),
    )
    pairs = [(x.unchanged[name], tensor) for name, tensor in y.unchanged.items()]
    for name, value in y.modules.items():
        own = x.modules[name]
        assert (own.scale, own.layout) == (value.scale, value.layout)
        pairs += zip(own.tensors, value.tensors, strict=True)
    return all(
        type(a) is type(b) and torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_an_adapter_is_the_same_value_in_tensors_of_its_own(
    copied: Callable[[object], object], tmp_path: Path
) -> None:
    value = lt.LowRank(
        torch.randn(2, 5), torch.randn(4, 2), 0.3, torch.randn(4), lt.Layout("conv", (5,))
    )
    trained = lt.LowRank(
        torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.randn(4, 3))
    )
    full = lt.Adapter(
        {"q": value, "m.x": trained},
        base="org/model",
        config={"task_type": "CAUSAL_LM", "list": [1, 2]},
        unchanged={"q.bias": torch.randn(4)},
        nesting={"m": ("x", "y")},
        assumed=frozenset({"m"}),
        errors={"q": 0.25},
        rounded=frozenset({"q"}),
    )
    made = copied(full)
    assert isinstance(made, lt.Adapter)
    assert same(made, full)
    assert made.modules["m.x"].A.requires_grad
    with pytest.raises(TypeError):
        made.modules["q"] = value  # type: ignore[index]
    one, two = copied([full, full])  # type: ignore[misc]
    assert one is two
    adapter(0, q=(4, 5), v=(3, 5)).save(tmp_path)
    read = lt.Adapter.load(tmp_path)
    assert same(copied(read), read)  # type: ignore[arg-type]


def test_a_pickle_holds_every_number_once(tmp_path: Path) -> None:
    """What was read from files lies in one buffer, of which torch would put one copy into it for
    each tensor.
    """
    big = {f"layers.{i}": lt.LowRank(torch.randn(4, 500), torch.randn(500, 4)) for i in range(20)}
    lt.Adapter(big).save(tmp_path)
    read = lt.Adapter.load(tmp_path)
    assert len(pickle.dumps(read)) < 2 * read.nbytes


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_a_copy_of_a_tree_is_a_tree_of_its_own_to_which_nothing_is_attached(
    copied: Callable[[object], object], tmp_path: Path
) -> None:
    family().save(tmp_path)
    tree = lt.load(tmp_path)
    tree.add("es", group=True)
    tree.add("es/fresh", r=3, target_modules=["q"])
    tree.add("es/here", adapter=adapter(7, q=(4, 5)))
    assert tree.adapter("fr") is not None, "read, and kept"
    base = torch.nn.ModuleDict({"q": torch.nn.Linear(5, 4), "v": torch.nn.Linear(5, 3)})
    twin = copied(tree)
    assert isinstance(twin, lt.AdapterTree)
    model = lt.attach(tree, base)
    model.activate("fr/legal")
    late = copied(tree)
    assert isinstance(late, lt.AdapterTree)
    for other in (twin, late):
        assert (other.base, other.defaults, other.home) == (tree.base, tree.defaults, tree.home)
        assert other.paths() == tree.paths()
        other.remove("fr", recursive=True)
        assert "fr" in tree
    with pytest.raises(TreeError, match="active on an attached model"):
        tree.remove("fr/legal", recursive=True)
    assert twin["es/fresh"].fresh is not None
    assert tree["es/fresh"].fresh is None, "it was made when the tree was attached"
    if copied is not copy.copy:
        assert same(late.adapter("es/here"), tree.adapter("es/here"))
        assert same(late.adapter("es/fresh"), tree.adapter("es/fresh"))
    assert same(late.adapter("de"), tree.adapter("de")), "each reads its own"


def test_what_a_copy_was_read_it_reads_again_when_a_model_takes_over(tmp_path: Path) -> None:
    family().save(tmp_path)
    tree = lt.load(tmp_path)
    for path in tree.paths():
        tree.adapter(path)
    twin = copy.deepcopy(tree)
    assert all(twin[path].loaded is not None for path in twin)
    base = torch.nn.ModuleDict({"q": torch.nn.Linear(5, 4), "v": torch.nn.Linear(5, 3)})
    model = lt.attach(twin, base, host_budget="1MiB")
    assert all(twin[path].loaded is None for path in twin)
    assert model.nodes_in_use() == []
    assert all(tree[path].loaded is not None for path in tree)


def test_a_base_is_named_by_a_string_or_a_path(tmp_path: Path) -> None:
    tree = lt.AdapterTree(base=tmp_path / "base")
    assert tree.base == str(tmp_path / "base")
    tree.add("fr", adapter=adapter(1, q=(4, 5)))
    tree.save(tmp_path / "zoo")
    assert lt.load(tmp_path / "zoo").base == str(tmp_path / "base")
    for wrong in (3, b"base", ["base"], torch.nn.Linear(1, 1)):
        with pytest.raises(SpecError, match=r"^base: a model's name is a hub id or a folder, got "):
            lt.AdapterTree(base=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["another adapter", "removed"])
def test_what_is_read_while_its_node_changes_does_not_come_into_the_tree(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread changes the node while its files are read; what it did is not undone."""
    adapter(1, q=(4, 5)).save(tmp_path / "fr")
    tree = lt.AdapterTree()
    tree.add("fr", adapter=tmp_path / "fr")
    source, other = tree["fr"].source, adapter(2, q=(4, 5))
    load = type(source).load

    def slow(self: Any, allocate: Any = None) -> lt.Adapter:
        read = load(self, allocate)
        if change == "removed":
            tree.remove("fr")
        else:
            tree.update("fr", adapter=other)
        return read

    monkeypatch.setattr(type(source), "load", slow)
    assert tree.adapter("fr") is not None
    if change == "removed":
        assert tree.paths() == []
    else:
        assert tree["fr"].loaded is other
