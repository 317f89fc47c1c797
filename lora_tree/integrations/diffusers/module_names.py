"""The names that files give to the modules of a pipeline, and the pipeline's own.

The components of a pipeline become one `Assembly`, which looks names up with underscores for dots.
Beyond that, files of other programs name modules of the original UNet of SDXL, and of Flux, whose
projections are fused. These go through diffusers' own conversion, which is called and not
rewritten here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...assembly import Assembly
from ...errors import BaseMismatch, LoraTreeError
from ...formats import kohya
from ...formats.diffusers import read_diffusers
from ...lowrank import LowRank

__all__ = ["assembled"]


def assembled(components: dict[str, nn.Module], kind: Any, *, name: str) -> Assembly:
    """Return the components as one base, which knows the names that files give to them."""
    return Assembly(
        components,
        name_or_path=name,
        aliases=_aliases(components),
        prefixes=_prefixes(components),
        convert=partial(_converted, kind, components.get("unet")),
    )


def _aliases(components: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the words in files for components that this pipeline names differently."""
    aliases: dict[str, str] = {}
    if "unet" not in components and "transformer" in components:
        aliases["unet"] = "transformer"
    second = components.get("text_encoder_2")
    if "text_encoder_3" not in components and "T5" in type(second).__name__:
        aliases["text_encoder_3"] = "text_encoder_2"  # kohya counts T5 as the third everywhere
    return aliases


def _prefixes(components: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return ``text_model`` for each CLIP model whose names lost that prefix in transformers 5."""
    found: dict[str, str] = {}
    for name, component in components.items():
        is_clip = type(component).__name__.startswith("CLIPText")
        if is_clip and "text_model" not in component._modules:
            found[name] = "text_model"
    return found


def _converted(
    kind: Any, unet: nn.Module | None, name: str, value: LowRank
) -> Mapping[str, LowRank]:
    """Convert one module of another program's UNet or transformer by diffusers' own code.

    Each module is converted separately. From a whole file diffusers silently drops the modules that
    it does not know; of a single one nothing comes back then, which the caller refuses.
    """
    if not name.startswith("unet.") or not hasattr(kind, "lora_state_dict"):
        return {}
    try:
        keys = _keys_for_diffusers(name, value)
        options = {} if unet is None else {"unet_config": getattr(unet, "config", None)}
        made = kind.lora_state_dict(keys, **options)
        state = made[0] if isinstance(made, tuple) else made
        if not state:
            return {}
        back = read_diffusers(state, {}, name)
    except LoraTreeError:
        raise
    except Exception as error:  # another library may raise anything
        raise BaseMismatch(
            f"{name}: diffusers can't convert it for a {kind.__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if value.A.is_meta:
        return {
            own: converted.with_tensors(lambda tensor: tensor.to("meta"))
            for own, converted in back.modules.items()
        }
    return back.modules


def _keys_for_diffusers(name: str, value: LowRank) -> dict[str, Tensor]:
    """Return the module's tensors under kohya's keys, with a scale of 1.

    The scale is folded into the factors, and alpha is the rank in fp64. Otherwise diffusers would
    multiply with a rounded scale.
    """
    if value.A.is_meta:
        # The conversion reads values, so an outline gets ones, expanded to take no memory.
        value = value.with_tensors(lambda t: torch.ones((), dtype=t.dtype).expand(t.shape))
    else:
        value = value.folded()
    keys = kohya.keys_of(name, value)
    alpha = next(key for key in keys if key.endswith(".alpha"))
    keys[alpha] = torch.tensor(float(value.rank), dtype=torch.float64)
    return keys
