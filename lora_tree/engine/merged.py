"""Merged: a path written into the weights, each from pristine, each rounded once, and only where the plan changed.

    changed sites ─→ check all ─→ keep pristine of all ─→ write all ─→ on any failure, write the old ones again

Addresses stay what they were, no hook is left, and the forward is the plain base's.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import StateError, TiedWeights, listing
from ..lowrank import LowRank, concat, is_sharded, stacked
from ..sites import Site
from .arithmetic import Scratch, compute_dtype, exact_mode, write_sum
from .finite import not_finite, suspects
from .kernels import MergePart, merge_launch, usable
from .launches import KeptLaunch, Launches, part_of
from .plan import EMPTY_PLAN, Plan, Terms, same_terms
from .pristine import Place, Pristine

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
        self._checked: weakref.WeakSet[Plan] = weakref.WeakSet()
        self._addresses: list[int] = []
        self._scratch = Scratch()
        self._launches = Launches()
        self.pristine = Pristine(place)
        self.plan = EMPTY_PLAN

    def check(self, plan: Plan, *, owned: Collection[str] = ()) -> None:
        """Check that every site of the plan can be written to.

        Args:
            owned: the nodes whose factors the model has made parameters.

        Raises:
            UnmergedOnly, TiedWeights: one can't; says which, why and what to do.
            BaseMismatch: a weight would get a number that is not finite; names the node and the module.
            StateError: a node trains, or the base is sharded; names the node or the site.
        """
        if not plan.terms:
            return
        if plan.trains:
            _refuse_sharded(plan)  # first: freezing the node would not help
            _refuse_training(plan, owned)
        addresses = _addresses(self._base)
        if (
            addresses != self._addresses
        ):  # a weight was replaced, and may be tied, or of another kind, since
            self._untied.clear()
            self._checked.clear()
            self._addresses = addresses
        if plan not in self._checked:
            self._check_sites(plan)
            self._checked.add(plan)
        self._check_finite(plan)

    def verify(self, plan: Plan) -> None:
        """Check that nobody else wrote to a weight since the last switch, before the switch to ``plan``.

        Raises:
            ForeignWrite: somebody did while a path was merged into it; names the weight.
        """
        if plan.terms or self.plan.terms:
            self.pristine.verify(self._replaced())

    def switch(self, plan: Plan, *, after_failure: bool = False) -> None:
        """Make the weights those of ``plan``; an empty plan is the bare base.

        Args:
            after_failure: a call of ours failed: how the weights look has to be noted anew, also where they are
                those of ``plan`` already.

        Raises:
            MemoryError, RuntimeError: what torch raised; the weights are as they were before the call.
        """
        if not (plan.terms or self.plan.terms):
            return
        sites = {**self.plan.sites, **plan.sites}
        jobs = [
            _SiteWrite(sites[name], plan.terms.get(name, ()), self.plan.terms.get(name, ()))
            # what goes bare comes first, because the same weight may be written under a second name
            for name in sorted(sites, key=lambda name: (name in plan.terms, name))
            if not same_terms(self.plan.terms.get(name, ()), plan.terms.get(name, ()))
        ]
        before = self.plan
        weights = [job.site.weight for job in jobs]
        with exact_mode(*{weight.device for weight in weights if weight is not None}):
            if not self._in_place:
                self.pristine.keep(
                    (job.site.module_name, job.site.module, attribute)
                    for job in jobs
                    for attribute in job.attributes
                )
            begun: list[_SiteWrite] = []
            done: list[_SiteWrite] = []
            try:
                self._write(jobs, begun, done, plan if plan.fixed and not self._in_place else None)
                self.plan = plan
            except BaseException:
                self.plan = before
                # From pristine any weight can be written anew, whatever it holds now. In place, what is half
                # written can't be taken back, and what was not begun must not be.
                undone = done if self._in_place else begun
                back = [_SiteWrite(job.site, job.old, job.new) for job in reversed(undone)]
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
        self._launches.forget()
        self.plan = EMPTY_PLAN

    def forget(self) -> None:
        """Take the weights as they are now for the base's own."""
        self.pristine.forget()
        self._launches.forget()
        self.plan = EMPTY_PLAN

    def _replaced(self) -> list[str]:
        """The weights with a path merged into them whose module is not in the base any more, as it was."""
        sites = self.plan.sites.values()
        return [
            f"{site.module_name}.{site.weight_name}" for site in sites if not site.is_in(self._base)
        ]

    def _write(
        self,
        jobs: Sequence[_SiteWrite],
        begun: list[_SiteWrite],
        done: list[_SiteWrite],
        plan: Plan | None = None,
    ) -> None:
        """Write some sites' weights and biases.

        Args:
            jobs: in the order in which they are written.
            begun: gets every job before anything of it is written.
            done: gets every job when it is written.
            plan: what the jobs write, where a launch may be kept for it.
        """
        # What goes bare comes first, because the same weight may be written under a second name.
        bare = [job for job in jobs if not job.new and not self._in_place]
        rest = [job for job in jobs if job.new or self._in_place]
        begun += bare
        self._write_bare(bare)
        done += bare
        sites = [job.site for job in rest]
        known = None if plan is None else self._launches.find(plan, sites, self.pristine.number)
        parts: dict[str, MergePart] = {}
        targets: list[Tensor] = []
        waiting: list[_SiteWrite] = []
        keeps = plan is not None
        for job in rest:
            site = job.site
            begun.append(job)
            for attribute in job.attributes:
                target: Tensor = getattr(site.module, attribute)
                source = self._source(job, attribute)
                if attribute != site.weight_name or not usable(target.device):
                    self._write_now(job, target, source)
                    continue
                if known is None:
                    found = part_of(site, target, source, self._terms(job))
                    if found is None:
                        self._write_now(job, target, source)
                        continue
                    parts[site.name] = found[0]
                    keeps = keeps and not found[1]
                elif site.name not in known.addresses:
                    self._write_now(job, target, source)
                    continue
                if source.device != target.device:
                    target.copy_(source, non_blocking=True)  # the launch reads it there
                targets.append(target)
            (waiting if targets and targets[-1] is site.weight else done).append(job)
        if targets:
            if known is None:
                addresses = {name: part.weight.data_ptr() for name, part in parts.items()}
                known = KeptLaunch(merge_launch(list(parts.values())), addresses)
                if keeps and plan is not None:
                    self._launches.keep(plan, sites, known)
            known.launch.run()
            # Autograd does not see a kernel's write: a backward that saved this weight must be told.
            torch.autograd.graph.increment_version(targets)
        done += waiting

    def _write_bare(self, jobs: Sequence[_SiteWrite]) -> None:
        """Put the base's own values back at some sites."""
        for job in jobs:
            site = job.site
            for attribute in job.attributes:
                target: Tensor = getattr(site.module, attribute)
                source = self.pristine.of(site.module, attribute)
                self.pristine.wrote(site.module, attribute, merged=False)
                _add(site, target, source, [], self._scratch)

    def _source(self, job: _SiteWrite, attribute: str) -> Tensor:
        """Return the tensor that a site's weight or bias is computed from, and count the weight as written."""
        if self._in_place:
            tensor: Tensor = getattr(job.site.module, attribute)
            return tensor.detach()
        self.pristine.wrote(job.site.module, attribute, merged=bool(job.new))
        return self.pristine.of(job.site.module, attribute)

    def _terms(self, job: _SiteWrite) -> list[tuple[LowRank, float]]:
        """Values and their coefficients; in place what was written before is taken back too."""
        terms = [(t.value, t.coefficient) for t in job.new]
        return terms + [(t.value, -t.coefficient) for t in job.old] if self._in_place else terms

    def _write_now(self, job: _SiteWrite, target: Tensor, source: Tensor) -> None:
        """With stock operations, on the weight's device."""
        values = [value.scaled(c).to(device=target.device) for value, c in self._terms(job)]
        _add(job.site, target, source, values, self._scratch)

    def _check_finite(self, plan: Plan) -> None:
        """Check that every number of a weight stays finite; the sum is computed only where a bound can't tell."""
        for name in suspects(plan):
            job = _SiteWrite(plan.sites[name], plan.terms[name], ())
            parts = [(term.node, term.value, term.coefficient) for term in job.new]
            for attribute in job.attributes:
                target: Tensor = getattr(job.site.module, attribute)
                with exact_mode(target.device):
                    own = self._own_value(job.site, attribute).to(target.device)
                    check_sum(
                        job.site,
                        name,
                        own,
                        parts,
                        self._scratch,
                        is_bias=attribute == job.site.bias_name,
                    )

    def _own_value(self, site: Site, attribute: str) -> Tensor:
        """The base's own numbers: the copy, or what stands there while nothing is merged (in place: as it stands)."""
        kept = self.pristine.known(site.module, attribute)
        if kept is not None:
            return kept
        own: Tensor = getattr(site.module, attribute)
        return own.detach()

    def _check_sites(self, plan: Plan) -> None:
        """Check that each site takes a write, under one name, and shares its memory with no other module."""
        _refuse_sharded(plan)
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
        jobs = [_SiteWrite(plan.sites[name], terms, ()) for name, terms in plan.terms.items()]
        self._check_ties(
            [(j, a) for j in jobs for a in j.attributes if (j.site.name, a) not in self._untied]
        )

    def _check_ties(self, written: Sequence[tuple[_SiteWrite, str]]) -> None:
        """That no other module uses a tensor that is about to be written."""
        spans = list(_spans(self._base)) if written else []
        for job, attribute in written:
            site = job.site
            start, end = _span(getattr(site.module, attribute))
            own = id(site.module), attribute
            shared = [
                f"{o}.{leaf}"
                for s, e, m, (o, leaf) in spans
                if s < end and e > start and (m, leaf) != own
            ]
            if shared:
                raise TiedWeights(
                    f"{job.new[0].node}: {site.name}: its {attribute} is tied to {listing(sorted(shared))}: "
                    "merging would change both",
                    'use activate(…, mode="unmerged"), which changes this module alone',
                    f"or untie the base: module.{attribute} = nn.Parameter(module.{attribute}.detach().clone())",
                    "or leave the module out of the adapter",
                )
            self._untied.add((site.name, attribute))


def _refuse_sharded(plan: Plan) -> None:
    """Raise for the first site of a plan of whose weight every rank has a part."""
    for name, site in plan.sites.items():
        weight = site.weight
        if weight is not None and is_sharded(weight):
            raise StateError(
                f"{name}: the base is sharded, and a path can't be merged into parts of its weights",
                'activate(…, mode="unmerged")',
            )


def _refuse_training(plan: Plan, owned: Collection[str]) -> None:
    """Raise for the first node of a plan that trains."""
    for name, terms in plan.terms.items():
        for term in terms:
            if any(tensor.requires_grad for tensor in term.value.tensors):
                freeze = (
                    "model.trainable()"
                    if term.node in owned
                    else "adapter.with_tensors(torch.Tensor.detach)"
                )
                raise StateError(
                    f"{term.node}: {name}: trains, and can't be merged while it does",
                    f'activate(…, mode="unmerged"), or {freeze} first',
                )


@dataclass(frozen=True, eq=False)
class _SiteWrite:
    """One site's part of a switch."""

    site: Site
    new: Terms
    old: Terms

    @cached_property
    def attributes(self) -> list[str]:
        """The tensors it writes: the weight, and the bias where a term has one or had."""
        names = [self.site.weight_name]
        for term in (*self.new, *self.old):
            if term.value.bias is not None:
                names.append(self.site.bias_name)
                break
        return names


def _add(
    site: Site, target: Tensor, source: Tensor, values: list[LowRank], scratch: Scratch
) -> None:
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
        values = [
            value.scaled(coefficient).to(device=source.device) for _, value, coefficient in parts
        ]
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


def add_weight(
    site: Site, target: Tensor, source: Tensor, values: Sequence[LowRank], scratch: Scratch
) -> None:
    """``target ← round_once(source + Σ values)``; ``source`` may be ``target`` itself.

    Args:
        site: says how a delta lies in such a weight; its own may be another one, on the meta device for example.
    """
    if not values:
        target.copy_(source, non_blocking=True)  # from pinned memory the host need not wait
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
    found: list[int] = []
    # By hand, because this is asked at every switch, and `modules()` takes several times as long.
    waiting = [base]
    seen: set[int] = set()
    while waiting:
        module = waiting.pop()
        if id(module) in seen:  # under a second name, or a child that refers to its parent
            continue
        seen.add(id(module))
        for held in (module._parameters, module._buffers):
            for tensor in held.values():
                if tensor is not None and tensor.layout is torch.strided and not is_lazy(tensor):
                    found.append(tensor.data_ptr())
        waiting += [child for child in module._modules.values() if child is not None]
    return found


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
    reach = (
        sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        if tensor.numel()
        else 0
    )
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()
