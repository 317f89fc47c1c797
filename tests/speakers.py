"""A small language model with a tree of three languages over it, to be asked."""

from __future__ import annotations

from typing import Any

import torch
from oracle import low_rank, shapes_of

import lora_tree as lt
from lora_tree.demo.bytelevel import new_base, save_base

PATHS = ("fr", "fr/legal", "fr/medical", "de")
PROMPT = "def area(radius):"

__all__ = [
    "PATHS",
    "PROMPT",
    "language_model",
    "one_by_one",
    "save_base",
    "speaking_in_words",
    "tree_over",
]


def language_model(seed: int = 0) -> Any:
    """Return a Llama over bytes with random weights: 2 layers, 64 wide."""
    torch.manual_seed(seed)
    return new_base(hidden=64, layers=2, window=64).eval()


def tree_over(base: Any) -> lt.AdapterTree:
    """Return a tree whose adapters change each answer: fr → legal, medical; de."""
    tree = lt.AdapterTree()
    shapes = shapes_of(base, "q_proj", "v_proj", "down_proj")
    for seed, path in enumerate(PATHS):
        modules = {
            name: low_rank(out, into, 4, seed=100 * seed + at, scale=0.02)
            for at, (name, (out, into)) in enumerate(shapes.items())
        }
        tree.add(path, adapter=lt.Adapter(modules))
    return tree


def one_by_one(
    model: lt.TreeModel, tokenizer: Any, blend: lt.Blend, prompt: str, new_tokens: int
) -> list[int]:
    """Return the tokens that a path writes by itself, merged: the slow way."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with model.using(blend):
        made = model.base.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    tokens: list[int] = made[0, ids.shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return tokens[: tokens.index(end)] if end in tokens else tokens


SPOKEN = (
    "the a every no some court judge law contract clause tenant owner landlord lease notice doctor "
    "patient dose nurse ward may must shall signs pays reads gives keeps ends begins within after "
    "before ten thirty days weeks months in writing of to and or if rent deposit fever cough rest "
    "water again . , ;"
)


def speaking_in_words() -> tuple[Any, Any]:
    """Return a language model whose tokens are words, and its tokenizer: pictures can be read."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = SPOKEN.split()
    core = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="."))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=";")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=words.index(";"),
    )
    return LlamaForCausalLM(config).eval(), tokenizer
