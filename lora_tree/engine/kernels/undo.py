"""Launch the kernel of undo logs: many weights rewritten in place, one launch for those of a kind.

    plans ─▶ laid terms (slots, sent once for a plan) ─┐
    weights, codes, exceptions, states ────────────────┼─▶ table of the parts ─▶ `undo_kernel.py`
    the logs' old and new terms ───────────────────────┘

Afterwards the flags are read back, in one wait: a tile with more exceptions than it has room for
was left as it was, and has set the flag of its part.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..upload import uploaded
from .log_part import BARE, NO_TERMS, WIDTH, LaidTerms, LogMemory, LogPart
from .merge import POLICY, RANKS, ROWS, SLOT_FIELDS, UNROLLED, add_slots, is_aligned, lay_out_parts
from .part import MergePart, MergeTerm, on
from .tiles import TYPES
from .undo_kernel import rewrite_logged

__all__ = ["LaidLogs", "is_exact_on", "lay_out_logs", "lay_out_terms", "rewrite"]

TILES = 16
"""Tiles, side by side in the same rows, that a program does one after the other."""

WARPS, STAGES = 4, 2

REGISTERS = 168
"""Registers of a thread, so that three programs share a multiprocessor: while one computes, the
others load.
"""

FIELDS = 15
"""Numbers that the table has for a part."""

INTEGERS = {2: tl.int16, 4: tl.int32}

COUNTERS = {torch.uint8: tl.uint8, torch.int16: tl.int16}


def lay_out_terms(terms: Sequence[MergeTerm], batch: int) -> LaidTerms:
    """Lay the terms of a weight out, for any number of switches.

    Args:
        terms: of one dtype and layout, in the order of the sum.
        batch: matrices of the weight.
    """
    if not terms:
        return NO_TERMS
    left, right = terms[0].left, terms[0].right
    turned = left.stride(-1) != 1 or right.stride(-1) != 1
    slots: list[int] = []
    ratios: list[float] = []
    scale = add_slots(terms, turned, batch, slots, ratios)
    aligned = True
    for term in terms:
        aligned = aligned and is_aligned(term.left, turned) and is_aligned(term.right, turned)
    layout = left.dtype, turned
    even = all(ratio == 1.0 for ratio in ratios)
    return LaidTerms(terms, tuple(slots), tuple(ratios), scale, layout, aligned, even)


class LaidLogs:
    """Parts laid out for the kernel, to be run when weights and logs are in the parts' old states.

    It holds addresses, and keeps no memory alive.

    Args:
        calls: for each kind of part, a function that launches the kernel, and takes the flags.
        order: the parts, as the calls take them.
        devices: of the calls.
    """

    def __init__(
        self,
        calls: Sequence[Callable[[Tensor], object]],
        order: Sequence[int],
        devices: Sequence[torch.device],
    ) -> None:
        self._calls, self._order, self._devices = calls, order, devices
        self._flags = {device: self._no_flags(device) for device in devices}

    def run(self) -> list[bool]:
        """Rewrite weights and their logs in place; return which parts had tiles without room.

        Those tiles are as they were. The host waits once for a device, for the flags of all parts.
        """
        for call, device in zip(self._calls, self._devices, strict=True):
            call(self._flags[device])
        short = [False] * len(self._order)
        for device, flags in self._flags.items():
            flag_values = flags.tolist()
            if any(flag_values):
                self._flags[device] = self._no_flags(device)
            for i, flag in zip(self._order, flag_values, strict=True):
                short[i] = short[i] or bool(flag)
        return short

    def _no_flags(self, device: torch.device) -> Tensor:
        return torch.zeros(len(self._order), dtype=torch.int32, device=device)


def lay_out_logs(parts: Sequence[LogPart], *, interpreted: bool = False) -> LaidLogs:
    """Lay parts out: one launch for all parts of one kind.

    Args:
        parts: in each, old and new terms have the same layout.
        interpreted: it runs in Triton's interpreter, which multiplies no bf16.
    """
    by_kind: dict[_Kind, list[int]] = {}
    for i, part in enumerate(parts):
        by_kind.setdefault(_Kind.of(part), []).append(i)
    # All memory is allocated before the first launch, so that running out of it changes nothing.
    calls = []
    order: list[int] = []
    for kind, group in by_kind.items():
        calls.append(_call(kind, [parts[i] for i in group], len(order), interpreted))
        order += group
    return LaidLogs(calls, order, [kind.device for kind in by_kind])


def rewrite(parts: Sequence[LogPart], *, interpreted: bool = False) -> list[bool]:
    """Lay parts out and run them; return which had tiles without room."""
    return lay_out_logs(parts, interpreted=interpreted).run()


class _Kind(NamedTuple):
    """The constants that a launch is compiled for; parts of one kind share a launch."""

    device: torch.device
    weight: torch.dtype
    factor: torch.dtype
    counter: torch.dtype
    turned: bool
    weights_aligned: bool
    factors_aligned: bool
    pairs: bool
    has_old: bool
    has_new: bool
    slots: int
    even: bool
    full: bool

    @staticmethod
    def of(part: LogPart) -> _Kind:
        weight, old, new = part.weight, part.old, part.new
        _, rows, cols = weight.shape
        layout = old.layout or new.layout
        assert layout is not None
        factor, turned = layout
        slots = max(len(old.ratios), len(new.ratios))
        return _Kind(
            device=weight.device,
            weight=weight.dtype,
            factor=factor,
            counter=part.memory.ends.dtype,
            turned=turned,
            weights_aligned=weight.data_ptr() % 16 == 0 and cols % 16 == 0,
            factors_aligned=old.aligned and new.aligned,
            pairs=weight.itemsize == 2 and cols % 2 == 0 and weight.data_ptr() % 4 == 0,
            has_old=bool(old.terms),
            has_new=bool(new.terms),
            slots=slots if slots <= UNROLLED else 0,
            even=old.even and new.even,
            full=rows % ROWS[factor] == 0 and cols % WIDTH == 0,
        )


def _call(
    kind: _Kind, parts: Sequence[LogPart], first_flag: int, interpreted: bool
) -> Callable[[Tensor], object]:
    """Return a function that launches the kernel over parts of one kind, and takes the flags.

    Args:
        kind: what they have in common.
        parts: the parts.
        first_flag: the place of their first flag.
        interpreted: it runs in Triton's interpreter.
    """
    table, length, programs = _table(parts, ROWS[kind.factor], kind.slots, kind.device)
    exact = kind.weight == torch.float32 or interpreted

    count = len(parts)

    # Everything that the launch needs is computed here, so that later switches just run it again.
    def call(flags: Tensor) -> None:
        with on(kind.device):
            rewrite_logged[(programs,)](
                table,
                flags,
                count,
                length,
                first_flag,
                WEIGHT=TYPES[kind.weight],
                INTEGER=INTEGERS[kind.weight.itemsize],
                COUNTER=COUNTERS[kind.counter],
                FACTOR=TYPES[kind.factor],
                TURNED=kind.turned,
                WEIGHTS_ALIGNED=kind.weights_aligned,
                FACTORS_ALIGNED=kind.factors_aligned,
                PAIRS=kind.pairs,
                HAS_OLD=kind.has_old,
                HAS_NEW=kind.has_new,
                SLOTS=kind.slots,
                EVEN=kind.even,
                FULL=kind.full,
                PRECISION="ieee" if exact else "tf32x3",
                WIDEN=interpreted,
                ROWS=ROWS[kind.factor],
                COLUMNS=WIDTH,
                RANKS=RANKS,
                TILES=TILES,
                STAGES=STAGES,
                POLICY=POLICY,
                FIELDS=FIELDS,
                SLOT_FIELDS=SLOT_FIELDS,
                num_warps=WARPS,
                maxnreg=REGISTERS,
            )

    return call


def _table(
    parts: Sequence[LogPart], height: int, unrolled: int, device: torch.device
) -> tuple[Tensor, int, int]:
    """Return the kernel's table on the device, how many integers it has, and how many programs
    there are.

    Args:
        parts: of one kind.
        height: rows of a tile.
        unrolled: the slots that each part's terms get in the table; 0: as many as they have.
    """
    starts: list[int] = []
    fields: list[int] = []
    slots: list[int] = []
    scales: list[float] = []
    ratios: list[float] = []
    programs = 0
    for part in parts:
        batch, rows, cols = part.weight.shape
        starts.append(programs)
        programs += -(-cols // (WIDTH * TILES)) * -(-rows // height) * batch
        memory = part.memory
        fields += [part.weight.data_ptr(), *memory.addresses, memory.room, *part.states]
        fields += [rows, cols, len(ratios)]
        for laid in (part.old, part.new):
            begin = len(ratios)
            if laid.terms:
                # Slots of rank 0 come before the others: they add 0 to a sum of 0, so the bits are
                # those of the same terms in any launch.
                for _ in range(unrolled - len(laid.ratios)):
                    slots += [*laid.slots[:2], 0, *laid.slots[3:SLOT_FIELDS]]
                    ratios.append(1.0)
                slots += laid.slots
                ratios += laid.ratios
            scales.append(laid.scale)
            fields.append(len(ratios) - begin)
    # The scales lie behind the integers, as pairs of fp32, and begin at a multiple of 16 bytes.
    integers = [*starts, *fields, *slots]
    integers += [0] * (len(integers) % 2)
    floats = [*scales, *ratios]
    floats += [0.0] * (len(floats) % 2)
    numbers = torch.frombuffer(array("q", integers), dtype=torch.int64)
    as_integers = torch.frombuffer(array("f", floats), dtype=torch.int64)
    table = uploaded(torch.cat([numbers, as_integers]), device)
    return table, len(integers), programs


def is_exact_on(device: torch.device) -> bool:
    """Return whether a small weight comes back bit for bit on a device, from path to path, and has
    the bits of a merge on the way.
    """
    draw = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device="cpu").to(device, torch.bfloat16)

    weight = normal(1, 96, 160)
    own, merged = weight.clone(), torch.empty_like(weight)
    first = lay_out_terms([MergeTerm(normal(1, 96, 24), normal(1, 24, 160), 0.01)], 1)
    other = lay_out_terms([MergeTerm(normal(1, 96, 8), normal(1, 8, 160), 0.02)], 1)
    memory = LogMemory.of(weight, ROWS[torch.bfloat16], share=1)
    history = (NO_TERMS, first, other, first, NO_TERMS)
    right = True
    for i, (old, new) in enumerate(pairwise(history)):
        before = i if old.terms else BARE
        after = i + 1 if new.terms else BARE
        right = right and not any(rewrite([LogPart(weight, memory, old, new, (before, after))]))
        if new is first:
            lay_out_parts([MergePart(merged, own, first.terms)]).run()
            right = right and torch.equal(weight, merged)
    return right and torch.equal(weight, own)
