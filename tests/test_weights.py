"""Weights per module: the same sum as by hand everywhere a weight goes, and a plain number as
ever.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import dense, lineage, low_rank, random_adapter
from shell import save_base
from torch import Tensor, nn
from zoo import opened

import lora_tree as lt
from lora_tree.errors import LoraTreeError, SpecError
from lora_tree.folder.lockfile import lineage as lineage_hash
from lora_tree.weights import as_weight, parse_weight

NAMES = [f"layers.{i}.{end}" for i in range(3) for end in ("q_proj", "down_proj")]
SHAPES = dict.fromkeys(NAMES, (6, 6))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.tanh(self.q_proj(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def net() -> Net:
    torch.manual_seed(0)
    return Net()


OWN: dict[str, Any] = {
    "fr": {"default": 1.0, "*.down_proj": 0.5, "layers.[0-1].*": 0},
    "fr/legal": 0.8,
    "fr/medical": {"q_proj": -2.0, "layers.2.*": 3.0},
}


def by_hand(path: str, module: str) -> float:
    """What OWN says for a module, written out."""
    end, layer = module.rpartition(".")[2], int(module.split(".")[1])
    if path == "fr":
        if end == "down_proj":
            return 0.5
        return 0.0 if layer < 2 else 1.0
    if path == "fr/medical":
        return -2.0 if end == "q_proj" else 3.0 if layer == 2 else 1.0
    return 0.8


def family() -> lt.AdapterTree:
    tree = lt.AdapterTree(base="org/model")
    for seed, path in enumerate(OWN):
        tree.add(path, adapter=random_adapter(SHAPES, seed, scale=0.3), weight=OWN[path])
    return tree


def summed(tree: lt.AdapterTree, blend: Mapping[str, Any], module: str) -> Tensor:
    """ΔW of a module in float64; an entry's weight is a number or a function of the module."""
    total = torch.zeros(6, 6, dtype=torch.float64)
    for path, share in blend.items():
        number = share(module) if callable(share) else share
        for node in lineage(path):
            adapter = tree.adapter(node)
            assert adapter is not None
            total += number * by_hand(node, module) * dense(adapter.modules[module])
    return total


def with_delta(base: Net, delta: Mapping[str, Tensor]) -> Net:
    made = copy.deepcopy(base).double()
    with torch.no_grad():
        for name, change in delta.items():
            made.get_submodule(name).weight += change  # type: ignore[operator]
    return made


def only_down(module: str) -> float:
    return 0.25 if module.endswith("down_proj") else 0.0


BLENDS: list[tuple[Any, dict[str, Any]]] = [
    ("fr", {"fr": 1.0}),
    ("fr/legal", {"fr/legal": 1.0}),
    ("fr/medical", {"fr/medical": 1.0}),
    ({"fr/legal": 0.5, "fr/medical": 0.5}, {"fr/legal": 0.5, "fr/medical": 0.5}),
    (
        {"fr/legal": {"default": 0, "down_proj": 0.25}, "fr/medical": 0.5},
        {"fr/legal": only_down, "fr/medical": 0.5},
    ),
    ("fr/legal:{down_proj=0.25,default=0}", {"fr/legal": only_down}),
]


# ---------------------------------------------------------------------- the value
def test_the_first_pattern_that_matches_counts_and_default_is_for_the_rest() -> None:
    weight = as_weight({"*.down_proj": 0.5, "default": 2, "layers.[0-7].*": 0})
    assert isinstance(weight, lt.ModuleWeights)
    asked = ["a.layers.3.down_proj", "layers.3.q_proj", "layers.9.q_proj", "layers.12.q_proj"]
    assert [weight.of(name) for name in asked] == [0.5, 0.0, 2.0, 2.0]
    turned = as_weight({"layers.[0-7].*": 0, "*.down_proj": 0.5})
    assert isinstance(turned, lt.ModuleWeights)
    assert turned.of("layers.3.down_proj") == 0.0


def test_a_number_stays_a_number_whatever_way_it_is_written() -> None:
    tree = lt.AdapterTree()
    for name, weight in {"a": 0.5, "b": {"default": 0.5}}.items():
        tree.add(name, adapter=random_adapter(SHAPES), weight=weight)
    assert type(tree["a"].weight) is type(tree["b"].weight) is float
    assert tree["a"].weight == tree["b"].weight == 0.5
    # The hash of a lineage as every lock has had it.
    text = f"{'0' * 64} {'1' * 64} {(0.8).hex()}"
    assert lineage_hash("0" * 64, "1" * 64, 0.8) == hashlib.sha256(text.encode()).hexdigest()


PATTERN = st.sampled_from(["*", "q_proj", "*.down_proj", "layers.[0-7].*", "a?b", "layers.1.*"])
NUMBER = st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(PATTERN | st.just("default"), NUMBER, min_size=1), NUMBER)
def test_a_blend_is_spelled_so_that_it_is_read_back(given: dict[str, float], other: float) -> None:
    blend = {"fr": given, "de": other}
    read = lt.parse_blend(lt.blend.spelled(blend) or {"": 1})
    for path, weight in lt.parse_blend(blend).items():
        assert read.get(path, 0.0) == weight
    weight = as_weight(given)
    assert parse_weight(f"{weight}") == weight


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        ({}, "an empty mapping"),
        ({"*.q": "1"}, "must be a finite number, got '1'"),
        ({"*.q": float("nan")}, "must be a finite number"),
        ({"*.q": True}, "must be a finite number"),
        ({r".*\.q": 1}, "of a regular expression; the patterns here are globs"),
        ({"q proj": 1}, "which is in no name of a module"),
        ({"": 1}, "is empty; '*' names every module"),
        ({"x" * 3000: 1}, "longer than"),
        ({1: 1.0}, "pattern 1"),
        ("0.5", "must be a finite number"),
    ],
)
def test_what_is_no_weight_is_refused_and_nothing_changes(weight: Any, said: str) -> None:
    tree = family()
    with pytest.raises(SpecError, match=r"fr/x: weight") as told:
        tree.add("fr/x", adapter=random_adapter(SHAPES), weight=weight)
    assert said in str(told.value)
    assert "fr/x" not in tree
    with pytest.raises(SpecError):
        tree.coefficients({"fr": weight})


# ---------------------------------------------------------------------- everywhere a weight goes
@pytest.mark.parametrize(("blend", "wanted"), BLENDS)
def test_merged_unmerged_and_flattened_are_the_dense_sum(
    blend: Any, wanted: dict[str, Any]
) -> None:
    tree, base = family(), net()
    delta = {name: summed(tree, wanted, name) for name in NAMES}
    flat = tree.flatten(blend)
    for name in NAMES:
        found = dense(flat.modules[name]) if name in flat.modules else torch.zeros(6, 6).double()
        torch.testing.assert_close(found, delta[name], atol=1e-6, rtol=1e-5)
    x = torch.randn(4, 6)
    expected = with_delta(base, delta)(x.double())
    pristine = copy.deepcopy(base.state_dict())
    model = lt.attach(tree, base)
    for mode in ("merged", "unmerged"):
        model.activate(blend, mode=mode)  # type: ignore[arg-type]
        torch.testing.assert_close(base(x).double(), expected, atol=1e-5, rtol=1e-4)
    model.deactivate()
    assert all(torch.equal(base.state_dict()[name], own) for name, own in pristine.items())


@pytest.mark.parametrize("strategy", ["auto", "nodes", "paths", "grouped", "matrix"])
def test_each_row_of_a_batch_has_its_own_weights(strategy: Any) -> None:
    tree, base = family(), net()
    # One path twice, once with the node's own weights and once with others.
    asked = [blend for blend, _ in BLENDS] + ["", "fr/medical"]
    wanted = [want for _, want in BLENDS] + [{}, {"fr/medical": 1.0}]
    x = torch.randn(len(asked), 6)
    model = lt.attach(tree, base)
    with model.route(asked, strategy=strategy):
        out = base(x)
    for row, want in enumerate(wanted):
        delta = {name: summed(tree, want, name) for name in NAMES}
        torch.testing.assert_close(
            out[row].double(),
            with_delta(net(), delta)(x[row].double()),
            atol=1e-5,
            rtol=1e-4,
        )


def test_a_zero_leaves_the_module_out_even_where_a_factor_is_infinite() -> None:
    broken = random_adapter(SHAPES)
    broken.modules["layers.0.q_proj"].A.fill_(torch.inf)
    tree = lt.AdapterTree()
    tree.add("fr", adapter=broken, weight={"layers.0.q_proj": 0})
    assert "layers.0.q_proj" not in tree.flatten("fr").modules
    base = net()
    lt.attach(tree, base).activate("fr")
    assert torch.isfinite(base(torch.ones(1, 6))).all()


def test_gradients_come_back_through_a_weight_per_module() -> None:
    tree, base = family(), net()
    model = lt.attach(tree, base)
    x = torch.randn(3, 6)
    model.trainable("fr/medical")
    with model.route(["fr/medical", "fr/medical:{q_proj=0.5}", "fr/legal"]):
        base(x).square().sum().backward()
    adapter = tree.adapter("fr/medical")
    assert adapter is not None
    own = {name: value.B.grad for name, value in adapter.modules.items()}
    # The same by hand: autograd through dense sums in float64.
    factors = {}
    for name, value in adapter.modules.items():
        factors[name] = value.B.detach().double().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for row, share in enumerate((1.0, 0.5, None)):
        replaced = {}
        for name, value in adapter.modules.items():
            part = share if share == 1.0 or name.endswith("q_proj") else 1.0
            others = {"fr/legal": 1.0} if share is None else {"fr": part}
            total = summed(tree, others, name)
            if share is not None:
                mine = factors[name] @ value.A.detach().double() * value.scale
                total = total + part * by_hand("fr/medical", name) * mine
            own_weight = net().get_submodule(name).weight.detach().double()  # type: ignore[operator]
            replaced[f"{name}.weight"] = own_weight + total
        out = torch.func.functional_call(net().double(), replaced, (x[row : row + 1].double(),))
        loss = loss + out.square().sum()
    loss.backward()
    for name, wanted in factors.items():
        grad = own[name]
        assert grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(grad.double(), wanted.grad, atol=1e-4, rtol=1e-4)


def test_switching_between_weights_leaves_no_trace_of_history() -> None:
    fresh, used = net(), net()
    model = lt.attach(family(), used)
    for blend, _ in BLENDS * 2:
        model.activate(blend)
    model.activate("fr/medical")
    lt.attach(family(), fresh).activate("fr/medical")
    for name, own in fresh.state_dict().items():
        assert torch.equal(own, used.state_dict()[name]), name


def test_a_weight_of_0_leaves_the_override_of_a_module_out_and_any_other_keeps_it() -> None:
    head = lt.Override(torch.full((6, 6), 7.0))
    adapter = lt.Adapter(random_adapter(SHAPES).modules, overrides={"layers.2.q_proj.weight": head})
    for number, stands in ((0, False), (0.5, True)):
        tree, base = lt.AdapterTree(), net()
        tree.add("fr", adapter=adapter, weight={"layers.2.*": number})
        ground = head.values if stands else net().layers[2].q_proj.weight.detach()  # type: ignore[union-attr]
        delta = number * dense(adapter.modules["layers.2.q_proj"])
        lt.attach(tree, base).activate("fr")
        found = base.layers[2].q_proj.weight.detach()  # type: ignore[union-attr]
        torch.testing.assert_close(found.double(), ground.double() + delta, atol=1e-5, rtol=1e-5)


def test_rows_with_different_weights_share_the_override_of_their_node() -> None:
    head = lt.Override(torch.full((6, 6), 3.0))
    adapter = lt.Adapter(random_adapter(SHAPES).modules, overrides={"layers.2.q_proj.weight": head})
    tree, base = lt.AdapterTree(), net()
    tree.add("fr", adapter=adapter, weight={"layers.2.*": 0.5})
    tree.add("fr/x", adapter=random_adapter(SHAPES, 3), weight={"q_proj": 2.0})
    asked = ["fr", "fr:{layers.2.*=0.25}", "", "fr/x"]
    model, x = lt.attach(tree, base), torch.randn(4, 6)
    alone = []
    for row, path in enumerate(asked):
        with model.using(path):
            alone.append(base(x[row : row + 1]))
    with model.route(asked):
        torch.testing.assert_close(base(x), torch.cat(alone), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- patterns that match nothing
def test_a_pattern_that_matches_no_module_is_named_with_the_nearest(tmp_path: Path) -> None:
    tree = family()
    said = (
        r"weight: pattern '\*\.dwn_proj' matches no module of its adapter; did you mean 'down_proj'"
    )
    with pytest.raises(SpecError, match=f"fr: {said}"):
        tree.update("fr", weight={"*.dwn_proj": 0.5})
    with pytest.raises(SpecError, match=f"fr/x: {said}"):
        tree.add("fr/x", adapter=random_adapter(SHAPES), weight={"*.dwn_proj": 0.5})
    with pytest.raises(SpecError, match=f"fr, fr/legal: {said}"):
        tree.flatten({"fr/legal": {"*.dwn_proj": 0.5}})
    model = lt.attach(tree, net())
    with pytest.raises(SpecError, match=f"fr, fr/legal: {said}"):
        model.activate({"fr/legal": {"*.dwn_proj": 0.5}})
    rows = ["", "fr", "fr:{q_proj=0.5}", "fr:{*.dwn_proj=0.5}"]
    with pytest.raises(SpecError, match=f"^fr: {said}"), model.route(rows):
        pass
    assert model.active == ""
    model.detach()
    # In a tree.yaml it is found where the adapter is read, and by `check`.
    tree.save(tmp_path)
    yaml = tmp_path / "tree.yaml"
    yaml.write_text(yaml.read_text().replace('"*.down_proj"', '"*.dwn_proj"'))
    with pytest.raises(SpecError, match=f"fr: {said}"):
        opened(tmp_path).flatten("fr")
    assert any("matches no module" in problem.text for problem in lt.check(tmp_path))


def test_an_entry_of_a_blend_may_match_a_module_of_any_node_that_it_passes_through() -> None:
    tree = lt.AdapterTree()
    tree.add("a", adapter=random_adapter({"q_proj": (6, 6)}))
    tree.add("a/b", adapter=random_adapter({"down_proj": (6, 6)}))
    flat = tree.flatten({"a/b": {"q_proj": 0.5, "down_proj": 2.0}})
    assert {name: value.scale for name, value in flat.modules.items()} == {
        "down_proj": 2.0,
        "q_proj": 0.5,
    }


# ---------------------------------------------------------------------- files
def test_a_tree_is_saved_and_opened_with_its_weights(tmp_path: Path) -> None:
    tree = family()
    tree.save(tmp_path)
    text = (tmp_path / "tree.yaml").read_text()
    assert '"*.down_proj": 0.5' in text
    assert "weight: 0.8" in text
    again = lt.load(tmp_path)
    assert {path: again[path].weight for path in again} == {
        path: tree[path].weight for path in tree
    }
    again.save(tmp_path)
    assert (tmp_path / "tree.yaml").read_text() == text
    assert lt.check(tmp_path) == []


def test_a_yaml_of_a_plain_number_is_written_as_ever(tmp_path: Path) -> None:
    tree = lt.AdapterTree(base="org/model")
    tree.add("fr", adapter=random_adapter(SHAPES, base="org/model"), weight={"default": 0.8})
    tree.save(tmp_path)
    assert (tmp_path / "tree.yaml").read_text() == (
        "version: 1\nbase: org/model\ntree:\n  fr:\n    weight: 0.8\n"
    )


def test_another_weight_per_module_above_makes_a_node_stale_and_says_which(tmp_path: Path) -> None:
    family().save(tmp_path)
    yaml = tmp_path / "tree.yaml"
    yaml.write_text(yaml.read_text().replace('"*.down_proj": 0.5', '"*.down_proj": 0.25'))
    stale = opened(tmp_path)["fr/legal"].stale
    assert stale is not None
    assert "the weight of fr (was {*.down_proj=0.5,layers.[0-1].*=0.0,default=1.0}, now" in stale
    # The order counts, because the first pattern that matches does.
    other = lt.AdapterTree(base="org/model")
    other.add(
        "fr", adapter=random_adapter(SHAPES), weight={"layers.[0-1].*": 0, "*.down_proj": 0.5}
    )
    assert other["fr"].weight != family()["fr"].weight


@pytest.mark.parametrize(
    ("weight", "said", "column"),
    [
        ("{}", "an empty mapping", 5),
        ('{"*.q": x}', "should be a valid number", 14),
        ('{".*\\\\.q": 1}', "of a regular expression", 5),
        ("[1]", "should be a valid number", 5),
    ],
)
def test_a_weight_that_is_none_is_told_by_line(
    tmp_path: Path, weight: str, said: str, column: int
) -> None:
    family().save(tmp_path)
    yaml = tmp_path / "tree.yaml"
    yaml.write_text(f"version: 1\ntree:\n  fr:\n    weight: {weight}\n")
    with pytest.raises(SpecError, match=said) as told:
        lt.load(tmp_path)
    assert f"tree.yaml:4:{column}: node fr: weight" in str(told.value)


# ---------------------------------------------------------------------- exports
LLAMA = "model.layers.0"


def exported(folder: Path) -> tuple[lt.AdapterTree, Path, dict[str, Tensor]]:
    """A tree over a saved Llama; and what "fr/legal" adds to each of its modules, by hand."""
    base = save_base(folder / "base")
    shapes = {f"{LLAMA}.self_attn.q_proj": (32, 32), f"{LLAMA}.self_attn.v_proj": (32, 32)}
    tree = lt.AdapterTree(base=str(base))
    tree.add("fr", adapter=random_adapter(shapes, 1), weight={"q_proj": 0.5, "default": 0})
    tree.add("fr/legal", adapter=random_adapter(shapes, 2), weight={"v_proj": -2.0})
    wanted = {}
    for name, (up, down) in {"q_proj": (0.5, 1.0), "v_proj": (0.0, -2.0)}.items():
        module = f"{LLAMA}.self_attn.{name}"
        parts = [tree.adapter(node).modules[module] for node in ("fr", "fr/legal")]  # type: ignore[union-attr]
        wanted[module] = up * dense(parts[0]) + down * dense(parts[1])
    return tree, base, wanted


def test_exports_have_the_weights_in_their_numbers(tmp_path: Path) -> None:
    tree, base, wanted = exported(tmp_path)
    lt.portable(tree, "fr/legal").save(tmp_path / "portable")
    lt.export_mlx(tree, "fr/legal", tmp_path / "mlx")
    tree.flatten("fr/legal").save(tmp_path / "peft")
    for name in ("portable", "mlx", "peft"):
        found = lt.Adapter.load(tmp_path / name)
        for module, delta in wanted.items():
            torch.testing.assert_close(dense(found.modules[module]), delta, atol=1e-5, rtol=1e-5)
    lt.export_model(tree, "fr/legal", tmp_path / "model")
    before = safetensors.torch.load_file(base / "model.safetensors")
    after = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    for name, own in before.items():
        delta = wanted.get(name.removesuffix(".weight"), torch.zeros(()).double())
        torch.testing.assert_close(after[name].double(), own.double() + delta, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- verbs
def weighed(tree: lt.AdapterTree, path: str) -> dict[str, Tensor]:
    """A path's sum in float64, from the tree's own weights."""
    total = {name: torch.zeros(6, 6, dtype=torch.float64) for name in NAMES}
    for node in lineage(path):
        adapter, weight = tree.adapter(node), tree[node].weight
        for name, value in adapter.modules.items() if adapter else ():
            number = weight if isinstance(weight, float) else weight.of(name)
            total[name] += number * dense(value)
    return total


def same(now: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in NAMES:
        torch.testing.assert_close(now[name], wanted[name], atol=1e-5, rtol=1e-5)


def grown() -> lt.AdapterTree:
    """The family without zeros, a node of one module, and a place to move to."""
    tree = family()
    tree.update("fr", weight={"*.down_proj": 0.5, "layers.[0-1].*": 4.0})
    tree.add("de", adapter=random_adapter(SHAPES, 7), weight={"layers.0.*": -1.0})
    return tree


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        (lambda tree: lt.squash(tree, "fr/medical", to="one"), "one"),
        (lambda tree: lt.rebase(tree, "fr/medical", to="de/medical"), "de/medical"),
        (
            lambda tree: lt.split(tree, "fr/medical", to="fr/medical/q", modules=["q_proj"]),
            "fr/medical/q",
        ),
        (lambda tree: lt.split(tree, "fr/medical", to="fr/medical/q", rank=1), "fr/medical/q"),
        (lambda tree: lt.hoist(tree, "fr"), "fr/medical"),
        (lambda tree: lt.hoist(tree, "fr", into="fr/both"), "fr/both/medical"),
        (lambda tree: lt.rebase_all(tree, "fr", weight={"layers.2.*": 0.25}), "fr/medical"),
    ],
)
def test_a_verb_keeps_the_effective_weight(verb: Any, path: str) -> None:
    tree = grown()
    wanted = weighed(tree, "fr/medical")
    verb(tree)
    same(weighed(tree, path), wanted)
    assert tree.flatten(path).modules.keys() <= set(
        NAMES
    )  # no pattern is left that matches nothing


def test_what_no_increment_can_make_up_for_is_refused() -> None:
    tree = grown()
    tree.update("fr/medical", weight={"layers.1.q_proj": 0})
    for verb in (
        lambda: lt.rebase(tree, "fr/medical", to="de/medical"),
        lambda: lt.hoist(tree, "fr"),
    ):
        with pytest.raises(SpecError, match=r"fr/medical: its weight is 0 at layers\.1\.q_proj"):
            verb()


def test_merge_compress_and_scaled_take_weights_per_module() -> None:
    x, y = random_adapter(SHAPES, 1), random_adapter(SHAPES, 2)
    found = lt.merge([x, y], [{"q_proj": 0.5, "default": 0}, 2.0], method="linear").adapter
    both = lt.combine([(x, {"q_proj": 0.5, "default": 0}), (y, 2.0)])
    for name in NAMES:
        own = 0.5 if name.endswith("q_proj") else 0.0
        wanted = own * dense(x.modules[name]) + 2.0 * dense(y.modules[name])
        torch.testing.assert_close(dense(found.modules[name]), wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(dense(both.modules[name]), wanted, atol=1e-5, rtol=1e-4)
    assert list(x.scaled({"q_proj": 2, "default": 0}).modules) == [n for n in NAMES if "q" in n][:3]
    with pytest.raises(SpecError, match="scaled: weight: pattern 'k_proj' matches no module"):
        x.scaled({"k_proj": 2})
    # A module counts by its weight: of modules that are alike, one with a small one is cut first.
    tree = lt.AdapterTree()
    alike = lt.Adapter(dict.fromkeys(NAMES, low_rank(6, 6)))
    tree.add("a", adapter=alike, weight={"layers.0.*": 1e-3})
    ranks = lt.compress(tree, max_error=0.2).ranks["a"]
    # Left out is rank 0.
    for end in ("q_proj", "down_proj"):
        assert ranks.get(f"layers.0.{end}", 0) < ranks[f"layers.2.{end}"]


def test_diff_and_json_tell_weights_as_mappings() -> None:
    one, other = family(), family()
    other.update("fr", weight=1.0)
    found = lt.diff_trees(one, other)
    assert found.as_dict()["weights"] == {
        "fr": [{"default": 1.0, "*.down_proj": 0.5, "layers.[0-1].*": 0.0}, 1.0]
    }
    assert lt.diff_paths(one, "fr", "fr").is_nothing


def test_a_node_is_not_trained_where_its_weight_is_0(tmp_path: Path) -> None:
    from lora_tree.runs.refusals import check_weights

    tree = family()
    with pytest.raises(SpecError, match=r"fr has weight 0 at layers\.0\.q_proj, layers\.1\.q_proj"):
        check_weights(tree, ["fr"])
    check_weights(tree, ["fr/medical"])


def test_a_mixed_pair_of_weights_is_never_mistaken_for_a_number() -> None:
    value = low_rank(6, 6)
    with pytest.raises((LoraTreeError, TypeError)):
        value.scaled(as_weight({"q": 0.5}))  # type: ignore[arg-type]
