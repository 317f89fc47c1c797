"""The config of a flattened path holds what is true of the sum, so that PEFT reads from it what the
tree computes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import with_sum
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import lora_tree as lt
from lora_tree.formats.peft_config import DERIVED, TRAINING, VARIANTS

IDS = torch.arange(16).reshape(2, 8) * 7
MATCHED = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
HARMLESS = {
    "task_type": "which class wraps the model; no factor is read otherwise",
    "auto_mapping": "the class of a base without a task type",
    "peft_version": "who wrote it",
    "revision": "of the base that it names",
    "lora_dropout": "in training only",
    "fan_in_fan_out": "PEFT corrects it by the kind of layer",
    "bias": "which of the base's own biases came along; written as the file has them",
    "use_rslora": "written together with the lora_alpha that gives the scale",
    "init_lora_weights": "how factors began that the file replaces",
    "megatron_core": "read beside megatron_config only, which is refused",
    "qalora_group_size": "read beside use_qalora only, which is refused",
}


def test_every_field_of_peft_s_config_is_accounted_for() -> None:
    """A new PEFT brings new fields: each is looked at before an adapter that has it is taken for an
    ordinary one.
    """
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    overriding = {"ensure_weight_tying", "modules_to_save", "trainable_token_indices"}
    known = DERIVED | TRAINING | set(VARIANTS) | MATCHED | set(HARMLESS) | overriding
    assert fields - known == set()
    named = {
        "velora_config",
        "megatron_config",
    }  # read by their names in the code, whatever this PEFT has
    assert known - fields - named == set()


def base() -> nn.Module:
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=120,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def trained(folder: Path, seed: int, **config: Any) -> Path:
    """An adapter that PEFT made over the tied base."""
    torch.manual_seed(seed)
    model = get_peft_model(base(), LoraConfig(init_lora_weights=False, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.mul_(0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def dense(tree: lt.AdapterTree, path: str) -> torch.Tensor:
    """The logits of the base with the sum in its weights, embedding and head apart."""
    model = base()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        found: torch.Tensor = with_sum(model, tree, path).float()(IDS).logits
    return found


def in_peft(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = PeftModel.from_pretrained(base(), folder).eval()(IDS).logits
    return found


TIED = {
    "target_modules": ["embed_tokens", "q_proj"],
    "ensure_weight_tying": True,
    "r": 4,
    "lora_alpha": 8,
}
CHILDREN = {
    "its head alone": {"target_modules": ["lm_head"]},
    "its embedding alone": {"target_modules": ["embed_tokens"]},
    "its queries alone": {"target_modules": ["q_proj"], "ensure_weight_tying": True},
    "both, apart": {"target_modules": ["embed_tokens", "lm_head"], "r": 2},
    "both, tied": TIED,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("child", CHILDREN.values(), ids=CHILDREN)
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_peft_ties_in_a_sum_only_what_the_sum_ties(
    child: dict[str, Any], weight: float, tmp_path: Path
) -> None:
    tree = lt.AdapterTree()
    tree.add("a", adapter=trained(tmp_path / "a", 1, **TIED))
    tree.add("a/b", adapter=trained(tmp_path / "b", 2, **child), weight=weight)
    assert any(
        ".lm_head." in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors")
    )
    for path in ("a", "a/b"):
        expected = dense(tree, path)
        tree.flatten(path).save(tmp_path / "flat")
        torch.testing.assert_close(in_peft(tmp_path / "flat"), expected, rtol=1e-4, atol=1e-4)
        lt.portable(tree, path).save(tmp_path / "out")
        torch.testing.assert_close(in_peft(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
        assert (expected - base()(IDS).logits).abs().max() > 0.01
    # a node of its own keeps what it says, which is true of it
    lt.Adapter.load(tmp_path / "a").save(tmp_path / "again")
    assert config_of(tmp_path / "again")["ensure_weight_tying"] is True
    torch.testing.assert_close(in_peft(tmp_path / "again"), dense(tree, "a"), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_factors_that_are_trained_apart_are_no_longer_tied(tmp_path: Path) -> None:
    adapter = lt.Adapter.load(trained(tmp_path / "a", 1, **TIED))
    head = adapter.modules["lm_head"]
    modules = {**adapter.modules, "lm_head": dataclasses.replace(head, B=head.B * 1.5)}
    changed = dataclasses.replace(adapter, modules=modules)
    changed.save(tmp_path / "changed")
    tree = lt.AdapterTree()
    tree.add("a", adapter=changed)
    torch.testing.assert_close(
        in_peft(tmp_path / "changed"), dense(tree, "a"), rtol=1e-4, atol=1e-4
    )


SAYS = {
    "task_type": "CAUSAL_LM",
    "revision": "main",
    "peft_version": "0.21.2",
    "auto_mapping": {"base_model_class": "X", "parent_library": "y"},
    "fan_in_fan_out": True,
    "lora_dropout": 0.1,
    "init_lora_weights": False,
    "megatron_core": "other.core",
    "qalora_group_size": 8,
}


@pytest.mark.parametrize("field", SAYS)
def test_a_sum_says_what_all_its_nodes_say(field: str, tmp_path: Path) -> None:
    value = lt.LowRank(torch.ones(2, 4), torch.ones(4, 2))
    plain: dict[str, Any] = {"peft_type": "LORA", "target_modules": ["q", "v"]}
    one, other = copy.deepcopy(plain) | {field: SAYS[field]}, dict(plain, target_modules=["v", "q"])
    written = {}
    for name, configs in {
        "alone": [one],
        "agree": [one, one],
        "one of them": [one, other],
        "none": [other],
    }.items():
        tree = lt.AdapterTree()
        for depth, config in enumerate(configs):
            path = "/".join("ab"[: depth + 1])
            tree.add(path, adapter=lt.Adapter({"x.q": value, "x.v": value}, config=config))
        tree.flatten(path).save(tmp_path / "flat")
        written[name] = config_of(tmp_path / "flat")
        assert written[name]["target_modules"] == [
            "q",
            "v",
        ]  # PEFT writes a set: the order says nothing
    assert written["alone"][field] == written["agree"][field] == SAYS[field]
    assert written["one of them"].get(field) == written["none"].get(field)
