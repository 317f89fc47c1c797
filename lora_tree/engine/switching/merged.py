"""Merged: a path written into the weights, each from pristine or from what overrides it, each
rounded once, and only where the plan changed.

    changed sites ─→ keep pristine of all ─→ write all ─→ on any failure, write the old ones again

`mergeable.py` has checked the plan before. Addresses stay what they were, no hook is left, and the
forward is the plain base's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ...errors import StateError
from ...lowrank import LowRank
from ...sites import Site
from ..arithmetic import Scratch, add_bias, add_weight, exact_mode
from ..kernels import MergePart, merge_launch, usable
from ..plan import EMPTY_PLAN, OverrideTerms, Plan
from .copy_place import CopyPlace
from .launches import KeptLaunch, Launches, part_of
from .mergeable import Mergeable
from .pristine import Pristine, Source
from .switches import KeptSwitches, SiteWrite, Switch, Writes
from .tile_log import LaidPlans, LogWrite, TileLog, write_logs
from .undo_log import UndoLog, add_in_blocks, can_log

__all__ = ["MergedWeights"]


class MergedWeights:
    """The plan that is written into a base's weights, and the way back.

    Args:
        base: the model.
        place: where the base's own weights are kept; ``none``: nowhere, paths are added to and
            subtracted from the weights in place, which drifts with every switch.
    """

    def __init__(self, base: nn.Module, *, place: CopyPlace) -> None:
        self._base = base
        self._in_place = place == "none"
        self._logs = place == "log"
        self._scratch = Scratch()
        self._switches = KeptSwitches()
        self._launches = Launches()
        self._laid = LaidPlans()
        self.pristine = Pristine(place)
        self._begin: Callable[[Switch], Mapping[tuple[int, str], Source]]
        self._begin = _in_place if self._in_place else self.pristine.begin
        """Called before the first write of a switch; returns, by (id of module, name of its
        tensor), what brings the base's own numbers back.
        """
        self.mergeable = Mergeable(base, self.pristine, self._scratch)
        self.plan = EMPTY_PLAN

    def verify(self, plan: Plan) -> None:
        """Check, before the switch to ``plan``, that all writes since the last switch were ours.

        Args:
            plan: its sites were found in the base just now.

        Raises:
            ForeignWrite: other code wrote to a weight with a path merged into it; names it.
        """
        if plan.terms or self.plan.terms:
            self.pristine.verify(self._replaced(plan))

    def switch(self, plan: Plan, *, after_failure: bool = False) -> None:
        """Make the weights those of ``plan``; an empty plan is the bare base.

        Args:
            plan: what the weights become.
            after_failure: an earlier call failed. The state of the weights has to be noted again,
                even if they are those of ``plan`` already.

        Raises:
            MemoryError, RuntimeError: what torch raised; the weights are as they were before the
                call.
        """
        if not (plan.terms or self.plan.terms):
            return
        switch = self._switches.between(self.plan, plan)
        if not switch.all.site_writes and not after_failure:
            # The same terms at every site, under another plan: nothing to write, nothing to note.
            self.plan = plan
            return
        before = self.plan
        known = self._launch_of(plan, switch)
        if known is not None:
            devices = known.devices
        else:
            # A base may be spread over several devices.
            devices = frozenset([weight.device for weight in _weights(switch.all)])
        launched = {device for device in devices if usable(device)}
        with exact_mode(*devices):
            sources = self._begin(switch)
            begun: list[SiteWrite] = []
            done: list[SiteWrite] = []
            # In place, no launch is kept: it would read what the last switch left, and there are no
            # pristine copies whose number tells when it is stale.
            kept_for = plan if plan.fixed and not self._in_place else None
            try:
                if known is not None:
                    # The device waits for the host until here.
                    begun += switch.all.site_writes
                    known.launch.run()
                    increment_version(_weights(switch.all))
                else:
                    bare, merged = switch.bare, switch.merged
                    self._write(bare, merged, sources, launched, begun, done, kept_for)
                self.plan = plan
            except BaseException:
                self.plan = before
                # With pristine any weight can be written again, half-written ones too. In place, a
                # half-written one can't be taken back, and one that was not begun must not be.
                undone = done if self._in_place else begun
                back = Writes(tuple(reversed(undone))).undone()
                # The way back is begun for all writes: since `_begin`, those that were not begun
                # count as written too.
                self._begin(switch.undone())
                self._write(*back.apart(), sources, launched, [], [], None)
                raise
            finally:
                if not self._in_place:
                    self.pristine.look()
            if self.pristine.has_logged:
                self.pristine.settle()

    def restore(self) -> None:
        """Put the base's own values back over any numbers that its weights hold now.

        Raises:
            StateError: no copies were kept.
            ForeignWrite: a module was replaced or resized, and its copy no longer fits; nothing was
                written.
        """
        if self._in_place and self.plan.terms:
            raise StateError(
                'pristine="none" kept no copies to put back',
                'model.trust("weights") takes the weights as they are now for the base, or load '
                "the base again",
            )
        self.pristine.restore(self._replaced(EMPTY_PLAN))
        # Their addresses are those of copies that are gone now.
        self._launches.forget()
        self.plan = EMPTY_PLAN

    def forget(self) -> None:
        """Take the weights as they are now for the base's own."""
        self.pristine.forget()
        self._launches.forget()
        self.plan = EMPTY_PLAN

    # ------------------------------------------------------------------ what changes
    def _replaced(self, plan: Plan) -> list[str]:
        """Return the merged weights whose module was replaced in the base, or removed from it.

        Args:
            plan: one whose sites were found in the base just now.
        """
        if plan.sites and self._switches.between(self.plan, plan).keeps_sites:
            return []
        if self.plan.ways.dtypes(self._base) is not None:
            return []
        weight_names = []
        for site in self.plan.sites.values():
            if not site.is_in(self._base):
                weight_names.append(f"{site.module_name}.{site.weight_name}")
        return weight_names

    def _launch_of(self, plan: Plan, switch: Switch) -> KeptLaunch | None:
        """Return the launch that makes a whole switch; None if none was kept, or if the switch
        needs more than a launch.
        """
        # Where no kernel runs, no plan has a launch.
        if plan not in self._launches.plans or self.pristine.has_logged:
            return None
        if switch.bare.site_writes or not switch.merged.is_plain:
            return None
        known = self._launches.find(plan, switch.merged.names, self.pristine.number)
        if known is None or not known.is_whole:
            return None
        return known

    # ------------------------------------------------------------------ the only writer of weights
    def _write(
        self,
        bare: Writes,
        merged: Writes,
        sources: Mapping[tuple[int, str], Source],
        launched: set[torch.device],
        begun: list[SiteWrite],
        done: list[SiteWrite],
        plan: Plan | None,
    ) -> None:
        """Write some sites' weights and biases.

        Args:
            bare: the writes that make a site the base's own; they come first.
            merged: the others.
            sources: what each weight or bias is computed from.
            launched: the devices on which a kernel writes all weights in one launch.
            begun: gets every write before anything of it is written.
            done: gets every write when it is written.
            plan: the plan that is written, if launches may be kept for it; else None.
        """
        if self._in_place:
            # A site that becomes the base's own takes a sum there as well.
            bare, merged = Writes(()), Writes((*bare.site_writes, *merged.site_writes))
        if launched:
            bare = self._write_logs(bare, sources, begun, done, plan)
        self._write_one_by_one(bare, sources, begun, done)
        if launched:
            merged = self._write_logs(merged, sources, begun, done, plan)
            merged = self._launch(merged, sources, launched, begun, done, plan)
        self._write_one_by_one(merged, sources, begun, done)

    def _write_one_by_one(
        self,
        writes: Writes,
        sources: Mapping[tuple[int, str], Source],
        begun: list[SiteWrite],
        done: list[SiteWrite],
    ) -> None:
        """Write some sites one after the other, with stock operations."""
        for write in writes.site_writes:
            begun.append(write)
            for name in write.tensors:
                self._write_now(write, name, sources)
            done.append(write)

    def _write_logs(
        self,
        writes: Writes,
        sources: Mapping[tuple[int, str], Source],
        begun: list[SiteWrite],
        done: list[SiteWrite],
        plan: Plan | None,
    ) -> Writes:
        """Write the weights whose logs a kernel writes, together; return the other writes."""
        if not self.pristine.has_logged:
            return writes
        others: list[SiteWrite] = []
        log_writes: list[SiteWrite] = []
        logged: list[LogWrite] = []
        laid = self._laid.of(plan)
        for write in writes.site_writes:
            name = write.site.weight_name
            log = sources.get((id(write.site.module), name))
            if name not in write.tensors or not isinstance(log, TileLog):
                others.append(write)
                continue
            target = _target(write, name)
            logged.append(LogWrite.of(log, target, write.new, laid.terms))
            log_writes.append(write)
        begun += log_writes
        write_logs(logged, self._scratch, laid)
        if logged:
            # Autograd does not see a kernel's write: a backward that saved a weight must be told.
            increment_version([logged_write.weight for logged_write in logged])
        for write in log_writes:
            for name in write.tensors:
                if name != write.site.weight_name:
                    self._write_now(write, name, sources)
        done += log_writes
        return Writes(tuple(others))

    def _launch(
        self,
        writes: Writes,
        sources: Mapping[tuple[int, str], Source],
        launched: set[torch.device],
        begun: list[SiteWrite],
        done: list[SiteWrite],
        plan: Plan | None,
    ) -> Writes:
        """Write the weights that a kernel covers in one launch; return the writes that it does not
        cover.
        """
        known = None
        if plan is not None:
            known = self._launches.find(plan, writes.names, self.pristine.number)
        parts: dict[str, MergePart] = {}
        targets: list[Tensor] = []
        launched_writes: list[SiteWrite] = []
        others: list[SiteWrite] = []
        keeps = plan is not None
        is_whole = True
        for write in writes.site_writes:
            site, weight = write.site, write.site.weight_name
            # No kernel writes an override; a weight without increments is a copy.
            if not write.new or weight not in write.tensors:
                others.append(write)
                continue
            target, source = _target(write, weight), sources[id(write.site.module), weight]
            if target.device not in launched or isinstance(source, UndoLog):
                others.append(write)
                continue
            ground = _ground(write, weight)
            if known is None:
                # An override is written into the weight first, and the launch reads it there.
                read = target if ground else source
                part_and_copied = part_of(site, target, read, self._terms(write))
                if part_and_copied is None:
                    others.append(write)
                    continue
                parts[site.name], is_copied = part_and_copied
                # Factors that had to be copied for the launch live as long as this switch.
                keeps = keeps and not is_copied
            elif site.name not in known.covered:
                others.append(write)
                continue
            begun.append(write)
            if ground:
                _write_overrides(ground, target, source)
            elif source.device != target.device:
                target.copy_(source, non_blocking=True)  # the launch reads it there
                is_whole = False
            for name in write.tensors:
                if name != weight:  # no kernel writes a bias
                    self._write_now(write, name, sources)
            targets.append(target)
            launched_writes.append(write)
        if not targets:
            return Writes(tuple(others))
        if known is None:
            known = KeptLaunch(
                merge_launch(list(parts.values())),
                covered=frozenset(parts),
                devices=frozenset([target.device for target in targets]),
                is_whole=is_whole and not others,
                places=() if plan is None else plan.places(),
            )
            if keeps and plan is not None:
                self._launches.keep(plan, writes.names, known)
        known.launch.run()
        # Autograd does not see a kernel's write: a backward that saved this weight must be told.
        increment_version(targets)
        done += launched_writes
        return Writes(tuple(others))

    def _write_now(
        self, write: SiteWrite, name: str, sources: Mapping[tuple[int, str], Source]
    ) -> None:
        """Write a site's weight or bias with stock operations, on its device."""
        target, source = _target(write, name), sources[id(write.site.module), name]
        if isinstance(source, UndoLog):
            increments = [term.scaled.to(device=target.device) for term in write.new]
            source.write(target, increments, self._scratch)
            return
        ground = _ground(write, name)
        if ground:
            _write_overrides(ground, target, source)
            source = target
        if name not in (write.site.weight_name, write.site.bias_name):
            # A tensor that takes no increment is its override, or the base's own.
            if source is not target:
                target.copy_(source, non_blocking=True)
            return
        values = [term.scaled for term in write.new]
        if self._in_place:
            # There is no copy to begin from: the earlier terms are subtracted in the same sum.
            values += [term.value.scaled(-term.coefficient) for term in write.old]
        for i, value in enumerate(values):
            if value.A.device != target.device:
                values[i] = value.to(device=target.device)
        is_logged = self._logs
        if self.pristine.has_logged:
            is_logged = is_logged or self.pristine.is_logged(write.site.module, name)
        summed = values and name == write.site.weight_name
        if is_logged and summed and can_log(write.site, target):
            # This weight had a log, which became too large, or met an override. It still has to get
            # the bits that a log gives.
            add_in_blocks(write.site, target, source, values, self._scratch)
        else:
            _add(write.site, target, source, values, self._scratch)

    def _terms(self, write: SiteWrite) -> list[tuple[LowRank, float]]:
        """Return values and their coefficients; in place, the earlier terms' too, negated."""
        terms = [(term.value, term.coefficient) for term in write.new]
        if self._in_place:
            terms += [(term.value, -term.coefficient) for term in write.old]
        return terms


def _in_place(switch: Switch) -> Mapping[tuple[int, str], Source]:
    """Return what each tensor is computed from where no copies are kept: itself."""
    sources: dict[tuple[int, str], Source] = {}
    for write in switch.all.site_writes:
        for name in write.tensors:
            sources[id(write.site.module), name] = _target(write, name).detach()
    return sources


def _target(write: SiteWrite, name: str) -> Tensor:
    """Return a site's weight or bias as the module shows it now."""
    tensor: Tensor = getattr(write.site.module, name)
    return tensor


def _weights(writes: Writes) -> list[Tensor]:
    """Return the weights of some writes' sites, as the modules show them now."""
    found: list[Tensor] = []
    for write in writes.site_writes:
        # Nearly always a parameter, and getattr is slow on modules.
        weight = write.site.module._parameters.get(write.site.weight_name)
        found.append(_target(write, write.site.weight_name) if weight is None else weight)
    return found


def _ground(write: SiteWrite, name: str) -> OverrideTerms:
    """Return the overrides of one of the tensors, in the order in which they are applied."""
    if not write.instead:
        return ()
    return tuple([override for override in write.instead if override.attribute == name])


def _write_overrides(ground: OverrideTerms, target: Tensor, source: Tensor) -> None:
    """Write the overrides of a tensor into it; terms are added to that.

    They are rounded to its dtype, as the base's own numbers were when it was loaded.
    """
    if ground[0].value.rows is not None:
        target.copy_(source, non_blocking=True)  # the other rows are the base's own
    for override in ground:
        override.value.write(target)


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
