"""A real llama.cpp server says of paths and blends what the tree says, in log-probabilities.

The server is xllamacpp's CPU build. The bases are tiny and written here, by the ``gguf`` package.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lora_tree as lt

gguf = pytest.importorskip("gguf")
xllamacpp = pytest.importorskip("xllamacpp")

VOCABULARY = 64
PROMPT = [1, 5, 9, 20, 33]
PATHS = ["fr", "fr/legal", "de", "fr/legal:0.5+de:0.25", ""]
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)
KINDS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}


def new_base(kind: str) -> Any:
    torch.manual_seed(0)
    config, model = KINDS[kind]
    return model(config(**SIZES)).eval().float()


def write_base(model: Any, kind: str, file: Path) -> None:
    """The base itself in GGUF, as llama.cpp's own converter lays it out."""
    config = model.config
    architecture = "llama" if kind == "mistral" else kind
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    words = [f"▁{chr(97 + number % 26)}{number}" for number in range(VOCABULARY - 3)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *words])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *([1] * len(words))])
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(number)
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.detach().numpy()
        count = heads.get(name.split(".")[-2])
        if architecture == "llama" and count:
            shape = (count, 2, array.shape[0] // count // 2, *array.shape[1:])
            array = array.reshape(shape).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def zoo(model: Any) -> lt.AdapterTree:
    tree = lt.AdapterTree()
    ends = ("q_proj", "k_proj", "o_proj", "down_proj", "lm_head")
    for seed, (path, weight) in enumerate((("fr", 1.0), ("fr/legal", 0.7), ("de", 1.0))):
        torch.manual_seed(seed)
        modules = {}
        for name, module in model.named_modules():
            if name.endswith(ends):
                out, into = module.weight.shape
                r = 2 + seed  # every node has a rank of its own
                A, B = torch.randn(r, into) / into**0.5, 0.2 * torch.randn(out, r)
                modules[name] = lt.LowRank(A, B, 1.5)
        tree.add(path, adapter=lt.Adapter(modules), weight=weight)
    return tree


def lora_tree(*arguments: str | Path) -> str:
    """Run ``lora-tree`` in a process of its own, and return what it prints."""
    said = [sys.executable, "-m", "lora_tree.cli", *map(str, arguments)]
    done = subprocess.run(said, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def serve(base: Path, loras: list[str]) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 64, 1, False, 0
    params.cpuparams.n_threads = 2
    params.lora_init_without_apply = True
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in loras]
    return xllamacpp.Server(params)


def said_by(server: Any, lora: list[dict[str, float]]) -> torch.Tensor:
    request = dict(prompt=PROMPT, n_predict=1, n_probs=VOCABULARY, temperature=0.0, lora=lora)
    answer = server.handle_completions({**request, "cache_prompt": False})
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    told = torch.full((VOCABULARY,), float("nan"))
    for each in found:
        told[each["id"]] = each["logprob"]
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_lists_a_paths_nodes_is_that_path(kind: str, tmp_path: Path) -> None:
    model = new_base(kind)
    model.save_pretrained(tmp_path / "base")
    write_base(model, kind, tmp_path / "base.gguf")
    tree = zoo(model)
    tree.save(tmp_path / "zoo")
    base = ["--base", tmp_path / "base"]
    files = tmp_path / "nodes"
    lora_tree("export", tmp_path / "zoo", "--as", "gguf", "--nodes", "--out", files, *base)
    flags = shlex.split(lora_tree("llama-args", tmp_path / "zoo", "--files", files))
    assert flags[0] == "--lora-init-without-apply"
    loras = [flag for flag in flags[1:] if flag != "--lora"]
    assert [Path(each).relative_to(files).as_posix() for each in loras] == [
        "de.gguf",
        "fr.gguf",
        "fr/legal.gguf",
    ]
    server = serve(tmp_path / "base.gguf", loras)
    attached = lt.attach(tree, model)
    answers = []
    for path in PATHS:
        request = ["llama-args", tmp_path / "zoo", path, "--files", files]
        lora = json.loads(lora_tree(*request))
        with attached.using(path), torch.no_grad():
            wanted = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
        got = said_by(server, lora)
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-3)
        answers.append(wanted)
    assert (answers[0] - answers[1]).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_is_the_flattened_path(kind: str, tmp_path: Path) -> None:
    model = new_base(kind)
    model.save_pretrained(tmp_path / "base")
    write_base(model, kind, tmp_path / "base.gguf")
    tree = zoo(model)
    file = tmp_path / "legal.gguf"
    lt.export_gguf(tree, "fr/legal", file, base=tmp_path / "base")
    server = serve(tmp_path / "base.gguf", [str(file)])
    with lt.attach(tree, model).using("fr/legal"), torch.no_grad():
        wanted = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    got = said_by(server, [{"id": 0, "scale": 1.0}])
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-3)
