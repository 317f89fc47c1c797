"""The demo's base: a small Llama over bytes, and a tokenizer that turns byte b into token b.

About 1.9 M parameters: enough to learn the look of Python, and few enough to do so in a minute or
two on two cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..extras import need

__all__ = ["END", "TARGETS", "VOCABULARY", "new_base", "open_base", "save_base"]

END = 256  # stands between two documents
VOCABULARY = 257
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_WHAT = "the demo"


def new_base(*, hidden: int, layers: int, window: int) -> Any:
    """Return a ``LlamaForCausalLM`` with random weights, from torch's own generator."""
    transformers = need("transformers", extra="transformers", what=_WHAT)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        # Llama's own rule, two thirds of four times the width, in whole multiples of 32.
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=4 * window,
        initializer_range=0.05,  # narrow layers want more than the 0.02 of wide ones
        bos_token_id=END,
        eos_token_id=END,
    )
    return transformers.LlamaForCausalLM(config)


def save_base(model: Any, folder: Path) -> None:
    """Save the model and its tokenizer, as transformers reads them."""
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def open_base(folder: Path) -> Any:
    """Return the model again, from its files."""
    transformers = need("transformers", extra="transformers", what=_WHAT)
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def _tokenizer() -> Any:
    """Return a tokenizer in which byte b is token b.

    The letters that stand for bytes come from GPT-2's byte-level alphabet.
    """
    transformers = need("transformers", extra="transformers", what=_WHAT)
    tokenizers = need("tokenizers", extra="transformers", what=_WHAT)
    vocabulary = {letter: byte for byte, letter in enumerate(_alphabet())}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.decoder = tokenizers.decoders.ByteLevel()
    end = "<|end|>"
    core.add_special_tokens([end])  # takes the next id, 256
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        model_input_names=["input_ids", "attention_mask"],
    )


def _alphabet() -> list[str]:
    """Return each byte's letter: itself if it prints, else the next code point from 256 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printing else chr(next(others)) for byte in range(256)]
