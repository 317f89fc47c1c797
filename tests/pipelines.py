"""Tiny diffusion pipelines with random weights, built without a file, and adapters for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import lora_tree as lt

WORDS = ("a", "castle", "knight", "wizard", "tower", "in", "snow")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of diffusers and transformers about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tokenizer() -> Any:
    """A word tokenizer of eight tokens, padded, with the interface that pipelines use."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=8,
    )


def clip(*, projected: bool = False, width: int = 16) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=16,
        hidden_size=width,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=8,
        projection_dim=width,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5(width: int = 16) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=16, d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0
    )
    return T5EncoderModel(config).eval()


def vae(channels: int) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=8,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).eval()


def stable_diffusion(seed: int = 0) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    with quiet():
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        ).eval()
        pipe = StableDiffusionPipeline(
            vae=vae(4),
            text_encoder=clip(),
            tokenizer=tokenizer(),
            unet=unet,
            scheduler=DDIMScheduler(clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_xl(seed: int = 0) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    with quiet():
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=4,
        ).eval()
        pipe = StableDiffusionXLPipeline(
            vae=vae(4),
            text_encoder=clip(),
            text_encoder_2=clip(projected=True),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=unet,
            scheduler=DDIMScheduler(clip_sample=False),
            add_watermarker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_3(seed: int = 0) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(seed)
    with quiet():
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=8,
        ).eval()
        pipe = StableDiffusion3Pipeline(
            vae=vae(4),
            text_encoder=clip(projected=True),
            text_encoder_2=clip(projected=True),
            text_encoder_3=t5(32),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            tokenizer_3=tokenizer(),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(seed: int = 0) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    with quiet():
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ).eval()
        pipe = FluxPipeline(
            vae=vae(1),
            text_encoder=clip(),
            text_encoder_2=t5(32),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, prompts: Iterable[str] | str, seed: int = 0, **options: Any) -> Tensor:
    """The images of one call, (images, channels, height, width), with seeded noise."""
    kind = type(pipe).__name__
    said: dict[str, Any] = {
        "num_inference_steps": 2,
        "output_type": "pt",
        "height": 16,
        "width": 16,
    }
    if kind in ("StableDiffusion3Pipeline", "FluxPipeline"):
        said["max_sequence_length"] = 8
    generator = torch.Generator().manual_seed(seed)
    prompts = prompts if isinstance(prompts, str) else list(prompts)
    with torch.no_grad(), quiet():
        made = pipe(prompts, generator=generator, **(said | options))
    return made.images


def adapter(
    pipe: Any, ends: Mapping[str, Iterable[str]], *, r: int = 2, seed: int = 0
) -> lt.Adapter:
    """Random factors for the modules of each component whose names end so."""
    from lora_tree.lowrank import LINEAR, Layout

    torch.manual_seed(seed)
    modules = {}
    for component, wanted in ends.items():
        for name, module in getattr(pipe, component).named_modules():
            if not any(name.endswith(end) for end in wanted):
                continue
            out, into = module.weight.shape[0], module.weight[0].numel()
            kernel = tuple(module.weight.shape[2:])
            layout = Layout("conv", kernel) if kernel else LINEAR
            A, B = torch.randn(r, into) / into**0.5, torch.randn(out, r)
            modules[f"{component}.{name}"] = lt.LowRank(A, B, 0.5, layout=layout)
    return lt.Adapter(modules)
