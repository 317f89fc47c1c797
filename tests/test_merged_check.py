"""Is this merged checkpoint that path? Our own exports, PEFT's merges, and every mistake that
people make with one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHS
from safetensors.torch import load_file, save_file
from shell import Shell, answer
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.errors import FormatError, SpecError
from lora_tree.export import tensor_comparison

PATH = "a/b/c"


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


class Place:
    """A base on the disk, a tree over it, and a merged checkpoint that a test may spoil."""

    def __init__(self, root: Path, dtype: torch.dtype, name: str = "llama") -> None:
        self.root, self.dtype = root, dtype
        base = ARCHS[name].base().to(dtype)
        base.save_pretrained(root / "base", max_shard_size="30KB")
        self.tree = tree_over(base)
        self.model = base

    def export(self, blend: str = PATH) -> Path:
        lt.export_model(self.tree, blend, self.root / "out", base=self.root / "base")
        return self.root / "out"

    def spoil(self, change: Callable[[str, Tensor], Tensor]) -> None:
        """Change tensors of the merged checkpoint, given their names."""
        for file in (self.root / "out").glob("*.safetensors"):
            tensors = {name: change(name, t).contiguous() for name, t in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})

    def summed(self, multiples: dict[str, Callable[[lt.LowRank], float] | float]) -> None:
        """Write the base plus some multiples of nodes' increments, by dense fp64 algebra, as the
        merged checkpoint.
        """
        out = self.export()
        base: dict[str, Tensor] = {}
        for file in (self.root / "base").glob("*.safetensors"):
            base |= load_file(file)

        def put(name: str, _: Tensor) -> Tensor:
            total = base[name].double()
            for node, multiple in multiples.items():
                value = self.tree.adapter(node).modules.get(name.removesuffix(".weight"))
                if value is not None:
                    times = multiple(value) if callable(multiple) else multiple
                    total = total + times * value.dense(dtype=torch.float64)
            return total.to(base[name].dtype)

        self.spoil(put)
        assert out.is_dir()

    def check(self, blend: str = PATH) -> lt.MergedCheck:
        return lt.check_merged(self.tree, blend, self.root / "out", base=self.root / "base")


def tree_over(base: nn.Module, *, scale: float = 2.0) -> lt.AdapterTree:
    """a → b → c, and d beside them; b has a weight, and every module its own factors."""
    tree = lt.AdapterTree()
    names = [n for n, m in base.named_modules() if n.endswith(("q_proj", "down_proj"))]
    for seed, (path, weight) in enumerate({"a": 1.0, "a/b": 0.6, PATH: 1.0, "a/d": 1.0}.items()):
        draw = torch.Generator().manual_seed(seed)
        modules = {}
        for name in names:
            out, into = base.get_submodule(name).weight.shape
            A, B = torch.randn(4, into, generator=draw), torch.randn(out, 4, generator=draw)
            modules[name] = lt.LowRank(A * 0.1, B * 0.1, scale=scale)
        tree.add(path, adapter=lt.Adapter(modules), weight=weight)
    return tree


# ---------------------------------------------------------------------- what is right
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blend", [PATH, "a/b/c:0.5+a/d:0.5", ""])
def test_an_export_is_bit_equal(tmp_path: Path, dtype: torch.dtype, blend: str) -> None:
    place = Place(tmp_path, dtype)
    place.export(blend)
    found = place.check(blend)
    assert {tensor.verdict for tensor in found.tensors} == {"equal"}
    assert len(found.tensors) == len(dict(place.model.named_parameters()))
    assert found.is_that_path
    assert found.guess == "the path itself"


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert"])
def test_other_layouts_are_compared_in_the_model_s_names(tmp_path: Path, name: str) -> None:
    base = ARCHS[name].base().to(torch.float32)
    base.save_pretrained(tmp_path / "base")
    tree = ARCHS[name].tree(base, factors=torch.float32)
    lt.export_model(tree, "a", tmp_path / "out", base=tmp_path / "base")
    found = lt.check_merged(tree, "a", tmp_path / "out", base=tmp_path / "base")
    assert {tensor.verdict for tensor in found.tensors} == {"equal"}
    found = lt.check_merged(tree, "a", tmp_path / "base", base=tmp_path / "base")
    assert found.guess == "it is the base itself: nothing was merged"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_peft_merges_is_a_rounding_off(tmp_path: Path, dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft", reason="an extra of its own")
    place = Place(tmp_path, dtype)
    model = type(place.model).from_pretrained(tmp_path / "base", dtype=dtype)
    lt.portable(place.tree, PATH, base=model).save(tmp_path / "one")
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "one").merge_and_unload()
    merged.save_pretrained(tmp_path / "out")
    found = place.check()
    assert found.is_that_path
    # Stage by stage, each saved and merged into again.
    model = type(place.model).from_pretrained(tmp_path / "base", dtype=dtype)
    for node in ("a", "a/b", PATH):
        weight = place.tree[node].weight
        own = {n: v.scaled(weight) for n, v in place.tree.adapter(node).modules.items()}
        lt.Adapter(own).save(tmp_path / node.replace("/", "-"))
        model = peft.PeftModel.from_pretrained(model, tmp_path / node.replace("/", "-"))
        model = model.merge_and_unload()
    model.save_pretrained(tmp_path / "out")
    found = place.check()
    assert found.is_that_path
    assert {tensor.verdict for tensor in found.tensors} == {"equal", "rounding"}
    assert found.guess == "the path itself, rounded node by node, as by PEFT"


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16])
def test_another_dtype_is_a_rounding_and_is_told(tmp_path: Path, kept: torch.dtype) -> None:
    place = Place(tmp_path, torch.float32)
    place.export()
    # Saved in the narrow dtype: every tensor is the sum, cast.
    place.spoil(lambda name, tensor: tensor.to(kept))
    found = place.check()
    assert {tensor.verdict for tensor in found.tensors} == {"equal"}
    # Rounded through it, and saved in fp32 again.
    place.spoil(lambda name, tensor: tensor.float())
    found = place.check()
    assert found.is_that_path
    assert f"as of {str(kept)[6:]} arithmetic" in found.guess


def test_products_in_bf16_over_a_wide_base_are_a_rounding(tmp_path: Path) -> None:
    place = Place(tmp_path, torch.float32)
    place.export("a")
    base: dict[str, Tensor] = {}
    for file in (tmp_path / "base").glob("*.safetensors"):
        base |= load_file(file)

    def put(name: str, tensor: Tensor) -> Tensor:
        value = place.tree.adapter("a").modules.get(name.removesuffix(".weight"))
        if value is None:
            return tensor
        return base[name] + ((value.B.bfloat16() @ value.A.bfloat16()) * value.scale).float()

    place.spoil(put)
    found = place.check("a")
    assert found.is_that_path
    assert found.guess == "the path itself, as of bfloat16 arithmetic"


def test_increments_below_the_rounding_are_not_taken_for_it(tmp_path: Path) -> None:
    place = Place(tmp_path, torch.bfloat16)
    for node in place.tree.paths():
        small = {n: v.scaled(0.004) for n, v in place.tree.adapter(node).modules.items()}
        place.tree.update(node, adapter=lt.Adapter(small))
    place.export()
    assert place.check().is_that_path
    place.spoil(lambda name, tensor: place.model.state_dict()[name])
    found = place.check()
    assert not found.is_that_path
    assert found.guess == "it is the base itself: nothing was merged"


# ---------------------------------------------------------------------- what is wrong
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "base": ({}, "it is the base itself: nothing was merged"),
    "twice": ({"a": 2.0, "a/b": 1.2, PATH: 2.0}, "merged twice"),
    "left out": ({"a/b": 0.6, PATH: 1.0}, "a was left out"),
    "only the last": ({PATH: 1.0}, f"only {PATH} was merged, without a, a/b"),
    "one twice": ({"a": 1.0, "a/b": 1.2, PATH: 1.0}, "a/b was merged twice"),
    "subtracted": ({"a": -1.0, "a/b": -0.6, PATH: -1.0}, "subtracted instead of added"),
    "weight": ({"a": 1.0, "a/b": 1.0, PATH: 1.0}, "the weight of a/b was left out"),
    "scale": (
        {n: (lambda v, w=w: w / v.scale) for n, w in (("a", 1.0), ("a/b", 0.6), (PATH, 1.0))},
        "the scale lora_alpha / r was left out",
    ),
    "root": (
        {"a": 2.0**1, "a/b": 1.2, PATH: 2.0},  # √4, of the rank 4
        "merged twice",
    ),
    "square": (
        {n: (lambda v, w=w: w / v.rank**0.5) for n, w in (("a", 1.0), ("a/b", 0.6), (PATH, 1.0))},
        "the scale lora_alpha / r was left out",  # 1 / √4 is 1 / 2, and the scale is 2 as well
    ),
    "others": ({"a": 0.3, "a/b": 0.6, PATH: 1.0}, "the path with other weights: a 0.3 times"),
    "sibling": (
        {"a": 1.0, "a/b": 0.6, PATH: 1.0, "a/d": 1.0},
        "a/d was merged as well, 1 times",
    ),
    "instead": (
        {"a": 1.0, "a/d": 1.0},
        f"a/b 0 times, {PATH} 0 times; a/d was merged as well, 1 times",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_called_by_its_name(tmp_path: Path, mistake: str, dtype: torch.dtype) -> None:
    multiples, said = MISTAKES[mistake]
    place = Place(tmp_path, dtype)
    place.summed(multiples)
    found = place.check()
    assert not found.is_that_path
    assert found.guess == said
    changed = [t for t in found.tensors if t.name.endswith(("q_proj.weight", "down_proj.weight"))]
    assert {tensor.verdict for tensor in changed} == {"other"}
    rest = [tensor for tensor in found.tensors if tensor not in changed]
    assert {tensor.verdict for tensor in rest} == {"equal"}


def test_scales_that_differ_by_rank_are_told_apart(tmp_path: Path) -> None:
    place = Place(tmp_path, torch.float32)
    place.tree = tree_over(place.model, scale=3.0)
    for how, said in (
        (lambda v: v.rank**0.5, "scaled by alpha / √r instead of alpha / r"),
        (lambda v: v.rank**-0.5, "scaled by alpha / r instead of alpha / √r"),
        (lambda v: 1 / 3, "the scale lora_alpha / r was left out"),
    ):
        weights = {"a": 1.0, "a/b": 0.6, PATH: 1.0}
        if how(place.tree.adapter("a").modules[next(iter(place.tree.adapter("a").modules))]) == 2.0:
            said = "merged twice"  # the two are one mistake at rank 4, and this is the likelier
        place.summed({n: (lambda v, w=w, how=how: w * how(v)) for n, w in weights.items()})
        assert place.check().guess == said
        for file in (tmp_path / "out").iterdir():
            file.unlink()
        (tmp_path / "out").rmdir()


def test_weights_per_module_count(tmp_path: Path) -> None:
    place = Place(tmp_path, torch.float32)
    place.tree.update("a/b", weight={"*.q_proj": 0.5, "default": 0.0})
    place.export()
    assert place.check().guess == "the path itself"

    place.tree.update("a/b", weight=1.0)
    assert place.check().guess.startswith("a/b 0.")


def test_another_sum_is_no_path_of_the_tree(tmp_path: Path) -> None:
    place = Place(tmp_path, torch.float32)
    place.export()
    draw = torch.Generator().manual_seed(7)

    def stir(name: str, tensor: Tensor) -> Tensor:
        if "q_proj" not in name:
            return tensor
        return tensor + 0.3 * torch.randn(tensor.shape, generator=draw)

    place.spoil(stir)
    found = place.check()
    assert not found.is_that_path
    assert "of the change comes from no node of this tree" in found.guess


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_that_differs_is_found(tmp_path: Path, dtype: torch.dtype) -> None:
    place = Place(tmp_path, dtype)
    place.export()

    def swap(name: str, tensor: Tensor) -> Tensor:
        if name == "model.layers.0.self_attn.q_proj.weight":
            tensor[0, 0] = tensor[0, 0] + 0.05
        return tensor

    place.spoil(swap)
    found = place.check()
    (other,) = [tensor for tensor in found.tensors if tensor.verdict == "other"]
    assert other.name == "model.layers.0.self_attn.q_proj.weight"
    assert found.guess.startswith("the path, but 1 tensor holds something else: model.layers.0")


def test_what_the_path_does_not_touch_is_compared_too(tmp_path: Path) -> None:
    place = Place(tmp_path, torch.float32)
    place.export()
    place.spoil(lambda name, t: t * 1.5 if name == "model.norm.weight" else t)
    found = place.check()
    (other,) = [tensor for tensor in found.tensors if tensor.verdict == "other"]
    assert (other.name, other.said) == ("model.norm.weight", "the path does not change it")
    assert other.error == pytest.approx(0.5)
    assert found.guess == "the path; 1 tensor beside its weights differs: model.norm.weight"


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    place = Place(tmp_path, torch.float32)
    with pytest.raises(FormatError, match=r"no model\.safetensors"):
        lt.check_merged(place.tree, PATH, tmp_path, base=tmp_path / "base")
    with pytest.raises(SpecError, match="names no base"):
        lt.check_merged(place.tree, PATH, tmp_path)


def test_memory_is_one_parameter_and_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, torch.float32)
    place.export()
    whole = place.check()
    place.spoil(lambda name, t: t + 1 if name == "model.layers.0.self_attn.q_proj.weight" else t)
    one = place.check()
    monkeypatch.setattr(tensor_comparison, "BLOCK_NUMBERS", 40)  # a row or two at a time
    small = place.check()
    assert [t.verdict for t in small.tensors] == [t.verdict for t in one.tensors]
    assert [t.verdict for t in one.tensors] != [t.verdict for t in whole.tensors]
    assert small.multiples == pytest.approx(one.multiples)


# ---------------------------------------------------------------------- an outside judge
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deltalint_finds_the_adapter_in_our_exports(tmp_path: Path, dtype: torch.dtype) -> None:
    deltalint = pytest.importorskip("deltalint.check", reason="for development")
    place = Place(tmp_path, dtype)
    place.export()
    lt.portable(place.tree, PATH, base=place.model).save(tmp_path / "one")
    report = deltalint.check_merge(tmp_path / "base", tmp_path / "one", tmp_path / "out")
    verdicts = {layer.verdict.value for layer in report.layers}
    assert verdicts == {"PASS"}
    assert not report.missing_layers
    assert len(report.layers) == len(place.tree.adapter("a").modules)
    report = deltalint.check_merge(tmp_path / "base", tmp_path / "one", tmp_path / "base")
    assert {layer.verdict.value for layer in report.layers} == {"FAIL"}


# ---------------------------------------------------------------------- the command line
def test_the_command_says_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell(capsys)
    place = Place(tmp_path, torch.float32)
    place.tree.save(tmp_path / "zoo")
    place.export()
    more = ("--merged", tmp_path / "out", "--base", tmp_path / "base")
    told = answer(shell, "check", tmp_path / "zoo", PATH, *more)
    assert told["is_that_path"] is True
    code, out, _ = shell("check", tmp_path / "zoo", "a/b", *more)
    assert code == 1
    assert "a/b/c was merged as well, 1 times" in out
    assert "other: model.layers.0.self_attn.q_proj.weight: another sum" in out
    code, out, _ = shell("check", tmp_path / "zoo", "a/b", *more, "--json")
    assert (code, json.loads(out)["multiples"][PATH]) == (1, pytest.approx(1.0, abs=1e-3))
    monkeypatch.chdir(tmp_path / "zoo")
    code, out, _ = shell("check", PATH, *more)
    assert (code, "the path itself" in out) == (0, True)
    code, _, err = shell("check", tmp_path / "zoo", *more)
    assert (code, "needs the path" in err) == (1, True)
    code, _, err = shell("check", tmp_path / "zoo", PATH)
    assert (code, "is only used with --merged" in err) == (1, True)
