"""Which modules a fresh adapter changes, and the adapter itself.

The rules are PEFT's: ``target_modules`` is a list of names or ends of names, one regex for the whole name, or
``all-linear`` (every Linear and Conv1D but the output embeddings and empty ones); ``exclude_modules`` takes away, and
``layers_to_transform`` with ``layers_pattern`` narrows by the first index in the name.

Initialisation as in the LoRA paper (arXiv 2106.09685 §4.1): A random, B zero, so a fresh adapter changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..adapter import Adapter
from ..errors import BaseMismatch, listing, suggest
from ..lowrank import EMBEDDING, LINEAR, PARAMETER, Layout, LowRank
from ..patterns import MatchingBudget, Patterns
from ..spec import LoraSpec
from . import find_site
from .conv import ConvSite
from .embedding import EmbeddingSite
from .linear import Conv1DSite
from .parameter import ParameterSite
from .site import Site

__all__ = ["fresh_adapter", "patterns_of_a_tree", "target_names"]

T = TypeVar("T")

DEFAULT_RANK = 8
DEFAULT_ALPHA = 8.0


def patterns_of_a_tree() -> Patterns:
    """The patterns of one tree's fresh nodes, to be matched out of one budget of work."""
    return Patterns(MatchingBudget("the tree's fresh nodes"))


def target_names(base: nn.Module, spec: LoraSpec, patterns: Patterns | None = None) -> list[str]:
    """The modules and parameters that ``spec`` targets in ``base``, sorted.

    Args:
        patterns: those of the whole tree; without it, the spec has a budget of its own.

    Raises:
        BaseMismatch: a target matches nothing, or the spec has none; with the nearest name.
        SpecError: the patterns take more work than the budget allows.
    """
    patterns = patterns or patterns_of_a_tree()
    if not spec.has_targets:
        raise BaseMismatch("nothing to adapt: neither target_modules nor target_parameters is set")
    modules = {name for name, _ in base.named_modules() if name}
    wanted = spec.target_modules
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        found = _all_linear(base)
    elif isinstance(wanted, str):
        found = {name for name in modules if patterns.whole(wanted, name)}
        _matched({wanted: bool(found)}, modules)
    else:
        found = {name for name in modules if _ends_with(name, wanted or ())}
        _matched({t: any(_ends_with(name, (t,)) for name in found) for t in wanted or ()}, modules)
    if spec.exclude_modules:
        out = spec.exclude_modules
        if isinstance(out, str):
            found -= {name for name in found if patterns.whole(out, name)}
        else:
            found -= {name for name in found if _ends_with(name, out)}
    if spec.layers_to_transform is not None:
        layers = _as_list(spec.layers_to_transform)
        found = {name for name in found if _layer_of(name, spec, patterns) in layers}
    parameters = {name for name, _ in base.named_parameters()}
    ends = spec.target_parameters or ()
    raw = {name for name in parameters if _ends_with(name, ends)}
    _matched({t: any(_ends_with(name, (t,)) for name in raw) for t in ends}, parameters)
    if not found and not raw:
        raise BaseMismatch(
            "nothing to adapt: every target was excluded, or lies in no layer of layers_to_transform"
        )
    return sorted(found | raw)


def fresh_adapter(
    base: nn.Module,
    spec: LoraSpec,
    *,
    base_name: str | None = None,
    patterns: Patterns | None = None,
) -> Adapter:
    """An adapter that changes nothing yet: A drawn from torch's global generator, B zero, both fp32 beside the weight.

    Args:
        patterns: those of the whole tree; without it, the spec has a budget of its own.

    Raises:
        BaseMismatch: a target matches nothing, or a module that takes no delta.
        SpecError: the patterns take more work than the budget allows.
    """
    patterns = patterns or patterns_of_a_tree()
    modules: dict[str, LowRank] = {}
    for name in target_names(base, spec, patterns):
        site = find_site(base, name)
        value = _fresh(site, spec, patterns)
        site.check(value)
        modules[name] = value
    return Adapter(modules, base=base_name, nesting=_nesting(base, modules))


def _fresh(site: Site, spec: LoraSpec, patterns: Patterns) -> LowRank:
    name = site.name
    r = _first(spec.rank_pattern, name, spec.r or DEFAULT_RANK, patterns)
    alpha = _first(spec.alpha_pattern, name, spec.lora_alpha or DEFAULT_ALPHA, patterns)
    scale = alpha / math.sqrt(r) if spec.use_rslora else alpha / r
    layout, groups = _layout(site)
    if r % groups:
        raise BaseMismatch(
            f"{name}: rank {r} does not divide among the convolution's {groups} groups"
        )
    weight = site.weight
    device = weight.device if weight is not None else torch.device("cpu")
    probe = LowRank(torch.empty(1, 1), torch.empty(1, 1), layout=layout)
    *batch, out, into = shape = site.expected(probe)
    if 0 in shape:
        raise BaseMismatch(
            f"{name}: its weight is empty, {shape}, so there is nothing to adapt",
            "leave it out: exclude_modules=[…]; where it is lazy, run the base once before attach",
        )
    A = torch.empty(*batch, r // groups, into, dtype=torch.float32, device=device)
    if spec.init_lora_weights == "gaussian":
        nn.init.normal_(A, std=1 / r)
    else:
        bound = 1 / math.sqrt(into)  # kaiming_uniform_(a=√5), of each matrix
        nn.init.uniform_(A, -bound, bound)
    B = torch.zeros(*batch, out, r // groups, dtype=torch.float32, device=device)
    bias = (
        torch.zeros(math.prod(B.shape[:-1]), dtype=torch.float32, device=device)
        if spec.lora_bias
        else None
    )
    return LowRank(A, B, scale, bias, layout)


def _layout(site: Site) -> tuple[Layout, int]:
    if isinstance(site, ConvSite):
        return Layout("conv", tuple(site.conv.kernel_size)), site.conv.groups
    if isinstance(site, EmbeddingSite):
        return EMBEDDING, 1
    return (PARAMETER if isinstance(site, ParameterSite) else LINEAR), 1


def _nesting(base: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Modules of which raw parameters are adapted → all of theirs, in the order the base registers them.

    All of them, because a sibling may adapt the others, and a flattened lineage has both.
    """
    modules = {
        name.rpartition(".")[0]
        for name in names
        if isinstance(find_site(base, name), ParameterSite)
    }
    return {
        m: tuple(n for n, _ in base.get_submodule(m).named_parameters(recurse=False))
        for m in modules
    }


def _all_linear(base: nn.Module) -> set[str]:
    get_head = getattr(base, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    found = {n for n, m in base.named_modules() if n and m is not head}
    return {n for n in found if _is_linear(base.get_submodule(n))}


def _is_linear(module: nn.Module) -> bool:
    if isinstance(
        module, nn.Linear
    ):  # a lazy one has no input yet, and is not passed over in silence
        return module.in_features * module.out_features > 0 or is_lazy(module.weight)
    return Conv1DSite.claims(module)


def _ends_with(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith("." + end) for end in ends)


def _layer_of(name: str, spec: LoraSpec, patterns: Patterns) -> int | None:
    for pattern in _as_list(spec.layers_pattern or r"[^.]*"):
        layer = patterns.layer(pattern, name)
        if layer is not None:
            return layer
    return None


def _first(values: dict[str, T] | None, name: str, default: T, patterns: Patterns) -> T:
    """The value of the first key that matches the name, or its end after a dot."""
    for key, value in (values or {}).items():
        if patterns.ends(key, name):
            return value
    return default


def _as_list(value: T | list[T]) -> list[T]:
    return value if isinstance(value, list) else [value]


def _matched(targets: dict[str, bool], names: Iterable[str]) -> None:
    lost = [target for target, hit in targets.items() if not hit]
    if lost:
        ends = {name.rpartition(".")[2] for name in names}
        raise BaseMismatch(
            f"target {lost[0]!r} matches nothing in the base{suggest(lost[0], ends)}",
            f"the last parts of its names: {listing(sorted(e for e in ends if not e.isdigit())) or 'none'}",
        )
