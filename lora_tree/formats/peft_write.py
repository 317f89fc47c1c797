"""Write a PEFT adapter: `Adapter` → the bytes of the two files, which depend on its value alone.

PEFT computes a scale as lora_alpha / r, or / √r with use_rslora. So lora_alpha is chosen such that
the quotient equals the scale bit for bit. If no float does, the scale is folded into B.
`peft_fields` writes the config, this module the factors.

Read by PEFT, transformers, diffusers, vLLM and SGLang. vLLM before 0.32 ignores rank_pattern and
alpha_pattern, and SGLang (0.5) wants one rank for all modules: `export.portable` makes an adapter
that needs neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..adapter import Adapter
from ..errors import FormatError
from ..lowrank import LowRank, is_sharded
from ..override import Override, tensor_owner
from . import peft_keys, safetensors
from .peft_config import FUSED, parse_config
from .peft_fields import PeftForm, config_bytes, parameter_names, peft_rank
from .peft_keys import CONFIG, NESTING, WEIGHTS
from .peft_overrides import TOKENS, TOKENS_ALONE

__all__ = ["peft_form", "render"]

DIMENSIONS = {"linear": (2,), "embedding": (2,), "conv": (2, 3), "parameter": (3,)}
"""Layout kind → the allowed numbers of dimensions; the first of three is groups or experts."""

_Nested = Mapping[str, tuple[str, ...]]
"""Module → its raw parameters, in the order in which PEFT nests their wrappers."""


def render(adapter: Adapter) -> dict[str, bytes]:
    """Return the files of a PEFT folder, name → bytes.

    PEFT has only one r and one lora_alpha for the two projections of an nn.MultiheadAttention, and
    raw parameters whose order is assumed must not differ in them. For these the smaller rank is
    padded, and scales that differ are folded.

    Raises:
        FormatError: PEFT's files can't hold this value; names the module and the reason.
    """
    form = peft_form(adapter)
    config = config_bytes(adapter, form)
    # Never write a config that our own reader refuses: the folder could not be opened again.
    parse_config(config, CONFIG)
    tensors = _tensors(adapter, form)
    return {CONFIG: config, WEIGHTS: safetensors.render_tensors(tensors, _metadata(adapter, form))}


def _metadata(adapter: Adapter, form: PeftForm) -> dict[str, str]:
    # transformers refuses a file without "format"
    metadata = {"format": "pt"}
    known: dict[str, tuple[str, ...]] = {}
    for module, names in form.nested.items():
        if len(names) > 1 and module not in adapter.assumed:
            known[module] = names
    if known:
        metadata[NESTING] = json.dumps(known, sort_keys=True)
    return metadata


def _check(name: str, value: LowRank) -> None:
    """Check that PEFT's files can hold one module, by its shape, dtype and name.

    Raises:
        FormatError: they can't; names the module.
    """
    if value.is_sharded:
        raise FormatError(
            f"{name}: every rank has a part of its factors",
            "save inside with model.gathered() as tree:",
        )
    kind, kernel = value.layout.kind, value.layout.kernel
    if value.A.ndim not in DIMENSIONS[kind]:
        raise FormatError(
            f"{name}: a {kind} has factors of {DIMENSIONS[kind]} dimensions, "
            f"got A {tuple(value.A.shape)}",
            "make the LowRank with the layout of its module",
        )
    if kind == "conv":
        has_kernel = 1 <= len(kernel) <= 3
        if not has_kernel or value.A.shape[-1] % math.prod(kernel):
            raise FormatError(
                f"{name}: A is {tuple(value.A.shape)}, expected in · {math.prod(kernel)} columns "
                f"for the kernel {kernel}",
                "make the LowRank with the kernel of its convolution: Layout('conv', kernel)",
            )
    if value.bias is not None and kind in ("embedding", "parameter"):
        raise FormatError(
            f"{name}: PEFT has no lora_bias for {kind}s",
            "leave the bias out, or write it elsewhere",
        )
    for tensor in value.tensors:
        if tensor.dtype not in safetensors.NAMES:
            raise FormatError(
                f"{name}: dtype {tensor.dtype} is not written, expected bf16, fp16, fp32 or fp64",
                "convert it: adapter.to(dtype=torch.bfloat16)",
            )
    if kind == "parameter" and "." not in name:
        raise FormatError(
            f"{name}: PEFT can't train a raw parameter of the top module",
            "put the parameter into a module of its own",
        )
    # In a key, base_layer means one of PEFT's wrappers, and a dot separates modules.
    if "" in name.split(".") or "base_layer" in name.split("."):
        raise FormatError(
            f"{name}: PEFT's keys have no way to write this name",
            "expected names between the dots, none of them base_layer: rename the module",
        )


def _check_override(name: str, override: Override, adapter: Adapter) -> None:
    """Check that PEFT's files can hold an override.

    Raises:
        FormatError: they can't; names the tensor and the reason.
    """
    if is_sharded(override.values):
        raise FormatError(
            f"{name}: every rank has a part of it", "save inside with model.gathered() as tree:"
        )
    if override.values.dtype not in safetensors.NAMES:
        raise FormatError(
            f"{name}: dtype {override.values.dtype} is not written, expected bf16, fp16, fp32 or "
            "fp64"
        )
    module, leaf = tensor_owner(name)
    if not module or "" in name.split(".") or "base_layer" in name.split("."):
        raise FormatError(
            f"{name}: PEFT's keys have no way to write this name",
            "expected the name of a module and of a tensor in it, none of them base_layer",
        )
    if override.rows is None:
        return
    if leaf != "weight" or override.values.ndim != 2:
        raise FormatError(
            f"{name}: PEFT trains rows of the weight of an embedding, and of nothing else",
            "write it as a whole tensor: Override(values)",
        )
    if module in adapter.modules:
        raise FormatError(
            f"{name}: PEFT has no trained rows of a module that has factors",
            "leave the module out of one of the two, or write the path merged: "
            "lora-tree export --as model",
        )


def peft_form(adapter: Adapter) -> PeftForm:
    """Return the adapter's modules in the form that PEFT's files can hold.

    Raises:
        FormatError: as `render`.
    """
    if not adapter.modules and not adapter.overrides:
        raise FormatError(
            "an adapter without modules can't be written",
            "leave the folder out: the node needs none",
        )
    for name, value in adapter.modules.items():
        _check(name, value)
    for name, override in adapter.overrides.items():
        _check_override(name, override, adapter)
    nested = _nested(adapter)
    attentions = _attentions(adapter.modules, nested)
    modules = dict(adapter.modules)
    for attention in sorted(attentions):
        _make_alike(modules, (attention, f"{attention}.out_proj"))
    for module in sorted(adapter.assumed & set(nested)):
        # With one rank and one scale the config is right for any order of registration.
        _make_alike(modules, parameter_names(module, nested))
    use_rslora = adapter.config.get("use_rslora") is True and _all_rslora(modules)
    alphas: dict[str, int | float] = {}
    for name, value in modules.items():
        alpha = _alpha(value.scale, peft_rank(value), rslora=use_rslora)
        if alpha is None:  # never with rslora: `_all_rslora` has tried every module
            modules[name] = value.folded()
            alpha = peft_rank(value)
        alphas[name] = alpha
    modules = _with_biases(modules)
    return PeftForm(
        modules, alphas, use_rslora, nested, frozenset(attentions), _tokens_alone(adapter)
    )


def _tokens_alone(adapter: Adapter) -> bool:
    """Return whether the adapter has only one embedding's trained rows: PEFT has a type for it."""
    overrides = list(adapter.overrides.values())
    return not adapter.modules and len(overrides) == 1 and overrides[0].rows is not None


def _nested(adapter: Adapter) -> dict[str, tuple[str, ...]]:
    """Return module → its raw parameters, in the order in which PEFT nests their wrappers.

    Raises:
        FormatError: a module has several, and the adapter does not record their order; or the
            module has its own factors as well.
    """
    parameters_of: dict[str, list[str]] = {}
    for name, value in adapter.modules.items():
        if value.layout.kind == "parameter":
            module, _, parameter = name.rpartition(".")
            parameters_of.setdefault(module, []).append(parameter)
    nested: dict[str, tuple[str, ...]] = {}
    for module, parameters in parameters_of.items():
        declared = adapter.nesting.get(module, ())
        order = tuple(parameter for parameter in declared if parameter in parameters)
        is_whole = set(order) == set(parameters)
        if not is_whole and set(parameters) <= set(FUSED):
            order = tuple(sorted(parameters, key=FUSED.index))
            is_whole = True
        if len(parameters) > 1 and not is_whole:
            raise FormatError(
                f"{module}: PEFT writes {' and '.join(parameters)} in the order in which the "
                f"module registers them, and nesting says {adapter.nesting.get(module)}",
                "attach the adapter to its base first, or give "
                "Adapter(nesting={module: (parameter, …)})",
            )
        if module in adapter.modules:
            raise FormatError(
                f"{module}: PEFT can't train a module and its raw parameters {parameters} at once",
                "leave one of the two out of the adapter",
            )
        nested[module] = order if len(parameters) > 1 else tuple(parameters)
    return nested


def _attentions(modules: Mapping[str, LowRank], nested: _Nested) -> set[str]:
    """Return the modules that must be an nn.MultiheadAttention: both projections have factors.

    PEFT (0.21) wraps an attention as a whole, and its out_proj inside. No other wrapped module
    contains a wrapped module.

    Raises:
        FormatError: a module with factors is inside another one in any other way.
    """
    wrapped = [name for name, value in modules.items() if value.layout.kind != "parameter"]
    attentions: set[str] = set()
    for name in [*wrapped, *nested]:
        for owner in peft_keys.ancestors(name):
            if owner not in modules:
                continue
            is_out_proj = name == f"{owner}.out_proj" and name in modules
            if not is_out_proj or not _both_linear(modules[name], modules[owner]):
                raise FormatError(
                    f"{name}: lies in {owner}, which has factors of its own; PEFT can write that "
                    "only for the out_proj of an nn.MultiheadAttention",
                    "leave one of the two out of the adapter",
                )
            attentions.add(owner)
    return attentions


def _both_linear(x: LowRank, y: LowRank) -> bool:
    return x.layout.kind == "linear" and y.layout.kind == "linear"


def _make_alike(modules: dict[str, LowRank], names: tuple[str, ...]) -> None:
    """Give some modules the same rank and scale, without changing their values."""
    rank = max(modules[name].rank for name in names)
    scales = {modules[name].scale for name in names}
    for name in names:
        value = modules[name] if len(scales) == 1 else modules[name].folded()
        modules[name] = value.padded(rank)


def _all_rslora(modules: Mapping[str, LowRank]) -> bool:
    """Return whether every scale has an exact lora_alpha with rslora, which is set for all modules
    or none.
    """
    alphas = [_alpha(value.scale, peft_rank(value), rslora=True) for value in modules.values()]
    return None not in alphas


def _alpha(scale: float, r: int, *, rslora: bool) -> int | float | None:
    """Return the lora_alpha whose quotient is ``scale``, bit for bit; None if no float has it.

    Prefer an integer, because PEFT's own configs have integers and readers expect them.
    """
    divisor = math.sqrt(r) if rslora else r
    near = scale * divisor
    if not math.isfinite(near):
        return None
    tries: list[int | float] = [near]
    if abs(near) < 2**53:  # beyond that every float is an integer already
        tries.insert(0, round(near))
    return next((alpha for alpha in tries if alpha / divisor == scale), None)


def _with_biases(modules: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Add a bias of zeros to modules without one if any has one: lora_bias is for all or none.

    Raises:
        FormatError: a module is of a kind for which PEFT has no lora_bias.
    """
    if all(value.bias is None for value in modules.values()):
        return dict(modules)
    biased: dict[str, LowRank] = {}
    for name, value in modules.items():
        if value.layout.kind in ("embedding", "parameter"):
            raise FormatError(
                f"{name}: PEFT has no lora_bias for {value.layout.kind}s, and other modules here "
                "have one",
                "leave the bias out, or split the adapter in two",
            )
        if value.bias is None:
            out = math.prod(value.B.shape[:-1])  # over all groups of a convolution
            value = replace(value, bias=value.B.new_zeros(out))
        biased[name] = value
    return biased


def _tensors(adapter: Adapter, form: PeftForm) -> dict[str, Tensor]:
    """Return key → tensor; `peft_factors` reads them back."""
    wrappers = {module: len(names) for module, names in form.nested.items()}
    for name, value in form.modules.items():
        if value.layout.kind != "parameter":
            wrappers[name] = 1
    tensors: dict[str, Tensor] = {}
    for name, value in form.modules.items():
        A, B = value.A, value.B
        path = peft_keys.key_path(name, wrappers)
        ends = ("lora_A.weight", "lora_B.weight")
        if value.layout.kind == "embedding":
            ends = ("lora_embedding_A", "lora_embedding_B")
        elif value.layout.kind == "parameter":
            module, _, parameter = name.rpartition(".")
            names = form.nested[module]
            # the parameter that registers last is in the outermost wrapper
            depth = len(names) - 1 - names.index(parameter)
            path = peft_keys.key_path(module, wrappers) + ".base_layer" * depth
            A = A.flatten(0, 1)  # (E·r, in), expert-major
            B = B.permute(1, 2, 0).flatten(1)  # (out, r·E), rank-major
        elif value.layout.kind == "conv":
            if A.ndim == 3:  # a batch of groups
                A, B = A.flatten(0, 1), B.flatten(0, 1)
            A = A.reshape(len(A), -1, *value.layout.kernel)  # (r, in, *kernel)
            ones = (1,) * len(value.layout.kernel)
            B = B.reshape(*B.shape, *ones)  # (out, r/G, 1, …)
        tensors[f"{path}.{ends[0]}"] = A
        tensors[f"{path}.{ends[1]}"] = B
        if value.bias is not None:
            tensors[f"{path}.lora_B.bias"] = value.bias
    for name, tensor in adapter.unchanged.items():
        tensors[peft_keys.key_path(name, wrappers)] = tensor
    for name, override in adapter.overrides.items():
        module, _ = tensor_owner(name)
        if override.rows is not None:
            tensors[f"{module}{TOKENS_ALONE if form.tokens_alone else TOKENS}"] = override.values
        else:
            tensors[peft_keys.key_path(name, wrappers)] = override.values
    return {peft_keys.PREFIX + path: tensor for path, tensor in tensors.items()}
