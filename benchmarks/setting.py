"""The models that are timed: a Llama of a few layers with random adapters, and the same in PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import lora_tree as lt

from .sizes import Size

__all__ = [
    "COUSIN",
    "SIBLING",
    "START",
    "adapter",
    "base",
    "name_in_peft",
    "tree",
    "with_peft",
]

PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
START, SIBLING, COUSIN = "a/b/c", "a/b/d", "a/e/f"
PATHS = ("a", "a/b", START, SIBLING, "a/e", COUSIN)


def base(size: Size, dtype: torch.dtype) -> Any:
    """Make random weights from a seed; with a small vocabulary the layers take the time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32 or 1,
        num_key_value_heads=size.hidden // 128 or 1,
        max_position_embeddings=4096,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def adapter(
    model: Any, size: Size, *, seed: int, dtype: torch.dtype, scale: float = 1.0
) -> lt.Adapter:
    """Return random factors whose ΔW is about a hundredth of the weights."""
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for layer in range(size.layers):
        for block, names in PROJECTIONS.items():
            for name in names:
                path = f"model.layers.{layer}.{block}.{name}"
                out, into = model.get_submodule(path).weight.shape
                A = torch.randn(size.r, into, generator=draw) / into**0.5
                B = torch.randn(out, size.r, generator=draw) * 1e-3
                modules[path] = lt.LowRank(A.to(dtype), B.to(dtype), scale)
    return lt.Adapter(modules)


def tree(model: Any, size: Size, *, dtype: torch.dtype, scale: float = 1.0) -> lt.AdapterTree:
    """Return a tree of three levels: siblings below a/b, a cousin below a/e."""
    grown = lt.AdapterTree()
    for seed, path in enumerate(PATHS):
        grown.add(path, adapter=adapter(model, size, seed=seed, dtype=dtype, scale=scale))
    return grown


def name_in_peft(path: str) -> str:
    """Return a name for PEFT, whose names are keys of modules: no dots and no part of ``lora_``."""
    return "node-" + path.replace("/", "-")


def with_peft(model: Any, adapters: lt.AdapterTree, folder: Path) -> Any:
    """Wrap ``model`` by PEFT, with every node of the tree as an adapter, in its own dtype."""
    adapters.save(folder)
    first, *others = adapters.paths()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # PEFT reads an attribute that transformers has renamed
        wrapped = peft.PeftModel.from_pretrained(
            model, folder / first, adapter_name=name_in_peft(first), autocast_adapter_dtype=False
        )
        for path in others:
            wrapped.load_adapter(
                folder / path, adapter_name=name_in_peft(path), autocast_adapter_dtype=False
            )
    return wrapped.eval()
