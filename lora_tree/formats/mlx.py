"""Read and write mlx-lm's adapters: ``adapters.safetensors`` and ``adapter_config.json``.

    model.layers.0.self_attn.q_proj.lora_a    (in, r)       A transposed
    model.layers.0.self_attn.q_proj.lora_b    (r, out)      B transposed
    model.embed_tokens.lora_a, .lora_b        (vocab, r), (r, dim)
    ….mlp.switch_mlp.up_proj.lora_a, .lora_b  (experts, r, in), (experts, out, r): not transposed

    adapter_config.json: {"fine_tune_type": "lora", "num_layers": 16,
                         "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": […]}}

The scale is ``lora_parameters.scale`` itself: mlx-lm does not divide it by the rank, and ignores an
``alpha``. Names are those of mlx-lm's models, which equal transformers' for most architectures. The
experts of a mixture get the names that transformers had before version 5, one Linear each, and the
base fuses them when the adapter is bound to it.

Written by ``mlx_lm.lora``; read and written by the rules of mlx-lm 0.32's ``load_adapters``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from torch import Tensor

from ..adapter import Adapter
from ..errors import FormatError, LoraTreeError, UnsupportedAdapter
from ..lowrank import EMBEDDING, LINEAR, LowRank
from ..override import check_none
from . import safetensors, strict_json
from .peft_keys import CONFIG
from .recognise import MLX_WEIGHTS

__all__ = ["read_mlx", "render_mlx"]

MAX_CHARACTERS = 1000

_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)\Z", re.DOTALL)
_EMBEDDINGS = frozenset(
    (
        "embed",
        "embed_in",
        "embed_tokens",
        "embed_tokens_per_layer",
        "embedding",
        "embeddings",
        "position_embedding_table",
        "tok_embeddings",
        "token_embeddings",
        "word_embeddings",
        "wpe",
        "wte",
    )
)
"""The last parts of embeddings' names in mlx-lm's models. Only the name tells an embedding from a
Linear: their factors have the same shapes."""
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_LAYER = re.compile(r".*?\.(?P<layer>\d+)\.(?P<key>.+)\Z", re.DOTALL)
_FUSE = (
    "write the whole model with mlx_lm.fuse --dequantize, "
    "then: lora-tree extract BASE FUSED --out DIR"
)


def read_mlx(
    tensors: Mapping[str, Tensor], config: bytes, where: str, config_named: str
) -> Adapter:
    """Read a folder's tensors and config as an adapter.

    Args:
        tensors: key → tensor.
        config: the bytes of its adapter_config.json.
        where, config_named: name the two files in errors.

    Raises:
        FormatError: a key of another format, half a pair, shapes that don't fit, or a config
            without a scale; names the file and the key.
        UnsupportedAdapter: DoRA, or a full fine-tuning.
    """
    fields = strict_json.loads(config, config_named)
    _check_type(fields, config_named)
    rank, scale = _parameters(fields, config_named)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        matched = _KEY.match(key) if len(key) <= MAX_CHARACTERS else None
        if matched is None or "" in matched["module"].split("."):
            raise FormatError(
                f"{where}: unexpected key {key[:200]!r}, expected <module>.lora_a or .lora_b"
            )
        if matched["part"] == "m":
            raise UnsupportedAdapter(
                f"{where}: {key[:200]}: DoRA rescales the whole weight, which is no sum of W and "
                "B·A",
                _FUSE,
            )
        pairs.setdefault(matched["module"], {})[matched["part"]] = tensors[key]
    modules: dict[str, LowRank] = {}
    for module, parts in pairs.items():
        try:
            modules |= _values(module, parts, rank, scale)
        except LoraTreeError as error:
            raise FormatError(f"{where}: {module}: {error.what}", *error.todo) from error
    base = fields.get("model")
    return Adapter(modules, base=base if isinstance(base, str) and base else None)


def _check_type(fields: Mapping[str, object], where: str) -> None:
    kind = fields.get("fine_tune_type", "lora")
    if kind == "lora":
        return
    reasons = {
        "dora": "DoRA rescales the whole weight, which is no sum of W and B·A",
        "full": "a full fine-tuning holds whole weights and no factors",
    }
    if isinstance(kind, str) and kind in reasons:
        raise UnsupportedAdapter(f"{where}: fine_tune_type is {kind}: {reasons[kind]}", _FUSE)
    raise UnsupportedAdapter(
        f"{where}: fine_tune_type is {kind!r:.80}, expected 'lora' ('dora' and 'full' are known "
        "and refused)",
        _FUSE,
    )


def _parameters(fields: Mapping[str, object], where: str) -> tuple[int | None, float]:
    """Return the rank, None if the config lacks it, and the scale."""
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise FormatError(
            f"{where}: no lora_parameters, which say the scale; is it the config of mlx-lm?",
            'mlx-lm writes {"lora_parameters": {"rank": 8, "scale": 20.0, …}, …}',
        )
    scale, rank = parameters.get("scale"), parameters.get("rank")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not _is_finite(scale):
        raise FormatError(f"{where}: lora_parameters.scale is {scale!r:.80}, expected a number")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise FormatError(f"{where}: lora_parameters.rank is {rank!r:.80}, expected 1 or more")
    return rank, float(scale)


def _is_finite(number: int | float) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:  # an integer too large for a float
        return False


def _values(
    module: str, parts: Mapping[str, Tensor], rank: int | None, scale: float
) -> dict[str, LowRank]:
    """Return the increments of one module: its own, or one for each expert.

    Raises:
        FormatError, ShapeMismatch: half a pair, or shapes that don't fit.
    """
    missing = [part for part in ("lora_a", "lora_b") if part not in parts]
    if missing:
        raise FormatError(f"no {missing[0]}: half a pair")
    a, b = parts["lora_a"], parts["lora_b"]
    shapes = f"lora_a {tuple(a.shape)}, lora_b {tuple(b.shape)}"
    holder, _, leaf = module.rpartition(".")
    is_switch = a.ndim == 3 and (holder == "switch_mlp" or holder.endswith(".switch_mlp"))
    if a.ndim != b.ndim or (a.ndim != 2 and not is_switch):
        raise FormatError(f"{shapes}: expected (in, r) and (r, out)")
    # The factors of experts are oriented as in PEFT, all others are transposed.
    A, B = (a, b) if is_switch else (_turned(a), _turned(b))
    if A.shape[:-2] != B.shape[:-2] or A.shape[-2] != B.shape[-1]:
        raise FormatError(f"{shapes} do not multiply")
    if rank is not None and A.shape[-2] != rank:
        raise FormatError(f"{shapes}: the config says rank {rank}, and mlx-lm refuses another one")
    if not is_switch:
        layout = EMBEDDING if leaf in _EMBEDDINGS else LINEAR
        return {module: LowRank(A, B, scale, layout=layout)}
    values = {}
    for expert in range(len(A)):
        values[_expert(holder, expert, leaf)] = LowRank(A[expert], B[expert], scale)
    return values


def _turned(tensor: Tensor) -> Tensor:
    """Return the transposed matrix, written over the original in the file's one buffer."""
    turned = tensor.mT.contiguous()
    return tensor.view(turned.shape).copy_(turned)


def _expert(holder: str, number: int, leaf: str) -> str:
    """Return the name of an expert's Linear, as in checkpoints and before transformers 5."""
    above = holder.removesuffix("switch_mlp")
    # Only Mixtral calls its projections w1, w2 and w3.
    name = _MIXTRAL.get(leaf, leaf) if above.endswith("block_sparse_moe.") else leaf
    return f"{above}experts.{number}.{name}"


# ---------------------------------------------------------------------- out
def render_mlx(adapter: Adapter, *, layers: int | None = None) -> dict[str, bytes]:
    """Return the two files: name → bytes.

    mlx-lm creates factors of one rank for all modules that ``keys`` names, in the last
    ``num_layers`` layers, and then loads the file. So factors of a smaller rank are padded with
    zeros, and scales are folded into B. Modules that are not in the file keep their initial B of
    zeros.

    Args:
        layers: the number of layers of the base; None: up to the adapter's last one. mlx-lm counts
            from the end, and refuses the file if the number is too small.

    Raises:
        FormatError: a module has no key in this format.
    """
    if not adapter.modules:
        raise FormatError("an adapter without modules can't be written")
    check_none(adapter.overrides, "mlx-lm's adapter")
    rank = max(adapter.ranks.values())
    tensors: dict[str, Tensor] = {}
    keys, deepest = set(), -1
    for module, value in adapter.modules.items():
        if value.layout not in (LINEAR, EMBEDDING) or value.A.ndim != 2:
            raise FormatError(
                f"{module}: {value.layout.kind} factors of {tuple(value.A.shape)}: mlx-lm's "
                "adapters hold Linear layers and embeddings"
            )
        if value.bias is not None:
            raise FormatError(f"{module}: it adds a bias, which mlx-lm's adapters can't hold")
        padded = value.folded().padded(rank)
        tensors[f"{module}.lora_a"] = padded.A.mT.contiguous()
        tensors[f"{module}.lora_b"] = padded.B.mT.contiguous()
        in_layer = _LAYER.match(module)
        if in_layer is None:
            keys.add(module)  # a module outside of the layers is listed by its whole name
        else:
            keys.add(in_layer["key"])
            deepest = max(deepest, int(in_layer["layer"]))
    config = {
        "fine_tune_type": "lora",
        "num_layers": layers if layers is not None else deepest + 1,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    if adapter.base is not None:
        config["model"] = adapter.base
    return {
        CONFIG: (json.dumps(config, indent=4, sort_keys=True) + "\n").encode(),
        MLX_WEIGHTS: safetensors.render_tensors(tensors, {"format": "mlx"}),
    }
