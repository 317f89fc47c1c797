"""TileLog: an undo log that a kernel reads and writes, many weights in a launch.

    log.write      one weight
    write_logs     the weights of a switch, in place: one launch for all of one kind
    LaidPlans      the terms of the last plans as the kernel takes them, kept with the plans

Each tile has a state: the number of the terms that are in it. So a switch that was cut off
half-way, or in which a tile has no room for its exceptions, can be taken back tile by tile. Then
the log gets more room. Terms that the kernel does not cover are logged by the base class, with
stock operations.

The codes take 1/8 of a 16-bit weight, and the exceptions that tiles have room for at first 2 %.
While nothing is merged, a log takes no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ...lowrank import LowRank
from ...sites import Site
from ..arithmetic import Scratch
from ..kernels import (
    BARE,
    NO_TERMS,
    SHARE,
    LaidTerms,
    LogLaunch,
    LogMemory,
    LogPart,
    lay_terms,
    log_height,
    log_launch,
    logs,
)
from ..plan import Plan, Terms
from .launches import part_of
from .undo_log import UndoLog, unshared

__all__ = ["LaidPlans", "LogWrite", "TileLog", "write_logs"]

KEPT = 8
"""Launches of one plan: each begins from what another plan left, in one of two states."""

GROWTH = 4
"""The factor by which the room of a tile grows when it is too small."""


class TileLog(UndoLog):
    """The log of one site's weight, on a device where the kernel runs.

    Args:
        site: the site.
        weight: its weight, which holds the base's own numbers now.
    """

    def __init__(self, site: Site, weight: Tensor) -> None:
        super().__init__(site, weight)
        # The terms of the states that tiles may be in, beside `BARE`.
        self._states: dict[int, LaidTerms] = {}
        self._memory: LogMemory | None = None
        self.is_cut_off = False
        """True: tiles may be in different states, because a launch failed or found no room."""

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the room for exceptions."""
        return super().nbytes + (self._memory.nbytes if self._memory is not None else 0)

    def write(self, weight: Tensor, values: Sequence[LowRank], scratch: Scratch) -> None:
        """``weight ← round_once(W0 + Σ values)``, in place; no values: W0."""
        laid, _ = _laid(self, weight, values)
        write_logs([LogWrite(self, weight, values, laid)], scratch)

    def write_stock(self, weight: Tensor, values: Sequence[LowRank], scratch: Scratch) -> None:
        """Do the same with stock operations; the kernel's terms have been taken out before."""
        super().write(weight, values, scratch)

    def own(self, weight: Tensor) -> Tensor:
        """Return the base's own numbers, as a tensor of the weight's shape."""
        if self._memory is None:
            return super().own(weight)
        found = weight.detach().to(self._device, copy=True)
        # Taking terms out changes the states in the memory, and nothing else there.
        memory = replace(self._memory, states=self._memory.states.clone())
        for state, terms in self._states.items():
            part = LogPart(self.site.rows(found), memory, terms, NO_TERMS, (state, BARE))
            log_launch([part]).run()
        return found.to(weight.device)

    # ------------------------------------------------------------------ for `write_logs`
    def layout(self) -> object:
        """Return the layout of the weight's terms (`LaidTerms.layout`); None if there are none."""
        for terms in self._states.values():
            return terms.layout
        return None

    def restore_moved(self, weight: Tensor, scratch: Scratch) -> None:
        """Take the terms out of a weight that was moved to another device. They are computed on the
        device where they were put in, so that their bits are the same.
        """
        if weight.device == self._device:
            return
        if self._memory is not None:
            weight.copy_(self.own(weight))
            self._cleared()
        self.write_stock(weight, (), scratch)

    def parts_out(self, weight: Tensor) -> list[LogPart]:
        """Return the parts that take out all terms."""
        if self._memory is None:
            return []
        rows, memory = self.site.rows(weight), self._memory
        return [LogPart(rows, memory, old, NO_TERMS, (n, BARE)) for n, old in self._states.items()]

    def part_in(self, write: LogWrite, share: int) -> LogPart:
        """Return the part that puts terms in the place of those that are in the weight.

        Args:
            write: the terms, in the layout of the old ones; not empty.
            share: a tile has room for one exception in ``share`` numbers, at least.
        """
        new = write.laid
        assert new is not None
        assert new.layout is not None
        rows = self.site.rows(write.weight)
        memory = self._memory
        if memory is None:
            memory = LogMemory.of(rows, log_height(new.layout[0]), share=share)
        ((state, old),) = self._states.items() or [(BARE, NO_TERMS)]
        # States alternate between two numbers, so that a launch between two plans can be run again.
        after = 2 if state == 1 else 1
        self._memory = memory
        self.begin(after, new)
        return LogPart(rows, memory, old, new, (state, after))

    def begin(self, after: int, new: LaidTerms) -> None:
        """Note that a tile may be in the old or the new state: the launch that follows may fail."""
        self.is_cut_off = True
        self._states = {**self._states, after: new}

    def holds(self, memory: LogMemory | None, state: int, terms: LaidTerms | None) -> bool:
        """Return whether all tiles hold these terms, by this state in this memory."""
        if memory is None or self._memory is not memory or self.is_cut_off:
            return False
        return len(self._states) == 1 and self._states.get(state) is terms

    def settled(self, state: int) -> None:
        """Note that all tiles are in one state now."""
        if state == BARE:
            self._cleared()
        else:
            self._states, self.is_cut_off = {state: self._states[state]}, False

    def _cleared(self) -> None:
        self._states, self._memory, self.is_cut_off = {}, None, False


Where: TypeAlias = tuple[str, int, torch.dtype]
"""(site name, address of its weight, dtype of its weight)."""


@dataclass(frozen=True, eq=False)
class LogWrite:
    """``weight ← round_once(W0 + Σ values)`` by a log.

    Args:
        log: the weight's.
        weight: what is written.
        values: on the weight's device; read only if the kernel does not cover them.
        laid: the values as the kernel takes them; None if it does not cover them.
    """

    log: TileLog
    weight: Tensor
    values: Sequence[LowRank]
    laid: LaidTerms | None

    @staticmethod
    def of(
        log: TileLog,
        weight: Tensor,
        terms: Terms,
        known: dict[Where, LaidTerms],
    ) -> LogWrite:
        """Return the write of a plan's terms, which are laid out if they are not known.

        Args:
            log: the weight's.
            weight: what is written.
            terms: of the site, on any device; none: W0.
            known: the terms of a plan that were laid out before; gets these.
        """
        where = log.site.name, weight.data_ptr(), weight.dtype
        laid = known.get(where)
        if laid is not None:
            return LogWrite(log, weight, (), laid)
        values = [term.scaled for term in terms]
        laid, is_copied = _laid(log, weight, values)
        if laid is None:
            moved = [value.to(device=weight.device) for value in values]
            return LogWrite(log, weight, moved, None)
        # Factors that were copied live only as long as they are merged.
        if not is_copied:
            known[where] = laid
        return LogWrite(log, weight, (), laid)


def _laid(log: TileLog, weight: Tensor, values: Sequence[LowRank]) -> tuple[LaidTerms | None, bool]:
    """Return values as the kernel takes them, and whether any factor was copied for that.

    None if the kernel does not cover them.
    """
    if not values:
        return NO_TERMS, False
    if not logs(weight.device):
        return None, False
    alone = [unshared(value) for value in values]
    part_and_copied = part_of(log.site, weight, weight, [(value, 1.0) for value in alone])
    if part_and_copied is None:
        return None, False
    part, is_copied = part_and_copied
    for before, after in zip(values, alone, strict=True):
        is_copied = is_copied or before is not after
    return lay_terms(part.terms, len(part.weight)), is_copied


class LaidPlans:
    """The terms and launches of the last plans, laid out for the kernel.

    Reading the addresses and the layout of a plan's factors takes longer than the switch itself, so
    it is done once. A launch from one plan to another is run again as long as nothing has moved.
    """

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[Plan, LaidPlan] = weakref.WeakKeyDictionary()

    def of(self, plan: Plan | None) -> LaidPlan:
        """Return what was laid out for a plan, to which more may be added.

        Args:
            plan: the plan; None if nothing is to be kept.
        """
        if plan is None:
            return LaidPlan(())
        places = plan.places()
        found = self._of.get(plan)
        # An adapter that was evicted and sent again may have another address.
        if found is None or found.places != places:
            found = self._of[plan] = LaidPlan(places)
        return found


class LaidPlan:
    """The terms and launches of one plan.

    Args:
        places: the addresses of the plan's buffers when this was made; see `Plan.places`.
    """

    def __init__(self, places: tuple[int, ...]) -> None:
        self.places = places
        self.terms: dict[Where, LaidTerms] = {}
        """The terms of its sites that were written so far."""
        self._launches: list[_KeptLogLaunch] = []

    def find(self, writes: Sequence[LogWrite]) -> _KeptLogLaunch | None:
        """Return the launch that makes some writes from what their logs hold now; None if it is not
        known.
        """
        for known in self._launches:
            if len(known.parts) == len(writes) and all(map(_KeptPart.fits, known.parts, writes)):
                return known
        return None

    def keep(self, launch: LogLaunch, parts: Sequence[LogPart], writes: Sequence[LogWrite]) -> None:
        """Keep a launch for `find`; the oldest ones are dropped."""
        known = {id(laid) for laid in self.terms.values()}
        for part in parts:
            # Not if it reads factors that were copied, which live only as long as they are merged,
            # or begins from a bare weight, whose log has no memory to find again.
            if id(part.new) not in known or not part.old.terms:
                return
        kept = [_KeptPart.of(part, write) for part, write in zip(parts, writes, strict=True)]
        self._launches = [*self._launches[1 - KEPT :], _KeptLogLaunch(launch, kept)]


@dataclass(frozen=True, eq=False)
class _KeptLogLaunch:
    """A launch from one plan to another, and what has to be as it was for it to be run again."""

    launch: LogLaunch
    parts: Sequence[_KeptPart]

    def run(self, writes: Sequence[LogWrite]) -> list[LogWrite]:
        """Make the writes; return those that had tiles without room."""
        for part, write in zip(self.parts, writes, strict=True):
            write.log.begin(part.after, part.new)
        short = self.launch.run()
        again = []
        for part, write, is_short in zip(self.parts, writes, short, strict=True):
            if is_short:
                again.append(write)
            else:
                write.log.settled(part.after)
        return again


@dataclass(frozen=True, eq=False)
class _KeptPart:
    """A weight's part of a kept launch.

    It keeps nothing alive: neither a log's memory, nor the factors of the plan before.
    """

    memory: weakref.ref[LogMemory]
    before: int
    old: weakref.ref[LaidTerms]
    after: int
    new: LaidTerms
    address: int

    @staticmethod
    def of(part: LogPart, write: LogWrite) -> _KeptPart:
        address = write.weight.data_ptr()
        memory, old = weakref.ref(part.memory), weakref.ref(part.old)
        before, after = part.states
        return _KeptPart(memory, before, old, after, part.new, address)

    def fits(self, write: LogWrite) -> bool:
        if write.laid is not self.new or write.weight.data_ptr() != self.address:
            return False
        return write.log.holds(self.memory(), self.before, self.old())


def write_logs(writes: Sequence[LogWrite], scratch: Scratch, plan: LaidPlan | None = None) -> None:
    """Write many weights, in place.

    If this fails half-way, the logs know what each weight holds, so it can be called again, with
    other values too.

    Args:
        writes: no weight twice.
        scratch: buffers for weights that the kernel does not cover.
        plan: what was laid out for the plan that is written; a new launch is kept there.
    """
    known = None if plan is None else plan.find(writes)
    if known is not None:
        pending, share = known.run(writes), SHARE // GROWTH
        _restore_weights(pending)
    else:
        pending, share = _prepare_writes(writes, scratch), SHARE
    while pending:
        parts = [write.log.part_in(write, share) for write in pending]
        launch = log_launch(parts)
        if plan is not None and len(parts) == len(writes):
            plan.keep(launch, parts, writes)
        again = []
        for write, part, is_short in zip(pending, parts, launch.run(), strict=True):
            if is_short:
                again.append(write)
            else:
                write.log.settled(part.states[1])
        _restore_weights(again)
        pending, share = again, max(share // GROWTH, 1)


def _prepare_writes(writes: Sequence[LogWrite], scratch: Scratch) -> list[LogWrite]:
    """Prepare weights for a kernel that puts new terms in; write those that it does not cover, and
    return the other writes.
    """
    stock: list[LogWrite] = []
    pending: list[LogWrite] = []
    out: list[LogWrite] = []
    for write in writes:
        log, new = write.log, write.laid
        log.restore_moved(write.weight, scratch)
        if not log.is_bare:
            log.write_stock(write.weight, (), scratch)
        if new is None or not new.terms:
            out.append(write)
            if new is None:
                stock.append(write)
            continue
        pending.append(write)
        # A kernel takes old and new terms of one layout only. Old terms of another one are taken
        # out first.
        if log.is_cut_off or log.layout() not in (None, new.layout):
            out.append(write)
    _restore_weights(out)
    for write in stock:
        write.log.write_stock(write.weight, write.values, scratch)
    return pending


def _restore_weights(writes: Sequence[LogWrite]) -> None:
    """Bring weights back to their own numbers, and drop the memory of their logs."""
    # A weight that was cut off has two parts, each for the tiles in one state.
    for turn in range(2):
        parts = [write.log.parts_out(write.weight)[turn : turn + 1] for write in writes]
        now = [part for found in parts for part in found]
        if now:
            log_launch(now).run()
    for write in writes:
        write.log.settled(BARE)
