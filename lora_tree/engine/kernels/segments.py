"""Segments: rows of a batch that lie side by side in the tree, and the nodes that each owes.

    rows, in depth-first order   a a b | b c ·        groups of GROUP rows
    entries of a group           root, a, b | root, b, c
    coefficients                 one for every entry and row of its group; 0: it owes nothing

All kernels of a routed sum read the same lists. They are int32 and fp32 numbers in one buffer, so
that a new batch is one small copy, and a batch of as many rows can be written over an old one, in
place, where a captured graph reads it. Factors are not in it: `FactorTable` has their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from ..upload import uploaded
from .part import DTYPES

__all__ = [
    "FIELDS",
    "FactorTable",
    "SegmentSizes",
    "Segments",
    "Tiling",
    "can_route",
    "group_of",
    "segment_numbers",
    "width_of",
]

FIELDS = 8
"""Numbers that a factor table has for a node: for A and then for B the address, the stride of a
row and the place of its gradient; the rank; and one that is not used.
"""

LARGEST_GROUP = 16
"""Rows of a group: a tile of a product has at least so many inputs on a GPU."""


LARGEST_RANK = 128

LARGEST_TILE = 64
SHORT, PART = 2048, 1024
"""A batch of at most so many inputs is short, and so much of a width is a part. These constants
decide the bits.
"""


def width_of(rank: int, compute: torch.dtype) -> int:
    """Return how much of a width a program takes at once, so that its tiles fit into a GPU's shared
    memory and registers.

    >>> width_of(16, torch.bfloat16), width_of(128, torch.float32)
    (64, 32)
    """
    narrow_from = 32 if compute == torch.float32 else 64
    return 64 if rank <= narrow_from else 32


def group_of(tokens: int) -> int:
    """Return how many rows make a group: enough for one tile of inputs.

    >>> group_of(1), group_of(6), group_of(128)
    (16, 2, 1)
    """
    return max(1, LARGEST_GROUP // max(tokens, 1))


@dataclass(frozen=True)
class Tiling:
    """How the kernels cut the inputs of a batch up: constants by its size, never tuned.

    Args:
        tokens: inputs of a row.
        tile: inputs of a program.
        chunks: tiles of a group.
        short: the batch has so few inputs that programs share the width of one.
        compute: the dtype in which factors and inputs are multiplied; sums are fp32.
    """

    tokens: int
    tile: int
    chunks: int
    short: bool
    compute: torch.dtype

    @staticmethod
    def of(sizes: SegmentSizes, tokens: int, compute: torch.dtype) -> Tiling:
        """Return the tiling of a batch whose rows have ``tokens`` inputs each."""
        inputs = sizes.group * tokens
        tile = 16
        while tile < LARGEST_TILE and tile < inputs:
            tile *= 2
        return Tiling(tokens, tile, -(-inputs // tile), sizes.rows * tokens <= SHORT, compute)

    def parts(self, width: int) -> int:
        """Return how many programs share a width."""
        return -(-width // PART) if self.short else 1


@dataclass(frozen=True)
class SegmentSizes:
    """The sizes of the lists, which are the same for all batches that share a buffer.

    Args:
        rows: of the batch.
        group: rows of a group.
        entries: room for so many; those past the last are −1.
        nodes: of the table.
    """

    rows: int
    group: int
    entries: int
    nodes: int

    @property
    def groups(self) -> int:
        """How many groups the rows make."""
        return -(-self.rows // self.group)

    @property
    def lengths(self) -> list[int]:
        """The lengths of the lists, in the order in which they lie in the buffer."""
        return [
            self.rows,
            self.groups + 1,
            self.entries,
            self.entries,
            self.entries * self.group,
            self.entries,
            self.nodes + 1,
        ]


class Segments:
    """The lists of a batch on a device.

    Args:
        sizes: of the lists.
        memory: (sum of the lengths,) int32, as `segment_numbers` fills it.
    """

    def __init__(self, sizes: SegmentSizes, memory: Tensor) -> None:
        self.sizes, self.memory = sizes, memory
        parts = torch.split(memory, sizes.lengths)
        self.order = parts[0]
        """Place → row: rows that share nodes lie side by side."""
        self.begins = parts[1]
        """Group → its first entry."""
        self.nodes = parts[2]
        """Entry → its node in the table; −1: there is none."""
        self.owners = parts[3]
        """Entry → its group."""
        self.coefficients = parts[4].view(torch.float32).view(sizes.entries, sizes.group)
        self.by_node = parts[5]
        """The entries once more, one node's after the other's."""
        self.node_begins = parts[6]
        """Node → its first place in `by_node`."""

    def take(self, other: Segments) -> None:
        """Take another batch's lists over, in place: of as many rows, and no more entries or
        nodes.
        """
        if other.sizes == self.sizes:
            self.memory.copy_(other.memory)
            return
        self.order.copy_(other.order)
        self.begins.copy_(other.begins)
        entries, nodes = other.sizes.entries, other.sizes.nodes
        for mine, theirs in (
            (self.nodes, other.nodes),
            (self.owners, other.owners),
            (self.coefficients, other.coefficients),
            (self.by_node, other.by_node),
        ):
            mine[:entries].copy_(theirs)
        # Entries past these are those of an earlier batch, and none of its rows owes them anything.
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
            owners.append(len(begins) - 1)
            coefficients += [kinds[kind_of_row][node] for kind_of_row in members]
            coefficients += [0.0] * (group - len(members))
        begins.append(len(listed))
    room = max(entries, len(listed), 1)
    sizes = SegmentSizes(len(of_row), group, room, max(nodes, len(kinds[0])))
    spare = sizes.entries - len(listed)
    by_node = sorted(range(len(listed)), key=listed.__getitem__)
    counts = [0] * sizes.nodes
    for node in listed:
        counts[node] += 1
    node_begins = [0]
    for count in counts:
        node_begins.append(node_begins[-1] + count)
    integers = [*order, *begins, *listed, *[-1] * spare, *owners, *[0] * spare]
    numbers = torch.zeros(sum(sizes.lengths), dtype=torch.int32, device="cpu")
    numbers[: len(integers)] = torch.tensor(integers, dtype=torch.int32, device="cpu")
    floats = torch.tensor(coefficients, dtype=torch.float32, device="cpu")
    numbers[len(integers) : len(integers) + len(floats)] = floats.view(torch.int32)
    last = [*by_node, *[0] * spare, *node_begins]
    numbers[-len(last) :] = torch.tensor(last, dtype=torch.int32, device="cpu")
    return sizes, numbers


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
