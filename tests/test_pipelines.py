"""A tree over diffusion pipelines: against diffusers' own LoRAs on the same files, and path by
path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipelines as tiny
import pytest
import torch
from shell import Shell
from torch import Tensor, nn

import lora_tree as lt
from lora_tree.errors import BaseMismatch, LoraTreeError, PathError, SpecError, StateError
from lora_tree.formats import kohya
from lora_tree.integrations.diffusers import (
    PipelineModel,
    attach_pipeline,
    components_of,
    pipeline_skeleton,
)
from lora_tree.lowrank import LINEAR, Layout

PROMPTS = ["a castle", "a tower in snow"]
SPATIAL = ("proj_in", "conv1", "conv_shortcut", "time_emb_proj")
CLIP_ENDS = ("q_proj", "out_proj", "fc1")
ENDS: dict[str, dict[str, tuple[str, ...]]] = {
    "stable_diffusion": {
        "unet": ("to_q", "to_out.0", "ff.net.0.proj", *SPATIAL),
        "text_encoder": CLIP_ENDS,
    },
    "stable_diffusion_xl": {
        "unet": ("to_q", "to_out.0", "ff.net.0.proj", *SPATIAL),
        "text_encoder": CLIP_ENDS,
        "text_encoder_2": CLIP_ENDS,
    },
    "stable_diffusion_3": {
        "transformer": ("to_q", "to_out.0", "add_k_proj", "ff.net.2"),
        "text_encoder": CLIP_ENDS,
        "text_encoder_2": CLIP_ENDS,
    },
    "flux": {
        "transformer": ("to_q", "to_out.0", "add_k_proj", "proj_mlp", "proj_out"),
        "text_encoder": CLIP_ENDS,
    },
}
FORMS = {
    "stable_diffusion": ("kohya", "diffusers"),
    "stable_diffusion_xl": ("kohya", "diffusers"),
    "stable_diffusion_3": ("diffusers",),
    "flux": ("diffusers",),
}
# Two sums in fp32 in different orders, through some dozen layers and two steps.
CLOSE: dict[str, float] = {"rtol": 0.0, "atol": 2e-5}


def pipeline(name: str) -> Any:
    return getattr(tiny, name)()


def zoo(name: str, pipe: Any, *, seed: int = 1) -> lt.AdapterTree:
    """style → style/knight, style/wizard, each with factors in every component."""
    tree = lt.AdapterTree()
    for at, path in enumerate(("style", "style/knight", "style/wizard")):
        tree.add(path, adapter=tiny.adapter(pipe, ENDS[name], seed=seed + at))
    return tree


def state(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, component in components_of(pipe).items()
        for key, value in component.state_dict(keep_vars=True).items()
    }


def hooks(pipe: Any) -> int:
    kept = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks")
    return sum(
        len(getattr(module, kind))
        for component in components_of(pipe).values()
        for module in component.modules()
        for kind in kept
    )


# ---------------------------------------------------------------------- the same files in diffusers
@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms]
)
def test_a_lineage_of_files_makes_the_images_that_diffusers_makes_of_them(
    tmp_path: Path, name: str, form: str
) -> None:
    pipe = pipeline(name)
    tree = lt.AdapterTree()
    weights = {"style": 1.0, "style/knight": 0.7}
    files = {}
    for seed, (path, weight) in enumerate(weights.items()):
        files[path] = tmp_path / f"{seed}.safetensors"
        tiny.adapter(pipe, ENDS[name], seed=seed).save(files[path], form=form)  # type: ignore[arg-type]
        tree.add(path, adapter=files[path], weight=weight)
    bare = tiny.call(pipe, PROMPTS)
    model = attach_pipeline(tree, pipe)
    made = {}
    for mode in ("merged", "unmerged"):
        model.activate("style/knight", mode=mode)  # type: ignore[arg-type]
        made[mode] = tiny.call(pipe, PROMPTS)
    model.detach()
    assert torch.equal(tiny.call(pipe, PROMPTS), bare)
    with tiny.quiet():
        for path, file in files.items():
            pipe.load_lora_weights(str(file), adapter_name=path.replace("/", "_"))
        adapters = [path.replace("/", "_") for path in weights]
        pipe.set_adapters(adapters, list(weights.values()))
    theirs = tiny.call(pipe, PROMPTS)
    assert (theirs - bare).abs().max() > 0.01
    torch.testing.assert_close(made["merged"], theirs, **CLOSE)
    torch.testing.assert_close(made["unmerged"], theirs, **CLOSE)


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        # a text encoder of which no out_proj has factors
        ("stable_diffusion", {"unet": ("to_q",), "text_encoder": ("q_proj", "fc1")}),
        # the embeddings of time, and of the image's size
        ("stable_diffusion_xl", {"unet": ("linear_1", "linear_2", "to_q")}),
    ],
)
def test_keys_that_diffusers_passes_over_count_here(
    tmp_path: Path, name: str, ends: dict[str, tuple[str, ...]]
) -> None:
    """diffusers drops factors of a kohya file without an error; the sum here is the dense one."""
    pipe = pipeline(name)
    made = tiny.adapter(pipe, ends)
    file = tmp_path / "style.safetensors"
    made.save(file, form="kohya")
    tree = lt.AdapterTree()
    tree.add("style", adapter=file)
    model = attach_pipeline(tree, pipe)
    with model.using("style"):
        active = {key: value.detach().clone() for key, value in state(pipe).items()}
    for module, value in made.modules.items():
        weight = state(pipe)[f"{module}.weight"].detach().double()
        dense = weight + value.dense(dtype=torch.float64).reshape(weight.shape)
        torch.testing.assert_close(active[f"{module}.weight"], dense.float())
    model.detach()
    with tiny.quiet():
        pipe.load_lora_weights(str(file), adapter_name="style")
    adapted = {
        f"{component}.{module}"
        for component, base in components_of(pipe).items()
        for module, layer in base.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert adapted < set(made.modules), "diffusers takes all of them now: compare with it instead"


SGM = {
    # as kohya's trainer calls SDXL's modules           # as diffusers does
    "input_blocks_3_1_transformer_blocks_0_attn1_to_q": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "input_blocks_3_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_3_0_in_layers_2": "down_blocks.1.resnets.0.conv1",
    "input_blocks_3_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": (
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    ),
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_1_1_transformer_blocks_0_attn2_to_out_0": (
        "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"
    ),
    "output_blocks_0_0_skip_connection": "up_blocks.0.resnets.0.conv_shortcut",
    "time_embed_0": "time_embedding.linear_1",
}


def of_module(module: nn.Module, *, seed: int) -> lt.LowRank:
    torch.manual_seed(seed)
    weight = module.weight
    assert isinstance(weight, Tensor)
    kernel = tuple(weight.shape[2:])
    layout = Layout("conv", kernel) if kernel else LINEAR
    into = weight[0].numel()
    A, B = torch.randn(2, into) / into**0.5, torch.randn(weight.shape[0], 2)
    return lt.LowRank(A, B, 0.5, layout=layout)


def test_names_of_the_original_sdxl_go_through_diffusers_own_conversion(tmp_path: Path) -> None:
    pipe = pipeline("stable_diffusion_xl")
    modules = {}
    for seed, (flat, own) in enumerate(SGM.items()):
        modules[f"unet.{flat}"] = of_module(pipe.unet.get_submodule(own), seed=seed)
    file = tmp_path / "sgm.safetensors"
    lt.Adapter(modules).save(file, form="kohya")
    tree = lt.AdapterTree()
    tree.add("style", adapter=file)
    assert lt.misfits(tree, attach_pipeline(lt.AdapterTree(), pipe).base) == []
    model = attach_pipeline(tree, pipeline("stable_diffusion_xl"))
    bound = tree.flatten("style", base=model.base)
    assert set(bound.modules) == {f"unet.{own}" for own in SGM.values()}
    for flat, own in SGM.items():
        got, wanted = bound.modules[f"unet.{own}"], modules[f"unet.{flat}"]
        assert torch.equal(got.dense(), wanted.dense())


def test_fused_projections_of_flux_go_through_diffusers_own_conversion(tmp_path: Path) -> None:
    pipe = pipeline("flux")
    attention = pipe.transformer.transformer_blocks[0].attn
    torch.manual_seed(0)
    into, width = attention.to_q.in_features, attention.to_q.out_features
    fused = lt.LowRank(torch.randn(2, into) / into**0.5, torch.randn(3 * width, 2), 0.5)
    adapter = lt.Adapter({"unet.double_blocks_0_img_attn_qkv": fused})
    file = tmp_path / "flux.safetensors"
    adapter.save(file, form="kohya")
    tree = lt.AdapterTree()
    tree.add("style", adapter=file)
    model = attach_pipeline(tree, pipe)
    bound = tree.flatten("style", base=model.base).modules
    parts = [bound[f"transformer.transformer_blocks.0.attn.to_{each}"].dense() for each in "qkv"]
    torch.testing.assert_close(torch.cat(parts), fused.dense())
    model.activate("style")
    ours = tiny.call(pipe, PROMPTS)
    model.detach()
    with tiny.quiet():
        pipe.load_lora_weights(str(file), adapter_name="style")
    torch.testing.assert_close(ours, tiny.call(pipe, PROMPTS), **CLOSE)


# ---------------------------------------------------------------------- bare means bare
@pytest.mark.parametrize("name", ENDS)
def test_nothing_of_a_pipeline_is_changed_but_what_is_active(name: str) -> None:
    pipe = pipeline(name)
    before = {key: (value, value.clone()) for key, value in state(pipe).items()}
    had = hooks(pipe)
    model = attach_pipeline(zoo(name, pipe), pipe)
    assert isinstance(model, PipelineModel)
    with model.using("style/knight"), model.route(["style/knight", ""]):
        pass
    model.activate("style/knight")
    model.activate("style/wizard", mode="unmerged")
    model.deactivate()
    after = state(pipe)
    assert hooks(pipe) == had
    assert list(after) == list(before)
    for key, (tensor, value) in before.items():
        assert after[key] is tensor
        assert torch.equal(tensor, value)
    model.detach()
    attach_pipeline(lt.AdapterTree(), pipe)


def test_a_pipeline_saved_under_a_merged_path_warns(tmp_path: Path) -> None:
    pipe = pipeline("stable_diffusion")
    model = attach_pipeline(zoo("stable_diffusion", pipe), pipe)
    pipe.save_pretrained(tmp_path / "bare")
    with (
        model.using("style"),
        pytest.warns(lt.MergedWarning, match="with a path merged into it"),
    ):
        pipe.save_pretrained(tmp_path / "merged")
    pipe.save_pretrained(tmp_path / "again")


# ---------------------------------------------------------------------- every image its own path
ROUTES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ENDS),
    *((name, {"num_images_per_prompt": 2}) for name in ENDS),
    ("stable_diffusion", {"guidance_scale": 1.0}),
    ("stable_diffusion", {"guidance_scale": 1.0, "num_images_per_prompt": 2}),
    ("stable_diffusion", {"negative_prompt": ["snow", "knight"]}),
    ("stable_diffusion_xl", {"negative_prompt": "snow", "num_images_per_prompt": 2}),
    ("stable_diffusion_3", {"guidance_scale": 1.0}),
    ("flux", {"negative_prompt": ["snow", "knight"], "true_cfg_scale": 2.0}),
]


@pytest.mark.parametrize(("name", "options"), ROUTES)
def test_every_image_is_the_one_that_its_path_makes_alone(
    name: str, options: dict[str, Any]
) -> None:
    pipe = pipeline(name)
    model = attach_pipeline(zoo(name, pipe), pipe)
    paths = ["style/knight", "style/wizard:0.5+style/knight:0.25"]
    each = options.get("num_images_per_prompt", 1)
    with model.route(paths):
        routed = tiny.call(pipe, PROMPTS, **options)
    assert len(routed) == 2 * each
    seen = []
    for at, path in enumerate(paths):
        with model.using(path, mode="unmerged"):
            alone = tiny.call(pipe, PROMPTS, **options)
        mine = slice(at * each, (at + 1) * each)
        torch.testing.assert_close(routed[mine], alone[mine], **CLOSE)
        seen.append(alone)
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_a_bare_row_is_the_bare_pipeline_bit_for_bit() -> None:
    pipe = pipeline("stable_diffusion")
    bare = tiny.call(pipe, PROMPTS)
    model = attach_pipeline(zoo("stable_diffusion", pipe), pipe)
    with model.route(["", "style"]):
        routed = tiny.call(pipe, PROMPTS)
    assert torch.equal(routed[0], bare[0])
    assert not torch.equal(routed[1], bare[1])


def unet_only(pipe: Any) -> lt.AdapterTree:
    tree = lt.AdapterTree()
    for seed, path in enumerate(("knight", "wizard")):
        tree.add(path, adapter=tiny.adapter(pipe, {"unet": ("to_q", "conv1")}, seed=seed))
    return tree


def test_the_images_of_one_prompt_can_differ_where_the_text_does_not() -> None:
    pipe = pipeline("stable_diffusion")
    model = attach_pipeline(unet_only(pipe), pipe)
    with model.route(["knight", "wizard"]):
        routed = tiny.call(pipe, "a castle", num_images_per_prompt=2)
    for at, path in enumerate(("knight", "wizard")):
        with model.using(path, mode="unmerged"):
            alone = tiny.call(pipe, "a castle", num_images_per_prompt=2)
        torch.testing.assert_close(routed[at], alone[at], **CLOSE)


def test_the_images_of_one_prompt_share_its_text_or_are_refused() -> None:
    pipe = pipeline("stable_diffusion")
    model = attach_pipeline(zoo("stable_diffusion", pipe), pipe)
    with (
        pytest.raises(BaseMismatch, match="the images of one prompt share its text"),
        model.route(["style/knight", "style/wizard"]),
    ):
        tiny.call(pipe, "a castle", num_images_per_prompt=2)
    assert model.active == ""


def test_another_number_of_images_than_paths_is_refused() -> None:
    pipe = pipeline("stable_diffusion")
    model = attach_pipeline(unet_only(pipe), pipe)
    with (
        pytest.raises(BaseMismatch, match="makes 1 image for each of 2 prompts"),
        model.route(["knight", "wizard", "knight"]),
    ):
        tiny.call(pipe, PROMPTS)


def test_a_component_called_by_itself_goes_by_what_the_caller_declares() -> None:
    pipe = pipeline("stable_diffusion")
    model = attach_pipeline(unet_only(pipe), pipe)
    torch.manual_seed(0)
    latents, text = torch.randn(4, 4, 8, 8), torch.randn(4, 8, 16)

    def denoised() -> Tensor:
        with torch.no_grad():
            return pipe.unet(latents, 3, text, return_dict=False)[0]

    with model.route(["knight", "wizard"], tile=2):
        routed = denoised()
    for at, path in enumerate(("knight", "wizard")):
        with model.using(path, mode="unmerged"):
            torch.testing.assert_close(routed[at::2], denoised()[at::2], **CLOSE)
    with pytest.raises(BaseMismatch, match="route of 2"), model.route(["knight", "wizard"], tile=3):
        denoised()


def test_rows_that_train_get_their_own_gradients() -> None:
    """A batch routed by subject trains each subject as a batch of its own does."""
    pipe = pipeline("stable_diffusion")
    model = attach_pipeline(unet_only(pipe), pipe)
    torch.manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 16)
    groups = model.trainable("knight", "wizard")
    with model.route(["knight", "wizard"]):
        pipe.unet(latents, 3, text, return_dict=False)[0].square().sum().backward()
    joint = [p.grad.clone() for group in groups for p in group["params"]]
    model.zero_grad()
    for at, path in enumerate(("knight", "wizard")):
        with model.using(path, mode="unmerged"):
            row = slice(at, at + 1)
            pipe.unet(latents[row], 3, text[row], return_dict=False)[0].square().sum().backward()
    alone = [p.grad for group in groups for p in group["params"]]
    for together, apart in zip(joint, alone, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------- names
def test_a_name_that_could_be_two_modules_is_refused() -> None:
    pipe = pipeline("stable_diffusion")
    pipe.unet.down = nn.ModuleDict({"x_y": nn.Linear(4, 4), "x": nn.Module()})
    pipe.unet.down.x.y = nn.Linear(4, 4)
    tree = lt.AdapterTree()
    value = lt.LowRank(torch.ones(1, 4), torch.ones(4, 1))
    tree.add("style", adapter=lt.Adapter({"unet.down_x_y": value}))
    model = attach_pipeline(tree, pipe)
    told = r"style: unet.down_x_y: ambiguous in this base: it could be unet.down.x_y, unet"
    with pytest.raises(BaseMismatch, match=told):
        model.activate("style")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("unet.mid_block_attentions_0_proj_inn", "the nearest is 'mid_block_attentions_0_proj_in'"),
        ("text_encoder.encoder.layers.7.mlp.fc1", "no module of this base's text_encoder"),
        ("text_encoder_2.encoder.layers.0.mlp.fc1", "no component 'text_encoder_2'"),
        ("controlnet.mid", "no component 'controlnet'"),
    ],
)
def test_a_key_that_matches_nothing_is_an_error(name: str, text: str) -> None:
    pipe = pipeline("stable_diffusion")
    tree = lt.AdapterTree()
    value = lt.LowRank(torch.ones(1, 4), torch.ones(4, 1))
    tree.add("style", adapter=lt.Adapter({name: value}))
    model = attach_pipeline(tree, pipe)
    with pytest.raises(BaseMismatch, match=text):
        model.activate("style")
    assert model.active == ""


def test_an_adapter_of_one_component_alone_finds_its_component() -> None:
    pipe = pipeline("stable_diffusion")
    whole = tiny.adapter(pipe, {"unet": ("to_q",)})
    bare = {name.removeprefix("unet."): value for name, value in whole.modules.items()}
    tree = lt.AdapterTree()
    tree.add("style", adapter=lt.Adapter(bare))
    model = attach_pipeline(tree, pipe)
    assert set(tree.flatten("style", base=model.base).modules) == set(whole.modules)


def test_underscores_and_dots_of_one_module_add_up(tmp_path: Path) -> None:
    pipe = pipeline("stable_diffusion")
    made = [tiny.adapter(pipe, {"unet": ("to_q",)}, seed=seed) for seed in (0, 1)]
    made[0].save(tmp_path / "a.safetensors", form="kohya")
    tree = lt.AdapterTree()
    tree.add("style", adapter=tmp_path / "a.safetensors")
    tree.add("style/knight", adapter=made[1])
    model = attach_pipeline(tree, pipe)
    flat = tree.flatten("style/knight", base=model.base)
    for name, value in flat.modules.items():
        wanted = made[0].modules[name].dense() + made[1].modules[name].dense()
        torch.testing.assert_close(value.dense(), wanted)
    with pytest.raises(BaseMismatch, match="look like two names of one module"):
        tree.flatten("style/knight")


def test_a_linear_file_fits_a_convolution_of_kernel_one_and_the_other_way_round() -> None:
    pipe = pipeline("stable_diffusion")
    name = "unet.mid_block.attentions.0.proj_in"
    conv = pipe.unet.mid_block.attentions[0].proj_in
    value = of_module(conv, seed=0)
    tree = lt.AdapterTree()
    tree.add("linear", adapter=lt.Adapter({name: lt.LowRank(value.A, value.B, value.scale)}))
    tree.add("conv", adapter=lt.Adapter({name: value}))
    fresh = lt.LowRank(torch.ones(1, 16, 1, 1).flatten(1), torch.ones(16, 1))
    out = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    conv_of_a_linear = lt.LowRank(fresh.A, fresh.B, layout=Layout("conv", (1, 1)))
    tree.add("other", adapter=lt.Adapter({out: conv_of_a_linear}))
    model = attach_pipeline(tree, pipe)
    made = []
    for path in ("linear", "conv"):
        with model.using(path):
            made.append(conv.weight.detach().clone())
    assert torch.equal(*made)
    with model.using("other"):
        pass


# ---------------------------------------------------------------------- fresh nodes, files out
def test_a_fresh_node_targets_modules_of_every_component(tmp_path: Path) -> None:
    pipe = pipeline("stable_diffusion")
    tree = lt.AdapterTree(defaults=dict(r=2, target_modules=["to_q", "q_proj"]))
    tree.add("style")
    attach_pipeline(tree, pipe)
    adapter = tree.adapter("style")
    assert adapter is not None
    assert {name.partition(".")[0] for name in adapter.modules} == {"unet", "text_encoder"}
    tree.save(tmp_path / "zoo")
    assert lt.load(tmp_path / "zoo").paths() == ["style"]


def test_the_command_writes_files_that_diffusers_loads(tmp_path: Path, shell: Shell) -> None:
    pipe = pipeline("stable_diffusion")
    pipe.save_pretrained(tmp_path / "base")
    tree = lt.AdapterTree()
    for seed, path in enumerate(("style", "style/knight")):
        file = tmp_path / f"{seed}.safetensors"
        tiny.adapter(pipe, ENDS["stable_diffusion"], seed=seed).save(file, form="kohya")
        tree.add(path, adapter=file)
    tree.save(tmp_path / "zoo")
    model = attach_pipeline(tree, pipe)
    with model.using("style/knight"):
        wanted = tiny.call(pipe, PROMPTS)
    model.detach()
    zoo_folder, base = str(tmp_path / "zoo"), str(tmp_path / "base")
    for form, more in (("kohya", []), ("diffusers", ["--base", base])):
        out = str(tmp_path / f"{form}.safetensors")
        said = ["export", zoo_folder, "style/knight", "--as", form, "--out", out, *more]
        code, _, err = shell(*said)
        assert code == 0, err
        with tiny.quiet():
            pipe.load_lora_weights(out, adapter_name=form)
        torch.testing.assert_close(tiny.call(pipe, PROMPTS), wanted, **CLOSE)
        pipe.unload_lora_weights()
    code, told, _ = shell("check", zoo_folder, "--base", base)
    assert code == 0, told


@pytest.mark.parametrize("name", ENDS)
def test_a_skeleton_has_the_modules_of_the_pipeline(tmp_path: Path, name: str) -> None:
    pipe = pipeline(name)
    pipe.save_pretrained(tmp_path)
    made = pipeline_skeleton(tmp_path)
    shapes = {key: value.shape for key, value in made.named_parameters(remove_duplicate=False)}
    own = {
        key: value.shape for key, value in state(pipe).items() if isinstance(value, nn.Parameter)
    }
    assert own.items() <= shapes.items()
    assert all(parameter.is_meta for parameter in made.parameters())


# ---------------------------------------------------------------------- what is refused
def test_a_pipeline_is_one_trees_own(tmp_path: Path) -> None:
    pipe = pipeline("stable_diffusion")
    model = attach_pipeline(lt.AdapterTree(), pipe)
    with pytest.raises(
        StateError, match="a tree is attached to this pipeline's text_encoder already"
    ):
        attach_pipeline(lt.AdapterTree(), pipe)
    model.detach()
    file = tmp_path / "a.safetensors"
    tiny.adapter(pipe, ENDS["stable_diffusion"]).save(file, form="diffusers")
    with tiny.quiet():
        pipe.load_lora_weights(str(file), adapter_name="style")
    with pytest.raises(StateError, match="LoRAs are loaded into the pipeline"):
        attach_pipeline(lt.AdapterTree(), pipe)


def test_a_component_that_was_replaced_is_noticed() -> None:
    pipe = pipeline("stable_diffusion")
    model = attach_pipeline(unet_only(pipe), pipe)
    own, pipe.unet = pipe.unet, pipeline("stable_diffusion").unet
    with pytest.raises(StateError, match="the pipeline's unet was replaced"):
        model.activate("knight")
    pipe.unet = own
    model.activate("knight")


def test_what_is_no_pipeline_is_refused() -> None:
    pipe = pipeline("stable_diffusion")
    with pytest.raises(SpecError, match=r"expected a DiffusionPipeline(.|\n)*lora_tree.attach"):
        attach_pipeline(lt.AdapterTree(), pipe.unet)
    model = attach_pipeline(unet_only(pipe), pipe)
    with pytest.raises(PathError, match="wizzard"):
        model.activate("wizzard")
    with pytest.raises(StateError, match="has no forward of its own"):
        model(torch.zeros(1))


def test_kohya_keys_of_a_transformer_say_the_way_out() -> None:
    value = lt.LowRank(torch.ones(1, 4), torch.ones(4, 1))
    with pytest.raises(LoraTreeError, match="--as diffusers"):
        kohya.keys_of("transformer.x_embedder", value)
