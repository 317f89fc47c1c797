"""The portable adapter: PEFT computes from it what the tree computes, its form is the one that
engines read, and its error is the error of a dense float64 model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHS, BLEND, BLENDED, PATHS, Arch, along, dense, run
from oracle import low_rank
from safetensors.torch import load_file, save_file
from test_architectures import in_peft, with_quiet_peft
from test_peft_format import CASES, IDS, Case, loaded_in_peft, saved
from torch import nn

import lora_tree as lt
from lora_tree.errors import BaseMismatch, FormatError, LoraTreeError, SpecError

REFUSED = {"lora_bias"}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def has_the_form(folder: Path) -> None:
    """Uniform r, alpha = r, no patterns, nothing beside the factors; q/k/v and gate/up together."""
    config, tensors = config_of(folder), load_file(folder / "adapter_model.safetensors")
    r = config["r"]
    assert config["lora_alpha"] == r
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert (config["use_rslora"], config["bias"], config["lora_bias"]) == (False, "none", False)
    assert not config.get("modules_to_save")
    assert all(".lora_" in key for key in tensors)
    names = {key.split(".lora_")[0] for key in tensors}
    for name in names:
        before, _, leaf = name.rpartition(".")
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if leaf in group:
                assert {f"{before}.{other}" for other in group} <= names
    if not config.get("target_parameters"):
        ranks = {
            tensor.shape[0]
            for key, tensor in tensors.items()
            if key.endswith((".lora_A.weight", "embedding_A"))
        }
        assert ranks == {r}


# -------------------------------------------------------------------- PEFT gives the tree's outputs
@with_quiet_peft
@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
def test_peft_gives_what_the_tree_gives(arch: Arch, tmp_path: Path) -> None:
    base = arch.base()
    tree, inputs = arch.tree(base, factors=torch.float32), arch.inputs()
    for number, (blend, nodes) in enumerate(
        [*((path, along(path)) for path in PATHS), (BLEND, BLENDED)]
    ):
        made = lt.portable(tree, blend, base=base, complete=True)
        made.save(tmp_path / str(number))
        has_the_form(tmp_path / str(number))
        peft = in_peft(base, tmp_path / str(number))
        if (
            "whisper" in str(type(base)).lower()
        ):  # PEFT wraps the convolutions, and Whisper reads their stride
            peft = peft.merge_and_unload()
        expected = run(dense(base, tree, nodes), inputs)
        torch.testing.assert_close(run(peft, inputs), expected, rtol=1e-5, atol=1e-5)
        assert (run(base, inputs) - expected).abs().max() > 0.01
        assert made.worst < 1e-6


@pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own, about the odd layers
@pytest.mark.parametrize("case", [case for name, case in CASES.items() if name not in REFUSED],
                         ids=[name for name in CASES if name not in REFUSED])  # fmt: skip
def test_every_kind_of_site_goes_through_peft(case: Case, tmp_path: Path) -> None:
    made = case.made()
    tree = lt.AdapterTree()
    tree.add("one", adapter=saved(made, tmp_path / "peft"))
    torch.manual_seed(0)
    lt.portable(tree, "one", base=case.model(), complete=True).save(tmp_path / "out")
    has_the_form(tmp_path / "out")
    again = loaded_in_peft(case, tmp_path / "out")
    with torch.no_grad():
        ours, theirs = (
            found if isinstance(found := model(IDS), list) else [found.logits]
            for model in (again, made)
        )
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["attention", "grouped", "conv2d", "three_parameters", "embedding"]
)
def test_what_peft_may_get_wrong_is_the_dense_sum(name: str, tmp_path: Path) -> None:
    """An attention's out-projection, a grouped kernel, …: the factors on the disk, multiplied out
    by hand.
    """
    tree = lt.AdapterTree()
    tree.add("one", adapter=saved(CASES[name].made(), tmp_path / "peft"), weight=0.7)
    second = tree.adapter("one")
    assert second is not None
    tree.add("one/two", adapter=second.scaled(-0.3))
    torch.manual_seed(0)
    lt.portable(tree, "one/two", base=CASES[name].model()).save(tmp_path / "out")
    read = lt.Adapter.load(tmp_path / "out").modules
    assert read.keys() == second.modules.keys()
    for module, value in second.modules.items():
        wanted = (0.7 - 0.3) * value.scale * (value.B.double() @ value.A.double())
        got = read[module].scale * (read[module].B.double() @ read[module].A.double())
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- small trees
def value(out: int = 6, into: int = 4, r: int = 2, seed: int = 0, **more: Any) -> lt.LowRank:
    return low_rank(out, into, r, seed=seed, **more)


def stack(**modules: lt.LowRank) -> lt.AdapterTree:
    """fr → legal, both over the same modules."""
    tree = lt.AdapterTree(base="org/model")
    tree.add("fr", adapter=lt.Adapter(modules))
    tree.add(
        "fr/legal", adapter=lt.Adapter({n: v.scaled(0.3) for n, v in modules.items()}), weight=0.7
    )
    return tree


def off(tree: lt.AdapterTree, made: lt.Portable) -> tuple[dict[str, float], float]:
    """The errors of an export as dense float64 algebra has them."""
    sums: dict[str, torch.Tensor] = {}
    for _, c, adapter in tree.terms(made.path):
        for n, v in adapter.modules.items():
            sums[n] = sums.get(n, 0) + c * v.scale * (v.B.double() @ v.A.double())
    kept = {n: made.adapter.modules[n] for n in sums}
    lost = {
        n: torch.linalg.norm(v.B.double() @ v.A.double() - sums[n]).item() for n, v in kept.items()
    }
    whole = {n: torch.linalg.norm(w).item() for n, w in sums.items()}
    total = sum(x * x for x in lost.values()) ** 0.5 / sum(x * x for x in whole.values()) ** 0.5
    return {n: lost[n] / whole[n] for n in sums}, total


@pytest.mark.parametrize(
    "bounds",
    [
        {},
        {"rank": 3},
        {"max_error": 0.4},
        {"rank": 9, "max_error": 0.5},
        {"rank": 2, "dtype": torch.bfloat16},
        {"dtype": torch.float16},
    ],
)
def test_the_error_is_that_of_the_dense_sum(bounds: dict[str, Any]) -> None:
    tree = lt.AdapterTree()
    tree.add("fr", adapter=lt.Adapter({"a": value(9, 8, 3, 1, scale=0.3), "b": value(7, 8, 5, 2)}))
    tree.add("fr/legal", adapter=lt.Adapter({"a": value(9, 8, 4, 3, scale=1.7)}), weight=0.9)
    made = lt.portable(tree, "fr/legal", **bounds)
    errors, total = off(tree, made)
    assert made.errors == pytest.approx(errors, rel=1e-6, abs=1e-12)
    assert made.error == pytest.approx(total, rel=1e-6, abs=1e-12)
    assert made.rank <= bounds.get("rank", 7)
    if "max_error" in bounds:
        assert made.worst <= bounds["max_error"]
        assert made.worst > 0
    if "rank" in bounds and "max_error" not in bounds:
        assert made.worst > 0.01


def test_rounding_counts_in_the_error_and_against_its_bound() -> None:
    tree = stack(a=value())
    assert lt.portable(tree, "fr").worst == 0.0
    assert 1e-4 < lt.portable(tree, "fr", dtype=torch.bfloat16).worst < 0.02
    with pytest.raises(
        SpecError, match=r"fr/legal: a: relative error 0\.00\d+ once the factors are"
    ):
        lt.portable(tree, "fr/legal", max_error=1e-4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("r", "rank", "wanted"),
    [(2, None, 8), (9, None, 16), (9, 3, 8), (40, 33, 64), (200, None, 256)],
)
def test_the_rank_is_the_next_that_an_engine_allows(r: int, rank: int | None, wanted: int) -> None:
    tree = lt.AdapterTree()
    tree.add("fr", adapter=lt.Adapter({"a": value(300, 300, r), "b": value(300, 300, 1)}))
    made = lt.portable(tree, "fr", rank=rank, ceil_rank=True)
    assert (made.rank, set(made.adapter.ranks.values())) == (wanted, {wanted})
    assert made.worst == 0.0 if wanted >= r else made.worst > 0


def test_a_rank_that_no_engine_allows_is_refused() -> None:
    tree = stack(a=value(600, 600, 300))
    with pytest.raises(
        SpecError, match="fr/legal: rank 600 is over the largest that vLLM serves, 512"
    ):
        lt.portable(tree, "fr/legal", ceil_rank=True)
    assert lt.portable(tree, "fr/legal").rank == 600


def test_a_bound_that_is_not_met_names_the_module() -> None:
    tree = stack(a=value(8, 8, 1, 1), b=value(8, 8, 6, 2))
    with pytest.raises(SpecError, match=r"fr: b: rank 2 leaves a relative error .* needs rank 6"):
        lt.portable(tree, "fr", rank=2, max_error=0.001)
    with pytest.raises(SpecError, match=r"fr: rank must be a whole number, got 2\.5"):
        lt.portable(tree, "fr", rank=2.5)  # type: ignore[arg-type]


def test_groups_of_a_convolution_share_the_rank(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    conv = lt.LowRank(
        torch.randn(2, 3, 12, generator=g),
        torch.randn(2, 5, 3, generator=g),
        layout=lt.Layout("conv", (3,)),
    )
    made = lt.portable(stack(conv=conv, lin=value(r=4)), "fr")
    assert (made.rank, made.adapter.ranks) == (6, {"conv": 3, "lin": 6})
    assert lt.portable(stack(conv=conv, lin=value(r=4)), "fr", rank=5).adapter.ranks == {
        "conv": 2,
        "lin": 4,
    }
    with pytest.raises(SpecError, match="rank 1 is less than the 2 groups of a convolution"):
        lt.portable(stack(conv=conv), "fr", rank=1)


# ---------------------------------------------------------------------- q, k, v and gate, up
def test_an_export_depends_on_its_lineage_not_on_its_neighbours(tmp_path: Path) -> None:
    """q and v alone, as PEFT targets them in a Llama by default: nothing is added, whoever else is
    in the folder.
    """
    lineage = {"x.q_proj": value(8, 4), "x.v_proj": value(2, 4)}
    alone = lt.portable(stack(**lineage), "fr/legal")
    tree = stack(**lineage)
    tree.add("de", adapter=lt.Adapter({"x.k_proj": value(2, 4)}))
    beside = lt.portable(tree, "fr/legal")
    for number, made in enumerate((alone, beside)):
        assert sorted(made.adapter.modules) == ["x.q_proj", "x.v_proj"]
        assert (made.added, made.incomplete) == ((), ("x.k_proj",))
        made.save(tmp_path / str(number))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes()
    with pytest.raises(
        FormatError, match=r"fr: x\.k_proj: no node on the path changes(?s:.)*--base(?s:.)*--shape"
    ):
        lt.portable(tree, "fr", complete=True)


@with_quiet_peft
def test_q_and_v_alone_are_in_peft_what_they_are_in_the_tree(tmp_path: Path) -> None:
    arch = ARCHS["llama"]
    base, inputs = arch.base(), arch.inputs()
    names = [n for n, _ in base.named_modules() if n.endswith(("q_proj", "v_proj"))]
    modules = {n: value(*base.get_submodule(n).weight.shape, seed=i) for i, n in enumerate(names)}
    tree = stack(**modules)
    made = lt.portable(tree, "fr/legal")
    made.save(tmp_path / "out")
    expected = run(dense(base, tree, {"fr": 1.0, "fr/legal": 0.7}), inputs)
    torch.testing.assert_close(
        run(in_peft(base, tmp_path / "out"), inputs), expected, rtol=1e-5, atol=1e-5
    )
    assert config_of(tmp_path / "out")["target_modules"] != []
    assert {name.rpartition(".")[2] for name in made.incomplete} == {"k_proj"}


def test_missing_siblings_take_their_shape_from_what_is_stated() -> None:
    tree = stack(**{"x.q_proj": value(8, 4), "x.v_proj": value(2, 4), "y.q_proj": value(8, 4)})
    made = lt.portable(tree, "fr", complete=True, shapes={"k_proj": (2, 4), "y.v_proj": (3, 4)})
    assert made.added == ("x.k_proj", "y.k_proj", "y.v_proj")
    assert made.incomplete == ()
    shapes = {name: made.adapter.modules[name].shape for name in made.added}
    assert shapes == {"x.k_proj": (2, 4), "y.k_proj": (2, 4), "y.v_proj": (3, 4)}
    assert all(made.adapter.modules[name].dense().abs().max() == 0 for name in made.added)
    with pytest.raises(BaseMismatch, match=r"x\.k_proj: it is said to be \(2, 5\)"):
        lt.portable(tree, "fr", complete=True, shapes={"k_proj": (2, 5), "v_proj": (2, 4)})
    for shapes in (
        {"k_proj": (2,)},
        {"k_proj": (0, 4)},
        {"k_proj": "2x4"},
        {3: (2, 4)},
        {"k_proj": (2.0, 4)},
    ):
        with pytest.raises(SpecError, match=r"shapes: .* expected two positive whole numbers"):
            lt.portable(tree, "fr", complete=True, shapes=shapes)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="complete=True"):
        lt.portable(tree, "fr", shapes={"k_proj": (2, 4)})
    with pytest.raises(
        BaseMismatch, match=r"fr: k_proj: the base has \(2, 4\) there, and \(3, 4\) was stated"
    ):
        lt.portable(
            stack(q_proj=value(8, 4)),
            "fr",
            complete=True,
            base=Attention(),
            shapes={"k_proj": (3, 4)},
        )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(4, 8), nn.Linear(4, 2), nn.Linear(4, 2)
        self.other = nn.ModuleDict({"q_proj": nn.Linear(4, 8)})


def test_missing_siblings_take_their_shape_from_a_model_or_a_folder(tmp_path: Path) -> None:
    tree = stack(q_proj=value(8, 4))
    base = Attention()
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    for source in (base, tmp_path, str(tmp_path)):
        made = lt.portable(tree, "fr", base=source, complete=True)
        assert made.added == ("k_proj", "v_proj")
        assert made.adapter.modules["k_proj"].shape == (2, 4)
        # other.q_proj has the same last name and no factors: the targets are full names
        made.save(tmp_path / "out")
        assert config_of(tmp_path / "out")["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    tree.base = str(tmp_path)
    assert lt.portable(tree, "fr", complete=True).added == ("k_proj", "v_proj")
    assert lt.portable(tree, "fr").added == ()


def test_targets_are_last_names_only_where_the_base_has_no_others(tmp_path: Path) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.y = Attention(), Attention()

    tree = stack(**{"x.q_proj": value(8, 4), "x.other.q_proj": value(8, 4)})
    made = lt.portable(tree, "fr", base=Layers())
    made.save(tmp_path / "some")
    assert config_of(tmp_path / "some")["target_modules"] == ["x.other.q_proj", "x.q_proj"]
    tree = stack(**{f"{a}.{b}": value(2, 4) for a in "xy" for b in ("k_proj", "v_proj")})
    lt.portable(tree, "fr", base=Layers()).save(tmp_path / "all")
    assert config_of(tmp_path / "all")["target_modules"] == ["k_proj", "v_proj"]


def test_a_base_of_another_width_is_noticed() -> None:
    tree = stack(q_proj=value(8, 5))
    with pytest.raises(
        BaseMismatch, match=r"fr: k_proj: .*\(2, 4\), which reads 4 numbers, but q_proj reads 5"
    ):
        lt.portable(tree, "fr", base=Attention(), complete=True)


# ---------------------------------------------------------------------- what can't be expressed
def test_a_bias_is_refused_with_its_node_and_module() -> None:
    tree = stack(a=value())
    tree.add("fr/legal/x", adapter=lt.Adapter({"b": value(bias=torch.ones(6))}))
    with pytest.raises(
        FormatError, match=r"fr/legal/x: b: it adds a bias \(lora_bias\), which vLLM"
    ):
        lt.portable(tree, "fr/legal/x")


def test_a_tensor_that_came_along_must_be_the_base_s() -> None:
    tree = lt.AdapterTree()
    base = Attention()
    own = base.q_proj.bias.detach().clone()
    for path, bias in (("same", own), ("other", own + 1)):
        tree.add(path, adapter=lt.Adapter({"q_proj": value(8, 4)}, unchanged={"q_proj.bias": bias}))
    assert lt.portable(tree, "same", base=base).adapter.unchanged == {}
    with pytest.raises(
        BaseMismatch,
        match=r"other: q_proj\.bias: the adapter carries a bias that is not the base's",
    ):
        lt.portable(tree, "other", base=base)
    with pytest.raises(BaseMismatch, match="no weights are at hand to compare it with"):
        lt.portable(tree, "same")


def test_nothing_to_export_is_an_error() -> None:
    tree = lt.AdapterTree()
    tree.add("grp", group=True)
    for path in ("grp", ""):
        with pytest.raises(FormatError, match="there is nothing to export"):
            lt.portable(tree, path)


# ---------------------------------------------------------------------- every leaf
def test_every_leaf_is_exported_and_told(tmp_path: Path) -> None:
    tree = stack(a=value())
    tree.add("fr/medical", adapter=lt.Adapter({"a": value(seed=5)}))
    tree.add("grp", group=True)
    tree.add("de", adapter=lt.Adapter({"a": value(seed=6)}))
    told: list[str] = []
    written = lt.export_leaves(
        tree, tmp_path / "out", workers=3, progress=lambda one, *_: told.append(one.path)
    )
    assert told == [one.path for one in written] == ["de", "fr/legal", "fr/medical"]
    for path in told:
        wanted, got = lt.portable(tree, path).adapter, lt.Adapter.load(tmp_path / "out" / path)
        assert torch.equal(wanted.modules["a"].dense(), got.modules["a"].dense())
    assert lt.load(tmp_path / "out").leaves() == told


def test_a_leaf_that_fails_stops_the_run_and_names_itself(tmp_path: Path) -> None:
    tree = stack(a=value())
    tree.add("fr/odd", adapter=lt.Adapter({"a": value(bias=torch.ones(6))}))
    with pytest.raises(LoraTreeError, match="fr/odd: a: it adds a bias"):
        lt.export_leaves(tree, tmp_path / "out")
    assert not (tmp_path / "out" / "fr" / "odd").exists()
