"""A tiny base, a tree of three levels over it, data, and the same run by trl over PEFT.

the tree      base ─ fr (frozen) ─ fr/legal (frozen) ─ fr/legal/acme (trains)
over PEFT     the base with fr and fr/legal added into its float64 weights, and one adapter that
              begins with the
              numbers of acme
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lora_tree as lt

POLICY, DOMAIN = "fr/legal/acme", "fr/legal"
TARGETS = ["q_proj", "v_proj", "down_proj"]
SPEC = dict(r=4, lora_alpha=8, target_modules=TARGETS)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and one that ends a text."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<end>"] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>", padding_side="left"
    )


def base(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "vocab_size": 257, **more})
    return LlamaForCausalLM(config)


def model(of: Any = None, *, seed: int = 1) -> lt.TreeModel:
    """The tree over a base; the frozen nodes change something, and the one that trains begins at
    zero.
    """
    of = base() if of is None else of
    torch.manual_seed(seed)
    tree = lt.AdapterTree(defaults=SPEC)
    for path in ("fr", DOMAIN, POLICY, "de"):
        tree.add(path)
    made = lt.attach(tree, of)
    for path in ("fr", DOMAIN, "de"):
        adapter = tree.adapter(path)
        assert adapter is not None
        for value in adapter.modules.values():
            value.B.normal_(std=0.1)
    made.trainable(POLICY)
    return made


def merged(of: lt.TreeModel, path: str = DOMAIN) -> LlamaForCausalLM:
    """A new base with a path's increments in its weights, summed in float64."""
    # Not a deep copy, which would take along the hook that refuses trainers of the bare base.
    made = type(of.base)(of.base.config).to(next(of.base.parameters()).dtype)
    made.load_state_dict(of.base.state_dict())
    for node in of.tree.lineage(path):
        adapter = of.tree.adapter(node)
        assert adapter is not None
        for name, value in adapter.modules.items():
            weight = made.get_submodule(name).weight
            delta = value.scale * value.B.double() @ value.A.double()
            with torch.no_grad():
                weight.copy_((weight.double() + delta).to(weight.dtype))
    return made.requires_grad_(True)


def peft_config(**more: Any) -> LoraConfig:
    return LoraConfig(**{**SPEC, "task_type": "CAUSAL_LM", **more})


def begin_alike(peft_model: Any, of: lt.TreeModel, path: str = POLICY) -> None:
    """Give PEFT's adapter the numbers that a node has now."""
    for name, pair in peft_factors(peft_model).items():
        adapter = of.tree.adapter(path)
        assert adapter is not None
        with torch.no_grad():
            pair[0].copy_(adapter.modules[name].A)
            pair[1].copy_(adapter.modules[name].B)


def peft_factors(peft_model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for name, module in peft_model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            found[name] = module.lora_A["default"].weight, module.lora_B["default"].weight
    return found


def assert_same_factors(
    of: lt.TreeModel, peft_model: Any, path: str = POLICY, tol: float = 1e-5
) -> None:
    adapter = of.tree.adapter(path)
    assert adapter is not None
    theirs = peft_factors(peft_model)
    assert sorted(theirs) == sorted(adapter.modules)
    moved = 0.0
    for name, value in adapter.modules.items():
        torch.testing.assert_close(value.A.detach(), theirs[name][0].detach(), rtol=tol, atol=tol)
        torch.testing.assert_close(value.B.detach(), theirs[name][1].detach(), rtol=tol, atol=tol)
        moved = max(moved, value.B.abs().max().item())
    assert moved > 1e-3, "nothing was learnt"


# ---------------------------------------------------------------------- data
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def pairs(rows: int = 8) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": f"{WORDS[i % 8]} and ",
                "chosen": f"{WORDS[(i + 1) % 8]} is it",
                "rejected": f"no {WORDS[(i + 3) % 8]}",
            }
            for i in range(rows)
        ]
    )


def judged(rows: int = 8) -> Dataset:
    """Completions that are good or bad, as KTO has them."""
    return Dataset.from_list(
        [
            {
                "prompt": f"{WORDS[i % 8]} and ",
                "completion": f"{WORDS[(i + 1) % 8]} is it",
                "label": i % 2 == 0,
            }
            for i in range(rows)
        ]
    )


def texts(rows: int = 8) -> Dataset:
    return Dataset.from_list(
        [{"text": f"{WORDS[i % 8]} {WORDS[(i * 3) % 8]} " * (1 + i % 3)} for i in range(rows)]
    )


def prompts(rows: int = 8) -> Dataset:
    return Dataset.from_list([{"prompt": f"{WORDS[i % 8]} and "} for i in range(rows)])


def settings(kind: Any, folder: Path, **more: Any) -> Any:
    plain: dict[str, Any] = dict(
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        lr_scheduler_type="constant",
        seed=7,
    )
    return kind(output_dir=str(folder), **{**plain, **more})


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
