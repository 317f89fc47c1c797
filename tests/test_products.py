"""LoHa and LoKr as exact factors: against PEFT's own layers, in its names and in LyCORIS'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.errors import FormatError, LoraTreeError, UnsupportedAdapter

TARGETS = ["linear", "wide", "conv", "point"]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8)
        self.wide = nn.Linear(6, 20)
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        mapped = self.point(self.conv(x)).flatten(1).sum(1)
        return mapped + self.linear(x.flatten(1)[:, :12]).sum(1) + self.wide(x.mean((2, 3))).sum(1)


CONFIGS: dict[str, Any] = {
    "LoHa": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
    "LoHa, effective": lambda: peft.LoHaConfig(
        r=2, alpha=1, target_modules=TARGETS, use_effective_conv2d=True
    ),
    "LoHa, patterns": lambda: peft.LoHaConfig(
        r=2, alpha=4, target_modules=TARGETS, rank_pattern={"wide": 3}, alpha_pattern={"wide": 5}
    ),
    "LoKr": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=TARGETS),
    "LoKr, both in factors": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=TARGETS, decompose_both=True, decompose_factor=4
    ),
    "LoKr, effective": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=TARGETS, use_effective_conv2d=True
    ),
    "LoKr, both full": lambda: peft.LoKrConfig(r=64, alpha=3, target_modules=TARGETS),
}


def saved(folder: Path, kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A bare base, a PEFT folder of random factors for it, and PEFT's own increments."""
    torch.manual_seed(0)
    base = Base()
    model = peft.get_peft_model(Base(), CONFIGS[kind]())
    model.base_model.model.load_state_dict(base.state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if "hada_" in name or "lokr_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    deltas = {}
    for name in TARGETS:
        layer = model.base_model.model.get_submodule(name)
        deltas[name] = layer.double().get_delta_weight("default").detach()
    return base, deltas


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_increment_is_pefts_own(tmp_path: Path, kind: str) -> None:
    base, deltas = saved(tmp_path / "a", kind)
    adapter = lt.Adapter.load(tmp_path / "a")
    tree = lt.AdapterTree()
    tree.add("style", adapter=tmp_path / "a")
    pristine = {name: base.get_submodule(name).weight.detach().clone() for name in TARGETS}
    model = lt.attach(tree, base)
    for name, delta in deltas.items():
        dense = adapter.modules[name].dense(dtype=torch.float64)
        torch.testing.assert_close(dense.reshape(delta.shape), delta, rtol=1e-6, atol=1e-6)
    with model.using("style"):
        for name, delta in deltas.items():
            wanted = (pristine[name].double() + delta).float()
            merged = base.get_submodule(name).weight.detach()
            torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 6, 5, 5)
    with model.using("style"), torch.no_grad():
        merged = base(x)
    with model.using("style", mode="unmerged"), torch.no_grad():
        torch.testing.assert_close(base(x), merged, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_outline_has_the_shapes_of_the_factors(tmp_path: Path, kind: str) -> None:
    saved(tmp_path / "a", kind)
    tree = lt.AdapterTree()
    tree.add("style", adapter=tmp_path / "a")
    outline, adapter = tree.outline("style"), lt.Adapter.load(tmp_path / "a")
    assert outline is not None
    for name, value in adapter.modules.items():
        drawn = outline.modules[name]
        assert drawn.A.is_meta
        assert (drawn.shape, drawn.rank, drawn.layout) == (value.shape, value.rank, value.layout)
        assert drawn.scale == value.scale


def test_ranks_are_products(tmp_path: Path) -> None:
    saved(tmp_path / "a", "LoHa")
    assert set(lt.Adapter.load(tmp_path / "a").ranks.values()) == {4}


def test_a_cut_tells_its_error(tmp_path: Path) -> None:
    saved(tmp_path / "a", "LoHa")
    adapter = lt.Adapter.load(tmp_path / "a")
    cut = adapter.truncate(2)
    for name, value in adapter.modules.items():
        whole, short = (
            value.dense(dtype=torch.float64),
            cut.modules[name].dense(dtype=torch.float64),
        )
        error = float((whole - short).norm() / whole.norm())
        assert error > 0.01
        assert cut.errors[name] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if "patterns" not in kind])
def test_the_same_parts_behind_kohyas_names(tmp_path: Path, kind: str) -> None:
    """LyCORIS applies alpha / r where a half is in factors, and no scale where both are full."""
    _, deltas = saved(tmp_path / "a", kind)
    tensors = {}
    for key, tensor in safetensors.torch.load_file(
        tmp_path / "a/adapter_model.safetensors"
    ).items():
        module, _, part = key.removeprefix("base_model.model.").rpartition(".")
        tensors[f"lora_unet_{module}.{part}"] = tensor
        tensors[f"lora_unet_{module}.alpha"] = torch.tensor(3.0)
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, file)
    adapter = lt.Adapter.load(file)
    r, said = CONFIGS[kind]().r, CONFIGS[kind]().alpha
    for name, delta in deltas.items():
        parts = {key.rpartition(".")[2] for key in tensors if key.startswith(f"lora_unet_{name}.")}
        is_full = {"lokr_w1", "lokr_w2"} <= parts
        scale = (1.0 if is_full else 3.0 / r) / (said / r)
        dense = adapter.modules[f"unet.{name}"].dense(dtype=torch.float64)
        torch.testing.assert_close(dense.reshape(delta.shape), delta * scale, rtol=1e-6, atol=1e-6)


NAME = "lora_unet_mid"
HALVES = {f"{NAME}.hada_w1_a": torch.ones(4, 2), f"{NAME}.hada_w1_b": torch.ones(2, 3)}
WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "one half": (HALVES, "no hada_w2"),
    "halves of two shapes": (
        HALVES | {f"{NAME}.hada_w2_a": torch.ones(4, 2), f"{NAME}.hada_w2_b": torch.ones(2, 5)},
        r"differ in shape: \(4, 3\) and \(4, 5\)",
    ),
    "factors that do not multiply": (
        {f"{NAME}.hada_w1_a": torch.ones(4, 2), f"{NAME}.hada_w1_b": torch.ones(3, 3)},
        r"hada_w1_a \(4, 2\), hada_w1_b \(3, 3\) do not multiply",
    ),
    "a half twice": (
        {f"{NAME}.lokr_w1": torch.ones(2, 2), f"{NAME}.lokr_w1_a": torch.ones(2, 2)},
        "lokr_w1 both whole and in factors",
    ),
    "two kinds at once": (
        HALVES | {f"{NAME}.lokr_w1": torch.ones(2, 2)},
        "parts of several kinds",
    ),
    "a LoRA beside it": (
        HALVES | {f"{NAME}.lora_up.weight": torch.ones(2, 2)},
        "parts of several kinds",
    ),
    "a vector": ({f"{NAME}.lokr_w1": torch.ones(2), f"{NAME}.lokr_w2": torch.ones(2)}, "a matrix"),
}


@pytest.mark.parametrize("what", WRONG)
def test_parts_that_make_no_product_are_refused_by_name(tmp_path: Path, what: str) -> None:
    tensors, text = WRONG[what]
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=text) as caught:
        lt.Adapter.load(tmp_path / "a.safetensors")
    assert NAME in str(caught.value)


def test_a_small_file_that_stands_for_more_than_all_memory_is_refused(tmp_path: Path) -> None:
    parts = {f"w{half}_{side}": shape for half in "12" for side, shape in
             (("a", (3000, 3000)), ("b", (3000, 3000)))}  # fmt: skip
    tensors = {
        f"{NAME}.hada_{part}": torch.zeros(shape, dtype=torch.float16)
        for part, shape in parts.items()
    }
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LoraTreeError, match="bytes of memory"):
        lt.Adapter.load(tmp_path / "a.safetensors")


def test_what_pefts_config_adds_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", "LoHa")
    config = tmp_path / "a/adapter_config.json"
    config.write_text(
        config.read_text().replace('"modules_to_save": null', '"modules_to_save": ["x"]')
    )
    with pytest.raises(UnsupportedAdapter, match="modules_to_save"):
        lt.Adapter.load(tmp_path / "a")
