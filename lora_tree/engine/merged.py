"""Merged: a path written into the weights, each from pristine, each rounded once, and only where the plan changed.

    changed sites ─→ check all ─→ keep pristine of all ─→ write one by one ─→ on any failure, write the old ones again

Addresses stay what they were, no hook is left, and the forward is the plain base's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import TiedWeights, listing
from ..lowrank import LowRank, concat
from ..sites import Site
from .arithmetic import exact_mode, write_sum
from .plan import Binder, Plan, Terms, same_terms
from .pristine import Pristine

__all__ = ["Merged"]


class Merged:
    """What is written into the base's weights, and the way back.

    Args:
        base: the model.
        binder: finds the sites.
        in_place: add to and subtract from the weights instead of keeping copies of them; drifts with every switch.
    """

    def __init__(self, base: nn.Module, binder: Binder, *, in_place: bool) -> None:
        self._base = base
        self._binder = binder
        self._in_place = in_place
        self._untied: set[str] = set()
        self.pristine = Pristine()
        self.plan: dict[str, Terms] = {}

    def check(self, plan: Plan) -> None:
        """That every site of the plan can be written to.

        Raises:
            UnmergedOnly, TiedWeights: one can't; says which, why and what to do.
        """
        for name, terms in plan.items():
            site = self._binder.site(name)
            for term in terms:
                site.check_mode(term.value, merged=True)
        self._check_ties(sorted(set(plan) - self._untied))

    def switch(self, plan: Plan) -> None:
        """Make the weights those of ``plan``; an empty plan is the bare base.

        Raises:
            ForeignWrite: somebody else wrote to a weight while a path was merged.
            MemoryError, RuntimeError: what torch raised; the weights are as they were before the call.
        """
        self.pristine.verify()
        names = sorted(self.plan.keys() | plan.keys())
        changed = [n for n in names if not same_terms(self.plan.get(n, ()), plan.get(n, ()))]
        sites = {name: self._binder.site(name) for name in changed}
        if not self._in_place:
            for name, site in sites.items():
                for attribute in self._attributes(name, plan):
                    self.pristine.keep(name, site.module, attribute)
        before = dict(self.plan)
        started: list[str] = []
        try:
            for name, site in sites.items():
                started.append(name)
                self._write(site, plan.get(name, ()), before.get(name, ()))
        except BaseException:
            for name in started[:-1] if self._in_place else started:
                self._write(sites[name], before.get(name, ()), plan.get(name, ()))
            raise
        self.plan = dict(plan)

    def _attributes(self, name: str, plan: Plan) -> list[str]:
        """The tensors that the switch writes at a site: its weight, and its bias where a term has one now or had."""
        site = self._binder.site(name)
        terms = (*self.plan.get(name, ()), *plan.get(name, ()))
        return [site.weight_name] + ([site.bias_name] if any(t.value.bias is not None for t in terms) else [])

    def _write(self, site: Site, terms: Terms, before: Terms) -> None:
        weight = site.weight
        assert weight is not None
        with exact_mode(weight.device):
            for attribute, old, new in self._values(site, weight, terms, before):
                target: Tensor = getattr(site.module, attribute)
                if self._in_place:
                    _add(site, target, target.detach(), new, old)
                else:
                    _add(site, target, self.pristine.keep(site.name, site.module, attribute), new, [])
                    self.pristine.wrote(site.module, attribute, merged=bool(terms))

    def _values(
        self, site: Site, weight: Tensor, terms: Terms, before: Terms
    ) -> Iterator[tuple[str, list[LowRank], list[LowRank]]]:
        """Each tensor to write, with what it holds and what it gets."""
        new = [t.value.scaled(t.coefficient).to(device=weight.device) for t in terms]
        old = [t.value.scaled(t.coefficient).to(device=weight.device) for t in before] if self._in_place else []
        yield site.weight_name, old, new
        if any(t.value.bias is not None for t in (*terms, *before)):
            yield site.bias_name, old, new

    def _check_ties(self, names: list[str]) -> None:
        """That no other module uses a weight that is about to be written."""
        if not names:
            return
        spans = sorted(_spans(self._base))
        for name in names:
            site = self._binder.site(name)
            for attribute in {site.weight_name, site.bias_name}:
                own = getattr(site.module, attribute, None)
                if not isinstance(own, Tensor):
                    continue
                start, end = _span(own)
                shared = [
                    o for s, e, m, o in spans if s < end and e > start and (m, o[1]) != (id(site.module), attribute)
                ]
                if shared:
                    also = listing(f"{module}.{leaf}" for module, leaf in shared)
                    raise TiedWeights(
                        f"{name}: its {attribute} is tied to {also}: merging would change both",
                        'use activate(…, mode="unmerged"), which changes this module alone',
                        f"or untie the base: module.{attribute} = nn.Parameter(module.{attribute}.detach().clone())",
                        "or leave the module out of the adapter",
                    )
            self._untied.add(name)


def _add(site: Site, target: Tensor, source: Tensor, new: list[LowRank], old: list[LowRank]) -> None:
    """``target ← round_once(source + Σ new − Σ old)``."""
    values = [*new, *(value.scaled(-1.0) for value in old)]
    if target is getattr(site.module, site.bias_name, None):
        total = source.to(device=target.device, dtype=torch.float64)
        for value in values:
            if value.bias is not None:
                total = total + value.bias.double() * value.scale
        target.copy_(total)
        return
    if not values:
        target.copy_(source)
        return
    value = concat(values).folded()
    rows = site.rows(target)
    write_sum(rows, site.rows(source), *site.sides_of(value))
    if rows.data_ptr() != target.data_ptr():  # not laid out row by row: rows() had to copy
        target.copy_(rows.reshape(target.shape))


def _spans(base: nn.Module) -> Iterator[tuple[int, int, int, tuple[str, str]]]:
    """Every parameter of every module, shared ones each time: (start, end, id of module, (module, name)) in memory."""
    for name, module in base.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                yield (*_span(parameter), id(module), (name, leaf))


def _span(tensor: Tensor) -> tuple[int, int]:
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1 if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()
