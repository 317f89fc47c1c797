"""Merged: a path written into the weights, each from pristine, each rounded once, and only where the plan changed.

    changed sites ─→ check all ─→ keep pristine of all ─→ write one by one ─→ on any failure, write the old ones again

Addresses stay what they were, no hook is left, and the forward is the plain base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import StateError, TiedWeights, listing
from ..lowrank import LowRank, concat, stacked
from ..sites import Site
from .arithmetic import Scratch, compute_dtype, exact_mode, write_sum
from .plan import BARE, Plan, Terms, same_terms
from .pristine import Pristine

__all__ = ["Merged", "add_bias", "add_weight"]


class Merged:
    """What is written into the base's weights, and the way back.

    Args:
        base: the model.
        in_place: add to and subtract from the weights instead of keeping copies of them; drifts with every switch.
    """

    def __init__(self, base: nn.Module, *, in_place: bool) -> None:
        self._base = base
        self._in_place = in_place
        self._untied: set[tuple[str, str]] = set()
        self._addresses: list[int] = []
        self._scratch = Scratch()
        self.pristine = Pristine()
        self.plan = BARE

    def check(self, plan: Plan) -> None:
        """That every site of the plan can be written to.

        Raises:
            UnmergedOnly, TiedWeights: one can't; says which, why and what to do.
        """
        names: dict[tuple[int, str], str] = {}
        for name, terms in plan.terms.items():
            site = plan.sites[name]
            for term in terms:
                site.check_mode(term.value, merged=True, node=term.node)
            other = names.setdefault((id(site.module), site.weight_name), name)
            if other != name:
                raise TiedWeights(
                    f"{terms[0].node}: {other} and {name} are two names of one weight: "
                    "written one after the other, one would be lost",
                    "call it by the same name in every adapter on the path",
                )
        if plan.terms and (addresses := _addresses(self._base)) != self._addresses:
            self._untied.clear()  # a weight was replaced, and may be tied since
            self._addresses = addresses
        jobs = [_Job(plan.sites[name], terms, ()) for name, terms in plan.terms.items()]
        self._check_ties([(j, a) for j in jobs for a in j.attributes if (j.site.name, a) not in self._untied])

    def switch(self, plan: Plan) -> None:
        """Make the weights those of ``plan``; an empty plan is the bare base.

        Raises:
            ForeignWrite: somebody else wrote to a weight while a path was merged.
            MemoryError, RuntimeError: what torch raised; the weights are as they were before the call.
        """
        if not (plan.terms or self.plan.terms):
            return
        self.pristine.verify(self._replaced())
        sites = {**self.plan.sites, **plan.sites}
        jobs = [
            _Job(sites[name], plan.terms.get(name, ()), self.plan.terms.get(name, ()))
            # what goes bare comes first, because the same weight may be written under a second name
            for name in sorted(sites, key=lambda name: (name in plan.terms, name))
            if not same_terms(self.plan.terms.get(name, ()), plan.terms.get(name, ()))
        ]
        started: list[_Job] = []
        before = self.plan
        with exact_mode(*(site.weight.device for site in sites.values() if site.weight is not None)):
            if not self._in_place:
                for job in jobs:
                    for attribute in job.attributes:
                        self.pristine.keep(job.site.module_name, job.site.module, attribute)
            try:
                for job in jobs:
                    started.append(job)
                    self._write(job)
                self.plan = plan
            except BaseException:
                self.plan = before
                for job in reversed(started[:-1] if self._in_place else started):
                    self._write(_Job(job.site, job.old, job.new))
                raise

    def restore(self) -> None:
        """Put the base's own values back, whatever stands in its weights now.

        Raises:
            StateError: no copies were kept.
            ForeignWrite: a module was replaced or resized, and its copy fits no more; nothing was written.
        """
        if self._in_place and self.plan.terms:
            raise StateError(
                'pristine="none" kept no copies to put back',
                'model.trust("weights") takes the weights as they are now for the base, or load the base again',
            )
        self.pristine.restore(self._replaced())
        self.plan = BARE

    def forget(self) -> None:
        """Take the weights as they are now for the base's own."""
        self.pristine.forget()
        self.plan = BARE

    def _replaced(self) -> list[str]:
        """The weights with a path merged into them whose module is not in the base any more, as it was."""
        sites = self.plan.sites.values()
        return [f"{site.module_name}.{site.weight_name}" for site in sites if not site.is_in(self._base)]

    def _write(self, job: _Job) -> None:
        site, weight = job.site, job.site.weight
        assert weight is not None
        new = [t.value.scaled(t.coefficient).to(device=weight.device) for t in job.new]
        old = [t.value.scaled(-t.coefficient).to(device=weight.device) for t in job.old] if self._in_place else []
        for attribute in job.attributes:
            target: Tensor = getattr(site.module, attribute)
            if self._in_place:
                _add(site, target, target.detach(), [*new, *old], self._scratch)
            else:
                pristine = self.pristine.keep(site.module_name, site.module, attribute)
                _add(site, target, pristine, new, self._scratch)
                self.pristine.wrote(site.module, attribute, merged=bool(new))

    def _check_ties(self, written: Sequence[tuple[_Job, str]]) -> None:
        """That no other module uses a tensor that is about to be written."""
        spans = list(_spans(self._base)) if written else []
        for job, attribute in written:
            site = job.site
            start, end = _span(getattr(site.module, attribute))
            own = id(site.module), attribute
            shared = [f"{o}.{leaf}" for s, e, m, (o, leaf) in spans if s < end and e > start and (m, leaf) != own]
            if shared:
                raise TiedWeights(
                    f"{job.new[0].node}: {site.name}: its {attribute} is tied to {listing(sorted(shared))}: "
                    "merging would change both",
                    'use activate(…, mode="unmerged"), which changes this module alone',
                    f"or untie the base: module.{attribute} = nn.Parameter(module.{attribute}.detach().clone())",
                    "or leave the module out of the adapter",
                )
            self._untied.add((site.name, attribute))


@dataclass(frozen=True, eq=False)
class _Job:
    """One site's part of a switch."""

    site: Site
    new: Terms
    old: Terms

    @property
    def attributes(self) -> list[str]:
        """The tensors it writes: the weight, and the bias where a term has one or had."""
        biased = any(t.value.bias is not None for t in (*self.new, *self.old))
        return [self.site.weight_name, self.site.bias_name] if biased else [self.site.weight_name]


def _add(site: Site, target: Tensor, source: Tensor, values: list[LowRank], scratch: Scratch) -> None:
    """``target ← round_once(source + Σ values)``, for a site's weight or its bias."""
    if target is getattr(site.module, site.bias_name, None):
        add_bias(target, source, values)
    else:
        add_weight(site, target, source, values, scratch)


def add_bias(target: Tensor, source: Tensor, values: Sequence[LowRank]) -> None:
    """``target ← round_once(source + Σ biases)``."""
    total = source.to(device=target.device, dtype=torch.float64)
    for value in values:
        if value.bias is not None:
            total = total + value.bias.double() * value.scale
    target.copy_(total)


def add_weight(site: Site, target: Tensor, source: Tensor, values: Sequence[LowRank], scratch: Scratch) -> None:
    """``target ← round_once(source + Σ values)``; ``source`` may be ``target`` itself.

    Args:
        site: says how a delta lies in such a weight; its own may be another one, on the meta device for example.
    """
    if not values:
        target.copy_(source)
        return
    wide = compute_dtype(target.dtype, *(value.dtype for value in values))
    if target.dtype != wide and all(value.dtype == target.dtype for value in values):
        value = concat(values).folded()  # stays narrow where no scale has to be rounded
    else:
        value = stacked(values, dtype=wide, device=target.device)
    rows = site.rows(target)
    write_sum(rows, site.rows(source), *site.sides_of(value), scratch)
    if rows.data_ptr() != target.data_ptr():  # not laid out row by row: rows() had to copy
        target.copy_(rows.reshape(target.shape))


def _addresses(base: nn.Module) -> list[int]:
    """Where every tensor of every module lies, shared ones each time."""
    return [tensor.data_ptr() for module in base.modules() for _, tensor in _own(module)]


def _spans(base: nn.Module) -> Iterator[tuple[int, int, int, tuple[str, str]]]:
    """Every tensor of every module, shared ones each time: (start, end, id of module, (module, name)) in memory."""
    for name, module in base.named_modules():
        for leaf, tensor in _own(module):
            if not tensor.is_meta:
                yield (*_span(tensor), id(module), (name, leaf))


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers, as far as they lie somewhere."""
    for held in (module._parameters, module._buffers):
        for leaf, tensor in held.items():
            if tensor is not None and not is_lazy(tensor) and tensor.layout is torch.strided:
                yield leaf, tensor


def _span(tensor: Tensor) -> tuple[int, int]:
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1 if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()
