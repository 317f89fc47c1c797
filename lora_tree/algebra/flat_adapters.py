"""Flat adapters of a tree, module by module, in the memory that there is for them.

The fit of one module needs that module of every adapter, and an adapter is one file. Where all of
them take too much memory in float64, the files are read again for every few modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import SpecError
from ..lowrank import LowRank
from ..override import tensor_owner
from ..tree import AdapterTree
from ..weights import weight_at
from .deviation import call_named
from .families import Families
from .shared_fit import SharedProblem
from .stack import stack_of
from .sums import aligned, read_apart

__all__ = ["FlatAdapters", "FlatModule", "smallest_module"]


def smallest_module(outline: Adapter) -> str:
    """Return the module that an adapter of zeros keeps."""
    modules = outline.modules
    return min(modules, key=lambda name: (modules[name].numel // modules[name].rank, name))


@dataclass(frozen=True, eq=False)
class FlatModule:
    """One module of all flat adapters.

    Args:
        name: of the module.
        values: the adapters' increments, depth first; None where one has none.
        problem: to be fitted.
    """

    name: str
    values: list[LowRank | None]
    problem: SharedProblem


class FlatAdapters:
    """The flat adapters of some nodes, read as often as the memory for them demands.

    Args:
        tree: has them.
        names: the nodes, depth first.
        families: which of them share a node.
        weights: (n,) how much each one's squared error counts.
        moments: module → second moments of its inputs, see `moment_inside`.
        working_bytes: for the problems of modules.
        dtype: of the factors that are made; None: the widest of the adapters' own.
    """

    def __init__(
        self,
        tree: AdapterTree,
        names: Sequence[str],
        families: Families,
        weights: Tensor,
        *,
        moments: Mapping[str, Tensor],
        working_bytes: int,
        dtype: torch.dtype | None,
    ) -> None:
        self.tree, self.names = tree, names
        self.families, self.weights, self.moments = families, weights, moments
        outlines = [tree.outline(name) or Adapter({}) for name in names]
        self.nbytes = sum(outline.nbytes for outline in outlines)
        self.outlines = aligned(outlines)
        self.numbers: dict[str, int] = {}  # module → its numbers, over all leaves and in any rank
        widths: dict[str, int] = {}
        self._means: dict[str, int] = {}  # module → the numbers of a mean, at most
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
                self._means[module] = math.prod(batch) * out * into
                mine = value.dtype
                widest = mine if widest is None else torch.promote_types(widest, mine)
        if not self.numbers:
            raise SpecError(
                "the weights of these adapters are 0 at all of their modules, so they share nothing"
            )
        self.dtype = dtype or widest or torch.float32
        # module → the bytes of one rank
        self.rank_bytes = {name: width * self.dtype.itemsize for name, width in widths.items()}
        for module, numbers in self.numbers.items():
            # In joint bases a mean has no more rows and columns than there are ranks.
            self._means[module] = min(self._means[module], numbers)
        self._refuse_replaced()
        self._groups = list(self._grouped(working_bytes))
        self._kept: dict[str, FlatModule] = {}

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

    @property
    def are_kept(self) -> bool:
        """All modules fit into the memory there is, so going through them again reads nothing."""
        return len(self._groups) == 1

    def modules(self) -> Iterator[FlatModule]:
        """Each module; a few are in memory at once."""
        for group in self._groups:
            if not self._kept.keys() >= set(group):
                self._kept = self._read(group)
            for module in group:
                yield self._kept[module]

    def _grouped(self, working_bytes: int) -> Iterator[list[str]]:
        group: list[str] = []
        size = 0
        for module, numbers in sorted(self.numbers.items()):
            # The values as they are read, their triplets in float64, and a mean for each node.
            mine = numbers * (8 + self.dtype.itemsize)
            mine += 8 * len(self.families.above) * self._means[module]
            if group and size + mine > working_bytes:
                yield group
                group, size = [], 0
            group.append(module)
            size += mine
        if group:
            yield group

    def _read(self, group: Sequence[str]) -> dict[str, FlatModule]:
        values: dict[str, list[LowRank | None]] = {module: [] for module in group}
        self._kept = {}  # before the next ones are read, so that both are never in memory
        for name, outline in zip(self.names, self.outlines, strict=True):
            adapter = read_apart(self.tree, name).weighed(self.tree[name].weight)
            adapter = adapter.renested(outline.nesting)
            for module in group:
                value = adapter.modules.get(module)
                # A copy: a view would keep all of the adapter's other modules in memory.
                values[module].append(None if value is None else value.with_tensors(torch.clone))
        return {module: self._problem(module, each) for module, each in values.items()}

    def _problem(self, module: str, values: list[LowRank | None]) -> FlatModule:
        stack = call_named(module, stack_of, values, self.moments.get(module))
        problem = SharedProblem(stack, self.families, self.weights, module)
        return FlatModule(module, values, problem)
