"""Segments: rows of a batch that lie side by side in the tree, and the nodes that each owes.

    rows, in depth-first order   a a b | b c ·        groups of GROUP rows
    entries of a group           root, a, b, – | root, b, c, –
    coefficients                 one for every entry and row of its group; 0: it owes nothing

A group's entries are filled up to a multiple of `TOGETHER`, so that a program may take several of
them and finds all in one group.

All kernels of a routed sum read the same lists. They are int32 and fp32 numbers in one buffer, so
that a new batch is one small copy, and a batch of as many rows can be written over an old one, in
place, where a captured graph reads it. Factors are not in it: `FactorTable` has their addresses.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, compress, pairwise
from typing import Any

import torch
from torch import Tensor

from .pointers import Pointers

__all__ = ["TOGETHER", "SegmentSizes", "Segments", "room_for", "segment_numbers"]

TOGETHER = 4
"""The number of entries of a group is a multiple of this."""

ALIGNED = 4
"""Lists begin at multiples of this many numbers, which are 16 bytes."""


@dataclass(frozen=True)
class SegmentSizes:
    """The sizes of the lists, which are the same for all batches that share a buffer.

    Args:
        rows: of the batch.
        group: rows of a group.
        entries: the number of entries that there is room for; the nodes of unused ones are −1.
        nodes: of the table.
        largest: the most entries of a group.
    """

    rows: int
    group: int
    entries: int
    nodes: int
    largest: int

    @property
    def groups(self) -> int:
        """The number of groups that the rows make."""
        return -(-self.rows // self.group)

    @property
    def lengths(self) -> list[int]:
        """The lengths of the lists, in the order in which they lie in the buffer."""
        return [
            self.rows,
            self.rows,
            self.groups + 1,
            self.entries,
            self.entries,
            self.entries * self.group,
            self.entries,
            self.nodes + 1,
        ]

    @property
    def places(self) -> list[int]:
        """The offsets of the lists in the buffer, and its length.

        Lists begin at multiples of 16 bytes: for a pointer that does not, Triton would compile a
        kernel again.
        """
        found = [0]
        for length in self.lengths:
            found.append(found[-1] + length + -length % ALIGNED)
        return found


class Segments:
    """The lists of a batch on a device.

    Args:
        sizes: of the lists.
        memory: (the last of ``sizes.places``,) int32, as `segment_numbers` fills it.
    """

    def __init__(self, sizes: SegmentSizes, memory: Tensor) -> None:
        self.sizes, self.memory = sizes, memory
        parts = []
        for place, length in zip(sizes.places, sizes.lengths, strict=False):
            parts.append(memory[place : place + length])
        self.order = parts[0]
        """Place → row: rows that share nodes lie side by side."""
        self.owed = parts[1]
        """Place → 1 if its row owes anything."""
        self.begins = parts[2]
        """Group → its first entry."""
        self.nodes = parts[3]
        """Entry → its node in the table; −1: there is none."""
        self.owners = parts[4]
        """Entry → its group."""
        self.coefficients = parts[5].view(torch.float32).view(sizes.entries, sizes.group)
        self.by_node = parts[6]
        """The entries that have a node, sorted by their nodes."""
        self.node_begins = parts[7]
        """Node → its first place in `by_node`."""
        self.plans: dict[tuple[object, ...], Any] = {}
        """The plans of launches over these lists, which the kernels' modules make."""

    @cached_property
    def to_shrink(self) -> Pointers:
        """The lists that `shrink` reads."""
        return Pointers.to(self.order, self.nodes, self.owners, self.coefficients)

    @cached_property
    def to_expand(self) -> Pointers:
        """The lists that `expand` reads."""
        return Pointers.to(self.order, self.owed, self.begins, self.nodes)

    def clear(self) -> None:
        """Rewrite the lists in place so that no row owes anything."""
        self.nodes.fill_(-1)
        self.coefficients.zero_()
        self.owed.zero_()

    def take(self, other: Segments) -> None:
        """Copy another batch's lists into these, in place. It has as many rows, and no more entries
        or nodes.
        """
        if other.sizes == self.sizes:
            self.memory.copy_(other.memory)
            return
        self.order.copy_(other.order)
        self.owed.copy_(other.owed)
        self.begins.copy_(other.begins)
        entries, nodes = other.sizes.entries, other.sizes.nodes
        for own_list, other_list in (
            (self.nodes, other.nodes),
            (self.owners, other.owners),
            (self.coefficients, other.coefficients),
            (self.by_node, other.by_node),
        ):
            own_list[:entries].copy_(other_list)
        # The entries after these are left from an earlier batch.
        self.nodes[entries:].fill_(-1)
        self.coefficients[entries:].zero_()
        self.node_begins[: nodes + 1].copy_(other.node_begins)


def segment_numbers(
    kinds: Sequence[Sequence[float]],
    of_row: Sequence[int],
    group: int,
    *,
    owing: Sequence[tuple[int, ...]] | None = None,
    entries: int = 0,
    nodes: int = 0,
) -> tuple[SegmentSizes, Tensor]:
    """Return the lists of a batch in one buffer, in host memory.

    Args:
        kinds: for each kind of row, its coefficient of every node.
        of_row: row → the index of its kind.
        group: the number of rows in a group.
        owing: for each kind, the places of the nodes that it owes, if the caller has found them:
            those whose coefficient is not 0, usually few of them.
        entries: the least number of entries to make room for.
        nodes: the least number of nodes of the table.
    """
    if owing is None:
        owing = [tuple(compress(range(len(kind)), kind)) for kind in kinds]
    # Nodes come in depth-first order, so rows sorted by the nodes that they owe lie beside those
    # with which they share the most ancestors.
    order = sorted(range(len(of_row)), key=[owing[kind] for kind in of_row].__getitem__)
    listed: list[int] = []
    owners: list[int] = []
    coefficients = array("f")
    begins = [0]
    for start in range(0, len(order), group):
        members = [of_row[row] for row in order[start : start + group]]
        first = len(listed)
        if group == 1:
            listed += owing[members[0]]
        else:
            listed += sorted(set().union(*[owing[kind] for kind in members]))
        # Node → the place of its first coefficient.
        firsts = range(first * group, len(listed) * group, group)
        places = dict(zip(listed[first:], firsts, strict=True))
        listed += [-1] * (-len(listed) % TOGETHER)
        count = len(listed) - first
        # Most coefficients are 0: a row owes a few of the nodes that its group owes.
        _append_zeros(coefficients, count * group)
        for i, kind in enumerate(members):
            numbers = kinds[kind]
            for node in owing[kind]:
                coefficients[places[node] + i] = numbers[node]
        owners += [len(begins) - 1] * count
        begins.append(len(listed))
    room = max(entries, len(listed), 1)
    room += -room % TOGETHER
    largest = max([after - before for before, after in pairwise(begins)])
    if entries:
        # Other batches may be written over this one, so a group may get as many entries as any can.
        largest = max(largest, entries // (len(begins) - 1))
    sizes = SegmentSizes(len(of_row), group, room, max(nodes, len(kinds[0])), largest)
    spare = room - len(listed)
    listed += [-1] * spare
    owners += [0] * spare
    _append_zeros(coefficients, spare * group)
    # The entries without a node come first in this order.
    unused = listed.count(-1)
    by_node = sorted(range(room), key=listed.__getitem__)[unused:]
    # At node + 1, so that the sums are the places where the nodes begin.
    counts = [0] * (sizes.nodes + 1)
    for entry in by_node:
        counts[listed[entry] + 1] += 1
    lists: list[Sequence[int]] = [
        order,
        [int(bool(owing[of_row[row]])) for row in order],
        begins,
        listed,
        owners,
        array("i", coefficients.tobytes()),
        by_node + [0] * unused,
        list(accumulate(counts)),
    ]
    integers = array("i")
    for numbers_of_list, length in zip(lists, sizes.lengths, strict=True):
        assert len(numbers_of_list) == length
        integers.extend(numbers_of_list)
        integers.extend([0] * (-length % ALIGNED))
    return sizes, torch.frombuffer(integers, dtype=torch.int32)


def _append_zeros(numbers: array[float], count: int) -> None:
    numbers.frombytes(bytes(numbers.itemsize * count))


def room_for(rows: int, group: int, depth: int) -> int:
    """Return how many entries a batch can have.

    Args:
        rows: of the batch.
        group: rows of a group.
        depth: the most nodes that a row owes.
    """
    each = min(rows, group) * depth
    return -(-rows // group) * (each + -each % TOGETHER)
