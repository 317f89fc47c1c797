"""What is no tree, no adapter or no number is refused by every verb, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense import zoo_of

import lora_tree as lt
from lora_tree.algebra.moments import Moment
from lora_tree.errors import LoraTreeError, PathError, SpecError


def zoo() -> lt.AdapterTree:
    tree = lt.AdapterTree()
    for seed, path in enumerate(("fr", "fr/legal", "de")):
        tree.add(path, adapter=zoo_of(seed))
    return tree


def flat() -> lt.AdapterTree:
    tree = lt.AdapterTree()
    for seed, path in enumerate(("fr", "de")):
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


ROWS = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
NO_MOMENTS: dict[str, tuple[Any, str]] = {
    "as many rows as the input is wide": (ROWS, r"not symmetric\n  rows x .* x\.T @ x / len\(x\)"),
    "such rows of both signs": (ROWS - 0.5, "negative mean square|not symmetric"),
    "symmetric rows": (ROWS + ROWS.T - 2 * torch.eye(8), "negative"),
    "one row": (ROWS[:1], "got 1 row of inputs, expected 2 or more"),
    "no row": (ROWS[:0], "got 0 rows of inputs, expected 2 or more"),
    "a batch of rows": (ROWS[None], r"got \(1, 8, 8\), expected \(8,\), \(8, 8\) or \(rows, 8\)"),
    "a number": (ROWS[0, 0], r"got \(\), expected"),
    "complex": (ROWS.to(torch.complex64), "expected a tensor of real numbers, got torch.complex64"),
    "meta": (ROWS.to("meta"), "expected a tensor of real numbers, got a tensor on the meta device"),
    "too large": (torch.full((3, 8), 1e200, dtype=torch.float64), "too large for float64"),
}


@pytest.mark.parametrize("verb", ["compress", "grow"])
@pytest.mark.parametrize("case", NO_MOMENTS)
def test_inputs_that_could_be_taken_for_their_moment_are_refused(case: str, verb: str) -> None:
    moment, said = NO_MOMENTS[case]
    with pytest.raises(LoraTreeError, match=said):
        if verb == "compress":
            lt.compress(zoo(), rank=1, moments={"q_proj": moment})
        else:
            lt.grow(flat(), max_error=0.1, moments={"q_proj": moment})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [2, 5, 7, 9, 300])
def test_rows_and_their_moment_give_one_cut(count: int, dtype: torch.dtype) -> None:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(count)).to(dtype)
    Q, _ = torch.linalg.qr(torch.randn(8, 5, dtype=torch.float64))
    C = x.double().T @ x.double() / count
    exact = Q.T @ C @ Q
    for moment in (x, C, x.T @ x / count):
        inside = Moment(moment).inside(Q, 8)
        near = 1e-12 if moment is not x and moment.dtype == torch.float64 else 0.02
        assert float((inside - exact).norm()) <= near * float(exact.norm())
        assert float(torch.linalg.eigvalsh(inside).min()) >= -1e-12 * float(exact.norm())


@pytest.mark.parametrize("verb", ["compress", "grow"])
def test_moments_of_no_module_are_refused(verb: str) -> None:
    def call(moments: Any) -> None:
        if verb == "compress":
            lt.compress(zoo(), rank=1, moments=moments)
        else:
            lt.grow(flat(), max_error=0.1, moments=moments)

    with pytest.raises(
        SpecError, match=r"no adapter here has the modules(.|\n)*modules are block.mlp, c_attn"
    ):
        call({"q": torch.ones(8)})
    with pytest.raises(SpecError, match=r"moments: expected module → tensor, got Tensor"):
        call(torch.ones(8))
    call({"q_proj": torch.ones(8), "of another part of the model": torch.ones(3)})


def with_bias(number: float) -> lt.Adapter:
    own = zoo_of(5)
    return lt.Adapter({"q_proj": replace(own.modules["q_proj"], bias=torch.full((6,), number))})


def zoo_with(adapter: lt.Adapter) -> lt.AdapterTree:
    tree = flat()
    tree.add("odd", adapter=adapter)
    return tree


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "call",
    [
        lambda own: lt.diff(own, with_bias(1.0)),
        lambda own: lt.deviation(with_bias(1.0), own),
        lambda own: lt.similar({"a": own, "b": with_bias(1.0)}, exact=True),
        lambda own: lt.similar({"a": own, "b": with_bias(1.0)}, exact=False),
        lambda own: lt.merge([own, with_bias(1.0)]),
        lambda own: lt.absorb(flat(), "late", own),
        lambda own: lt.compress(zoo_with(own), rank=1),
        lambda own: lt.hoist(zoo_with(own), "", into="x"),
        lambda own: lt.grow(zoo_with(own), max_error=0.1),
        lambda own: lt.split(zoo_with(own), "odd", to="odd/x", rank=1),
        lambda own: lt.squash(zoo_with(own), "odd", to="x", rank=1),
        lambda own: lt.rebase(zoo_with(own), "odd", to="fr/x", rank=1),
    ],
    ids=[
        *("diff", "deviation", "similar", "similar, sketched", "merge", "absorb", "compress"),
        *("hoist", "grow", "split", "squash", "rebase"),
    ],
)
def test_a_bias_that_is_not_finite_is_refused_by_its_module(
    call: Callable[[lt.Adapter], object], number: float
) -> None:
    with pytest.raises(SpecError, match="q_proj: the bias is not finite"):
        call(with_bias(number))


@pytest.mark.parametrize("verb", ["compress", "grow", "squash"])
def test_numbers_that_a_dtype_can_not_hold_are_refused(verb: str) -> None:
    tree = flat()
    # The bias is multiplied by the scale, 0.7.
    tree.add("odd", adapter=with_bias(1e5))
    before = {path: tree.adapter(path) for path in tree.paths()}
    with pytest.raises(SpecError, match=r"q_proj: a factor goes up to 70000, float16 to 65504"):
        if verb == "compress":
            lt.compress(tree, rank=1, dtype=torch.float16)
        elif verb == "grow":
            lt.grow(tree, max_error=0.1, dtype=torch.float16)
        else:
            lt.squash(tree, "odd", to="x", rank=1, dtype=torch.float16)
    assert {path: tree.adapter(path) for path in tree.paths()} == before


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [1e-120, 1e-60, 1e30, 1e60, 1e120])
def test_likeness_does_not_depend_on_the_scale(exact: bool, size: float) -> None:
    named = {f"n{i}": zoo_of(i) for i in range(4)}
    sized = {name: own.scaled(size) for name, own in named.items()}
    sized["n0"] = named["n0"].scaled(1.0 / size)
    plain, found = (lt.similar(each, exact=exact) for each in (named, sized))
    torch.testing.assert_close(found.cosines, plain.cosines, rtol=1e-5, atol=1e-6)
    wanted = plain.norms * torch.tensor([1.0 / size, *[size] * 3], dtype=torch.float64)
    torch.testing.assert_close(found.norms, wanted, rtol=1e-5, atol=0.0)


def test_a_weight_whose_square_is_too_large_is_refused() -> None:
    tree = flat()
    tree.update("fr", weight=1e200)
    with pytest.raises(SpecError, match=r"fr: .*: its weighted norm is too large for float64"):
        lt.compress(tree, rank=1)


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


def lists() -> dict[str, Callable[[], object]]:
    """Calls with an argument of another kind than the verb takes."""
    odd: Any = 3
    a, b = zoo_of(1), zoo_of(2)
    found = lt.similar({"a": a, "b": b})
    return {
        "most: -1": lambda: found.nearest(-1),
        "most: a word": lambda: found.nearest("x"),  # type: ignore[arg-type]
        "cosine: a word": lambda: found.groups("x"),  # type: ignore[arg-type]
        "merge: a number": lambda: lt.merge(odd),
        "merge: fewer names": lambda: lt.merge([a, b], names=["a"]),
        "merge: a number as names": lambda: lt.merge([a, b], names=odd),
        "merge: a number as weights": lambda: lt.merge([a, b], odd),
        "merge: one weight": lambda: lt.merge([a, b], [1.0]),
        "diff: one name": lambda: lt.diff(a, b, names=("a",)),  # type: ignore[arg-type]
        "merge_paths: a number": lambda: lt.merge_paths(zoo(), odd, to="x"),
        "hoist into: a number": lambda: lt.hoist(flat(), "", into=odd),
        "split to: a number": lambda: lt.split(zoo(), "fr", to=odd, rank=1),
        "split modules: a number": lambda: lt.split(zoo(), "fr", to="fr/x", modules=odd),
        "split modules: numbers": lambda: lt.split(zoo(), "fr", to="fr/x", modules=[odd]),
        "rebase to: a number": lambda: lt.rebase(zoo(), "fr", to=odd),
        "absorb name: a number": lambda: lt.absorb(zoo(), odd, a),
        "portable base: a number": lambda: lt.portable(zoo(), "fr", base=odd),
        "portable shapes: a number": lambda: lt.portable(zoo(), "fr", complete=True, shapes=odd),
    }


@pytest.mark.parametrize("call", lists())
def test_an_argument_of_another_kind_is_refused_in_words(call: str) -> None:
    with pytest.raises(LoraTreeError, match=r"got |a cosine is a number|2 adapters, but 1"):
        lists()[call]()
