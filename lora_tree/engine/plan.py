"""Plan: what each site gets for a path or a blend: site name → terms in the order of the sum.

Binding comes first: an adapter fits the base or it does not, whatever the path, so it is checked once.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import BaseMismatch, LoraTreeError
from ..lowrank import LowRank
from ..sites import Site, find_site

__all__ = ["Binder", "Plan", "Term", "Terms", "same_terms"]


@dataclass(frozen=True, eq=False)
class Term:
    """One node's part at one site: ``coefficient`` · ΔW. ``version`` moves when a factor was trained in place."""

    node: str
    coefficient: float
    value: LowRank
    version: int


Terms = tuple[Term, ...]
Plan = Mapping[str, Terms]


def same_terms(x: Terms, y: Terms) -> bool:
    """Whether two sites' plans write the same bits: the same values, as they are, with the same coefficients."""
    return len(x) == len(y) and all(
        a.value is b.value and a.coefficient == b.coefficient and a.version == b.version
        for a, b in zip(x, y, strict=True)
    )


class Binder:
    """Adapters checked against one base, and the sites they use."""

    def __init__(self, base: nn.Module, base_name: str | None) -> None:
        self._base = base
        self._base_name = base_name
        self._sites: dict[str, Site] = {}
        self._bound: weakref.WeakKeyDictionary[Adapter, Adapter] = weakref.WeakKeyDictionary()

    def site(self, name: str) -> Site:
        """The site of that name in the base as it is now: a replaced module is found again."""
        known = self._sites.get(name)
        if known is not None and self._still_there(known):
            return known
        site = self._sites[name] = find_site(self._base, name)
        self._bound.clear()  # what was checked against the old module has to be checked again
        return site

    def bind(self, node: str, adapter: Adapter) -> Adapter:
        """``adapter`` with its names as this base has them, checked.

        Raises:
            BaseMismatch: a module is missing, of another kind or shape, or carries a base tensor that differs.
        """
        known = self._bound.get(adapter)
        if known is not None and all(self._still_there(self._sites[name]) for name in known.modules):
            return known
        try:
            bound = adapter.renested(self._registered(adapter)) if adapter.nesting else adapter
            for name, value in bound.modules.items():
                self.site(name).check(value)
            for name, tensor in bound.unchanged.items():
                self._check_unchanged(name, tensor)
        except LoraTreeError as error:
            where = error.within(node)
            made_for = adapter.base and self._base_name and adapter.base != self._base_name
            hint = (f"the adapter names base {adapter.base!r}, the model attached is {self._base_name!r}",)
            raise type(error)(where.what, *where.todo, *(hint if made_for else ())) from error
        self._bound[adapter] = bound
        return bound

    def plan(self, terms: list[tuple[str, float, Adapter]]) -> dict[str, Terms]:
        """The plan of (node, coefficient, adapter) terms; every adapter is checked first."""
        found: dict[str, list[Term]] = {}
        for node, coefficient, adapter in terms:
            for name, value in self.bind(node, adapter).modules.items():
                version = value.A._version + value.B._version if _counts(value) else 0
                found.setdefault(name, []).append(Term(node, coefficient, value, version))
        return {name: tuple(terms) for name, terms in found.items()}

    def _still_there(self, site: Site) -> bool:
        holder: nn.Module | None = self._base
        name = site.name.rpartition(".")[0] if site.kind == "parameter" else site.name
        for part in name.split(".") if name else ():
            holder = holder._modules.get(part) if holder is not None else None
        return holder is site.module

    def _registered(self, adapter: Adapter) -> dict[str, tuple[str, ...]]:
        """Each nested module's adapted parameters in the order in which this base registers them."""
        order = {}
        for module, parameters in adapter.nesting.items():
            try:
                holder = self._base.get_submodule(module)
            except AttributeError:
                raise BaseMismatch(f"{module}: the base has no such module") from None
            order[module] = tuple(name for name, _ in holder.named_parameters(recurse=False) if name in parameters)
        return order

    def _check_unchanged(self, name: str, tensor: Tensor) -> None:
        try:
            own = self._base.get_parameter(name)
        except AttributeError:
            raise BaseMismatch(f"{name}: the adapter carries this tensor of its base, this base has none") from None
        if own.shape != tensor.shape or not torch.equal(own.detach().to(tensor.dtype).cpu(), tensor.cpu()):
            raise BaseMismatch(
                f"{name}: the adapter carries a {name.rpartition('.')[2]} that is not the base's, "
                "and a replaced tensor does not add up",
                "train without bias= and without resizing embeddings, or attach the base it was trained on",
            )


def _counts(value: LowRank) -> bool:
    return not (value.A.is_inference() or value.B.is_inference())
