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
from functools import cached_property, lru_cache
from itertools import compress, pairwise
from typing import Any

import torch
from torch import Tensor

from ..upload import uploaded
from .part import DTYPES
from .pointers import Pointers

__all__ = [
    "FIELDS",
    "FactorTable",
    "SegmentSizes",
    "Segments",
    "Tiling",
    "can_route",
    "entries_at_once",
    "group_of",
    "room_for",
    "segment_numbers",
    "width_of",
]

FIELDS = 8
"""Numbers that a factor table has for a node: for A and then for B the address, the stride of a
row and the place of its gradient; the rank; and one that is not used.
"""

LARGEST_GROUP = 16
"""Rows of a group: a tile of a product has at least so many inputs on a GPU."""

TOGETHER = 4
"""Entries of a group are so many, or a multiple."""

ALIGNED = 4
"""Lists begin at multiples of so many numbers, which are 16 bytes."""

LANES = 64
"""Lanes of a program that takes several entries: one lane is one rank of one entry."""

LEAST, MOST_PARTS = 128, 64
"""A part of a width is so much, at least; a single input has so many, at most."""

KEPT = 1024
"""Tilings and kinds of tables that are remembered."""

LARGEST_RANK = 128

LARGEST_TILE = 64
PROGRAMS = 64
"""A launch has so many programs if it can. This constant, and those beside it, decide the bits."""


def group_of(tokens: int, rows: int = LARGEST_GROUP) -> int:
    """Return how many rows make a group: enough for one tile of inputs, or a single row.

    >>> group_of(1), group_of(6), group_of(128)
    (16, 2, 1)
    """
    return 1 if rows == 1 else max(1, LARGEST_GROUP // max(tokens, 1))


def width_of(rank: int, compute: torch.dtype) -> int:
    """Return how much of a width `outer` takes at once, so that its tiles fit into a GPU's shared
    memory and registers.

    >>> width_of(16, torch.bfloat16), width_of(128, torch.float32)
    (64, 32)
    """
    narrow_from = 32 if compute == torch.float32 else 64
    return 64 if rank <= narrow_from else 32


def entries_at_once(rank: int) -> int:
    """Return how many entries fill the lanes of a program.

    >>> entries_at_once(16), entries_at_once(32), entries_at_once(128)
    (4, 2, 1)
    """
    return max(1, min(TOGETHER, LANES // rank))


@dataclass(frozen=True, eq=False)
class Tiling:
    """How the kernels cut the inputs of a batch up: constants by its size, never tuned.

    Args:
        tokens: inputs of a row.
        inputs: of a group.
        tile: inputs of a program that shrinks.
        wide_tile: inputs of a program that expands.
        most_parts: programs that share the width of one, at most.
        compute: the dtype in which factors and inputs are multiplied; sums are fp32.
    """

    tokens: int
    inputs: int
    tile: int
    wide_tile: int
    most_parts: int
    compute: torch.dtype

    @staticmethod
    @lru_cache(KEPT)
    def of(sizes: SegmentSizes, tokens: int, compute: torch.dtype) -> Tiling:
        """Return the tiling of a batch whose rows have ``tokens`` inputs each.

        It is one object for all batches of a size, so that a launch knows it by identity.
        """
        inputs = sizes.group * tokens
        if inputs == 1:
            return Tiling(tokens, 1, 1, 1, MOST_PARTS, compute)
        wide_tile = tile = 16
        while wide_tile < LARGEST_TILE and wide_tile < inputs:
            wide_tile *= 2
        # Larger tiles read factors less often, and leave fewer programs.
        while tile < wide_tile and sizes.groups * (inputs // (2 * tile)) >= PROGRAMS:
            tile *= 2
        programs = sizes.groups * -(-inputs // tile)
        if sizes.group > 1:
            programs = 2 * sizes.rows  # each entry has programs of its own
        parts = 1
        while parts < LARGEST_GROUP and parts * programs < PROGRAMS:
            parts *= 2
        return Tiling(tokens, inputs, tile, wide_tile, parts, compute)

    @property
    def room(self) -> int:
        """Inputs of a group in whole tiles of both kinds."""
        return -(-self.inputs // self.wide_tile) * self.wide_tile

    def parts(self, width: int) -> int:
        """Return how many programs share a width: each takes at least `LEAST` of it."""
        parts = self.most_parts
        while parts > 1 and width < parts * LEAST:
            parts //= 2
        return parts


@dataclass(frozen=True)
class SegmentSizes:
    """The sizes of the lists, which are the same for all batches that share a buffer.

    Args:
        rows: of the batch.
        group: rows of a group.
        entries: room for so many; those past the last are −1.
        nodes: of the table.
        largest: entries of a group, at most.
    """

    rows: int
    group: int
    entries: int
    nodes: int
    largest: int

    @property
    def groups(self) -> int:
        """How many groups the rows make."""
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
        """Where the lists begin in the buffer, and its length.

        They begin at multiples of 16 bytes: Triton compiles a kernel anew for a pointer that does
        not.
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
        """Row → 1 if it owes anything; by place."""
        self.begins = parts[2]
        """Group → its first entry."""
        self.nodes = parts[3]
        """Entry → its node in the table; −1: there is none."""
        self.owners = parts[4]
        """Entry → its group."""
        self.coefficients = parts[5].view(torch.float32).view(sizes.entries, sizes.group)
        self.by_node = parts[6]
        """The entries that have a node once more, one node's after the other's."""
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
        """Let no row owe anything, in place."""
        self.nodes.fill_(-1)
        self.coefficients.zero_()
        self.owed.zero_()

    def take(self, other: Segments) -> None:
        """Take another batch's lists over, in place: of as many rows, and no more entries or
        nodes.
        """
        if other.sizes == self.sizes:
            self.memory.copy_(other.memory)
            return
        self.order.copy_(other.order)
        self.owed.copy_(other.owed)
        self.begins.copy_(other.begins)
        entries, nodes = other.sizes.entries, other.sizes.nodes
        for mine, theirs in (
            (self.nodes, other.nodes),
            (self.owners, other.owners),
            (self.coefficients, other.coefficients),
            (self.by_node, other.by_node),
        ):
            mine[:entries].copy_(theirs)
        # Entries past these are those of an earlier batch.
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
        kinds: a coefficient for every node, for every distinct thing that a row can owe.
        of_row: row → its kind.
        group: rows of a group.
        entries: room for so many, at least.
        nodes: of the table, at least.
    """
    # What a kind owes: its nodes that are not 0. Nodes come in depth-first order, so kinds sorted
    # by them lie beside those with which they share the most ancestors.
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
        found: set[int] = set()
        for kind_of_row in set(members):
            found.update(owed[kind_of_row])
        for node in sorted(found):
            listed.append(node)
            coefficients += [kinds[kind_of_row][node] for kind_of_row in members]
            coefficients += [0.0] * (group - len(members))
        spare = -len(found) % TOGETHER
        listed += [-1] * spare
        coefficients += [0.0] * (spare * group)
        owners += [len(begins) - 1] * (len(listed) - len(owners))
        begins.append(len(listed))
    room = max(entries, len(listed), 1)
    room += -room % TOGETHER
    largest = max([after - before for before, after in pairwise(begins)])
    if entries:
        # Other batches are written over this one: a group may come to have as many as any can.
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
    for each, length in zip(lists, sizes.lengths, strict=True):
        assert len(each) == length
        integers.extend(each)
        integers.extend([0] * (-length % ALIGNED))
    return sizes, torch.frombuffer(integers, dtype=torch.int32)


def room_for(rows: int, group: int, depth: int) -> int:
    """Return how many entries a batch can have.

    Args:
        rows: of the batch.
        group: rows of a group.
        depth: nodes that a row owes, at most.
    """
    each = min(rows, group) * depth
    return -(-rows // group) * (each + -each % TOGETHER)


def can_route(factors: Sequence[tuple[Tensor, Tensor, float]], device: torch.device) -> bool:
    """Return whether the kernels cover some (A (r, in), B (out, r), scale).

    They have to be plain matrices of one dtype on the device, of a rank of at most `LARGEST_RANK`.
    """
    dtype = factors[0][0].dtype
    if dtype not in DTYPES:
        return False
    for A, B, _ in factors:
        if A.ndim != 2 or A.shape[0] > LARGEST_RANK:
            return False
        for factor in (A, B):
            plain = type(factor) in (Tensor, torch.nn.Parameter)
            if not plain or factor.dtype != dtype or factor.device != device:
                return False
            if factor.stride(1) != 1:
                return False
    return True


@dataclass(frozen=True, eq=False)
class FactorTable:
    """Where the factors of some nodes lie, at one site.

    It holds addresses, and none of the memory that they lead to.

    Args:
        numbers: (nodes, FIELDS) int64, on the device.
        scales: (nodes,) fp32, on the device.
        key: what tells whether the factors are still where they were.
        rank: the largest, rounded up to what a tile takes.
        wide: (in, out).
        dtype: of all factors.
        aligned: all begin at multiples of 16 bytes, and all their rows at multiples of 8 numbers.
        grad_sizes: numbers of the gradients of all A, and of all B.
    """

    numbers: Tensor
    scales: Tensor
    key: tuple[object, ...]
    rank: int
    wide: tuple[int, int]
    dtype: torch.dtype
    aligned: bool
    grad_sizes: tuple[int, int]

    @cached_property
    def to_shrink(self) -> Pointers:
        """What `shrink` reads of it."""
        return Pointers.to(self.numbers, self.scales)

    @cached_property
    def to_expand(self) -> Pointers:
        """What `expand` reads of it."""
        return Pointers.to(self.numbers)

    @cached_property
    def kind(self) -> object:
        """One object for all tables whose sites are launched alike."""
        return _kind(self.rank, self.wide, self.dtype, self.aligned)

    @staticmethod
    def key_of(factors: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[object, ...]:
        """Return what a table is made of: if it is the same, so is the table."""
        key: list[object] = []
        for A, B, scale in factors:
            key += [A.data_ptr(), B.data_ptr(), A.shape[0], scale]
        return tuple(key)

    @staticmethod
    def of(factors: Sequence[tuple[Tensor, Tensor, float]], device: torch.device) -> FactorTable:
        """Return the table of some (A (r, in), B (out, r), scale) for which `can_route` is true."""
        return FactorTable.of_all([factors], device)[0][0]

    @staticmethod
    def of_all(
        sites: Sequence[Sequence[tuple[Tensor, Tensor, float]]], device: torch.device
    ) -> tuple[list[FactorTable], Tensor]:
        """Return the tables of several sites, and the numbers of all of them, sent as one."""
        fields: list[int] = []
        all_scales: list[float] = []
        shapes: list[tuple[int, bool, tuple[int, int]]] = []
        for factors in sites:
            sizes = [0, 0]
            aligned, rank = True, 16
            for A, B, scale in factors:
                for i, factor in enumerate((A, B)):
                    address, stride = factor.data_ptr(), factor.stride(0)
                    fields += [address, stride, sizes[i]]
                    sizes[i] += factor.numel()
                    aligned = aligned and address % 16 == 0 and stride % 8 == 0
                fields += [A.shape[0], 0]
                rank = max(rank, 1 << (A.shape[0] - 1).bit_length())
                all_scales.append(scale)
            # Each site's scales begin at a multiple of 16 bytes. Triton compiles a kernel anew for
            # a pointer that does not.
            all_scales += [0.0] * (-len(factors) % 4)
            shapes.append((rank, aligned, (sizes[0], sizes[1])))
        numbers = torch.tensor(fields, dtype=torch.int64, device="cpu").view(-1, FIELDS)
        scales = torch.tensor(all_scales, dtype=torch.float32, device="cpu")
        lengths = [len(factors) for factors in sites]
        padded = [length + -length % 4 for length in lengths]
        # Tensors made under the caller's inference_mode could not be rewritten outside of it.
        with torch.inference_mode(False), torch.no_grad():
            every = uploaded(numbers, device)
            parts = torch.split(every, lengths)
            scale_parts = torch.split(uploaded(scales, device), padded)
        found = []
        for i, factors in enumerate(sites):
            A, B, _ = factors[0]
            rank, aligned, grad_sizes = shapes[i]
            table = FactorTable(
                parts[i],
                scale_parts[i][: lengths[i]],
                FactorTable.key_of(factors),
                rank,
                (A.shape[1], B.shape[0]),
                A.dtype,
                aligned,
                grad_sizes,
            )
            found.append(table)
        return found, every


@lru_cache(KEPT)
def _kind(rank: int, wide: tuple[int, int], dtype: torch.dtype, aligned: bool) -> object:
    return object()
