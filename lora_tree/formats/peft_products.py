"""Read PEFT's LoHa and LoKr folders as exact factors: see `products`.

    base_model.model.<module>.hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b
                             .hada_t1, hada_t2                               of some convolutions
                             .lokr_w1 or lokr_w1_a, lokr_w1_b; lokr_w2 or …
                             .lokr_t2                                        of some convolutions

The scale is alpha / r of the config, even if both halves of a LoKr are full.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor

from ..adapter import Adapter
from ..errors import FormatError, UnsupportedAdapter
from ..lowrank import LowRank
from . import strict_json
from .pairs import ModuleTensors
from .peft_config import PeftConfig, parse_config
from .peft_keys import PREFIX
from .products import PRODUCT_PARTS, as_product

__all__ = ["product_config", "read_products"]

KINDS = {"LOHA": "hada_", "LOKR": "lokr_"}


def product_config(config: bytes, where: str) -> PeftConfig | None:
    """Return the checked config of a LoHa or LoKr; None if another reader handles its kind.

    Raises:
        FormatError: it is broken.
        UnsupportedAdapter: it has parts that do not add up.
    """
    # Search the bytes first: nearly all adapters are LoRAs, whose config is parsed elsewhere.
    if not any(f'"{kind}"'.encode() in config for kind in KINDS):
        return None
    fields = strict_json.loads(config, where)
    if fields.get("peft_type") not in KINDS:
        return None
    if fields.get("modules_to_save"):
        raise UnsupportedAdapter(
            f"{where}: modules_to_save = {str(fields['modules_to_save'])[:80]} beside a "
            f"{fields['peft_type']}, which is read for LORA alone",
            "save its modules with a LoRA of their own, as another node of the lineage",
        )
    # Pass only these fields on: these kinds have use_effective_conv2d, which `parse_config` would
    # refuse as an unknown kind of LoRA.
    taken = ("r", "rank_pattern", "alpha_pattern", "target_modules")
    own = {name: fields[name] for name in taken if name in fields}
    own["lora_alpha"] = fields.get("alpha", 8)
    own["base_model_name_or_path"] = fields.get("base_model_name_or_path")
    own["peft_type"] = "LORA"
    return parse_config(json.dumps(own).encode(), where)


def read_products(config: PeftConfig, tensors: Mapping[str, Tensor], where: str) -> Adapter:
    """Read a file's tensors under their config.

    Args:
        config: of `product_config`.
        tensors: key → tensor; on the meta device for an outline.
        where: names the file in errors.

    Raises:
        FormatError: a key of neither kind, or parts that don't fit; names the key.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        module, _, part = key.removeprefix(PREFIX).rpartition(".")
        if not key.startswith(PREFIX) or part not in PRODUCT_PARTS or "" in module.split("."):
            raise FormatError(
                f"{where}: unexpected key {key[:200]!r}, expected {PREFIX}<module>.hada_w1_a or "
                ".lokr_w1"
            )
        groups.setdefault(module, {})[part] = tensors[key]
    if not groups:
        raise UnsupportedAdapter(f"{where}: no hada_ and no lokr_ factors of any module")
    modules: dict[str, LowRank] = {}
    for module, parts in groups.items():
        module_tensors = ModuleTensors(module, f"{where}: {module}", parts)
        modules[module] = as_product(module_tensors, scale=config.scale(module))
    return Adapter(modules, base=config.base)
