"""The kinds of sites, and how a name in an adapter finds its place in a base.

A new kind of layer is one file beside this one and one row in `KINDS`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import BaseMismatch, suggest
from ..lowrank import LINEAR, Layout, LowRank
from .attention import InProjectionSite, OutProjectionSite
from .conv import ConvSite
from .embedding import EmbeddingSite
from .linear import Conv1DSite, LinearSite
from .parameter import ParameterSite
from .site import Site

__all__ = [
    "KINDS",
    "ParameterSite",
    "Site",
    "as_site_has_it",
    "find_site",
    "is_there",
    "supports",
    "takes_delta",
]

KINDS = (InProjectionSite, EmbeddingSite, ConvSite, Conv1DSite, LinearSite)
"""The first kind that claims a module takes it; raw parameters are found by name."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def supports(module: nn.Module) -> bool:
    """Whether some kind of site claims this module."""
    return any(kind.claims(module) for kind in KINDS)


def is_there(base: nn.Module, name: str) -> bool:
    """Whether the base has a module, or a raw parameter, of that name."""
    holder, leaf, module = _walk(base, name)
    if module is not None:
        return True
    return holder is not None and isinstance(holder._parameters.get(leaf), nn.Parameter)


def takes_delta(base: nn.Module, name: str) -> bool:
    """Whether the base has a module of that name that some kind of site claims."""
    _, _, module = _walk(base, name)
    return module is not None and supports(module)


def as_site_has_it(base: nn.Module, name: str, value: LowRank) -> LowRank:
    """The value in the layout of the module that it changes; the same object where it has that already.

    Some files do not say a kernel's size: a matrix may stand for a convolution, and a convolution of kernel 1 for a
    Linear. Whether the sizes fit is checked by the site.
    """
    _, _, module = _walk(base, name)
    kernel = value.layout.kernel
    if isinstance(module, nn.Linear) and kernel and set(kernel) == {1}:
        return replace(value, layout=LINEAR)
    is_conv = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
    if is_conv and value.layout == LINEAR and value.A.ndim == 2:
        size: Any = getattr(module, "kernel_size", ())
        return replace(value, layout=Layout("conv", tuple(size)))
    return value


def find_site(base: nn.Module, name: str) -> Site:
    """The site that an adapter calls ``name``.

    Raises:
        BaseMismatch: no such module or parameter, or one of a kind that takes no delta.
    """
    holder, leaf, module = _walk(base, name)
    parent = _running_parent(base, name)
    if module is None:
        if holder is not None and isinstance(holder._parameters.get(leaf), nn.Parameter):
            return ParameterSite(name, holder, parent)
        raise BaseMismatch(f"{name}: the base has no such module or parameter{_hint(base, name)}")
    if isinstance(holder, nn.MultiheadAttention) and leaf == "out_proj":
        return OutProjectionSite(name, module, parent)
    for kind in KINDS:
        if kind.claims(module):
            return kind(name, module, parent)
    own = [n for n, p in module.named_parameters(recurse=False) if p.ndim in (2, 3)]
    raise BaseMismatch(
        f"{name}: a {type(module).__name__} takes no delta",
        "Linear, Conv1D, Embedding, Conv1d/2d/3d and MultiheadAttention do; other weights as parameters: "
        + (", ".join(f"{name}.{n}" for n in own) or "it has no 2-D or 3-D parameter of its own"),
    )


def _walk(base: nn.Module, name: str) -> tuple[nn.Module | None, str, nn.Module | None]:
    """The module around ``name``, its last part, and the module of that name; None where there is none."""
    holder: nn.Module | None = base
    *way, leaf = name.split(".")
    for part in way:
        holder = holder._modules.get(part) if holder is not None else None
    return holder, leaf, holder._modules.get(leaf) if holder is not None else None


def _running_parent(base: nn.Module, name: str) -> str:
    """The nearest module around ``name`` whose forward runs when its children's should: no bare container."""
    while name:
        name = name.rpartition(".")[0]
        _, _, module = _walk(base, name) if name else (None, "", base)
        if module is not None and not isinstance(module, _CONTAINERS):
            break
    return name


def _hint(base: nn.Module, name: str) -> str:
    names = [n for n, _ in base.named_modules() if n]
    for full in names:  # the usual mistake: with or without the head's prefix
        if full.endswith("." + name) or (name.endswith("." + full) and "." in full):
            return (
                f"; it has {full!r}: was the adapter made for the model with, or without, its head?"
            )
    return suggest(name, names)
