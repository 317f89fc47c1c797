"""Read and write kohya's single ``.safetensors`` file, which most trainers of image models use.

    in the file     lora_unet_mid_block_attentions_0_proj_in.lora_down.weight
                    └ component └ path of the module, dots as underscores
    in `Adapter`    unet.mid_block_attentions_0_proj_in

    lora_unet → unet                            lora_te, lora_te1 → text_encoder
    lora_te2 → text_encoder_2                   lora_te3 → text_encoder_3

LyCORIS' files have the same names with LoHa's and LoKr's parts (`products`).

The underscores can't be turned back into dots without the model, because names like ``to_q`` have
underscores themselves. So the adapter keeps the name from the file, and when it is bound to a base,
the name is matched with the base's modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import FormatError, LoraTreeError, UnsupportedAdapter, listing
from ..lowrank import LowRank
from . import safetensors
from .pairs import ModuleTensors, as_lowrank, down_and_up
from .products import PRODUCT_PARTS, as_product, is_product

__all__ = ["keys_of", "read_kohya", "render_kohya"]

MAX_CHARACTERS = 1000
"""The most characters in a key: they are untrusted, and are matched with a base's modules."""
_KEY = re.compile(r"(?P<module>lora_(?P<word>unet|te[123]?)_(?P<rest>[^.]+))\.(?P<part>.+)\Z")
_COMPONENT = {
    "unet": "unet",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
}
_PARTS = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
}
_OTHER_KINDS = {
    "dora_scale": "DoRA rescales the whole weight, which is no sum of W and B·A",
    "oft_blocks": "OFT rotates the weight, which is no sum of W and B·A",
    "oft_diag": "OFT rotates the weight, which is no sum of W and B·A",
    "on_input": "IA³ scales inputs or outputs, which is no sum of W and B·A",
    "diff": "a full difference of the weight has no low rank of its own",
    "diff_b": "a full difference of a bias has no low rank of its own",
}


def read_kohya(tensors: Mapping[str, Tensor], where: str) -> Adapter:
    """Read a file's tensors as an adapter.

    Args:
        tensors: key → tensor.
        where: names the file in errors.

    Raises:
        FormatError: a key of another format, half a pair, or shapes that don't fit; names the key.
        UnsupportedAdapter: a kind that does not add up to W + B·A.
    """
    words: dict[str, str] = {}
    groups: dict[str, dict[str, Tensor]] = {}
    named: dict[str, str] = {}
    for key in sorted(tensors):
        matched = _KEY.match(key)
        if matched is None or len(key) > MAX_CHARACTERS:
            raise FormatError(
                f"{where}: unexpected key {key[:200]!r}, expected "
                "lora_unet_<module>.lora_down.weight"
            )
        part = _part(matched["part"], key, where)
        component = _COMPONENT[matched["word"]]
        # lora_te and lora_te1 mean the same encoder; a file with both could hold a module twice
        word = words.setdefault(component, matched["word"])
        if word != matched["word"]:
            raise FormatError(f"{where}: keys of both lora_{word}_ and lora_{matched['word']}_")
        module = f"{component}.{matched['rest']}"
        groups.setdefault(module, {})[part] = tensors[key]
        named[module] = f"{where}: {matched['module']}"
    modules: dict[str, LowRank] = {}
    for module, parts in groups.items():
        module_tensors = ModuleTensors(module, named[module], parts)
        read_parts = as_product if is_product(parts) else as_lowrank
        modules[module] = read_parts(module_tensors)
    return Adapter(modules)


def _part(part: str, key: str, where: str) -> str:
    """Return the part of a pair that the end of a key means."""
    found = _PARTS.get(part)
    if found is not None:
        return found
    if part in PRODUCT_PARTS:
        return part
    for word, reason in _OTHER_KINDS.items():
        # Compare whole words between dots: "diff" is also a substring of "diff_b", another kind.
        if word in part.split("."):
            raise UnsupportedAdapter(f"{where}: {key[:200]}: {reason}")
    raise FormatError(
        f"{where}: unexpected key {key[:200]!r}, expected it to end in one of {listing(_PARTS)}"
    )


def keys_of(module: str, value: LowRank, *, only_encoder: bool = False) -> dict[str, Tensor]:
    """Return the three tensors of one module by key: down, up and alpha.

    Args:
        module: component and path.
        only_encoder: no other text encoder has factors, so the key begins with ``lora_te``.

    Raises:
        FormatError: the format has no word for the component, or can't hold the value.
    """
    component, _, rest = module.partition(".")
    words = {name: word for word, name in _COMPONENT.items()}  # the last of two: lora_te1
    word = words.get(component)
    if word is None or not rest:
        raise FormatError(
            f"{module}: kohya's keys know the components {listing(sorted(words))}, not "
            f"{component!r}",
            "--as diffusers writes the components of every pipeline",
        )
    # Trainers number the encoders only where a model has several.
    if word == "te1" and only_encoder:
        word = "te"
    if value.bias is not None:
        raise FormatError(f"{module}: it adds a bias, which no key of kohya's format holds")
    try:
        A, B = down_and_up(value)
    except LoraTreeError as error:
        raise error.within(module) from error
    name = f"lora_{word}_{_clip(component, rest).replace('.', '_')}"
    alpha = torch.tensor(value.scale * value.rank, dtype=torch.float32)
    return {
        f"{name}.lora_down.weight": A,
        f"{name}.lora_up.weight": B,
        f"{name}.alpha": alpha,
    }


def render_kohya(adapter: Adapter) -> bytes:
    """Return the bytes of a file that holds the adapter.

    Raises:
        FormatError: a module has no key in this format; or two modules would have the same key.
    """
    if not adapter.modules:
        raise FormatError("an adapter without modules can't be written")
    encoders = {name.partition(".")[0] for name in adapter.modules}
    only_encoder = not encoders & {"text_encoder_2", "text_encoder_3"}
    tensors: dict[str, Tensor] = {}
    whose: dict[str, str] = {}
    for module, value in adapter.modules.items():
        # The file has no scale, only an alpha in fp32. If alpha / r does not equal the scale bit
        # for bit, the scale is folded into the factors.
        if not _is_alpha(value):
            value = value.folded()
        for key, tensor in keys_of(module, value, only_encoder=only_encoder).items():
            # Two names that differ only in a dot and an underscore have the same key here. Without
            # this check the second module would replace the first.
            if key in tensors:
                raise FormatError(f"{module} and {whose[key]} would have the same key, {key}")
            tensors[key], whose[key] = tensor, module
    return safetensors.render_tensors(tensors, {"format": "pt"})


def _is_alpha(value: LowRank) -> bool:
    """Return whether alpha / r equals the scale bit for bit, with alpha rounded to fp32."""
    alpha = torch.tensor(value.scale * value.rank, dtype=torch.float32)
    return float(alpha) / value.rank == value.scale


def _clip(component: str, rest: str) -> str:
    """Return a CLIP module's path with the ``text_model`` that it had before transformers 5.

    All readers of these files expect that name.
    """
    is_clip = component.startswith("text_encoder") and rest.startswith(
        ("encoder.layers.", "encoder_layers_")
    )
    return f"text_model.{rest}" if is_clip else rest
