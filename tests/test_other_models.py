"""An adapter of another kind of model: the error says what it is for, and suggests no name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import joint
import pipelines as tiny
import pytest
import torch
from shell import Shell, save_base
from torch import nn

import lora_tree as lt
from lora_tree.errors import BaseMismatch
from lora_tree.integrations.diffusers import attach_pipeline

TEXT_ENCODER = "a text encoder of a diffusion pipeline"
UNET = "the UNet of a diffusion pipeline"
TRANSFORMER = "the transformer of a diffusion pipeline"
IMAGE_MODEL = "the UNet or the transformer of a diffusion pipeline"
NAMES = {
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": TEXT_ENCODER,
    "text_encoder_2.text_model_encoder_layers_0_self_attn_q_proj": TEXT_ENCODER,
    "text_model.encoder.layers.0.self_attn.q_proj": TEXT_ENCODER,
    "te1.text_model.encoder.layers.0.self_attn.q_proj": TEXT_ENCODER,
    "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q": TEXT_ENCODER,
    "unet.down_blocks.0.attentions.0.proj_in": UNET,
    "unet.mid_block_attentions_0_proj_in": UNET,
    "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": UNET,
    "unet.double_blocks_0_img_attn_proj": IMAGE_MODEL,
    "unet.input_blocks_4_1_proj_in": IMAGE_MODEL,
    "transformer.transformer_blocks.0.attn.to_q": TRANSFORMER,
    "transformer.single_transformer_blocks.0.attn.to_q": TRANSFORMER,
    "transformer_blocks.0.attn.to_q": TRANSFORMER,
    "transformer.blocks.0.attn1.to_q": TRANSFORMER,
}
LANGUAGE = (
    "model.layers.0.self_attn.q_proj",
    "layers.0.mlp.down_proj",
    "model.language_model.layers.0.self_attn.q_proj",
    "transformer.h.0.attn.c_attn",
    "gpt_neox.layers.0.attention.dense",
)


def of(name: str, shape: tuple[int, int] = (4, 4)) -> lt.AdapterTree:
    tree = lt.AdapterTree()
    value = lt.LowRank(torch.ones(1, shape[1]), torch.ones(shape[0], 1))
    tree.add("style", adapter=lt.Adapter({name: value}))
    return tree


def refused(tree: lt.AdapterTree, base: nn.Module) -> str:
    """The error of every way to the base, which is the same."""
    told = [text for _, text in lt.misfits(tree, base)]
    for mode in ("merged", "unmerged"):
        model = lt.attach(tree, base)
        with pytest.raises(BaseMismatch) as caught:
            model.activate("style", mode=mode)
        model.detach()
        told.append(str(caught.value))
    assert len(set(told)) == 1
    return told[0]


def components(kind: str) -> dict[str, Any]:
    with tiny.quiet():
        pipe = getattr(tiny, kind)()
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_a_pipeline_does_not_fit_a_language_model(name: str) -> None:
    told = refused(of(name), joint.base())
    assert told.startswith(
        f"style: {name}: the adapter is for {NAMES[name]}, and this base is a LlamaForCausalLM\n"
        "  attach the tree to the pipeline: lora_tree.integrations.diffusers.attach_pipeline"
    )
    assert "did you mean" not in told


@pytest.mark.parametrize(
    "name", ["encoder.layers.0.self_attn.q_proj", "encoder.block.0.layer.0.SelfAttention.q"]
)
def test_an_encoders_own_names_do_not_fit_a_language_model(name: str) -> None:
    told = refused(of(name), joint.base())
    assert told.startswith(
        f"style: {name}: the adapter is for an encoder, as the text encoders of diffusion "
        "pipelines are, and this base is a LlamaForCausalLM\n"
        "  attach the tree to the model that the adapter was trained on; to a pipeline: "
        "lora_tree.integrations.diffusers.attach_pipeline"
    )
    assert "did you mean" not in told


def test_an_encoder_gets_the_hint_for_a_name_of_its_own() -> None:
    base = components("stable_diffusion")["text_encoder"]
    assert "the adapter is for" not in refused(of("encoder.layers.0.self_attn.q_prjo"), base)
    other = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})})
    told = refused(of("encoder.layers.1"), other)
    assert "did you mean 'encoder.layers.0'?" in told


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_language_models_adapter_does_not_fit_a_part_of_a_pipeline(name: str, part: str) -> None:
    base = components("stable_diffusion")[part]
    told = refused(of(name), base)
    own = type(base).__name__
    assert told.startswith(
        f"style: {name}: the adapter is for a language model, and this base is a {own}\n"
    )


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_models_adapter_does_not_fit_a_pipeline(name: str) -> None:
    with tiny.quiet():
        model = attach_pipeline(of(name), tiny.stable_diffusion())
    with pytest.raises(
        BaseMismatch, match=r"the adapter is for a language model, and this base is a pipeline of "
    ):
        model.activate("style")


def test_a_name_without_a_component_that_no_component_has_is_told_so() -> None:
    with tiny.quiet():
        model = attach_pipeline(of("transformer_blocks.0.attn.to_q"), tiny.stable_diffusion())
    with pytest.raises(
        BaseMismatch, match=r"none of this base's components has a module of that name; it has "
    ):
        model.activate("style")


@pytest.mark.parametrize(
    ("kind", "part", "name", "told"),
    [
        ("stable_diffusion", "text_encoder", "unet.mid_block.attentions.0.proj_in", UNET),
        ("stable_diffusion", "unet", "transformer.transformer_blocks.0.attn.to_q", TRANSFORMER),
        ("stable_diffusion", "text_encoder", "transformer_blocks.0.attn.to_q", TRANSFORMER),
        ("flux", "transformer", "unet.down_blocks.0.attentions.0.proj_in", UNET),
        ("flux", "transformer", "text_encoder.encoder.layers.0.mlp.fc1", TEXT_ENCODER),
    ],
)
def test_one_part_of_a_pipeline_does_not_fit_another(
    kind: str, part: str, name: str, told: str
) -> None:
    base = components(kind)[part]
    assert refused(of(name), base).startswith(
        f"style: {name}: the adapter is for {told}, and this base is a {type(base).__name__}\n"
    )


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("text_encoder", "text_encoder.encoder.layers.0.mlp.fc1"),
        ("text_encoder", "text_encoder.text_model_encoder_layers_0_mlp_fc1"),
        ("unet", "unet.mid_block.attentions.0.proj_in"),
        ("unet", "unet.mid_block_attentions_0_proj_in"),
        ("unet", "unet.middle_block_1_proj_in"),
    ],
)
def test_names_of_a_whole_pipeline_are_told_over_a_part_of_one(part: str, name: str) -> None:
    base = components("stable_diffusion")[part]
    assert refused(of(name), base).startswith(
        f"style: {name}: the adapter names the modules of a whole pipeline, and this base is a "
        f"part of one, a {type(base).__name__}\n"
    )


def test_a_misspelt_name_of_the_same_kind_of_model_gets_its_hint() -> None:
    told = refused(of("model.layers.0.self_attn.q_prjo"), joint.base())
    assert "did you mean 'model.layers.0.self_attn.q_proj'?" in told
    unet = components("stable_diffusion")["unet"]
    told = refused(of("mid_block.attentions.0.proj_inn"), unet)
    assert "did you mean 'mid_block.attentions.0.proj_in'?" in told


@pytest.mark.parametrize("name", ["transformer.wte", "transformer.blocks.0.attn.Wqkv", "encoder.x"])
def test_names_that_tell_nothing_are_only_missing(name: str) -> None:
    assert f"{name}: the base has no such module" in refused(of(name), joint.base())


def test_a_base_with_a_module_called_like_a_component_is_asked_itself() -> None:
    base = nn.ModuleDict({"unet": nn.ModuleDict({"down_blocks": nn.Linear(4, 4)})})
    told = refused(of("unet.down_blockz"), base)
    assert "did you mean 'unet.down_blocks'?" in told


def test_generate_says_what_a_text_encoders_file_is_for(tmp_path: Path, shell: Shell) -> None:
    base = save_base(tmp_path / "base")
    with tiny.quiet():
        adapter = tiny.adapter(tiny.stable_diffusion(), {"text_encoder": ("q_proj",)})
    adapter.save(tmp_path / "style.safetensors", form="kohya")
    tree = lt.AdapterTree(base=str(base))
    tree.add("style", adapter=tmp_path / "style.safetensors")
    tree.save(tmp_path / "zoo")
    code, _, told = shell("generate", tmp_path / "zoo", "style", "--prompt", "a")
    assert code == 1
    assert f"the adapter is for {TEXT_ENCODER}, and this base is a LlamaForCausalLM" in told
    assert "did you mean" not in told
