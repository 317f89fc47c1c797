"""Merged: a path written into the weights, each from pristine or from what overrides it, each
rounded once, and only where the plan changed.

    changed sites ─→ keep pristine of all ─→ write all ─→ on any failure, write the old ones again

`mergeable.py` has checked the plan before. Addresses stay what they were, no hook is left, and the
forward is the plain base's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..lowrank import LowRank
from ..sites import Site
from .arithmetic import Scratch, add_bias, add_weight, exact_mode
from .kernels import MergePart, merge_launch, usable
from .launches import KeptLaunch, Launches, part_of
from .mergeable import Mergeable
from .plan import EMPTY_PLAN, OverrideTerms, Plan, Terms
from .pristine import Place, Pristine, Source, Wanted
from .tile_log import LogWrite, TileLog, write_logs
from .undo_log import UndoLog, add_in_blocks, can_log

__all__ = ["MergedWeights"]


class MergedWeights:
    """The plan that is written into a base's weights, and the way back.

    Args:
        base: the model.
        place: where the base's own weights are kept; ``none``: nowhere, paths are added to and
            subtracted from the weights in place, which drifts with every switch.
    """

    def __init__(self, base: nn.Module, *, place: Place) -> None:
        self._base = base
        self._in_place = place == "none"
        self._logs = place == "log"
        self._scratch = Scratch()
        self._launches = Launches()
        self.pristine = Pristine(place)
        self.mergeable = Mergeable(base, self.pristine, self._scratch)
        self.plan = EMPTY_PLAN

    def verify(self, plan: Plan) -> None:
        """Check, before the switch to ``plan``, that all writes since the last switch were ours.

        Raises:
            ForeignWrite: somebody else wrote to a weight with a path merged into it; names it.
        """
        if plan.terms or self.plan.terms:
            self.pristine.verify(self._replaced())

    def switch(self, plan: Plan, *, after_failure: bool = False) -> None:
        """Make the weights those of ``plan``; an empty plan is the bare base.

        Args:
            plan: what the weights become.
            after_failure: a call of ours failed: how the weights look has to be noted anew, even if
                they are those of ``plan`` already.

        Raises:
            MemoryError, RuntimeError: what torch raised; the weights are as they were before the
                call.
        """
        if not (plan.terms or self.plan.terms):
            return
        writes = self._changes(plan)
        if not writes and not after_failure:
            # The same terms at every site, under another plan: nothing to write, nothing to note.
            self.plan = plan
            return
        before = self.plan
        # A base may be spread over several devices.
        devices = {write.target(write.site.weight_name).device for write in writes}
        launched = {device for device in devices if usable(device)}
        with exact_mode(*devices):
            sources = self._sources(writes)
            begun: list[_SiteWrite] = []
            done: list[_SiteWrite] = []
            # In place, a launch reads what the last switch left, and the copies that it is known by
            # do not exist.
            kept_for = plan if plan.fixed and not self._in_place else None
            try:
                self._write(writes, sources, launched, begun, done, kept_for)
                self.plan = plan
            except BaseException:
                self.plan = before
                # With pristine any weight can be written anew, half-written ones too. In place,
                # what is half written can't be taken back, and what was not begun must not be.
                undone = done if self._in_place else begun
                back = [write.undone() for write in reversed(undone)]
                # All of them: the writes that were not begun count as written since `_sources`.
                self._sources([write.undone() for write in writes])
                self._write(back, sources, launched, [], [], None)
                raise
            finally:
                if not self._in_place:
                    self.pristine.look()
            self.pristine.settle()

    def restore(self) -> None:
        """Put the base's own values back over any numbers that its weights hold now.

        Raises:
            StateError: no copies were kept.
            ForeignWrite: a module was replaced or resized, and its copy fits no more; nothing was
                written.
        """
        if self._in_place and self.plan.terms:
            raise StateError(
                'pristine="none" kept no copies to put back',
                'model.trust("weights") takes the weights as they are now for the base, or load '
                "the base again",
            )
        self.pristine.restore(self._replaced())
        # Their addresses are those of copies that are gone now.
        self._launches.forget()
        self.plan = EMPTY_PLAN

    def forget(self) -> None:
        """Take the weights as they are now for the base's own."""
        self.pristine.forget()
        self._launches.forget()
        self.plan = EMPTY_PLAN

    # ------------------------------------------------------------------ what changes
    def _replaced(self) -> list[str]:
        """Return the merged weights whose module the base does not have any more, as it was."""
        found = []
        for site in self.plan.sites.values():
            if not site.is_in(self._base):
                found.append(f"{site.module_name}.{site.weight_name}")
        return found

    def _changes(self, plan: Plan) -> list[_SiteWrite]:
        """Return the sites whose terms differ from those that are written now, in the order in
        which to write them.
        """
        old = self.plan
        bare: list[_SiteWrite] = []
        merged: list[_SiteWrite] = []
        for name in sorted({*old.sites, *plan.sites}):
            now, then = plan.terms.get(name, ()), old.terms.get(name, ())
            instead, before = plan.overrides.get(name, ()), old.overrides.get(name, ())
            if _same_terms(now, then) and _same_overrides(instead, before):
                continue
            site = plan.sites.get(name) or old.sites[name]
            tensors = []
            if now or then:
                tensors.append(site.weight_name)
            if name in plan.biased or name in old.biased:
                tensors.append(site.bias_name)
            for override in (*instead, *before):
                if override.attribute not in tensors:
                    tensors.append(override.attribute)
            write = _SiteWrite(site, tensors, now, then, instead, before)
            (merged if now or instead else bare).append(write)
        # Sites that go bare come first: the new plan may write the same weight under another name.
        return [*bare, *merged]

    def _sources(self, writes: Sequence[_SiteWrite]) -> dict[tuple[int, str], Source]:
        """Return what each weight or bias is computed from, by (id of module, name), before the
        first write.
        """
        if self._in_place:
            sources: dict[tuple[int, str], Source] = {}
            for write in writes:
                for name in write.tensors:
                    sources[id(write.site.module), name] = write.target(name).detach()
            return sources
        wanted = []
        for write in writes:
            site = write.site
            for name in write.tensors:
                summed = name == site.weight_name and not (write.instead or write.before)
                wanted.append(Wanted(site.module_name, site, name, write.is_merged, summed))
        return self.pristine.begin(wanted)

    # ------------------------------------------------------------------ the only writer of weights
    def _write(
        self,
        writes: Sequence[_SiteWrite],
        sources: Mapping[tuple[int, str], Source],
        launched: set[torch.device],
        begun: list[_SiteWrite],
        done: list[_SiteWrite],
        plan: Plan | None,
    ) -> None:
        """Write some sites' weights and biases.

        Args:
            writes: in the order in which they are written.
            sources: what each weight or bias is computed from.
            launched: the devices on which a kernel writes all weights in one launch.
            begun: gets every write before anything of it is written.
            done: gets every write when it is written.
            plan: what the writes make of the base, if a launch may be kept for it.
        """
        merged: list[_SiteWrite] = []
        bare: list[_SiteWrite] = []
        for write in writes:
            (merged if write.is_merged or self._in_place else bare).append(write)
        if launched:
            bare = self._write_logs(bare, sources, begun, done)
        for write in bare:
            begun.append(write)
            for name in write.tensors:
                self._write_now(write, name, sources)
            done.append(write)
        if launched:
            merged = self._write_logs(merged, sources, begun, done)
            merged = self._launch(merged, sources, launched, begun, done, plan)
        for write in merged:
            begun.append(write)
            for name in write.tensors:
                self._write_now(write, name, sources)
            done.append(write)

    def _write_logs(
        self,
        writes: Sequence[_SiteWrite],
        sources: Mapping[tuple[int, str], Source],
        begun: list[_SiteWrite],
        done: list[_SiteWrite],
    ) -> list[_SiteWrite]:
        """Write the weights whose logs a kernel writes, together; return the other writes."""
        others: list[_SiteWrite] = []
        mine: list[_SiteWrite] = []
        logged: list[LogWrite] = []
        for write in writes:
            name = write.site.weight_name
            log = sources.get((id(write.site.module), name))
            if name not in write.tensors or not isinstance(log, TileLog):
                others.append(write)
                continue
            target = write.target(name)
            values = [term.scaled.to(device=target.device) for term in write.new]
            logged.append(LogWrite(log, target, values))
            mine.append(write)
        begun += mine
        write_logs(logged, self._scratch)
        if logged:
            # Autograd does not see a kernel's write: a backward that saved a weight must be told.
            torch.autograd.graph.increment_version([each.weight for each in logged])
        for write in mine:
            for name in write.tensors:
                if name != write.site.weight_name:
                    self._write_now(write, name, sources)
        done += mine
        return others

    def _launch(
        self,
        writes: Sequence[_SiteWrite],
        sources: Mapping[tuple[int, str], Source],
        launched: set[torch.device],
        begun: list[_SiteWrite],
        done: list[_SiteWrite],
        plan: Plan | None,
    ) -> list[_SiteWrite]:
        """Write the weights that a kernel covers in one launch; return the writes that it does not
        cover.
        """
        sites = [write.site for write in writes]
        known = None if plan is None else self._launches.find(plan, sites, self.pristine.number)
        parts: dict[str, MergePart] = {}
        targets: list[Tensor] = []
        mine: list[_SiteWrite] = []
        others: list[_SiteWrite] = []
        keeps = plan is not None
        for write in writes:
            site, weight = write.site, write.site.weight_name
            # No kernel writes an override; a weight without increments is a copy.
            if not write.new or weight not in write.tensors:
                others.append(write)
                continue
            target, source = write.target(weight), sources[id(write.site.module), weight]
            if target.device not in launched or isinstance(source, UndoLog):
                others.append(write)
                continue
            if known is None:
                # An override is written into the weight first, and the launch reads it there.
                read = target if write.ground(weight) else source
                found = part_of(site, target, read, self._terms(write))
                if found is None:
                    others.append(write)
                    continue
                parts[site.name] = found[0]
                # Factors that had to be copied for the launch live as long as this switch.
                keeps = keeps and not found[1]
            elif site.name not in known.addresses:
                others.append(write)
                continue
            begun.append(write)
            if write.ground(weight):
                write.lay_ground(weight, target, source)
            elif source.device != target.device:
                target.copy_(source, non_blocking=True)  # the launch reads it there
            for name in write.tensors:
                if name != weight:  # no kernel writes a bias
                    self._write_now(write, name, sources)
            targets.append(target)
            mine.append(write)
        if not targets:
            return others
        if known is None:
            addresses = {name: part.weight.data_ptr() for name, part in parts.items()}
            places = () if plan is None else plan.places()
            known = KeptLaunch(merge_launch(list(parts.values())), addresses, places)
            if keeps and plan is not None:
                self._launches.keep(plan, sites, known)
        known.launch.run()
        # Autograd does not see a kernel's write: a backward that saved this weight must be told.
        torch.autograd.graph.increment_version(targets)
        done += mine
        return others

    def _write_now(
        self, write: _SiteWrite, name: str, sources: Mapping[tuple[int, str], Source]
    ) -> None:
        """Write a site's weight or bias with stock operations, on its device."""
        target, source = write.target(name), sources[id(write.site.module), name]
        if isinstance(source, UndoLog):
            here = [term.scaled.to(device=target.device) for term in write.new]
            source.write(target, here, self._scratch)
            return
        if write.ground(name):
            source = write.lay_ground(name, target, source)
        if name not in (write.site.weight_name, write.site.bias_name):
            # A tensor that takes no increment is its override, or the base's own.
            if source is not target:
                target.copy_(source, non_blocking=True)
            return
        values = [term.scaled for term in write.new]
        if self._in_place:
            # There is no copy to begin from: the terms of before are taken back in the same sum.
            values += [term.value.scaled(-term.coefficient) for term in write.old]
        for i, value in enumerate(values):
            if value.A.device != target.device:
                values[i] = value.to(device=target.device)
        is_logged = self._logs
        if self.pristine.has_logged:
            is_logged = is_logged or self.pristine.is_logged(write.site.module, name)
        summed = values and name == write.site.weight_name
        if is_logged and summed and can_log(write.site, target):
            # A weight whose log became too large, or that was overridden, keeps the log's bits.
            add_in_blocks(write.site, target, source, values, self._scratch)
        else:
            _add(write.site, target, source, values, self._scratch)

    def _terms(self, write: _SiteWrite) -> list[tuple[LowRank, float]]:
        """Return values and their coefficients; in place, what was written before is taken back
        too.
        """
        terms = [(term.value, term.coefficient) for term in write.new]
        if self._in_place:
            terms += [(term.value, -term.coefficient) for term in write.old]
        return terms


@dataclass(frozen=True, eq=False)
class _SiteWrite:
    """One site's part of a switch.

    Args:
        site: the site.
        tensors: the names of what it writes: the weight, and the bias if a term has one or had.
        new: the terms that are written.
        old: the terms that were written before.
        instead: the overrides to which they are added.
        before: the overrides that were written before.
    """

    site: Site
    tensors: list[str]
    new: Terms
    old: Terms
    instead: OverrideTerms = ()
    before: OverrideTerms = ()

    @property
    def is_merged(self) -> bool:
        """Whether the site is another than the base's own after it."""
        return bool(self.new or self.instead)

    def ground(self, name: str) -> OverrideTerms:
        """Return the overrides of one of the tensors, in the order in which they are applied."""
        return tuple([override for override in self.instead if override.attribute == name])

    def lay_ground(self, name: str, target: Tensor, source: Tensor) -> Tensor:
        """Write the overrides of a tensor into it; return the tensor, to which terms are added.

        They are rounded to its dtype, as the base's own numbers were when it was loaded.
        """
        ground = self.ground(name)
        if ground[0].value.rows is not None:
            target.copy_(source, non_blocking=True)  # the other rows are the base's own
        for override in ground:
            override.value.write(target)
        return target

    def target(self, name: str) -> Tensor:
        """Return the weight or bias as the module shows it now."""
        tensor: Tensor = getattr(self.site.module, name)
        return tensor

    def undone(self) -> _SiteWrite:
        """Return the write that takes this one back."""
        return _SiteWrite(self.site, self.tensors, self.old, self.new, self.before, self.instead)


def _same_terms(x: Terms, y: Terms) -> bool:
    """Return whether two sites' terms write the same bits: the same values and coefficients."""
    if len(x) != len(y):
        return False
    # Values by identity: their factors are never written to, or else their version moves. A loop,
    # because this is asked of every site at every switch.
    for a, b in zip(x, y, strict=True):
        if a.value is not b.value or a.coefficient != b.coefficient or a.version != b.version:
            return False
    return True


def _same_overrides(x: OverrideTerms, y: OverrideTerms) -> bool:
    """Return whether two sites' overrides write the same bits."""
    if len(x) != len(y):
        return False
    for a, b in zip(x, y, strict=True):
        if a.value is not b.value or a.attribute != b.attribute or a.version != b.version:
            return False
    return True


def _add(
    site: Site, target: Tensor, source: Tensor, values: list[LowRank], scratch: Scratch
) -> None:
    """``target ← round_once(source + Σ values)``, for a site's weight or its bias."""
    if not values:
        # The base's own numbers go back. From pinned memory the host need not wait.
        target.copy_(source, non_blocking=True)
    elif target is getattr(site.module, site.bias_name, None):
        add_bias(target, source, values)
    else:
        add_weight(site, target, source, values, scratch)
