"""Write the fields of adapter_config.json for an adapter.

    r, lora_alpha                the most frequent values of all modules
    rank_pattern, alpha_pattern  the others, under keys that match one full name and nothing else
    target_modules               the adapter's own list, if it still names exactly these modules
    other fields                 from the adapter's config, unless its value contradicts them

Law: from these fields PEFT builds exactly the wrappers whose factors are in the weights file, with
the same scales.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..adapter import Adapter
from ..errors import FormatError
from ..lowrank import LowRank
from ..override import tensor_owner
from .peft_config import DERIVED, TRAINING, TURNED, is_orientation_known
from .peft_overrides import words_for

__all__ = ["PeftForm", "config_bytes", "parameter_names", "peft_rank"]

OTHER_TARGETS = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields that narrow ``target_modules`` down."""


@dataclass(frozen=True)
class PeftForm:
    """An adapter's modules with ranks and alphas that PEFT's files can express.

    Args:
        modules: name → value, with the ranks that are written.
        alphas: name → its lora_alpha.
        use_rslora: whether the scale is lora_alpha / √r.
        nested: module → its raw parameters, in the order in which PEFT nests their wrappers.
        attentions: the modules that are an nn.MultiheadAttention with both projections changed.
        tokens_alone: whether there are only trained rows of one embedding.
    """

    modules: Mapping[str, LowRank]
    alphas: Mapping[str, int | float]
    use_rslora: bool
    nested: Mapping[str, tuple[str, ...]]
    attentions: frozenset[str]
    tokens_alone: bool = False


def peft_rank(value: LowRank) -> int:
    """Return r as PEFT counts it: of all groups of a convolution together, but per expert."""
    if value.layout.kind == "conv" and value.A.ndim == 3:
        return value.rank * value.A.shape[0]
    return value.rank


def parameter_names(module: str, nested: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the full names of a module's raw parameters."""
    return tuple(f"{module}.{parameter}" for parameter in nested[module])


def config_bytes(adapter: Adapter, form: PeftForm) -> bytes:
    """Return adapter_config.json, which depends on the value alone.

    Raises:
        FormatError: a field of the adapter's config can't be written as JSON.
    """
    try:
        text = json.dumps(_fields(adapter, form), indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(
            f"the adapter's config can't be written as JSON: {error}",
            "expected strings, numbers, true, false, null, lists and objects: "
            "change or remove the field in Adapter.config",
        ) from error
    return (text + "\n").encode("ascii")


def _fields(adapter: Adapter, form: PeftForm) -> dict[str, Any]:
    if form.tokens_alone:
        return _tokens_fields(adapter)
    # PEFT gives the out_proj of an attention the attention's r and alpha; no pattern applies to it.
    out_projections = {f"{name}.out_proj" for name in form.attentions}
    ranks: dict[str, int] = {}
    alphas: dict[str, int | float] = {}
    for name, value in form.modules.items():
        if name not in out_projections:
            ranks[name] = peft_rank(value)
            alphas[name] = form.alphas[name]
    # An adapter with only overrides has no rank; use PEFT's defaults.
    r = _commonest(ranks.values() or [8])
    alpha = _commonest(alphas.values() or [8])
    lora_bias = any(value.bias is not None for value in form.modules.values())
    fields: dict[str, Any] = {"task_type": None, "lora_dropout": 0.0, "fan_in_fan_out": False}
    for key, kept in adapter.config.items():
        if key not in DERIVED | TRAINING:
            # Sort sets: their order changes from process to process.
            fields[key] = sorted(kept) if isinstance(kept, (set, frozenset)) else kept
    fields |= {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": form.use_rslora,
        "rank_pattern": _pattern(ranks, r),
        "alpha_pattern": _pattern(alphas, alpha),
        "lora_bias": lora_bias,
        "bias": _bias(adapter),
    }
    # If a module has factors, its override is the weight inside the wrapper, not a saved module.
    own = {
        name: override
        for name, override in adapter.overrides.items()
        if tensor_owner(name)[0] not in form.modules
    }
    fields |= words_for(own, adapter.config)
    if "ensure_weight_tying" in fields:
        wanted = fields["ensure_weight_tying"] is True
        is_tied = _has_tied_factors(form.modules) or _has_tied_weights(adapter)
        fields["ensure_weight_tying"] = wanted and is_tied
    if fields.get("init_lora_weights") != "gaussian" or lora_bias:
        # PEFT runs the named initialisation and then loads the factors over it. Most
        # initialisations (an SVD of the weight, orthogonal A and B) fail if r exceeds the weight's
        # size, as it may for a sum, and PEFT refuses them together with lora_bias. For a trained
        # adapter they have no meaning.
        fields["init_lora_weights"] = fields.get("init_lora_weights") is not False
    if form.nested:
        # PEFT refuses other values of these two with a raw parameter; neither changes the value.
        fields |= {"lora_dropout": 0.0, "fan_in_fan_out": False}
        targeted: list[str] = []
        for module in sorted(form.nested):
            targeted += parameter_names(module, form.nested)
        fields["target_parameters"] = targeted
        if not is_orientation_known(fields):
            # The factors are oriented as in PEFT since this version, and readers check for it.
            fields["peft_version"] = ".".join(map(str, TURNED))
    _set_targets(fields, form, out_projections)
    return fields


def _tokens_fields(adapter: Adapter) -> dict[str, Any]:
    """Return the fields of PEFT's TrainableTokensConfig."""
    ((name, override),) = adapter.overrides.items()
    module, _ = tensor_owner(name)
    return {
        "peft_type": "TRAINABLE_TOKENS",
        "task_type": adapter.config.get("task_type"),
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "init_weights": True,
        "target_modules": module,
        "token_indices": list(override.rows or ()),
    }


def _set_targets(fields: dict[str, Any], form: PeftForm, out_projections: set[str]) -> None:
    """Set ``target_modules`` so that PEFT wraps exactly the modules that have factors."""
    targets: list[str] = []
    for name, value in form.modules.items():
        if value.layout.kind != "parameter" and name not in out_projections:
            targets.append(name)
    targets.sort()
    others = {*out_projections, *form.nested}
    kept = fields.get("target_modules")
    if isinstance(kept, list) and _names_exactly(kept, targets, others, fields):
        fields["target_modules"] = sorted(kept)
        return
    for field in ("target_modules", *OTHER_TARGETS):
        fields.pop(field, None)
    if _names_exactly(targets, targets, others, fields):
        fields["target_modules"] = targets
    else:
        # One name is the end of another, so a list of suffixes would match both. A string works:
        # PEFT matches it as a regular expression on the whole name.
        fields["target_modules"] = "|".join(map(re.escape, targets))


def _names_exactly(
    entries: list[Any], targets: list[str], others: set[str], fields: Mapping[str, Any]
) -> bool:
    """Return whether a list names all these targets and none of the others, by PEFT's rule.

    The rule matches every module whose name equals an entry or ends in ``.entry``.
    """
    if any(fields.get(field) is not None for field in OTHER_TARGETS):
        return False
    known = {str(entry) for entry in entries}
    if len(known) < len(entries):
        return False
    used: set[str] = set()
    # Look up every end of a name in a set. To compare each name with each entry would be quadratic,
    # and a mixture of experts has some ten thousand of both.
    for target in targets:
        naming = known.intersection(_ends_of(target))
        if not naming:
            return False
        used |= naming
    if any(known.intersection(_ends_of(name)) for name in others):
        return False
    # An entry that names none of the targets was meant for another model.
    return used == known


def _ends_of(name: str) -> list[str]:
    """Return a name and all its ends after a dot.

    >>> _ends_of("a.b.c")
    ['a.b.c', 'b.c', 'c']
    """
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _has_tied_factors(modules: Mapping[str, LowRank]) -> bool:
    """Return whether every head of an embedding's size has its factors, transposed.

    With ``ensure_weight_tying`` PEFT reads only the embedding's factors and uses them for the head
    as well. That is right for an adapter that it trained so, but not for a sum with a node that
    changes only one of the two.
    """
    embeddings = [value for value in modules.values() if value.layout.kind == "embedding"]
    linear = [
        value for value in modules.values() if value.layout.kind == "linear" and value.A.ndim == 2
    ]
    for embedding in embeddings:
        A, B = embedding.B.mT, embedding.A.mT  # of the head, if it is tied
        has_head = False
        for head in linear:
            if head.A.shape != A.shape or head.B.shape != B.shape:
                continue
            has_head = True
            same = torch.equal(head.A, A) and torch.equal(head.B, B)
            if head.scale != embedding.scale or not same:
                return False
        if not has_head:
            return False
    return bool(embeddings)


def _has_tied_weights(adapter: Adapter) -> bool:
    """Return whether an embedding that is saved whole has its head beside it, equal to it."""
    heads = [*adapter.unchanged.values(), *[o.values for o in adapter.overrides.values()]]
    for name, override in adapter.overrides.items():
        if override.rows is None and name.endswith(("embed_tokens.weight", "wte.weight")):
            equal = [head for head in heads if head is not override.values]
            return any(torch.equal(head, override.values) for head in equal)
    return False


def _bias(adapter: Adapter) -> str:
    """Return the field ``bias``, which tells PEFT whether the weights hold biases of the base."""
    carried = list(adapter.unchanged)
    # If a module has factors, its overridden bias is inside the wrapper, not in a saved module.
    carried += [name for name in adapter.overrides if tensor_owner(name)[0] in adapter.modules]
    if not any(name.rpartition(".")[2] == "bias" for name in carried):
        return "none"
    kept = adapter.config.get("bias", "none")
    return "all" if kept == "none" else str(kept)


def _pattern(of: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return a rank_pattern or alpha_pattern for the modules that differ from the default."""
    found: dict[str, Any] = {}
    for name, value in of.items():
        if value != default:
            # PEFT (0.21) matches ``(.*\.)?(key)$``. The ^ in the key forces the first part to be
            # empty, so that the key never matches the end of a longer name.
            found["^" + re.escape(name)] = value
    return found


def _commonest(values: Iterable[Any]) -> Any:
    counts = Counter(values)
    # If two are equally frequent, take the smaller one, so that the result ignores their order.
    return min(counts, key=lambda value: (-counts[value], value))
