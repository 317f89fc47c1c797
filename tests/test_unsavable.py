"""A verb makes no adapter that a save refuses: PEFT's files can't hold everything that two nodes
hold apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from shell import Shell
from torch import Tensor

import lora_tree as lt
from lora_tree.errors import FormatError, LoraTreeError, SpecError, TreeError
from lora_tree.lowrank import EMBEDDING, PARAMETER, Layout

Verb: TypeAlias = Callable[[lt.AdapterTree], object]

DRAW = torch.Generator().manual_seed(0)
ROWS = lt.Override(torch.ones(2, 6), (1, 5))
PAIRS: dict[str, tuple[lt.Adapter, lt.Adapter, str]] = {}
"""Two adapters that can be saved, and why their sum can't."""


def increments(
    layout: Layout | None = None, *, batch: tuple[int, ...] = (), bias: Tensor | None = None
) -> lt.LowRank:
    A = torch.randn(*batch, 2, 6, generator=DRAW)
    B = torch.randn(*batch, 6, 2, generator=DRAW)
    return lt.LowRank(A, B, 1.0, bias, layout or Layout("linear"))


def of(module: str, value: lt.LowRank) -> lt.Adapter:
    return lt.Adapter({module: value})


WITH_BIAS = of("m.fc", increments(bias=torch.ones(6)))
LINEAR = of("m.fc", increments())
PAIRS["bias, embedding"] = (
    WITH_BIAS,
    of("m.wte", increments(EMBEDDING)),
    "m.wte: PEFT has no lora_bias for embeddings, and other modules here have one",
)
PAIRS["bias, experts"] = (
    WITH_BIAS,
    of("m.experts.down_proj", increments(PARAMETER, batch=(3,))),
    "m.experts.down_proj: PEFT has no lora_bias for parameters, and other modules here have one",
)
PAIRS["two parameters"] = (
    of("m.experts.a", increments(PARAMETER, batch=(3,))),
    of("m.experts.b", increments(PARAMETER, batch=(3,))),
    "m.experts: PEFT writes a and b in the order in which the module registers them",
)
PAIRS["module, its parameter"] = (
    LINEAR,
    of("m.fc.weight", increments(PARAMETER, batch=(1,))),
    "m.fc: PEFT can't train a module and its raw parameters",
)
PAIRS["module in module"] = (
    LINEAR,
    of("m.fc.inner", increments()),
    "m.fc.inner: lies in m.fc, which has factors of its own",
)
REPLACED = (
    lt.Adapter({}, overrides={"m.wte.weight": ROWS}),
    of("m.wte", increments(EMBEDDING)),
    "m.wte.weight: PEFT has no trained rows of a module that has factors",
)

VERBS: dict[str, tuple[Verb, str]] = {
    "squash": (lambda tree: lt.squash(tree, "p/x/z", to="n"), "n"),
    "merge": (lambda tree: lt.merge_paths(tree, ["p/x", "p/y"], to="p/n"), "p/n"),
    "rebase": (lambda tree: lt.rebase(tree, "p/x/z", to="p/n"), "p/n"),
    "rebase_all": (lambda tree: lt.rebase_all(tree, "p/x", weight=0.5), "p/x/z"),
    "hoist": (lambda tree: lt.hoist(tree, "p"), "p"),
    "hoist between": (lambda tree: lt.hoist(tree, "p", into="p/n"), "p/n"),
}


def family(one: lt.Adapter, other: lt.Adapter) -> lt.AdapterTree:
    """Return p, below it x and y with an adapter each, and below x the adapter of y again."""
    tree = lt.AdapterTree()
    tree.add("p", adapter=of("m.o", increments()))
    tree.add("p/x", adapter=one)
    tree.add("p/x/z", adapter=other)
    tree.add("p/y", adapter=other)
    return tree


def refused(
    tree: lt.AdapterTree, verb: Verb, kind: type[LoraTreeError], folder: Path
) -> LoraTreeError:
    """Return the error of a verb, which leaves the tree as it was; a save takes that."""
    before = {path: (tree[path].weight, tree.adapter(path)) for path in tree.paths()}
    with pytest.raises(kind) as raised:
        verb(tree)
    assert {path: (tree[path].weight, tree.adapter(path)) for path in tree.paths()} == before
    tree.save(folder)
    return raised.value


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_verb_refuses_what_no_save_takes_before_it_changes_the_tree(
    pair: str, name: str, tmp_path: Path
) -> None:
    one, other, why = PAIRS[pair]
    verb, node = VERBS[name]
    error = refused(family(one, other), verb, FormatError, tmp_path / "zoo")
    assert error.what.startswith(f"{node}: {why}")
    assert error.todo[-1].startswith("one adapter can't hold what p")
    assert "lora-tree split, lora_tree.split(tree, path, to=…, modules=…)" in error.todo[-1]


@pytest.mark.parametrize("name", ["squash", "rebase"])
def test_trained_rows_do_not_meet_factors_of_their_embedding(name: str, tmp_path: Path) -> None:
    one, other, why = REPLACED
    verb, node = VERBS[name]
    error = refused(family(one, other), verb, FormatError, tmp_path / "zoo")
    assert error.what == f"{node}: {why}"


def test_absorb_refuses_a_place_where_no_save_takes_the_rest(tmp_path: Path) -> None:
    one, other, why = PAIRS["bias, embedding"]
    tree = family(one, other)
    tree.remove("p/x/z")
    error = refused(
        tree, lambda tree: lt.absorb(tree, "n", other, under="p/x"), FormatError, tmp_path / "zoo"
    )
    assert error.what == f"p/x/n: {why}"


def test_absorb_takes_the_next_node_where_no_save_takes_the_rest_below_the_nearest(
    tmp_path: Path,
) -> None:
    one, other, why = PAIRS["bias, embedding"]
    shared = increments()
    tree = lt.AdapterTree()
    # Less of the adapter is left below p than below q, but p has a bias beside an embedding's
    # factors.
    tree.add("p", adapter=lt.Adapter({"m.o": shared, **one.scaled(0.01).modules}))
    tree.add("q", adapter=lt.Adapter({"m.o": shared}), weight=0.5)
    own = lt.concat([shared, lt.LowRank(torch.ones(1, 6), torch.ones(6, 1))])
    late = lt.Adapter({"m.o": own, **other.modules})
    done = lt.absorb(tree, "n", late, rank=1)
    assert next(iter(done.left)) == "p"
    assert done.parent == "q"
    assert done.edited.notes == (
        f"a closer parent was passed over, for it can't be saved there: p/n: {why}",
    )
    tree.save(tmp_path / "zoo")


def test_absorb_says_of_every_node_why_no_save_takes_the_rest_there(tmp_path: Path) -> None:
    one, other, why = PAIRS["bias, embedding"]
    tree = family(one, one)
    tree.remove("p/y")
    tree.add("p/x/w", adapter=of("m.o", increments()))
    error = refused(
        tree, lambda tree: lt.absorb(tree, "n", other, under="p/x"), FormatError, tmp_path / "zoo"
    )
    assert error.what == "n: what remains of it can't be saved below any of 3 nodes"
    places = ("p/x/n", "p/x/w/n", "p/x/z/n")
    assert sorted(error.todo[:3]) == [f"{place}: {why}" for place in places]
    assert error.todo[3].startswith("absorb it below another node")


def alike() -> lt.AdapterTree:
    """Return four adapters that share a part which the fifth one, c, can't be below."""
    shared, embedding = increments(), increments(EMBEDDING)
    tree = lt.AdapterTree()
    for i in range(4):
        tree.add(f"w{i}", adapter=lt.Adapter({"m.o": shared, "m.wte": embedding}))
    tree.add("c", adapter=lt.Adapter({"m.o": shared, **WITH_BIAS.modules}))
    return tree


def test_grow_refuses_a_named_leaf_that_no_save_takes(tmp_path: Path) -> None:
    error = refused(
        alike(),
        lambda tree: lt.grow(tree, ["w*", "c"], max_error=1e-4, depth=1),
        FormatError,
        tmp_path / "zoo",
    )
    assert error.what == f"c, below shared: {PAIRS['bias, embedding'][2]}"
    assert error.todo[-1] == "leave c out, and name the others"


def test_grow_leaves_a_leaf_that_no_save_takes_alone(tmp_path: Path) -> None:
    tree = alike()
    wanted = copy.copy(tree)
    mine = tree.adapter("c")
    grown = lt.grow(tree, max_error=1e-4, depth=1)
    assert tree.adapter("c") is mine
    assert grown.edited.notes == (f"left alone: c, below shared: {PAIRS['bias, embedding'][2]}",)
    # The others are what they are if c is not there.
    wanted.remove("c")
    lt.grow(wanted, max_error=1e-4, depth=1)
    tree.save(tmp_path / "zoo")
    tree.remove("c")
    wanted.save(tmp_path / "wanted")
    assert tree.paths() == wanted.paths()
    for path in tree.paths():
        file = f"{path}/adapter_model.safetensors"
        assert (tmp_path / "zoo" / file).read_bytes() == (tmp_path / "wanted" / file).read_bytes()


def test_absorb_rounds_to_a_dtype_before_it_asks_whether_a_save_takes_it(tmp_path: Path) -> None:
    exact = increments()
    narrow = exact.with_tensors(lambda tensor: tensor.to(torch.float8_e4m3fn))
    tree = family(LINEAR, LINEAR)
    done = lt.absorb(tree, "n", of("m.new", narrow), dtype=torch.bfloat16)
    assert (done.parent, done.edited.notes) == ("", ())
    tree.save(tmp_path / "zoo")
    with pytest.raises(FormatError, match=r"^n: m\.new: dtype torch\.float8") as raised:
        lt.absorb(lt.AdapterTree(), "n", of("m.new", narrow))
    # One adapter is no sum, so no line says to leave a part of it out.
    assert raised.value.todo == ("convert it: adapter.to(dtype=torch.bfloat16)",)


def test_a_tree_in_memory_that_no_save_takes_can_be_worked_on(tmp_path: Path) -> None:
    one, other, _ = PAIRS["bias, embedding"]
    tree = family(one, other)
    tree.add("q", adapter=lt.combine([(one, 1.0), (other, 1.0)]))
    assert lt.squash(tree, "p/x/z", to="n").added == ("n",)
    with pytest.raises(FormatError, match=r"^(n|q): m\.wte"):
        tree.save(tmp_path / "zoo")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_are_not_rounded_to_a_dtype_that_is_not_written(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    def tree() -> lt.AdapterTree:
        made = family(LINEAR, of("m.q", increments()))
        made.add("flat", adapter=LINEAR)
        made.add("flatter", adapter=LINEAR)
        return made

    verbs: list[Verb] = [
        lambda tree: lt.squash(tree, "p/x/z", to="n", dtype=dtype),
        lambda tree: lt.rebase(tree, "p/x/z", to="p/n", dtype=dtype),
        lambda tree: lt.rebase_all(tree, "p/x", weight=0.5, dtype=dtype),
        lambda tree: lt.absorb(tree, "n", LINEAR, dtype=dtype),
        lambda tree: lt.compress(tree, rank=1, dtype=dtype),
        lambda tree: lt.grow(tree, ["flat", "flatter"], max_error=0.1, dtype=dtype),
    ]
    for i, verb in enumerate(verbs):
        error = refused(tree(), verb, SpecError, tmp_path / f"zoo{i}")
        assert error.what == (
            f"dtype: factors are not written in {dtype}, expected bf16, fp16, fp32 or fp64"
        )


def test_a_grafted_name_that_differs_by_case_is_refused(tmp_path: Path) -> None:
    tree = family(LINEAR, LINEAR)
    other = lt.AdapterTree()
    other.add("X", adapter=LINEAR)
    error = refused(tree, lambda tree: lt.graft(tree, "p", other), TreeError, tmp_path / "zoo")
    assert error.what == "p/X differs from p/x only by case"


def test_an_export_names_the_path_and_the_form_that_holds_it(shell: Shell, tmp_path: Path) -> None:
    one, other, why = PAIRS["bias, embedding"]
    family(one, other).save(tmp_path / "zoo")
    code, _, told = shell(
        "export", tmp_path / "zoo", "p/x/z", "--as", "peft", "--out", tmp_path / "p"
    )
    assert code == 1
    assert f"p/x/z: {why}" in told
    assert "or write the path merged into a checkpoint: --as model" in told
    assert not (tmp_path / "p").exists()
