"""A small Llama with random weights, and adapters for it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import transformers

import lora_tree as lt
from lora_tree.demo import bytelevel

HIDDEN, WIDE = 128, 224
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN), "k_proj": (64, HIDDEN),
    "v_proj": (64, HIDDEN), "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (WIDE, HIDDEN), "up_proj": (WIDE, HIDDEN), "down_proj": (HIDDEN, WIDE),
}  # fmt: skip


def adapter(
    seed: int, targets: dict[str, tuple[int, float]], *, rslora: bool = False
) -> lt.Adapter:
    """Targets → (r, alpha), in both layers; ΔW about half as large as W."""
    g = torch.Generator().manual_seed(seed)
    modules = {}
    for layer in range(2):
        for name, (r, alpha) in targets.items():
            out, into = SHAPES[name]
            scale = alpha / math.sqrt(r) if rslora else alpha / r
            A = torch.randn(r, into, generator=g) / into**0.5
            B = torch.randn(out, r, generator=g) * 0.3 / (scale * r**0.5)
            place = "self_attn" if name[0] in "qkvo" else "mlp"
            modules[f"model.layers.{layer}.{place}.{name}"] = lt.LowRank(A, B, scale)
    return lt.Adapter(modules, config={"use_rslora": rslora, "task_type": "CAUSAL_LM"})


def save_base(folder: Path) -> None:
    """Two layers, four heads, two of them for keys and values."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=bytelevel.VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDE,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.08,
        bos_token_id=bytelevel.END, eos_token_id=bytelevel.END,
    )  # fmt: skip
    bytelevel.save_base(transformers.LlamaForCausalLM(config), folder)
