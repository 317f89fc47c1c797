"""Tell from a module's name what kind of model an adapter is for, where a base has no such module.

    text_encoder.text_model.encoder.layers.0.…     a text encoder of a diffusion pipeline
    encoder.layers.0.…, encoder.block.0.layer.…    CLIP's or T5's by itself, or another encoder
    unet.down_blocks.0.…, down_blocks.0.…          its UNet
    transformer.transformer_blocks.0.…             its transformer; transformer.h.0.… is GPT-2's
    model.layers.0.…, transformer.h.0.…            a language model

The nearest name in a base of another kind is no mistake of spelling: ``model.layers.0.self_attn``
is not what ``text_encoder.….layers.0.self_attn`` means, however alike they look.
"""

from __future__ import annotations

import re

from torch import nn

from ..errors import BaseMismatch

__all__ = ["COMPONENTS", "LANGUAGE_MODEL", "kind_of_model", "other_model"]

LANGUAGE_MODEL = "a language model"
_TEXT_ENCODER = "a text encoder of a diffusion pipeline"
_ENCODER = "an encoder, as the text encoders of diffusion pipelines are"
_UNET = "the UNet of a diffusion pipeline"
_TRANSFORMER = "the transformer of a diffusion pipeline"
_IMAGE_MODEL = "the UNet or the transformer of a diffusion pipeline"
COMPONENTS = (
    *("unet", "transformer", "transformer_2"),
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
)
"""The words with which the names of a pipeline's modules begin in a file."""
_UNET_BLOCKS = r"(?:down_blocks|up_blocks|mid_block)[._]"
_TRANSFORMER_BLOCKS = r"(?:single_)?transformer_blocks[._]"
_SIGNS = {
    LANGUAGE_MODEL: re.compile(
        r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.\d+\.(?:self_attn|mlp)\."
        r"|(?:transformer\.)?h\.\d+\.|gpt_neox\."
    ),
    # Language models have a module called transformer as well, so the word alone tells nothing.
    _TRANSFORMER: re.compile(
        rf"(?:transformer(?:_2)?\.|unet\.)?{_TRANSFORMER_BLOCKS}"
        r"|transformer(?:_2)?\.blocks\.\d+\.attn[12]\."
    ),
    _UNET: re.compile(rf"(?:unet\.)?{_UNET_BLOCKS}"),
    # kohya calls the image model of every pipeline its unet.
    _IMAGE_MODEL: re.compile(r"unet\."),
    _TEXT_ENCODER: re.compile(r"text_encoder(?:_[23])?\.|(?:te[123]?\.)?text_model\.encoder\."),
    # Speech models and others have such an encoder as well.
    _ENCODER: re.compile(r"encoder\.(?:layers\.\d+\.|block\.\d+\.layer\.\d+\.)"),
}
"""Kind of model → how the names of its modules begin. The first that matches counts."""


def kind_of_model(name: str) -> str | None:
    """Return what kind of model has a module of this name; None if the name does not tell.

    >>> kind_of_model("unet.mid_block.attentions.0.proj_in"), kind_of_model("model.norm")
    ('the UNet of a diffusion pipeline', None)
    """
    return next((kind for kind, sign in _SIGNS.items() if sign.match(name)), None)


def other_model(base: nn.Module, name: str) -> BaseMismatch | None:
    """Return the error for an adapter of another kind of model; None if its name does not tell.

    Args:
        base: has no module of that name.
        name: of the module that the adapter changes.
    """
    kind = kind_of_model(name)
    if kind is None or name.partition(".")[0] in base._modules:
        return None
    kinds = _kinds_of(base)
    own = type(base).__name__
    what = f"{name}: the adapter is for {kind}, and this base is a {own}"
    if kind == LANGUAGE_MODEL:
        # A base that does not tell what it is may well be a language model.
        if not kinds or LANGUAGE_MODEL in kinds:
            return None
        return BaseMismatch(what, "attach the tree to the model that the adapter was trained on")
    is_same = kind in kinds or (
        kind == _IMAGE_MODEL and not kinds.isdisjoint((_UNET, _TRANSFORMER))
    )
    is_same = is_same or (kind == _ENCODER and (_TEXT_ENCODER in kinds or not kinds))
    if is_same and name.partition(".")[0] not in COMPONENTS:
        return None  # the same kind of model, in which this one name is missing
    if kind == _ENCODER:
        return BaseMismatch(
            what,
            "attach the tree to the model that the adapter was trained on; to a pipeline: "
            "lora_tree.integrations.diffusers.attach_pipeline(tree, pipeline)",
        )
    if is_same:
        what = (
            f"{name}: the adapter names the modules of a whole pipeline, and this base is a part "
            f"of one, a {own}"
        )
    return BaseMismatch(
        what,
        "attach the tree to the pipeline: lora_tree.integrations.diffusers.attach_pipeline(tree, "
        "pipeline)",
    )


def _kinds_of(base: nn.Module) -> set[str]:
    """Return what a base is by the names of its modules, and of its class."""
    kinds = {kind_of_model(name) for name, _ in base.named_modules()}
    found = {kind for kind in kinds if kind is not None}
    # CLIP's encoder has the same names as that of many another model.
    if type(base).__name__.startswith(("CLIPText", "T5Encoder")):
        found = {_TEXT_ENCODER}
    return found
