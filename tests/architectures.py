"""Tiny transformers of every kind, a tree over each, and the dense model that it stands for,
written out by hand.

a           weight 0.7      dense(arch, tree, {"a": …, "a/b": …}): a copy of the base with
├── b       weight 1            W ← round_once( W + Σ coefficient · scale · B A )
│   └── c   weight −1.3     in float64, placed by what transformers says about the layer,
└── d       weight 1        with nothing of the library but the factors' own numbers
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import lora_tree as lt

VOCAB, DIM, WIDE = 61, 32, 48
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PATHS = ("a", "a/b", "a/b/c", "a/d")
WEIGHTS = {"a": 0.7, "a/b": 1.0, "a/b/c": -1.3, "a/d": 1.0}
BLEND = {"a/b/c": 0.25, "a/d": 0.75}
BLENDED = {"a": 0.7, "a/b": 0.25, "a/b/c": 0.25 * -1.3, "a/d": 0.75}


@dataclass(frozen=True)
class Arch:
    """A tiny model of one architecture.

    targets: node → the words of `LoraSpec` it is made with: target sets, ranks, scales.
    generates: what ``generate`` is given, or None where the model has no such thing.
    tied: a module whose weight a second one uses, and that one.
    """

    make: Callable[[], PreTrainedModel]
    inputs: Callable[[], dict[str, Tensor]]
    targets: Mapping[str, Mapping[str, Any]]
    generates: Callable[[], dict[str, Tensor]] | None = None
    tied: tuple[str, str] | None = None

    def base(self) -> PreTrainedModel:
        """A fresh base in float64: the same numbers every time, large enough that a wrong weight
        shows.
        """
        torch.manual_seed(1)
        base = self.make().eval()
        with torch.no_grad():
            for p in base.parameters():
                p.copy_(
                    torch.randn_like(p) / p.shape[-1] ** 0.5
                    if p.ndim > 1
                    else p + 0.1 * torch.randn_like(p)
                )
        return base.double()

    def tree(self, base: nn.Module, *, factors: torch.dtype = torch.float64) -> lt.AdapterTree:
        """Fresh adapters made for ``base``, then A and B drawn at random: ΔW about as large as
        W.
        """
        tree = lt.AdapterTree(defaults=dict(r=3))
        for path in PATHS:
            tree.add(path, weight=WEIGHTS[path], **self.targets[path])
        lt.attach(tree, base).detach()
        torch.manual_seed(2)
        for path in PATHS:
            adapter = tree.adapter(path)
            assert adapter is not None
            tree.update(path, adapter=adapter.map(lambda v: _random(v, factors)))
        return tree


def _random(value: lt.LowRank, dtype: torch.dtype) -> lt.LowRank:
    into, r = value.shape[-1], value.rank
    A = torch.randn(value.A.shape, dtype=torch.float64) / (into * r) ** 0.5
    return replace(
        value, A=A.to(dtype), B=torch.randn(value.B.shape, dtype=torch.float64).to(dtype)
    )


# ---------------------------------------------------------------------- the dense model, by hand
def along(path: str) -> dict[str, float]:
    """Node → coefficient for one path."""
    return {node: WEIGHTS[node] for node in PATHS if (path + "/").startswith(node + "/")}


def deltas(
    tree: lt.AdapterTree, nodes: Mapping[str, float]
) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """For each adapted name: ΔW and Σ|s||B||A| as (*batch, out, in) in float64, and Σr."""
    found: dict[str, tuple[Tensor, Tensor, int]] = {}
    for node, coefficient in nodes.items():
        adapter = tree.adapter(node)
        assert adapter is not None
        for name, v in adapter.modules.items():
            s, A, B = coefficient * v.scale, v.A.double(), v.B.double()
            delta, size, rank = found.get(
                name, (torch.zeros(v.shape).double(), torch.zeros(v.shape).double(), 0)
            )
            found[name] = delta + s * (B @ A), size + abs(s) * (B.abs() @ A.abs()), rank + v.rank
    for name, (delta, size, rank) in found.items():
        yield name, delta, size, rank


def place(base: nn.Module, name: str, delta: Tensor) -> tuple[str, Tensor]:
    """The parameter that an adapter's ``name`` means, and ``delta`` as it lies in there."""
    names = {n for n, _ in base.named_parameters(remove_duplicate=False)}
    if name in names:  # a raw parameter: experts as they are, one matrix without its batch
        return name, delta if base.get_parameter(name).ndim == 3 else delta[0]
    module = base.get_submodule(name)
    if isinstance(module, (Conv1D, nn.Embedding)):  # (in, out), (vocab, dim)
        return f"{name}.weight", delta.mT
    return f"{name}.weight", delta.reshape(module.weight.shape)  # a kernel is (out, in, *kernel)


def dense(base: nn.Module, tree: lt.AdapterTree, nodes: Mapping[str, float]) -> Any:
    """A copy of ``base`` with the dense sum in its weights, rounded once to the base's dtype; tied
    ones untied.
    """
    made = copy.deepcopy(base)
    for name, delta, _, _ in deltas(tree, nodes):
        where, placed = place(made, name, delta)
        holder, _, leaf = where.rpartition(".")
        parameter = made.get_parameter(where)
        exact = (parameter.detach().double() + placed).to(parameter.dtype)
        setattr(
            made.get_submodule(holder),
            leaf,
            nn.Parameter(exact, requires_grad=parameter.requires_grad),
        )
    return made


def run(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's logits."""
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def assert_close(got: Tensor, wanted: Tensor) -> None:
    """Equal in float64: outputs are between 1 and 10, and another order of the same sums moves them
    by 1e-13.
    """
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def bits(base: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, copied."""
    return {name: tensor.clone() for name, tensor in base.state_dict().items()}


def same_bits(base: nn.Module, before: Mapping[str, Tensor]) -> bool:
    """Whether a base has these keys, in this order, with these bits."""
    now = base.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in now)


# ---------------------------------------------------------------------- the models
def _ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(3))


def _image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _prompt() -> dict[str, Tensor]:
    ids = _ids(2, 5)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pairs() -> dict[str, Tensor]:
    return {**_prompt(), "decoder_input_ids": _ids(2, 4)}


def _llama(*, tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=DIM, intermediate_size=WIDE, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, **TOKENS,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=DIM, n_layer=2, n_head=4, **TOKENS)
    )


def _bert() -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=4, intermediate_size=WIDE,
        max_position_embeddings=64,
    )  # fmt: skip
    return BertForMaskedLM(config)


def _t5() -> T5ForConditionalGeneration:
    config = T5Config(vocab_size=VOCAB, d_model=DIM, d_kv=8, d_ff=WIDE, num_layers=2, num_heads=4,
                      decoder_start_token_id=0)  # fmt: skip
    return T5ForConditionalGeneration(config)


def _mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=DIM, intermediate_size=WIDE, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, **TOKENS,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")  # the others take no float64
    return model


def _vit() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=DIM, num_hidden_layers=2, num_attention_heads=4, intermediate_size=WIDE, image_size=16,
        patch_size=4, num_labels=5,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _whisper() -> WhisperForConditionalGeneration:
    config = WhisperConfig(
        vocab_size=VOCAB, d_model=DIM, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=WIDE, decoder_ffn_dim=WIDE, num_mel_bins=8, max_source_positions=12,
        max_target_positions=32, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, **TOKENS,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def _sound() -> dict[str, Tensor]:
    return {"input_features": _image(2, 8, 24)}


def _spoken() -> dict[str, Tensor]:
    return {**_sound(), "decoder_input_ids": _ids(2, 4)}


_LLAMA = {
    "a": dict(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "a/b": dict(
        r=2,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["gate_proj", "up_proj", "down_proj", "v_proj"],
    ),
    "a/b/c": dict(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 5}
    ),
    "a/d": dict(target_modules="all-linear", exclude_modules=["o_proj"], lora_alpha=2),
}
_HEADS = {
    "a/b/c": dict(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "embed_tokens", "lm_head"],
        alpha_pattern={"lm_head": 1},
    ),
    "a/d": dict(target_modules=["embed_tokens", "up_proj"], lora_alpha=2),
}

ARCHS: dict[str, Arch] = {
    "llama": Arch(lambda: _llama(tied=False), _prompt, {**_LLAMA, **_HEADS}, _prompt),
    "llama, tied": Arch(lambda: _llama(tied=True), _prompt, _LLAMA, _prompt, tied=("lm_head", "model.embed_tokens")),
    "gpt2": Arch(
        _gpt2,
        _prompt,
        {
            "a": dict(r=4, lora_alpha=6, target_modules=["c_attn", "wpe"]),
            "a/b": dict(r=2, lora_alpha=3, use_rslora=True, target_modules=["c_fc", "mlp.c_proj"]),
            "a/b/c": dict(r=5, lora_alpha=5, target_modules=["c_attn", "attn.c_proj", "wpe"]),
            "a/d": dict(target_modules="all-linear", lora_alpha=2),
        },
        _prompt,
        tied=("lm_head", "transformer.wte"),
    ),
    "bert": Arch(
        _bert,
        _prompt,
        {
            "a": dict(r=4, lora_alpha=6, target_modules=["query", "value", "token_type_embeddings"]),
            "a/b": dict(r=2, lora_alpha=3, use_rslora=True, target_modules=["intermediate.dense", "output.dense"]),
            "a/b/c": dict(r=5, lora_alpha=5, target_modules=["query", "transform.dense", "position_embeddings"]),
            "a/d": dict(target_modules=["key", "value"], layers_to_transform=1, lora_alpha=2),
        },
        tied=("cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    ),
    "t5": Arch(
        _t5,
        _pairs,
        {
            "a": dict(r=4, lora_alpha=6, target_modules=["q", "v"]),
            "a/b": dict(r=2, lora_alpha=3, use_rslora=True, target_modules=["wi", "wo", "k"]),
            "a/b/c": dict(r=5, lora_alpha=5, target_modules=["relative_attention_bias", "o", "q"]),
            "a/d": dict(target_modules=["EncDecAttention.k", "EncDecAttention.v"], lora_alpha=2),
        },
        _prompt,
        tied=("lm_head", "decoder.embed_tokens"),
    ),
    "mixtral": Arch(
        _mixtral,
        _prompt,
        {
            "a": dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
            "a/b": dict(r=2, lora_alpha=3, use_rslora=True, target_modules=["k_proj", "o_proj", "lm_head"]),
            "a/b/c": dict(r=5, lora_alpha=5, target_modules=["q_proj", "embed_tokens"]),
            "a/d": dict(target_modules=["o_proj"], lora_alpha=2),
        },
        _prompt,
    ),
    "mixtral, experts": Arch(
        _mixtral,
        _prompt,
        {
            "a": dict(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
            "a/b": dict(r=2, lora_alpha=3, target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
            "a/b/c": dict(r=5, lora_alpha=5, target_modules=["v_proj"], target_parameters=["mlp.gate.weight"]),
            "a/d": dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"], lora_alpha=2),
        },
        _prompt,
    ),
    "vit": Arch(
        _vit,
        lambda: {"pixel_values": _image(2, 3, 16, 16)},
        {
            "a": dict(r=4, lora_alpha=6, target_modules=["patch_embeddings.projection", "q_proj"]),
            "a/b": dict(r=2, lora_alpha=3, use_rslora=True, target_modules=["fc1", "fc2", "classifier"]),
            "a/b/c": dict(r=5, lora_alpha=5, target_modules=["patch_embeddings.projection", "v_proj"]),
            "a/d": dict(target_modules="all-linear", lora_alpha=2),
        },
    ),
    "whisper": Arch(
        _whisper,
        _spoken,
        {
            "a": dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "conv1"]),
            "a/b": dict(r=2, lora_alpha=3, use_rslora=True, target_modules=["conv2", "fc1", "fc2"]),
            "a/b/c": dict(r=5, lora_alpha=5, target_modules=["conv1", "conv2", "encoder_attn.k_proj"]),
            "a/d": dict(target_modules=["out_proj"], lora_alpha=2),
        },
        _sound,
        tied=("proj_out", "model.decoder.embed_tokens"),
    ),
}  # fmt: skip
