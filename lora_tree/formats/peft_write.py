"""PEFT adapters out: `Adapter` → the bytes of the two files, which depend on its value alone.

PEFT knows a scale only as lora_alpha / r (or / √r), so lora_alpha is the number whose quotient is the scale, bit for
bit. For some scales there is none; they are folded into B. Where modules differ, ``rank_pattern`` and
``alpha_pattern`` say so under keys that match one full name and nothing else.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import FormatError
from ..lowrank import LowRank
from . import peft_keys, safetensors
from .peft_config import DERIVED, FUSED, TRAINING, TURNED, parse_config, says_which_way
from .peft_keys import CONFIG, NESTING, WEIGHTS

__all__ = ["render"]

MATCHING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def render(adapter: Adapter) -> dict[str, bytes]:
    """The files of a PEFT folder, name → bytes.

    Modules that PEFT can only give one r and one lora_alpha (an nn.MultiheadAttention's two projections, raw
    parameters whose order is assumed) are padded to the larger rank, and their scales folded where they differ.

    Raises:
        FormatError: PEFT has no way to write this value; names the module and the reason.
    """
    if not adapter.modules:
        raise FormatError(
            "an adapter without modules can't be written",
            "leave the folder out: the node needs none",
        )
    for name, value in adapter.modules.items():
        _check(name, value)
    nested = _nested(adapter)
    attentions = _attentions(adapter.modules, nested)
    modules = dict(adapter.modules)
    for names in [(n, f"{n}.out_proj") for n in attentions] + [
        _names(m, nested) for m in adapter.assumed & set(nested)
    ]:
        modules.update(_alike({name: modules[name] for name in names}))
    modules, alphas, rslora = _scales(
        modules, wants_rslora=adapter.config.get("use_rslora") is True
    )
    modules = _biases(modules)
    wrappers = {name: 1 for name in modules if modules[name].layout.kind != "parameter"}
    wrappers |= {module: len(names) for module, names in nested.items()}
    config = _config(adapter, modules, nested, attentions, alphas, rslora)
    known = {
        module: names
        for module, names in nested.items()
        if len(names) > 1 and module not in adapter.assumed
    }
    metadata = {"format": "pt"} | ({NESTING: json.dumps(known, sort_keys=True)} if known else {})
    data = _json(config)
    parse_config(data, CONFIG)  # what we would not read, we do not write
    return {
        CONFIG: data,
        WEIGHTS: safetensors.render_tensors(_tensors(adapter, modules, nested, wrappers), metadata),
    }


def _check(name: str, value: LowRank) -> None:
    """One module on its own: a shape, a dtype and a name that PEFT can have."""
    if value.is_sharded:
        raise FormatError(
            f"{name}: every rank has a part of its factors",
            "save inside with model.gathered() as tree:",
        )
    kind, kernel = value.layout.kind, value.layout.kernel
    dimensions = {"linear": (2,), "embedding": (2,), "conv": (2, 3), "parameter": (3,)}[kind]
    if value.A.ndim not in dimensions:
        raise FormatError(
            f"{name}: a {kind} has factors of {dimensions} dimensions, got A {tuple(value.A.shape)}"
        )
    if kind == "conv" and not (
        1 <= len(kernel) <= 3 and value.A.shape[-1] % math.prod(kernel) == 0
    ):
        raise FormatError(
            f"{name}: A is {tuple(value.A.shape)}, expected in · {math.prod(kernel)} columns ({kernel})"
        )
    if value.bias is not None and kind in ("embedding", "parameter"):
        raise FormatError(
            f"{name}: PEFT has no lora_bias for {kind}s",
            "leave the bias out, or write it elsewhere",
        )
    for t in value.tensors:
        if t.dtype not in safetensors.NAMES:
            raise FormatError(
                f"{name}: dtype {t.dtype} is not written, expected bf16, fp16, fp32 or fp64"
            )
    if kind == "parameter" and "." not in name:
        raise FormatError(f"{name}: PEFT can't train a raw parameter of the top module")
    if "" in name.split(".") or "base_layer" in name.split("."):
        raise FormatError(f"{name}: PEFT's keys have no way to write this name")


def _nested(adapter: Adapter) -> dict[str, tuple[str, ...]]:
    """Module → its raw parameters, in the order in which PEFT nests their wrappers."""
    found: dict[str, list[str]] = {}
    for name, value in adapter.modules.items():
        if value.layout.kind == "parameter":
            module, _, parameter = name.rpartition(".")
            found.setdefault(module, []).append(parameter)
    nested = {}
    for module, parameters in found.items():
        order = tuple(p for p in adapter.nesting.get(module, ()) if p in parameters)
        if set(order) != set(parameters) <= set(FUSED):
            order = tuple(sorted(parameters, key=FUSED.index))
        if len(parameters) > 1 and set(order) != set(parameters):
            raise FormatError(
                f"{module}: PEFT writes {' and '.join(parameters)} in the order in which the module registers them, "
                f"and nesting says {adapter.nesting.get(module)}",
                "attach the adapter to its base first, or give Adapter(nesting={module: (parameter, …)})",
            )
        if module in adapter.modules:
            raise FormatError(
                f"{module}: PEFT can't train a module and its raw parameters {parameters} at once"
            )
        nested[module] = order if len(parameters) > 1 else tuple(parameters)
    return nested


def _attentions(modules: Mapping[str, LowRank], nested: Mapping[str, tuple[str, ...]]) -> set[str]:
    """The modules that must be an nn.MultiheadAttention: they and their out_proj have factors."""
    found = set()
    for name in [n for n in modules if modules[n].layout.kind != "parameter"] + list(nested):
        for owner in peft_keys.ancestors(name):
            if owner not in modules:
                continue
            both = [modules.get(name), modules[owner]]
            if name != f"{owner}.out_proj" or any(
                v is None or v.layout.kind != "linear" for v in both
            ):
                raise FormatError(
                    f"{name}: lies in {owner}, which has factors of its own; PEFT can write that only for the out_proj "
                    "of an nn.MultiheadAttention"
                )
            found.add(owner)
    return found


def _names(module: str, nested: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(f"{module}.{parameter}" for parameter in nested[module])


def _alike(group: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The same values with one rank and one scale."""
    rank = max(value.rank for value in group.values())
    if len({value.scale for value in group.values()}) > 1:
        group = {name: value.folded() for name, value in group.items()}
    return {name: value.padded(rank) for name, value in group.items()}


def _r(value: LowRank) -> int:
    """r as PEFT counts it: over all groups of a convolution, for each expert of a raw parameter."""
    return value.rank * (
        value.A.shape[0] if value.layout.kind == "conv" and value.A.ndim == 3 else 1
    )


def _scales(
    modules: dict[str, LowRank], *, wants_rslora: bool
) -> tuple[dict[str, LowRank], dict[str, int | float], bool]:
    """(modules, their lora_alpha, use_rslora): rslora where it was so and writes every scale as it is."""
    rslora = wants_rslora and all(
        _alpha(value.scale, _r(value), rslora=True) is not None for value in modules.values()
    )
    alphas: dict[str, int | float] = {}
    for name, value in modules.items():
        alpha = _alpha(value.scale, _r(value), rslora=rslora)
        if alpha is None:
            modules[name] = value.folded()
            alpha = _r(value)  # without rslora, so the scale is 1
        alphas[name] = alpha
    return modules, alphas, rslora


def _alpha(scale: float, r: int, *, rslora: bool) -> int | float | None:
    """The lora_alpha whose quotient is ``scale``, bit for bit; an integer where one will do; None where none will."""
    divisor = math.sqrt(r) if rslora else r
    near = scale * divisor
    if not math.isfinite(near):
        return None
    tries: list[int | float] = [round(near), near] if abs(near) < 2**53 else [near]
    return next((alpha for alpha in tries if alpha / divisor == scale), None)


def _biases(modules: dict[str, LowRank]) -> dict[str, LowRank]:
    """lora_bias holds for all modules or none: those without one get zeros."""
    if all(value.bias is None for value in modules.values()):
        return modules
    without = next(
        (n for n, v in modules.items() if v.layout.kind in ("embedding", "parameter")), None
    )
    if without:
        raise FormatError(
            f"{without}: PEFT has no lora_bias for {modules[without].layout.kind}s, and other modules here have one",
            "leave the bias out, or split the adapter in two",
        )
    zeros = {
        n: v.B.new_zeros(math.prod(v.B.shape[:-1])) for n, v in modules.items() if v.bias is None
    }
    return {n: replace(v, bias=zeros.get(n, v.bias)) for n, v in modules.items()}


def _tensors(
    adapter: Adapter,
    modules: Mapping[str, LowRank],
    nested: Mapping[str, tuple[str, ...]],
    wrappers: Mapping[str, int],
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, value in modules.items():
        A, B = value.A, value.B
        path = peft_keys.key_path(name, wrappers)
        if value.layout.kind == "parameter":
            module, _, parameter = name.rpartition(".")
            depth = len(nested[module]) - 1 - nested[module].index(parameter)
            path = peft_keys.key_path(module, wrappers) + ".base_layer" * depth
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)  # (E·r, in) (out, r·E)
        elif value.layout.kind == "conv":
            kernel = value.layout.kernel
            A, B = (A.flatten(0, 1), B.flatten(0, 1)) if A.ndim == 3 else (A, B)
            A = A.reshape(len(A), -1, *kernel)  # (r, in, *kernel)
            B = B.reshape(*B.shape, *(1 for _ in kernel))  # (out, r/G, 1, …)
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if value.layout.kind == "embedding"
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors |= {f"{path}.{names[0]}": A, f"{path}.{names[1]}": B}
        if value.bias is not None:
            tensors[f"{path}.lora_B.bias"] = value.bias
    for name, tensor in adapter.unchanged.items():
        tensors[peft_keys.key_path(name, wrappers)] = tensor
    return {peft_keys.PREFIX + path: tensor for path, tensor in tensors.items()}


def _config(
    adapter: Adapter,
    modules: Mapping[str, LowRank],
    nested: Mapping[str, tuple[str, ...]],
    attentions: Iterable[str],
    alphas: Mapping[str, int | float],
    rslora: bool,
) -> dict[str, Any]:
    outside = {
        f"{name}.out_proj" for name in attentions
    }  # they go by the r and alpha of their attention
    ranks = {name: _r(value) for name, value in modules.items() if name not in outside}
    scales = {name: alpha for name, alpha in alphas.items() if name not in outside}
    r, alpha = _commonest(ranks.values()), _commonest(scales.values())
    fields: dict[str, Any] = {"task_type": None, "lora_dropout": 0.0, "fan_in_fan_out": False}
    fields |= {key: _plain(v) for key, v in adapter.config.items() if key not in DERIVED | TRAINING}
    lora_bias = any(value.bias is not None for value in modules.values())
    fields |= {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": {_exactly(name): v for name, v in ranks.items() if v != r},
        "alpha_pattern": {_exactly(name): v for name, v in scales.items() if v != alpha},
        "lora_bias": lora_bias,
        "bias": _bias(adapter),
    }
    if "ensure_weight_tying" in fields:
        fields["ensure_weight_tying"] = fields["ensure_weight_tying"] is True and _tied(modules)
    if fields.get("init_lora_weights") != "gaussian" or lora_bias:
        # the others can't be begun again at every rank, and say nothing about a trained adapter
        fields["init_lora_weights"] = fields.get("init_lora_weights") is not False
    if nested:  # PEFT refuses both of these beside a raw parameter; neither changes the value
        fields |= {"lora_dropout": 0.0, "fan_in_fan_out": False}
        fields["target_parameters"] = [
            name for module in sorted(nested) for name in _names(module, nested)
        ]
        if not says_which_way(fields):  # the factors lie as PEFT writes them since then
            fields["peft_version"] = ".".join(map(str, TURNED))
    targets = sorted(
        n for n, v in modules.items() if v.layout.kind != "parameter" and n not in outside
    )
    kept = fields.get("target_modules")
    if not (isinstance(kept, list) and _describes(kept, targets, {*outside, *nested}, fields)):
        for field in MATCHING:
            fields.pop(field, None)
        kept = targets if _describes(targets, targets, {*outside, *nested}, fields) else None
    fields["target_modules"] = "|".join(map(re.escape, targets)) if kept is None else sorted(kept)
    return fields


def _tied(modules: Mapping[str, LowRank]) -> bool:
    """Whether every head of an embedding's size has the embedding's factors, transposed.

    With ``ensure_weight_tying`` PEFT reads the factors of the embedding alone and uses them for the head as well. That
    is true of what it has just trained, but not of a sum with a node that changes one of the two by itself.
    """
    embeddings = [value for value in modules.values() if value.layout.kind == "embedding"]
    linear = [
        value for value in modules.values() if value.layout.kind == "linear" and value.A.ndim == 2
    ]
    for one in embeddings:
        heads = [
            head
            for head in linear
            if head.A.shape == one.B.mT.shape and head.B.shape == one.A.mT.shape
        ]
        mirrored = [
            h
            for h in heads
            if h.scale == one.scale and torch.equal(h.A, one.B.mT) and torch.equal(h.B, one.A.mT)
        ]
        if not heads or len(mirrored) < len(heads):
            return False
    return bool(embeddings)


def _describes(
    entries: list[Any], targets: list[str], others: set[str], fields: Mapping[str, Any]
) -> bool:
    """Whether a list of ``target_modules`` stands for these targets, by PEFT's rule, and for none of the others."""
    if any(fields.get(name) is not None for name in MATCHING[1:]) or len(
        set(map(str, entries))
    ) < len(entries):
        return False
    used = {
        entry
        for name in targets
        for entry in entries
        if name == entry or name.endswith(f".{entry}")
    }
    stray = any(name == entry or name.endswith(f".{entry}") for name in others for entry in entries)
    covered = all(
        any(name == entry or name.endswith(f".{entry}") for entry in used) for name in targets
    )
    return covered and len(used) == len(entries) and not stray


def _bias(adapter: Adapter) -> str:
    kept = adapter.config.get("bias", "none")
    biases = any(name.rpartition(".")[2] == "bias" for name in adapter.unchanged)
    return "none" if not biases else "all" if kept == "none" else str(kept)


def _commonest(values: Iterable[Any]) -> Any:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _exactly(name: str) -> str:
    return "^" + re.escape(name)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _json(fields: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(fields, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"the adapter's config can't be written as JSON: {error}") from error
    return (text + "\n").encode("ascii")
