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
from itertools import compress, pairwise
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
    entries: int = 0,
    nodes: int = 0,
) -> tuple[SegmentSizes, Tensor]:
    """Return the lists of a batch in one buffer, in host memory.

    Args:
        kinds: for each kind of row, its coefficient of every node.
        of_row: row → the index of its kind.
        group: the number of rows in a group.
        entries: the least number of entries to make room for.
        nodes: the least number of nodes of the table.
    """
    # The nodes that a kind owes: those whose coefficient is not 0. Nodes come in depth-first order,
    # so kinds sorted by them lie beside those with which they share the most ancestors.
    owed: list[list[int]] = []
    for kind in kinds:
        owed.append(list(compress(range(len(kind)), kind)))
    order = sorted(range(len(of_row)), key=lambda row: owed[of_row[row]])
    listed: list[int] = []
    owners: list[int] = []
    coefficients: list[float] = []
    begins = [0]
    for start in range(0, len(order), group):
        members = [of_row[row] for row in order[start : start + group]]
        group_nodes: set[int] = set()
        for kind_of_row in members:
            group_nodes.update(owed[kind_of_row])
        first = len(listed)
        places: dict[int, int] = {}
        for node in sorted(group_nodes):
            places[node] = len(listed) * group
            listed.append(node)
        spare = -len(group_nodes) % TOGETHER
        listed += [-1] * spare
        count = len(listed) - first
        # Most coefficients are 0: a row owes a few of the nodes that its group owes.
        coefficients += [0.0] * (count * group)
        for i, kind_of_row in enumerate(members):
            kind = kinds[kind_of_row]
            for node in owed[kind_of_row]:
                coefficients[places[node] + i] = kind[node]
        owners += [len(begins) - 1] * count
        begins.append(len(listed))
    room = max(entries, len(listed), 1)
    room += -room % TOGETHER
    largest = max([after - before for before, after in pairwise(begins)])
    if entries:
        # Other batches may be written over this one, so a group may get as many entries as any can.
        largest = max(largest, entries // (len(begins) - 1))
    sizes = SegmentSizes(len(of_row), group, room, max(nodes, len(kinds[0])), largest)
    spare = sizes.entries - len(listed)
    with_node = [entry for entry, node in enumerate(listed) if node >= 0]
    by_node = sorted(with_node, key=listed.__getitem__)
    counts = [0] * sizes.nodes
    for entry in with_node:
        counts[listed[entry]] += 1
    node_begins = [0]
    for count in counts:
        node_begins.append(node_begins[-1] + count)
    adapted = [int(bool(owed[of_row[row]])) for row in order]
    floats = array("i", array("f", coefficients).tobytes())
    floats.extend([0] * (spare * group))
    lists: list[Sequence[int]] = [
        order,
        adapted,
        begins,
        [*listed, *[-1] * spare],
        [*owners, *[0] * spare],
        floats,
        [*by_node, *[0] * (room - len(by_node))],
        node_begins,
    ]
    integers = array("i")
    for numbers, length in zip(lists, sizes.lengths, strict=True):
        assert len(numbers) == length
        integers.extend(numbers)
        integers.extend([0] * (-length % ALIGNED))
    return sizes, torch.frombuffer(integers, dtype=torch.int32)


def room_for(rows: int, group: int, depth: int) -> int:
    """Return how many entries a batch can have.

    Args:
        rows: of the batch.
        group: rows of a group.
        depth: the most nodes that a row owes.
    """
    each = min(rows, group) * depth
    return -(-rows // group) * (each + -each % TOGETHER)
