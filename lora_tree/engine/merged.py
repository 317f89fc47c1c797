"""Merged: a path written into the weights, each from pristine, each rounded once, and only where the plan changed.

    changed sites ─→ check all ─→ keep pristine of all ─→ write all ─→ on any failure, write the old ones again

Addresses stay what they were, no hook is left, and the forward is the plain base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import StateError, TiedWeights, listing
from ..lowrank import LowRank, concat, stacked
from ..sites import Site
from .arithmetic import Scratch, compute_dtype, exact_mode, write_sum
from .finite import not_finite, suspects
from .kernels import Part, Term, can_merge, merge, usable
from .plan import BARE, Plan, Terms, same_terms
from .pristine import Place, Pristine
from .unpromised import copy_all

__all__ = ["Merged", "add_bias", "add_weight", "check_sum"]


class Merged:
    """What is written into the base's weights, and the way back.

    Args:
        base: the model.
        place: where the base's own weights are kept; ``none``: nowhere, paths are added to and subtracted from the
            weights in place, which drifts with every switch.
    """

    def __init__(self, base: nn.Module, *, place: Place) -> None:
        self._base = base
        self._in_place = place == "none"
        self._untied: set[tuple[str, str]] = set()
        self._addresses: list[int] = []
        self._scratch = Scratch()
        self.pristine = Pristine(place)
        self.plan = BARE

    def check(self, plan: Plan) -> None:
        """That every site of the plan can be written to.

        Raises:
            UnmergedOnly, TiedWeights: one can't; says which, why and what to do.
            BaseMismatch: a weight would get a number that is not finite; names the node and the module.
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
        self._check_finite(plan)

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
        before = self.plan
        with exact_mode(*(site.weight.device for site in sites.values() if site.weight is not None)):
            if not self._in_place:
                self.pristine.keep(
                    (job.site.module_name, job.site.module, attribute) for job in jobs for attribute in job.attributes
                )
            begun: list[_Job] = []
            done: list[_Job] = []
            try:
                self._write(jobs, begun, done)
                self.plan = plan
            except BaseException:
                self.plan = before
                # From pristine a weight can be written anew whatever stands in it; in place, what is half
                # written can't be taken back, and what was not begun must not be.
                undone = done if self._in_place else begun
                back = [_Job(job.site, job.old, job.new) for job in reversed(undone)]
                self._write(back, [], [])
                raise
            finally:
                if not self._in_place:
                    self.pristine.look()

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

    def _write(self, jobs: Sequence[_Job], begun: list[_Job], done: list[_Job]) -> None:
        """Write some sites' weights and biases.

        Args:
            jobs: in the order in which they are written.
            begun: gets every job before anything of it is written.
            done: gets every job when it is written.
        """
        later: list[_Job] = []
        parts: list[Part] = []
        # What goes bare comes first, because the same weight may be written under a second name.
        bare = [job for job in jobs if not job.new and not self._in_place]
        begun += bare
        self._write_bare(bare)
        done += bare
        for job in jobs:
            if not job.new and not self._in_place:
                continue
            begun.append(job)
            waiting = len(parts)
            for attribute in job.attributes:
                part = self._written(job, attribute)
                if part is not None:
                    parts.append(part)
            (done if len(parts) == waiting else later).append(job)
        if parts:
            merge(parts)
        done += later

    def _write_bare(self, jobs: Sequence[_Job]) -> None:
        """Put the base's own values back at some sites."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for job in jobs:
            site = job.site
            for attribute in job.attributes:
                target: Tensor = getattr(site.module, attribute)
                source = self.pristine.of(site.module, attribute)
                self.pristine.wrote(site.module, attribute, merged=False)
                if target.device.type == "cuda":
                    targets.append(target)
                    sources.append(source)
                else:
                    _add(site, target, source, [], self._scratch)
        if targets:
            copy_all(targets, sources)  # a few launches for all

    def _written(self, job: _Job, attribute: str) -> Part | None:
        """Write a site's weight or bias now, or return what a kernel writes together with others."""
        site = job.site
        target: Tensor = getattr(site.module, attribute)
        terms = [(t.value, t.coefficient) for t in job.new]
        if self._in_place:
            source = target.detach()
            terms += [(t.value, -t.coefficient) for t in job.old]
        else:
            source = self.pristine.of(site.module, attribute)
            self.pristine.wrote(site.module, attribute, merged=bool(terms))
        if attribute == site.weight_name and usable(target.device):
            part = _part(site, target, source, terms)
            if part is not None:
                return part
        values = [value.scaled(c).to(device=target.device) for value, c in terms]
        _add(site, target, source, values, self._scratch)
        return None

    def _check_finite(self, plan: Plan) -> None:
        """That no finite number of a weight becomes one that is not; tried out only where a bound can't tell."""
        for name in suspects(plan):
            job = _Job(plan.sites[name], plan.terms[name], ())
            parts = [(term.node, term.value, term.coefficient) for term in job.new]
            for attribute in job.attributes:
                target: Tensor = getattr(job.site.module, attribute)
                with exact_mode(target.device):
                    own = self._own_value(job.site, attribute).to(target.device)
                    check_sum(job.site, name, own, parts, self._scratch, is_bias=attribute == job.site.bias_name)

    def _own_value(self, site: Site, attribute: str) -> Tensor:
        """The base's own numbers: the copy, or what stands there while nothing is merged (in place: as it stands)."""
        kept = self.pristine.known(site.module, attribute)
        if kept is not None:
            return kept
        own: Tensor = getattr(site.module, attribute)
        return own.detach()

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


def _part(site: Site, target: Tensor, source: Tensor, terms: Sequence[tuple[LowRank, float]]) -> Part | None:
    """A site's weight as kernels take it; None where they don't cover it."""
    rows = site.rows(target)
    if rows.data_ptr() != target.data_ptr():
        return None  # not laid out row by row
    found = []
    for value, coefficient in terms:
        left, right = site.sides_of(value.to(device=target.device))
        found.append(Term(left, right, value.scale * coefficient))
    part = Part(rows, site.rows(source), found)
    return part if can_merge(part) else None


def _add(site: Site, target: Tensor, source: Tensor, values: list[LowRank], scratch: Scratch) -> None:
    """``target ← round_once(source + Σ values)``, for a site's weight or its bias."""
    if target is getattr(site.module, site.bias_name, None):
        add_bias(target, source, values)
    else:
        add_weight(site, target, source, values, scratch)


def check_sum(
    site: Site,
    name: str,
    source: Tensor,
    parts: Sequence[tuple[str, LowRank, float]],
    scratch: Scratch,
    *,
    is_bias: bool,
) -> None:
    """Refuse a sum that is not finite where ``source`` is; it is computed as it would be written, and dropped.

    Args:
        site: says how a delta lies in such a weight.
        name: of the site, for the message.
        source: (as the weight), on the device on which to compute.
        parts: node, value and its coefficient.

    Raises:
        BaseMismatch: it is not; names the node that adds the most.
    """
    if all(math.isfinite(value.scale * coefficient) for _, value, coefficient in parts):
        values = [value.scaled(coefficient).to(device=source.device) for _, value, coefficient in parts]
        trial = torch.empty_like(source, requires_grad=False)
        if is_bias:
            add_bias(trial, source, values)
        else:
            add_weight(site, trial, source, values, scratch)
        if bool((trial.isfinite() | ~source.isfinite()).all()):
            return
    raise not_finite(name, parts, source.dtype)


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
