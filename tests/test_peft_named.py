"""Keys that carry the adapter's own name, as a state dict of a PEFT model has them.

Compared with what PEFT's own ``save_pretrained`` wrote of the same model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from shell import Shell
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.errors import FormatError
from lora_tree.formats.peft import WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft", "ignore::FutureWarning")


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        self.lin = nn.Linear(6, 6)
        self.attn = nn.MultiheadAttention(6, 2)
        self.score = nn.Linear(6, 2)
        self.experts = nn.Module()
        self.experts.gate = nn.Parameter(torch.randn(3, 8, 6))
        self.experts.down = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x


ON = {"r": 2, "target_modules": ["lin"]}
KINDS: dict[str, Callable[[], Any]] = {
    "modules": lambda: peft.LoraConfig(r=2, target_modules=["lin", "embed_tokens", "attn"]),
    "lora_bias": lambda: peft.LoraConfig(**ON, lora_bias=True),
    "parameters": lambda: peft.LoraConfig(
        r=2, target_modules=["lin"], target_parameters=["experts.gate", "experts.down"]
    ),
    "saved whole": lambda: peft.LoraConfig(**ON, modules_to_save=["score"]),
    "token rows": lambda: peft.LoraConfig(**ON, trainable_token_indices={"embed_tokens": [1, 3]}),
    "token rows alone": lambda: peft.TrainableTokensConfig(
        target_modules=["embed_tokens"], token_indices=[1, 3]
    ),
    "LoHa": lambda: peft.LoHaConfig(**ON),
    "LoKr": lambda: peft.LoKrConfig(**ON),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=2, target_r=1, total_step=9, target_modules=["lin"]
    ),
    "VeRA": lambda: peft.VeraConfig(**ON),
    "VB-LoRA": lambda: peft.VBLoRAConfig(**ON, num_vectors=9, vector_length=2, topk=2),
}


def made(kind: str, name: str) -> peft.PeftModel:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Base(), KINDS[kind](), adapter_name=name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def both(tmp_path: Path, kind: str, name: str) -> tuple[Path, Path]:
    """Return PEFT's own save of a model, and its config beside the factors of its state dict."""
    model = made(kind, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "peft")
    # PEFT takes a folder of that name for every adapter but the default one.
    theirs = tmp_path / "peft" if name == "default" else tmp_path / "peft" / name
    own = tmp_path / "own"
    own.mkdir()
    (own / "adapter_config.json").write_bytes((theirs / "adapter_config.json").read_bytes())
    tensors = {}
    for key, tensor in model.state_dict().items():
        is_adapters = name in key.split(".") or ".original_module." in key
        if is_adapters:
            # VeRA's and VB-LoRA's shared tensors are in it for every module, too.
            tensors[key] = tensor.clone().contiguous()
    assert any(key.split(".")[-2:].count(name) for key in tensors)
    save_file(tensors, own / WEIGHTS)
    return theirs, own


def written(adapter: lt.Adapter, folder: Path) -> bytes:
    adapter.save(folder)
    return (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ["default", "my_adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_is_what_peft_saves_of_the_model(tmp_path: Path, kind: str, name: str) -> None:
    theirs, own = both(tmp_path, kind, name)
    tree = lt.AdapterTree()
    tree.add("x", adapter=own)
    outline = tree.outline("x")
    assert outline is not None
    adapter, wanted = lt.Adapter.load(own), lt.Adapter.load(theirs)
    assert adapter.modules.keys() == wanted.modules.keys() == outline.modules.keys()
    assert adapter.overrides.keys() == wanted.overrides.keys()
    # Every bit of what is written, and its names: no key has the adapter's own.
    assert written(adapter, tmp_path / "a") == written(wanted, tmp_path / "b")
    assert not any(name in key.split(".") for key in load_file(tmp_path / "a" / WEIGHTS))


def edited(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def test_a_file_of_several_adapters_is_refused_by_their_names(tmp_path: Path) -> None:
    _, own = both(tmp_path, "modules", "legal")
    edited(own, lambda t: t | {k.replace(".legal", ".tax"): v + 1 for k, v in t.items()})
    with pytest.raises(
        FormatError, match=r"keys name 2 adapters, expected one: legal, tax\n.*selected_adapters"
    ):
        lt.Adapter.load(own)


def test_a_head_of_another_adapter_is_refused_by_its_name(tmp_path: Path) -> None:
    _, own = both(tmp_path, "saved whole", "legal")
    edited(own, lambda t: {k.replace("save.legal", "save.tax"): v for k, v in t.items()})
    with pytest.raises(FormatError, match=r"keys name 2 adapters, expected one: legal, tax\n"):
        lt.Adapter.load(own)


@pytest.mark.parametrize("kind", ["modules", "LoHa", "token rows", "AdaLoRA", "VeRA"])
def test_some_keys_with_a_name_and_some_without_are_refused(tmp_path: Path, kind: str) -> None:
    _, own = both(tmp_path, kind, "legal")

    def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        first = next(iter(sorted(tensors)))
        return tensors | {first.replace(".legal", ""): tensors[first].clone()}

    edited(own, half)
    with pytest.raises(
        FormatError, match=r"\.legal.*carries an adapter's name, and .* carries none\n.*own name"
    ):
        lt.Adapter.load(own)


def test_a_state_dict_of_the_whole_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    _, own = both(tmp_path, "lora_bias", "legal")
    weight = {"base_model.model.score.weight": torch.ones(2, 6)}
    edited(own, lambda t: t | weight)
    with pytest.raises(FormatError, match=r"score\.weight' is a whole weight(?s:.*)whole model"):
        lt.Adapter.load(own)


def test_diffusers_keys_may_carry_a_name_too(tmp_path: Path) -> None:
    file, named = tmp_path / "a.safetensors", tmp_path / "named.safetensors"
    tensors = {
        "transformer.blocks.0.to_q.lora_A.weight": torch.randn(2, 6),
        "transformer.blocks.0.to_q.lora_B.weight": torch.randn(6, 2),
        "transformer.blocks.0.to_q.alpha": torch.tensor(3.0),
    }
    save_file(tensors, file)
    save_file({key.replace("weight", "default.weight"): t for key, t in tensors.items()}, named)
    wanted, found = lt.Adapter.load(file), lt.Adapter.load(named)
    assert list(found.modules) == ["transformer.blocks.0.to_q"]
    assert written(found, tmp_path / "x") == written(wanted, tmp_path / "y")
    other = {"transformer.blocks.1.to_q.lora_A.late.weight": torch.ones(2, 6)}
    save_file(load_file(named) | other, named)
    with pytest.raises(FormatError, match="keys name 2 adapters, expected one: default, late"):
        lt.Adapter.load(named)


def test_the_name_is_told_when_a_node_is_added_and_left_out_of_a_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, own = both(tmp_path, "modules", "legal")
    shell = Shell(capsys)
    zoo = tmp_path / "zoo"
    lt.AdapterTree().save(zoo)
    code, out, _ = shell("add", zoo, "named", own)
    assert code == 0
    assert "its keys carry the adapter's name, 'legal', which is left out" in out
    code, out, _ = shell("add", zoo, "plain", theirs)
    assert code == 0
    assert "carry" not in out
    code, out, _ = shell("add", zoo, "copied", own, "--copy")
    assert code == 0
    assert load_file(zoo / "copied" / WEIGHTS).keys() == load_file(theirs / WEIGHTS).keys()
    tree = lt.load(zoo)
    assert written(tree.flatten("named"), tmp_path / "x") == written(
        tree.flatten("copied"), tmp_path / "y"
    )
