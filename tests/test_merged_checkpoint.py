"""Merged checkpoints: what transformers loads from one has the bits of `activate`, and nothing else
has changed.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHS, along
from forked import Forked
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sampling import slow
from torch import nn

import lora_tree as lt
from lora_tree.errors import BaseMismatch, FolderError, FormatError, SpecError, TiedWeights
from lora_tree.export import checkpoint_writer
from lora_tree.export.names import CheckpointNames
from lora_tree.export.shards import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNTIED = {
    "llama": (),
    "mixtral": (),
    "mixtral, experts": (),
    "vit": (),
    "bert": ("a/b/c",),
    "gpt2": ("a/d",),
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def saved(name: str, dtype: torch.dtype, folder: Path) -> nn.Module:
    """A base of one architecture on the disk, in several shards."""
    base = ARCHS[name].base().to(dtype)
    base.save_pretrained(folder, max_shard_size="30KB")
    (folder / "tokenizer.json").write_text("{}")
    return base


def loaded(folder: Path, dtype: torch.dtype, like: nn.Module) -> nn.Module:
    return type(like).from_pretrained(folder, dtype=dtype).eval()


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())


def on_disk(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[name] = bits(tensor)
    return found


# ---------------------------------------------------------------------- the bits of activate
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "mixtral, experts", "vit"])
def test_a_merged_checkpoint_loads_as_what_activate_gives(
    name: str, dtype: str, tmp_path: Path
) -> None:
    base = saved(name, DTYPES[dtype], tmp_path / "base")
    tree = ARCHS[name].tree(base, factors=torch.float32)
    leaf = next(path for path in ("a/b/c", "a/b", "a") if path not in UNTIED[name])
    told = lt.export_model(tree, leaf, tmp_path / "out", base=tmp_path / "base")
    model = loaded(tmp_path / "base", DTYPES[dtype], base)
    bare = {key: bits(tensor) for key, tensor in model.state_dict().items()}
    lt.attach(tree, model).activate(leaf)
    merged = loaded(tmp_path / "out", DTYPES[dtype], base)
    wanted = {key: bits(tensor) for key, tensor in model.state_dict().items()}
    assert {key: bits(tensor) for key, tensor in merged.state_dict().items()} == wanted
    assert wanted != bare
    before, after = on_disk(tmp_path / "base"), on_disk(tmp_path / "out")
    assert list(before) == list(after)
    assert {key for key in before if before[key] != after[key]} <= set(told.changed)
    assert len(told.changed) < len(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_else_is_the_base_s_byte_for_byte(dtype: str, tmp_path: Path) -> None:
    base = saved("llama", DTYPES[dtype], tmp_path / "base")
    (tmp_path / "base" / "pytorch_model.bin").write_text("another format")
    (tmp_path / "base" / "extra").mkdir()
    (tmp_path / "base" / "extra" / "template.jinja").write_text("{{ text }}")
    told = lt.export_model(ARCHS["llama"].tree(base), "a", tmp_path / "out", base=tmp_path / "base")
    assert told.left_out == ("pytorch_model.bin",)
    files = {
        p.relative_to(tmp_path / "base"): p for p in (tmp_path / "base").rglob("*") if p.is_file()
    }
    there = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert there == set(files) - {Path("pytorch_model.bin")}
    assert len([file for file in files if file.suffix == ".safetensors"]) > 1
    changed = set(told.changed)
    for relative in there:
        old, new = files[relative].read_bytes(), (tmp_path / "out" / relative).read_bytes()
        assert len(old) == len(new)
        if relative.suffix != ".safetensors":
            assert old == new
            continue
        start = 8 + int.from_bytes(old[:8], "little")
        assert old[:start] == new[:start]
        for tensor, entry in json.loads(old[8:start]).items():
            begin, end = (start + n for n in entry.get("data_offsets", (0, 0)))
            assert tensor == "__metadata__" or (old[begin:end] != new[begin:end]) == (
                tensor in changed
            )


def test_an_adapter_in_the_base_s_folder_is_not_put_on_top_of_the_merged_weights(
    tmp_path: Path,
) -> None:
    base = ARCHS["llama"].base().float()
    base.save_pretrained(tmp_path / "base")
    tree = ARCHS["llama"].tree(base, factors=torch.float32)
    tree.flatten("a").save(tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        shutil.copy(file, tmp_path / "base")
    told = lt.export_model(tree, "a/d", tmp_path / "out", base=tmp_path / "base")
    assert told.left_out == ("adapter_config.json", "adapter_model.safetensors")
    lt.attach(tree, base).activate("a/d")
    merged = loaded(tmp_path / "out", torch.float32, base)
    assert [name for name, _ in merged.named_parameters() if "lora" in name] == []
    assert all(
        torch.equal(x, y)
        for x, y in zip(base.state_dict().values(), merged.state_dict().values(), strict=True)
    )


def test_one_file_without_an_index(tmp_path: Path) -> None:
    base = ARCHS["llama"].base().float()
    base.save_pretrained(tmp_path / "base")
    tree = ARCHS["llama"].tree(base, factors=torch.float32)
    tree.base = str(tmp_path / "base")
    lt.export_model(tree, "a/d", tmp_path / "out")
    lt.attach(tree, base).activate("a/d")
    merged = loaded(tmp_path / "out", torch.float32, base)
    assert all(
        torch.equal(x, y)
        for x, y in zip(base.state_dict().values(), merged.state_dict().values(), strict=True)
    )


def test_a_blend_and_an_empty_path(tmp_path: Path) -> None:
    base = saved("llama", torch.float32, tmp_path / "base")
    tree = ARCHS["llama"].tree(base, factors=torch.float32)
    blend = {"a/b": 0.5, "a/d": 0.5}
    lt.export_model(tree, blend, tmp_path / "out", base=tmp_path / "base")
    lt.attach(tree, base).activate(blend)
    merged = loaded(tmp_path / "out", torch.float32, base)
    assert all(
        torch.equal(x, y)
        for x, y in zip(base.state_dict().values(), merged.state_dict().values(), strict=True)
    )
    told = lt.export_model(tree, "", tmp_path / "bare", base=tmp_path / "base")
    assert told.changed == ()
    assert on_disk(tmp_path / "bare") == on_disk(tmp_path / "base")


def test_a_lora_bias_goes_into_the_bias(tmp_path: Path) -> None:
    base = saved("bert", torch.float32, tmp_path / "base")
    name = "bert.encoder.layer.0.attention.self.query"
    tree = lt.AdapterTree()
    value = lt.LowRank(torch.randn(2, 32), torch.randn(32, 2), 0.3, torch.randn(32))
    tree.add("a", adapter=lt.Adapter({name: value}), weight=0.7)
    told = lt.export_model(tree, "a", tmp_path / "out", base=tmp_path / "base")
    assert told.changed == (f"{name}.bias", f"{name}.weight")
    lt.attach(tree, base).activate("a")
    merged = loaded(tmp_path / "out", torch.float32, base)
    for leaf in ("weight", "bias"):
        assert torch.equal(
            merged.get_parameter(f"{name}.{leaf}"), base.get_parameter(f"{name}.{leaf}")
        )


def test_another_file_system_is_copied_to_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved("llama", torch.float32, tmp_path / "base")
    tree = ARCHS["llama"].tree(base)
    lt.export_model(tree, "a", tmp_path / "kernel", base=tmp_path / "base")

    def refuses(*_: Any) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuses)
    told: list[tuple[int, int]] = []
    lt.export_model(
        tree, "a", tmp_path / "hand", base=tmp_path / "base", progress=lambda *now: told.append(now)
    )
    assert on_disk(tmp_path / "hand") == on_disk(tmp_path / "kernel")
    assert (
        told[-1][0]
        == told[-1][1]
        == sum(f.stat().st_size for f in (tmp_path / "hand").glob("*.safetensors"))
    )


# ------------------------------------------------------------------ names on the disk and in memory
def test_mixtral_s_experts_are_separate_on_the_disk_and_fused_in_memory(tmp_path: Path) -> None:
    base = saved("mixtral, experts", torch.float32, tmp_path / "base")
    names = set(open_checkpoint(tmp_path / "base").tensors)
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names
    assert not any("gate_up_proj" in name for name in names)
    tree = ARCHS["mixtral, experts"].tree(base, factors=torch.float32)
    told = lt.export_model(tree, "a/d", tmp_path / "out", base=tmp_path / "base")
    assert {
        f"model.layers.1.block_sparse_moe.experts.{e}.{w}.weight"
        for e in range(4)
        for w in ("w1", "w2", "w3")
    } <= set(told.changed)
    assert set(open_checkpoint(tmp_path / "out").tensors) == names
    lt.attach(tree, base).activate("a/d")
    merged = loaded(tmp_path / "out", torch.float32, base)
    assert torch.equal(
        merged.get_parameter("model.layers.1.mlp.experts.gate_up_proj"),
        base.get_parameter("model.layers.1.mlp.experts.gate_up_proj"),
    )


def test_mixtral_s_experts_stay_fused_where_they_are_fused_on_the_disk(tmp_path: Path) -> None:
    base = ARCHS["mixtral, experts"].base().float()
    (tmp_path / "base").mkdir()
    save_file(
        {n: t.contiguous() for n, t in base.state_dict().items()},
        tmp_path / "base" / "model.safetensors",
    )
    base.config.save_pretrained(tmp_path / "base")
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(tmp_path / "base")
    tree = ARCHS["mixtral, experts"].tree(base, factors=torch.float32)
    told = lt.export_model(tree, "a/b", tmp_path / "out", base=tmp_path / "base")
    assert "model.layers.0.mlp.experts.gate_up_proj" in told.changed
    lt.attach(tree, base).activate("a/b")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in base.state_dict().items())


def test_a_checkpoint_without_the_head_s_prefix(tmp_path: Path) -> None:
    base = ARCHS["bert"].base().float()
    base.bert.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    tree = lt.AdapterTree()
    name = "bert.encoder.layer.1.output.dense"
    tree.add("a", adapter=lt.Adapter({name: lt.LowRank(torch.randn(2, 48), torch.randn(32, 2))}))
    told = lt.export_model(tree, "a", tmp_path / "out", base=tmp_path / "base")
    assert told.changed == ("encoder.layer.1.output.dense.weight",)
    head = lt.AdapterTree()
    value = lt.LowRank(torch.randn(2, 32), torch.randn(32, 2))
    head.add("a", adapter=lt.Adapter({"cls.predictions.transform.dense": value}))
    with pytest.raises(
        BaseMismatch, match=r"^a: cls\.predictions.*: the checkpoint has no tensor for it"
    ):
        lt.export_model(head, "a", tmp_path / "head", base=tmp_path / "base")
    assert not (tmp_path / "head").exists()


def test_a_conversion_that_loses_something_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved("mixtral, experts", torch.float32, tmp_path / "base")
    tree = ARCHS["mixtral, experts"].tree(base, factors=torch.float32)
    whole = CheckpointNames.take_apart

    def lossy(self: CheckpointNames, group: Any, parameters: Any) -> dict[str, torch.Tensor]:
        return {
            name: value.half().float() for name, value in whole(self, group, parameters).items()
        }

    monkeypatch.setattr(CheckpointNames, "take_apart", lossy)
    with pytest.raises(BaseMismatch, match="has other values: its conversion loses something"):
        lt.export_model(tree, "a/b", tmp_path / "out", base=tmp_path / "base")
    monkeypatch.setattr(CheckpointNames, "take_apart", whole)
    loading = transformers.core_model_loading
    monkeypatch.setattr(loading, "revert_weight_conversion", lambda model, tensors: tensors)
    with pytest.raises(BaseMismatch, match="its conversion can't be inverted"):
        lt.export_model(tree, "a/b", tmp_path / "out", base=tmp_path / "base")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


# ---------------------------------------------------------------------- ties
def test_a_tied_weight_is_refused_and_ties_are_kept(tmp_path: Path) -> None:
    base = saved("llama, tied", torch.float32, tmp_path / "base")
    tree = ARCHS["llama, tied"].tree(base, factors=torch.float32)
    lt.export_model(tree, "a/b/c", tmp_path / "out", base=tmp_path / "base")
    assert not any("lm_head" in name for name in on_disk(tmp_path / "out"))
    merged = loaded(tmp_path / "out", torch.float32, base)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    for name in ("lm_head", "model.embed_tokens"):
        shape = (61, 32) if name == "lm_head" else (32, 61)
        layout = lt.Layout("linear" if name == "lm_head" else "embedding")
        value = lt.LowRank(torch.randn(2, shape[1]), torch.randn(shape[0], 2), layout=layout)
        tree.add(name.replace("model.", ""), adapter=lt.Adapter({name: value}))
        with pytest.raises(TiedWeights, match="its weight is tied to"):
            lt.export_model(
                tree, name.replace("model.", ""), tmp_path / name, base=tmp_path / "base"
            )


# ---------------------------------------------------------------------- what is refused
def test_keys_that_find_nothing_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = saved("llama", torch.float32, tmp_path / "base")
    tree = lt.AdapterTree()
    value = lt.LowRank(torch.randn(2, 32), torch.randn(32, 2))
    tree.add("typo", adapter=lt.Adapter({"model.layers.0.self_attn.q_prj": value}))
    tree.add("wide", adapter=lt.Adapter({"model.layers.0.self_attn.k_proj": value}))
    tree.add("nan", adapter=lt.Adapter({"model.layers.0.self_attn.q_proj": value.scaled(1.0).to()}))
    with pytest.raises(BaseMismatch, match=r"^typo: .*q_prj: the base has no such module"):
        lt.export_model(tree, "typo", tmp_path / "out", base=tmp_path / "base")
    with pytest.raises(BaseMismatch, match=r"^wide: .*this base needs"):
        lt.export_model(tree, "wide", tmp_path / "out", base=tmp_path / "base")
    with pytest.raises(SpecError, match="the tree names no base"):
        lt.export_model(tree, "typo", tmp_path / "out")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(FolderError, match="exists already"):
        lt.export_model(tree, "nan", tmp_path / "there", base=tmp_path / "base")
    del base
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "there"]


def test_a_base_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    base = saved("llama", torch.float32, tmp_path / "base")
    tree = ARCHS["llama"].tree(base, factors=torch.float32)
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    with pytest.raises(FormatError, match="the header describes"):
        lt.export_model(tree, "a", tmp_path / "out", base=tmp_path / "base")
    shard.unlink()
    with pytest.raises(FormatError, match=r"can't be read: No such file"):
        lt.export_model(tree, "a", tmp_path / "out", base=tmp_path / "base")
    shard.write_bytes(whole)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match="its weights are quantised"):
        lt.export_model(tree, "a", tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- interruption
def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved("llama", torch.float32, tmp_path / "base")
    tree = ARCHS["llama"].tree(base, factors=torch.float32)
    calls = 0

    def failing(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_writer, "add_weight", failing)
    with pytest.raises(KeyboardInterrupt):
        lt.export_model(tree, "a", tmp_path / "deep" / "out", base=tmp_path / "base")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


KILLED = """
import sys, transformers, lora_tree as lt
transformers.utils.logging.disable_progress_bar()
tree = lt.load(sys.argv[1])
print("ready", flush=True)
lt.export_model(tree, "a", sys.argv[3], base=sys.argv[2])
print("done", flush=True)
"""


@slow
def test_a_killed_run_leaves_no_folder_that_looks_finished(tmp_path: Path) -> None:
    base = saved("llama", torch.float32, tmp_path / "base")
    ARCHS["llama"].tree(base, factors=torch.float32).save(tmp_path / "zoo")
    places = (tmp_path / "zoo", tmp_path / "base", tmp_path / "out")
    started = Forked(KILLED, *places)
    assert started.stdout.readline() == "ready\n"
    began = time.perf_counter()
    assert started.stdout.readline() == "done\n"
    whole_s = time.perf_counter() - began
    assert started.end()[0] == 0
    wanted = on_disk(tmp_path / "out")
    shutil_rmtree(tmp_path / "out")
    for part in sorted(random.random() for _ in range(3)):
        killed = Forked(KILLED, *places)
        assert killed.stdout.readline() == "ready\n"
        time.sleep(whole_s * part)
        killed.kill()
        if (tmp_path / "out").exists():
            assert on_disk(tmp_path / "out") == wanted  # it was done before
            shutil_rmtree(tmp_path / "out")
        for stage in tmp_path.glob(".out.*"):
            if (stage / "config.json").exists():  # all was written but the name
                assert on_disk(stage) == wanted
    (tmp_path / f".out.{'0' * 32}").mkdir()  # one that is surely left
    assert Forked(KILLED, *places).end()[0] == 0
    assert on_disk(tmp_path / "out") == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "zoo"]


def shutil_rmtree(folder: Path) -> None:
    for file in sorted(folder.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    folder.rmdir()


def test_the_header_s_metadata_is_kept(tmp_path: Path) -> None:
    base = saved("llama", torch.float32, tmp_path / "base")
    lt.export_model(ARCHS["llama"].tree(base), "a", tmp_path / "out", base=tmp_path / "base")
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert along("a") == {"a": 0.7}
