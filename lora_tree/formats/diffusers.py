"""Read and write diffusers' LoRA files, ``pytorch_lora_weights.safetensors``.

    unet.….to_q.lora_A.weight                     since 0.22; lora_B.bias with lora_bias
    unet.….proj_in.lora.down.weight               before, also ….lora_linear_layer.down.weight
    ….attn1.processor.to_q_lora.down.weight       before 0.17, of the UNet alone
    unet.….to_q.alpha                             an alpha beside the factors
    unet.….to_q.lora_A.default.weight             with the adapter's name, see `peft_named`

    metadata: lora_adapter_metadata = {"unet.r": 4, "unet.lora_alpha": 8, …}

The scale is alpha / r if there is an alpha beside the factors. Otherwise it comes from the
metadata, which hold one PEFT config per component. Without these it is 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from torch import Tensor

from ..adapter import Adapter
from ..errors import FormatError, LoraTreeError, UnsupportedAdapter, listing
from ..lowrank import LowRank
from . import safetensors, strict_json
from .pairs import ModuleTensors, as_lowrank, down_and_up
from .peft_config import PeftConfig, parse_config
from .peft_named import KeyNames

__all__ = ["METADATA", "read_diffusers", "render_diffusers"]

METADATA = "lora_adapter_metadata"
_COMPONENT = re.compile(r"(unet|transformer|text_encoder)(_[23])?\Z")
_ENDS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "bias",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
_OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA rescales the whole weight, which is no sum of W and B·A",
    "dora_scale": "DoRA rescales the whole weight, which is no sum of W and B·A",
}
# Every name has a block's number between two dots. A name without dots, but with a number between
# underscores, is one of kohya's.
_NUMBERED = re.compile(r"_[0-9]+(?:_|\Z)")
# the projections of an attention, as the attention processors of old files call them
_OF_AN_ENCODER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def read_diffusers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str
) -> Adapter:
    """Read a file's tensors as an adapter.

    Args:
        tensors: key → tensor.
        metadata: of the file.
        where: names the file in errors.

    Raises:
        FormatError: a key of another format, half a pair, or shapes that don't fit; names the key.
        UnsupportedAdapter: a kind that does not add up to W + B·A.
    """
    configs = _configs(metadata, where)
    groups: dict[str, dict[str, Tensor]] = {}
    keys: dict[tuple[str, str], str] = {}
    names = KeyNames(tensors, where)
    for key in sorted(tensors):
        module, part = _split(names.plain(key), where)
        earlier = keys.setdefault((module, part), key)
        if earlier != key:
            raise FormatError(f"{where}: {earlier[:200]} and {key[:200]} are the same factor")
        groups.setdefault(module, {})[part] = tensors[key]
    modules: dict[str, LowRank] = {}
    for module, parts in groups.items():
        component, _, path = module.partition(".")
        config = configs.get(component)
        scale = None
        if config is not None and "alpha" not in parts:
            scale = config.scale(path)
        module_tensors = ModuleTensors(module, f"{where}: {module}", parts)
        modules[module] = as_lowrank(module_tensors, scale=scale)
    return Adapter(modules)


def _split(key: str, where: str) -> tuple[str, str]:
    """Split a key into (component and module, part)."""
    for word, reason in _OTHER_KINDS.items():
        if word in key:
            raise UnsupportedAdapter(f"{where}: {key[:200]}: {reason}")
    end = next((end for end in _ENDS if key.endswith(end)), None)
    if end is None or len(key) > 1000:
        raise FormatError(
            f"{where}: unexpected key {key[:200]!r}, expected it to end in one of {listing(_ENDS)}"
        )
    path = key.removesuffix(end)
    first, _, rest = path.partition(".")
    if _COMPONENT.match(first) is None or not rest:
        first, rest = "unet", path  # keys without a component are from old files, of the UNet alone
    if end.startswith("_lora"):
        rest = _of_a_processor(rest, encoder=first.startswith("text_encoder"))
    if "" in rest.split("."):
        raise FormatError(f"{where}: {key[:200]!r} names no module")
    return f"{first}.{rest}", _ENDS[end]


def _of_a_processor(path: str, *, encoder: bool) -> str:
    """Return the module to which an attention processor's factors belong."""
    above, _, leaf = path.replace(".processor.", ".").rpartition(".")
    if encoder:
        leaf = _OF_AN_ENCODER.get(leaf, leaf)
    elif leaf == "to_out":
        leaf = "to_out.0"  # to_out is a list: the projection and a dropout
    return f"{above}.{leaf}" if above else leaf


def _configs(metadata: Mapping[str, str], where: str) -> dict[str, PeftConfig]:
    """Return component → its PEFT config in the metadata."""
    packed = metadata.get(METADATA)
    if packed is None:
        return {}
    fields: dict[str, dict[str, object]] = {}
    named = f"{where}: {METADATA}"
    for key, value in strict_json.loads(packed.encode("utf-8", "surrogatepass"), named).items():
        component, _, field = key.partition(".")
        if _COMPONENT.match(component) is None:
            raise FormatError(f"{named}: {key[:80]!r} begins with no component of a pipeline")
        fields.setdefault(component, {})[field] = value
    configs = {}
    for component, own in fields.items():
        own["peft_type"] = "LORA"
        # Through `parse_config`, so that these fields pass the same checks as a PEFT config: it
        # refuses DoRA, for example.
        configs[component] = parse_config(json.dumps(own).encode(), f"{named}: {component}")
    return configs


def render_diffusers(adapter: Adapter) -> bytes:
    """Return the bytes of a file that holds the adapter, with scales folded into the factors.

    Without an alpha every reader uses the scale 1. Metadata are not written, because old versions
    of diffusers, and other programs, ignore them.

    Raises:
        FormatError: a module has no key in this format.
    """
    if not adapter.modules:
        raise FormatError("an adapter without modules can't be written")
    tensors: dict[str, Tensor] = {}
    for module, value in adapter.modules.items():
        component, _, path = module.partition(".")
        if _COMPONENT.match(component) is None or not path:
            raise FormatError(
                f"{module}: {component!r} is no component of a diffusers pipeline",
                "names begin with unet., transformer., text_encoder., … in a tree over a pipeline",
            )
        if "." not in path and _NUMBERED.search(path):
            raise FormatError(
                f"{module}: it has underscores for dots, as kohya's files do, and diffusers' keys "
                "have dots",
                "name the pipeline that says which module is meant: --base FOLDER, "
                "tree.flatten(path, base=model.base)",
            )
        folded = value.folded()
        if folded.bias is not None:
            raise FormatError(f"{module}: it adds a bias, which diffusers does not load")
        try:
            A, B = down_and_up(folded)
        except LoraTreeError as error:
            raise error.within(module) from error
        # diffusers expects the ``text_model`` that CLIP's names had before transformers 5, and
        # removes it for an encoder without it.
        if component.startswith("text_encoder") and path.startswith("encoder.layers."):
            path = f"text_model.{path}"
        tensors[f"{component}.{path}.lora_A.weight"] = A
        tensors[f"{component}.{path}.lora_B.weight"] = B
    return safetensors.render_tensors(tensors, {"format": "pt"})
