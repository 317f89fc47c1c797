"""Find the modules that a fresh adapter changes, and make the adapter.

The rules are PEFT's: ``target_modules`` is a list of names or ends of names, one regex for the
whole name, or ``all-linear`` (every Linear and Conv1D except output embeddings and empty ones).
``exclude_modules`` removes some of them, and ``layers_to_transform`` with ``layers_pattern`` keeps
those with one of the given layer numbers.

Initialisation follows the LoRA paper (arXiv 2106.09685 §4.1): A is random and B zero, so a fresh
adapter changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import BaseMismatch, listing, suggest
from ..lowrank import LowRank, draw_uniform
from ..override import Override
from ..patterns import MatchingBudget, Patterns
from ..spec import LoraSpec
from .finding import find_site, find_tensor_site, kind_of
from .replaced import is_inside, replaced_tensors
from .site import Site

__all__ = ["fresh_adapter", "patterns_of_a_tree", "target_names"]

T = TypeVar("T")

DEFAULT_RANK = 8
DEFAULT_ALPHA = 8.0


def patterns_of_a_tree() -> Patterns:
    """Return a cache for the patterns of one tree's fresh nodes, which share a budget of work."""
    return Patterns(MatchingBudget("the tree's fresh nodes"))


def target_names(base: nn.Module, spec: LoraSpec, patterns: Patterns | None = None) -> list[str]:
    """Return the modules and parameters that ``spec`` targets in ``base``, sorted.

    Args:
        patterns: those of the whole tree; None: new ones, with their own budget.

    Raises:
        BaseMismatch: a target matches nothing, or the spec has none; suggests the nearest name.
        SpecError: the patterns take more work than the budget allows.
    """
    patterns = patterns or patterns_of_a_tree()
    if not spec.has_targets:
        raise BaseMismatch("nothing to adapt: neither target_modules nor target_parameters is set")
    replaced = replaced_tensors(base, spec)
    modules = set()
    if spec.target_modules:
        modules = _target_modules(base, spec, patterns)
        # As in PEFT, modules inside one that is saved whole get no factors.
        modules = {name for name in modules if not is_inside(name, replaced)}
    parameters = _by_ends(
        {name for name, _ in base.named_parameters()}, spec.target_parameters or []
    )
    if not modules and not parameters and not replaced:
        raise BaseMismatch(
            "nothing to adapt: every target was excluded, "
            "or lies in no layer of layers_to_transform"
        )
    return sorted(modules | parameters)


def _target_modules(base: nn.Module, spec: LoraSpec, patterns: Patterns) -> set[str]:
    """Return the modules that a spec targets; raises as `target_names`."""
    modules = {name for name, _ in base.named_modules() if name}
    wanted = spec.target_modules or []
    if not isinstance(wanted, str):
        targets = _by_ends(modules, wanted)
    elif wanted.lower() == "all-linear":
        targets = _all_linear(base)
    else:
        targets = {name for name in modules if patterns.matches(wanted, name)}
        if not targets:
            _refuse_target(wanted, modules)
    excluded = spec.exclude_modules
    if isinstance(excluded, str):
        targets = {name for name in targets if not patterns.matches(excluded, name)}
    elif excluded:
        targets = {name for name in targets if not _ends_with(name, excluded)}
    if spec.layers_to_transform is not None:
        layers = _as_list(spec.layers_to_transform)
        targets = {name for name in targets if _layer_of(name, spec, patterns) in layers}
    return targets


def _by_ends(names: set[str], ends: Sequence[str]) -> set[str]:
    """Return the names that equal one of the ends, or end with one after a dot.

    Raises:
        BaseMismatch: an end matches no name: it is misspelled, or meant for another model.
    """
    for end in ends:
        if not any(_ends_with(name, [end]) for name in names):
            _refuse_target(end, names)
    return {name for name in names if _ends_with(name, ends)}


def fresh_adapter(
    base: nn.Module,
    spec: LoraSpec,
    *,
    base_name: str | None = None,
    patterns: Patterns | None = None,
    ground: Callable[[str], Tensor] | None = None,
) -> Adapter:
    """Return an adapter that changes nothing yet.

    A is random, from torch's global generator, and B zero; both are fp32, on the weight's device.
    Overrides are copies of the tensors that they replace.

    Args:
        patterns: those of the whole tree; None: new ones, with their own budget.
        ground: returns the effective value of a tensor above the node; None: the base's own.

    Raises:
        BaseMismatch: a target matches nothing, or a module that takes no delta.
        SpecError: the patterns take more work than the budget allows.
    """
    patterns = patterns or patterns_of_a_tree()
    # Sorted by name, so that a seed determines the adapter.
    modules: dict[str, LowRank] = {}
    for name in target_names(base, spec, patterns):
        site = find_site(base, name)
        value = _fresh(site, spec, patterns)
        site.check(value)
        modules[name] = value
    overrides: dict[str, Override] = {}
    for tensor, rows in replaced_tensors(base, spec).items():
        site, attribute = find_tensor_site(base, tensor)
        now: Tensor = getattr(site.module, attribute) if ground is None else ground(tensor)
        values = now.detach()[list(rows)] if rows is not None else now.detach().clone()
        overrides[tensor] = Override(values, rows)
        site.check_override(attribute, overrides[tensor])
    return Adapter(
        modules,
        base=base_name,
        config=_words(spec),
        nesting=_nesting(base, modules),
        overrides=overrides,
    )


def _words(spec: LoraSpec) -> dict[str, Any]:
    """Return the fields of a spec about overrides, as PEFT's config has them."""
    found: dict[str, Any] = {}
    if spec.modules_to_save:
        found["modules_to_save"] = list(spec.modules_to_save)
    if spec.trainable_token_indices:
        found["trainable_token_indices"] = spec.trainable_token_indices
    return found


def _fresh(site: Site, spec: LoraSpec, patterns: Patterns) -> LowRank:
    """Return a module's fresh value; raises as `fresh_adapter`."""
    name = site.name
    # Patterns may set the rank and alpha per module; as in PEFT, the first match wins.
    r = _first(spec.rank_pattern, name, spec.r or DEFAULT_RANK, patterns)
    alpha = _first(spec.alpha_pattern, name, spec.lora_alpha or DEFAULT_ALPHA, patterns)
    scale = alpha / math.sqrt(r) if spec.use_rslora else alpha / r
    if r % site.groups:
        raise BaseMismatch(
            f"{name}: rank {r} does not divide among the convolution's {site.groups} groups"
        )
    rank = r // site.groups
    *batch, out, into = shape = site.matrix_shape
    if 0 in shape:
        raise BaseMismatch(
            f"{name}: its weight is empty, {shape}, so there is nothing to adapt",
            "leave it out: exclude_modules=[…]; where it is lazy, run the base once before attach",
        )
    device = torch.device("cpu") if site.weight is None else site.weight.device
    # Draw on the weight's device: another device's generator would give other numbers, and A would
    # have to be copied.
    A = torch.empty(*batch, rank, into, dtype=torch.float32, device=device)
    if spec.init_lora_weights == "gaussian":
        nn.init.normal_(A, std=1 / r)
    else:
        draw_uniform(A)
    B = torch.zeros(*batch, out, rank, dtype=torch.float32, device=device)
    bias = None
    if spec.lora_bias:
        bias = torch.zeros(math.prod(B.shape[:-1]), dtype=torch.float32, device=device)
    return LowRank(A, B, scale, bias, site.layout)


def _nesting(base: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return module → all its raw parameters in the base's order, if one of them is adapted.

    All of them, because other nodes of a lineage may adapt the others, and the flattened adapter
    has both.
    """
    nesting: dict[str, tuple[str, ...]] = {}
    for name in names:
        if find_site(base, name).is_raw:
            holder = name.rpartition(".")[0]
            own = base.get_submodule(holder).named_parameters(recurse=False)
            nesting[holder] = tuple(parameter for parameter, _ in own)
    return nesting


def _all_linear(base: nn.Module) -> set[str]:
    """Return the modules of PEFT's ``all-linear``: the linear layers but the output embeddings."""
    get_head = getattr(base, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    found: set[str] = set()
    # `named_modules` lists a shared module once, so it is adapted once.
    for name, module in base.named_modules():
        if not name or module is head:
            continue
        kind = kind_of(module, base.get_submodule(name.rpartition(".")[0]))
        if kind is not None and kind.is_linear(module):
            found.add(name)
    return found


def _ends_with(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith("." + end) for end in ends)


def _layer_of(name: str, spec: LoraSpec, patterns: Patterns) -> int | None:
    for pattern in _as_list(spec.layers_pattern or r"[^.]*"):
        layer = patterns.layer(pattern, name)
        if layer is not None:
            return layer
    return None


def _first(values: dict[str, T] | None, name: str, default: T, patterns: Patterns) -> T:
    """Return the value of the first key that matches the name, or its end after a dot."""
    for key, value in (values or {}).items():
        if patterns.matches_end(key, name):
            return value
    return default


def _as_list(value: T | list[T]) -> list[T]:
    return value if isinstance(value, list) else [value]


def _refuse_target(target: str, names: Iterable[str]) -> NoReturn:
    """Raise for a target that matches none of the names."""
    ends = {name.rpartition(".")[2] for name in names}
    known = sorted(end for end in ends if not end.isdigit())  # a list's indices say nothing
    raise BaseMismatch(
        f"target {target!r} matches nothing in the base{suggest(target, ends)}",
        f"the last parts of its names: {listing(known) or 'none'}",
    )
