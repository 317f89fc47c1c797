"""TileLog: an undo log that a kernel reads and writes, many weights in a launch.

    log.write      one weight
    write_logs     those of a switch: one launch for all that lie alike, in place

A tile knows which terms it has in it, by a number, so that a switch that was cut off half-way, or
in which a tile has no room for its exceptions, is taken back tile by tile. Then the log gets more
room. Terms that the kernel does not cover take the log of stock operations, which this one is too.

The memory is 1/8 of a 16-bit weight for the codes, and 1.6 % for the exceptions that
tiles have room for at first. While nothing is merged there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..lowrank import LowRank
from ..sites import Site
from .arithmetic import Scratch
from .kernels import (
    BARE,
    SHARE,
    LogMemory,
    LogPart,
    MergeTerm,
    lie_of,
    log_height,
    logs,
    rewrite_logs,
)
from .launches import part_of
from .undo_log import UndoLog, unshared

__all__ = ["LogWrite", "TileLog", "write_logs"]

GROWTH = 4
"""How many times the room of a tile grows when it is too little."""


class TileLog(UndoLog):
    """The log of one site's weight, on a device where the kernel runs.

    Args:
        site: the site.
        weight: its weight, which holds the base's own numbers now.
    """

    def __init__(self, site: Site, weight: Tensor) -> None:
        super().__init__(site, weight)
        # The terms of the states that tiles may be in, beside `BARE`.
        self._states: dict[int, Sequence[MergeTerm]] = {}
        self._memory: LogMemory | None = None
        self._last_state = BARE
        self.is_cut_off = False
        """Tiles may be in different states, because a launch failed or found no room."""

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the room for exceptions."""
        return super().nbytes + (self._memory.nbytes if self._memory is not None else 0)

    def write(self, weight: Tensor, values: Sequence[LowRank], scratch: Scratch) -> None:
        """``weight ← round_once(W0 + Σ values)``, in place; no values: W0."""
        write_logs([LogWrite(self, weight, values)], scratch)

    def write_stock(self, weight: Tensor, values: Sequence[LowRank], scratch: Scratch) -> None:
        """Do the same with stock operations; nothing that the kernel wrote is in the weight."""
        super().write(weight, values, scratch)

    def own(self, weight: Tensor) -> Tensor:
        """Return the base's own numbers, as a tensor of the weight's shape."""
        if self._memory is None:
            return super().own(weight)
        found = weight.detach().to(self._device, copy=True)
        # The states are the only thing that changes on the way to the base's own numbers.
        memory = replace(self._memory, states=self._memory.states.clone())
        for state, terms in self._states.items():
            rewrite_logs([LogPart(self.site.rows(found), memory, terms, (), (state, BARE))])
        return found.to(weight.device)

    # ------------------------------------------------------------------ for `write_logs`
    def lie(self) -> object:
        """Return how the terms lie that are in the weight; None if there are none."""
        for terms in self._states.values():
            return lie_of(terms)
        return None

    def come_home(self, weight: Tensor, scratch: Scratch) -> None:
        """Take the terms out of a weight that was moved to another device, on the device where they
        were put in.
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
        return [LogPart(rows, memory, old, (), (n, BARE)) for n, old in self._states.items()]

    def part_in(self, weight: Tensor, new: Sequence[MergeTerm], share: int) -> LogPart:
        """Return the part that puts terms in the place of those that are in the weight.

        Args:
            weight: the weight.
            new: the terms, which lie as the old ones do; not empty.
            share: a tile has room for one exception in so many numbers, at least.
        """
        rows = self.site.rows(weight)
        memory = self._memory
        if memory is None:
            memory = LogMemory.of(rows, log_height(new), share=share)
        ((state, old),) = self._states.items() or [(BARE, ())]
        self._last_state += 1
        # Noted before the launch: if that is cut off, tiles are in either state.
        self._memory, self.is_cut_off = memory, True
        self._states = {**self._states, self._last_state: new}
        return LogPart(rows, memory, old, new, (state, self._last_state))

    def settled(self, state: int) -> None:
        """Note that all tiles are in one state now."""
        if state == BARE:
            self._cleared()
        else:
            self._states, self.is_cut_off = {state: self._states[state]}, False

    def _cleared(self) -> None:
        self._states, self._memory, self.is_cut_off = {}, None, False


@dataclass(frozen=True, eq=False)
class LogWrite:
    """``weight ← round_once(W0 + Σ values)`` by a log.

    Args:
        log: the weight's.
        weight: what is written.
        values: on the weight's device; none: W0.
    """

    log: TileLog
    weight: Tensor
    values: Sequence[LowRank]

    def terms(self) -> Sequence[MergeTerm] | None:
        """Return the values as the kernel takes them; None if it does not cover them."""
        values = [unshared(value) for value in self.values]
        if not values:
            return ()
        if not logs(self.weight.device):
            return None
        coefficients = [(value, 1.0) for value in values]
        found = part_of(self.log.site, self.weight, self.weight, coefficients)
        return None if found is None else found[0].terms


def write_logs(writes: Sequence[LogWrite], scratch: Scratch) -> None:
    """Write many weights, in place.

    If this fails half-way, calling it again with other values finds every weight as it is.

    Args:
        writes: no weight twice.
        scratch: buffers for weights that the kernel does not cover.
    """
    stock: list[LogWrite] = []
    pending: list[tuple[LogWrite, Sequence[MergeTerm]]] = []
    out: list[LogWrite] = []
    for write in writes:
        log, new = write.log, write.terms()
        log.come_home(write.weight, scratch)
        if new is None:
            stock.append(write)
        elif new:
            pending.append((write, new))
        if not log.is_bare:
            log.write_stock(write.weight, (), scratch)
        # From terms that lie otherwise there is no way but by the base's own numbers.
        if not new or log.is_cut_off or log.lie() not in (None, lie_of(new)):
            out.append(write)
    _take_out(out)
    for write in stock:
        write.log.write_stock(write.weight, write.values, scratch)
    share = SHARE
    while pending:
        parts = [write.log.part_in(write.weight, new, share) for write, new in pending]
        short = rewrite_logs(parts)
        again = []
        for (write, new), part, is_short in zip(pending, parts, short, strict=True):
            if is_short:
                again.append((write, new))
            else:
                write.log.settled(part.states[1])
        _take_out([write for write, _ in again])
        pending, share = again, max(share // GROWTH, 1)


def _take_out(writes: Sequence[LogWrite]) -> None:
    """Bring weights back to their own numbers, and drop the memory of their logs."""
    # A weight that was cut off has two parts, each for the tiles in one state.
    for turn in range(2):
        parts = [write.log.parts_out(write.weight)[turn : turn + 1] for write in writes]
        now = [part for found in parts for part in found]
        if now:
            rewrite_logs(now)
    for write in writes:
        write.log.settled(BARE)
