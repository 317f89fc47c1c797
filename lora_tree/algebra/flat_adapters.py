"""Flat adapters of a tree, module by module, in the memory that there is for them.

The fit of one module needs that module of every adapter, and an adapter is one file. Where all of
them take too much memory in float64, the files are read again for every few modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from ..adapter import Adapter
from ..errors import SpecError
from ..lowrank import LowRank
from ..override import tensor_owner
from ..tree import AdapterTree
from ..weights import weight_at
from .shared_fit import Stack, triplets_of
from .sums import aligned, read_apart

__all__ = ["FlatAdapters"]


class FlatAdapters:
    """The flat adapters of some nodes, read as often as the memory for them demands.

    Args:
        tree: has them.
        names: the nodes, depth first.
        working_bytes: for stacks of modules.
        dtype: of the factors that are made; None: the widest of the adapters' own.
    """

    def __init__(
        self, tree: AdapterTree, names: Sequence[str], working_bytes: int, dtype: torch.dtype | None
    ) -> None:
        self.tree, self.names = tree, names
        outlines = [tree.outline(name) or Adapter({}) for name in names]
        self.nbytes = sum(outline.nbytes for outline in outlines)
        self.outlines = aligned(outlines)
        self.numbers: dict[str, int] = {}  # module → its numbers, over all leaves and in any rank
        widths: dict[str, int] = {}
        widest: torch.dtype | None = None
        for name, outline in zip(names, self.outlines, strict=True):
            weight = tree[name].weight
            for module, value in outline.modules.items():
                # Where a weight is 0 the leaf adds nothing, and no leaf may be left to fit.
                if weight_at(weight, module) == 0.0:
                    continue
                self.numbers[module] = self.numbers.get(module, 0) + value.numel
                *batch, out, into = value.shape
                widths[module] = math.prod(batch) * (out + into)
                mine = value.dtype
                widest = mine if widest is None else torch.promote_types(widest, mine)
        if not self.numbers:
            raise SpecError(
                "the weights of these adapters are 0 at all of their modules, so they share nothing"
            )
        self.dtype = dtype or widest or torch.float32
        # module → the bytes of one rank
        self.rank_bytes = {name: width * self.dtype.itemsize for name, width in widths.items()}
        self._refuse_replaced()
        self._groups = list(self._grouped(working_bytes))
        self._kept: dict[str, tuple[list[LowRank | None], Stack]] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def _refuse_replaced(self) -> None:
        """Refuse an override of a module that would get a shared part: the part would not count.

        Raises:
            SpecError: an adapter replaces such a tensor; names both.
        """
        for name, outline in zip(self.names, self.outlines, strict=True):
            for tensor in outline.overrides:
                if tensor_owner(tensor)[0] in self.numbers:
                    raise SpecError(
                        f"{name}: replaces {tensor}, so nothing above it counts there",
                        "name the other adapters, and leave this one out",
                    )

    def modules(self) -> Iterator[tuple[str, list[LowRank | None], Stack]]:
        """Each module with the leaves' values and their stack; a few are in memory at once."""
        for group in self._groups:
            if not self._kept.keys() >= set(group):
                self._kept = self._read(group)
            for module in group:
                yield module, *self._kept[module]

    def _grouped(self, working_bytes: int) -> Iterator[list[str]]:
        group: list[str] = []
        size = 0
        for module, numbers in sorted(self.numbers.items()):
            # The values as they are read, and their triplets in float64.
            mine = numbers * (8 + self.dtype.itemsize)
            if group and size + mine > working_bytes:
                yield group
                group, size = [], 0
            group.append(module)
            size += mine
        if group:
            yield group

    def _read(self, group: Sequence[str]) -> dict[str, tuple[list[LowRank | None], Stack]]:
        values: dict[str, list[LowRank | None]] = {module: [] for module in group}
        self._kept = {}  # before the next ones are read, so that both are never in memory
        for name, outline in zip(self.names, self.outlines, strict=True):
            adapter = read_apart(self.tree, name).weighed(self.tree[name].weight)
            adapter = adapter.renested(outline.nesting)
            for module in group:
                value = adapter.modules.get(module)
                # A copy: a view would keep all of the adapter's other modules in memory.
                values[module].append(None if value is None else value.with_tensors(torch.clone))
        return {module: (each, triplets_of(each)) for module, each in values.items()}
