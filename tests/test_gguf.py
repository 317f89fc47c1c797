"""GGUF adapters: what the file says, read back by the gguf package; a real server is in
engines/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from shell import Shell

import lora_tree as lt
from lora_tree.errors import FormatError, LoraTreeError, SpecError

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
HEADS = 4


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def saved(folder: Path, **more: Any) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=2, tie_word_embeddings=False, **more,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def zoo() -> lt.AdapterTree:
    tree = lt.AdapterTree()
    torch.manual_seed(0)
    for path, weight in (("fr", 1.0), ("fr/legal", 0.5)):
        q = lt.LowRank(torch.randn(2, 16), torch.randn(16, 2), 1.5)
        down = lt.LowRank(torch.randn(3, 24), torch.randn(16, 3), 0.25)
        tree.add(path, adapter=lt.Adapter({Q: q, DOWN: down}), weight=weight)
    tree.add("group", group=True)
    return tree


def read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {each.name: torch.from_numpy(each.data.copy()) for each in reader.tensors}


def test_a_path_is_one_file_with_scales_folded(tmp_path: Path) -> None:
    base, tree = saved(tmp_path / "base"), zoo()
    lt.export_gguf(tree, "fr/legal", tmp_path / "a.gguf", base=base)
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 0.0
    assert set(tensors) == {
        f"blk.{name}.weight.lora_{half}" for name in ("0.attn_q", "1.ffn_down") for half in "ab"
    }
    flat = tree.flatten("fr/legal").modules
    down = tensors["blk.1.ffn_down.weight.lora_b"] @ tensors["blk.1.ffn_down.weight.lora_a"]
    torch.testing.assert_close(down, flat[DOWN].dense())
    q = tensors["blk.0.attn_q.weight.lora_b"] @ tensors["blk.0.attn_q.weight.lora_a"]
    wanted = flat[Q].dense()
    rows = wanted.reshape(HEADS, 2, 2, 16).transpose(1, 2).reshape(16, 16)
    torch.testing.assert_close(q, rows)
    first = (tmp_path / "a.gguf").read_bytes()
    lt.export_gguf(tree, "fr/legal", tmp_path / "b.gguf", base=base)
    assert (tmp_path / "b.gguf").read_bytes() == first


def test_nodes_are_stored_once_and_a_path_is_a_list(tmp_path: Path) -> None:
    base, tree = saved(tmp_path / "base"), zoo()
    files = lt.export_gguf_nodes(tree, tmp_path / "nodes", base=base)
    assert files == [tmp_path / "nodes/fr.gguf", tmp_path / "nodes/fr/legal.gguf"]
    said = lt.llama_request(tree, tmp_path / "nodes", {"fr/legal": 0.5})
    assert said.body == [{"id": 0, "scale": 0.5}, {"id": 1, "scale": 0.25}]
    assert said.arguments == [
        "--lora-init-without-apply", "--lora", str(files[0]), "--lora", str(files[1])
    ]  # fmt: skip
    # An empty list would mean the scales that the server started with.
    bare = lt.llama_request(tree, tmp_path / "nodes", "")
    assert bare.body == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]
    files[1].unlink()
    with pytest.raises(FormatError, match=r"fr/legal\.gguf: no such file(.|\n)*--as gguf --nodes"):
        lt.llama_request(tree, tmp_path / "nodes", "fr")


def test_what_gguf_can_not_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    value = lt.LowRank(torch.ones(1, 16), torch.ones(16, 1))
    embedding = lt.LowRank(torch.ones(1, 32), torch.ones(16, 1), layout=lt.Layout("embedding"))
    biased = lt.LowRank(value.A, value.B, bias=torch.ones(16))
    for name, wrong, text in (
        ("model.norm", value, "model.norm"),
        ("model.embed_tokens", embedding, "Linear layers without a bias"),
        (Q, biased, "Linear layers without a bias"),
    ):
        tree = zoo()
        tree.add("group/x", adapter=lt.Adapter({name: wrong}))
        with pytest.raises(LoraTreeError, match=text):
            lt.export_gguf_nodes(tree, tmp_path / "nodes", base=base)
        assert not (tmp_path / "nodes").exists()


def test_an_architecture_that_was_not_tried_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    with pytest.raises(SpecError, match=r"model_type is 'gpt2', expected one of llama"):
        lt.export_gguf(zoo(), "fr", tmp_path / "a.gguf", base=tmp_path / "base")
    with pytest.raises(SpecError, match="the tree names no base"):
        lt.export_gguf(zoo(), "fr", tmp_path / "a.gguf")


def test_the_commands(tmp_path: Path, shell: Shell) -> None:
    base = saved(tmp_path / "base")
    zoo().save(tmp_path / "zoo")
    folder, files = str(tmp_path / "zoo"), str(tmp_path / "nodes")
    code, out, err = shell(
        "export", folder, "--as", "gguf", "--nodes", "--out", files, "--base", base
    )
    assert code == 0, err
    assert out.splitlines()[1].split() == ["1", f"{files}/fr/legal.gguf"]
    _, out, _ = shell("llama-args", folder, "fr/legal", "--files", files)
    assert out.strip() == '[{"id": 0, "scale": 1.0}, {"id": 1, "scale": 0.5}]'
    one = tmp_path / "one.gguf"
    code, _, err = shell("export", folder, "fr", "--as", "gguf", "--out", one, "--base", base)
    assert code == 0, err
    assert read(one)[0]["general.type"] == "adapter"
    code, _, err = shell("export", folder, "fr", "--nodes", "--out", files)
    assert code == 1
    assert "--nodes writes every node by itself" in err


def test_weights_per_module_are_in_the_files_because_a_request_has_one_scale(
    tmp_path: Path,
) -> None:
    base, tree = saved(tmp_path / "base"), zoo()
    tree.update("fr/legal", weight={"*.down_proj": 0.25, "default": 2.0})
    lt.export_gguf_nodes(tree, tmp_path / "nodes", base=base)
    said = lt.llama_request(tree, tmp_path / "nodes", {"fr/legal": 0.5})
    assert said.body == [{"id": 0, "scale": 0.5}, {"id": 1, "scale": 0.5}]
    _, tensors = read(tmp_path / "nodes/fr/legal.gguf")
    down = tensors["blk.1.ffn_down.weight.lora_b"] @ tensors["blk.1.ffn_down.weight.lora_a"]
    own = tree.adapter("fr/legal")
    assert own is not None
    torch.testing.assert_close(down, 0.25 * own.modules[DOWN].dense())
    with pytest.raises(SpecError, match=r"fr: llama\.cpp has one scale for a file"):
        lt.llama_request(tree, tmp_path / "nodes", {"fr/legal": {"*.down_proj": 0.5}})
