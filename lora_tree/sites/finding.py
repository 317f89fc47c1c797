"""Find the site for a name in an adapter: a module of some kind, or a raw parameter."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..adapter import Adapter
from ..errors import BaseMismatch, suggest
from ..lowrank import LowRank
from ..override import Override
from .attention import InProjectionSite, OutProjectionSite
from .conv import ConvSite
from .embedding import EmbeddingSite
from .linear import Conv1DSite, LinearSite
from .other_models import other_model
from .parameter import ParameterSite
from .site import Site

__all__ = [
    "KINDS",
    "as_site_has_it",
    "experts_around",
    "find_site",
    "find_tensor_site",
    "is_there",
    "kind_of",
    "takes_delta",
    "weight_names",
    "with_tied_rows",
]

KINDS: list[type[Site]] = [
    LinearSite,
    Conv1DSite,
    EmbeddingSite,
    ConvSite,
    InProjectionSite,
    OutProjectionSite,
]
"""All kinds; the last one that claims a module wins, so special cases come after general ones."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def kind_of(module: nn.Module, holder: nn.Module | None) -> type[Site] | None:
    """Return the kind of site that claims a module; None if no kind does.

    Args:
        module: of the base.
        holder: the module that it is a child of; None for the base itself.
    """
    for kind in reversed(KINDS):
        if kind.claims(module, holder):
            return kind
    return None


def is_there(base: nn.Module, name: str) -> bool:
    """Return whether the base has a module, or a raw parameter, of that name."""
    holder, leaf, module = _walk(base, name)
    return module is not None or _has_parameter(holder, leaf)


def takes_delta(base: nn.Module, name: str) -> bool:
    """Return whether the base has a module of that name that some kind of site claims."""
    holder, _, module = _walk(base, name)
    return module is not None and kind_of(module, holder) is not None


def find_site(base: nn.Module, name: str) -> Site:
    """Return the site that an adapter calls ``name``.

    Raises:
        BaseMismatch: no such module or parameter, or one of a kind that takes no delta.
    """
    holder, leaf, module = _walk(base, name)
    if module is None:
        if holder is None or not _has_parameter(holder, leaf):
            raise other_model(base, name) or BaseMismatch(
                f"{name}: the base has no such module or parameter{_hint(base, name)}"
            )
        return _parameter_site(base, name, holder)
    kind = kind_of(module, holder)
    if kind is not None:
        return kind(name, module, _running_parent(base, name))
    # No kind claims it, but its own matrices may be adapted as raw parameters: name them.
    *most, last = [kind.layers for kind in KINDS if kind.layers]
    own = [n for n, p in module.named_parameters(recurse=False) if p.ndim in (2, 3)]
    parameters = ", ".join(f"{name}.{n}" for n in own)
    raise BaseMismatch(
        f"{name}: a {type(module).__name__} can't have an increment",
        f"{', '.join(most)} and {last} can; adapt other weights as parameters: "
        + (parameters or "it has no 2-D or 3-D parameter of its own"),
    )


def find_tensor_site(base: nn.Module, tensor: str) -> tuple[Site, str]:
    """Return the site that an override of a tensor belongs to, and the tensor's name in its module.

    The weight and the bias of a module that takes deltas belong to that module's site. Any other
    tensor is a `ParameterSite` of its own.

    Raises:
        BaseMismatch: the base has no such parameter or buffer.
    """
    name, _, leaf = tensor.rpartition(".")
    holder, _, module = _walk(base, name) if name else (None, "", base)
    if module is None or (leaf not in module._parameters and leaf not in module._buffers):
        raise BaseMismatch(
            f"{tensor}: the adapter replaces this tensor, and the base has none of that name"
            + suggest(tensor, [known for known, _ in base.named_parameters()])
        )
    kind = kind_of(module, holder)
    if kind is not None and leaf in (kind.weight_name, kind.bias_name):
        return kind(name, module, _running_parent(base, name)), leaf
    return _parameter_site(base, tensor, module), leaf


def _parameter_site(base: nn.Module, name: str, holder: nn.Module) -> ParameterSite:
    parent = _running_parent(base, name)
    return ParameterSite(name, holder, parent, _running_parent(base, parent) if parent else None)


def with_tied_rows(base: nn.Module, adapter: Adapter) -> Adapter:
    """Return an adapter whose overridden rows apply to every module that shares the tensor.

    A file has the trained rows of an embedding once; PEFT applies them to a tied head as well.
    """
    more: dict[str, Override] = {}
    for tensor, override in adapter.overrides.items():
        if override.rows is None:
            continue
        for other in _same_parameter(base, tensor):
            if other not in adapter.overrides:
                more[other] = override
    if not more:
        return adapter
    return replace(adapter, overrides={**adapter.overrides, **more})


def _same_parameter(base: nn.Module, tensor: str) -> list[str]:
    """Return the other names of a parameter of the base."""
    name, _, leaf = tensor.rpartition(".")
    _, _, module = _walk(base, name)
    own = None if module is None else module._parameters.get(leaf)
    found = []
    if own is not None:
        for other, parameter in base.named_parameters(remove_duplicate=False):
            if parameter is own and other != tensor:
                found.append(other)
    return found


def as_site_has_it(base: nn.Module, name: str, value: LowRank) -> LowRank:
    """Return the value in the layout of the module that it changes; the same object if it has it.

    Some files do not state the kernel: a matrix may be meant for a convolution, and a convolution
    with kernel 1 for a Linear. The site checks later whether the sizes fit.
    """
    holder, _, module = _walk(base, name)
    if module is None:
        return value
    kind = kind_of(module, holder)
    return value if kind is None else kind.in_own_layout(module, value)


def experts_around(base: nn.Module, name: str) -> str | None:
    """Return the nearest module around ``name`` that routes tokens to experts; None if none does.

    It is recognised by a child with fused experts (3-D parameters), or, inside a numbered layer, by
    a child ModuleList. Such a module flattens the tokens of all rows into one axis.
    """
    around = name
    while around:
        around = _running_parent(base, around)
        module = base.get_submodule(around)
        for child in module.children():
            if kind_of(child, module) is not None:
                continue  # the weight of a convolution is 3-D too
            fused = any(p.ndim == 3 for p in child.parameters(recurse=False))
            listed = isinstance(child, nn.ModuleList) and any(map(str.isdigit, around.split(".")))
            if fused or listed:
                return around
    return None


def weight_names() -> list[str]:
    """Return the attribute names of weights over all kinds: ``weight`` and others."""
    return list(dict.fromkeys(kind.weight_name for kind in KINDS))


def _walk(base: nn.Module, name: str) -> tuple[nn.Module | None, str, nn.Module | None]:
    """Return the module around ``name``, the name's last part, and the module of that name.

    A missing module is None. The walk uses `nn.Module._modules` instead of getattr, so that a name
    from a file can't reach other attributes, and because it is faster.
    """
    holder: nn.Module | None = base
    *way, leaf = name.split(".")
    for part in way:
        if holder is None:
            return None, leaf, None
        holder = holder._modules.get(part)
    if holder is None:
        return None, leaf, None
    return holder, leaf, holder._modules.get(leaf)


def _has_parameter(holder: nn.Module | None, leaf: str) -> bool:
    return holder is not None and isinstance(holder._parameters.get(leaf), nn.Parameter)


def _running_parent(base: nn.Module, name: str) -> str:
    """Return the nearest module around ``name`` that has a forward; "" for the base.

    A ModuleList has none, so a hook on it could not notice that a child did not run.
    """
    while name:
        name = name.rpartition(".")[0]
        module: nn.Module | None = base
        if name:
            _, _, module = _walk(base, name)
        if module is not None and not isinstance(module, _CONTAINERS):
            break
    return name


def _hint(base: nn.Module, name: str) -> str:
    """Return the end of an error for a missing name: the likely mistake, or the nearest name."""
    names = [n for n, _ in base.named_modules() if n]
    # The most frequent mistake: the adapter was made for the model with its head, and this one has
    # none, or the other way round.
    for full in names:
        if full.endswith("." + name) or (name.endswith("." + full) and "." in full):
            return (
                f"; it has {full!r}: was the adapter made for the model with, or without, its head?"
            )
    return suggest(name, names)
