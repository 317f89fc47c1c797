"""Flat adapters of a tree, read module by module within a bound on memory.

The fit of one module needs that module of every adapter, but each adapter is one file. If all
modules together need too much memory in float64, they are split into groups, and every pass reads
all files once for each group.
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
from ..lowrank.promoting import promoted
from ..tree import AdapterTree
from ..weights import weight_at
from .aligning import aligned
from .deviation import call_named
from .families import Families
from .moments import moments_of
from .shared_fit import SharedProblem
from .stack import stack_of
from .sums import read_uncached

__all__ = ["FlatAdapters", "FlatModule", "smallest_module"]


def smallest_module(outline: Adapter) -> str:
    """Return the module with the fewest numbers per rank, which an adapter of zeros keeps."""
    modules = outline.modules
    return min(modules, key=lambda name: (modules[name].numel // modules[name].rank, name))


@dataclass(frozen=True, eq=False)
class FlatModule:
    """One module of all flat adapters.

    Args:
        name: of the module.
        values: the adapters' increments, depth first; None where an adapter lacks the module.
        problem: the fit of their shared parts.
    """

    name: str
    values: list[LowRank | None]
    problem: SharedProblem


class FlatAdapters:
    """The flat adapters of some nodes; files are read again if not all modules fit into memory.

    Args:
        tree: the tree of the nodes.
        names: the nodes, depth first.
        families: which of them share a node.
        weights: (n,) how much each one's squared error counts.
        moments: module → second moments of its inputs, see `Moment`; None: of none.
        working_bytes: the memory for the modules that are fitted together.
        dtype: of the factors that are made; None: the widest of the adapters' own.
    """

    def __init__(
        self,
        tree: AdapterTree,
        names: Sequence[str],
        families: Families,
        weights: Tensor,
        *,
        moments: Mapping[str, Tensor] | None,
        working_bytes: int,
        dtype: torch.dtype | None,
    ) -> None:
        self.tree, self.names = tree, names
        self.families, self.weights = families, weights
        outlines = [tree.outline(name) or Adapter({}) for name in names]
        self.nbytes = sum(outline.nbytes for outline in outlines)
        self.outlines = aligned(outlines)
        self.numbers: dict[str, int] = {}  # module → the size of its factors, over all leaves
        widths: dict[str, int] = {}
        self._means: dict[str, int] = {}  # module → the numbers of a mean, at most
        widest: torch.dtype | None = None
        for name, outline in zip(names, self.outlines, strict=True):
            weight = tree[name].weight
            for module, value in outline.modules.items():
                # A leaf with the weight 0 at a module adds nothing there. If all have, there is
                # nothing to fit.
                if weight_at(weight, module) == 0.0:
                    continue
                self.numbers[module] = self.numbers.get(module, 0) + value.numel
                *batch, out, into = value.shape
                widths[module] = math.prod(batch) * (out + into)
                self._means[module] = math.prod(batch) * out * into
                own_dtype = value.dtype
                widest = own_dtype if widest is None else promoted(widest, own_dtype)
        if not self.numbers:
            raise SpecError(
                "the weights of these adapters are 0 at all of their modules, so they share nothing"
            )
        self.moments = moments_of(moments, self.numbers)
        self.dtype = dtype or widest or torch.float32
        # module → the bytes of one rank
        self.rank_bytes = {name: width * self.dtype.itemsize for name, width in widths.items()}
        for module, numbers in self.numbers.items():
            # In joint bases a mean has at most as many rows and columns as there are ranks.
            self._means[module] = min(self._means[module], numbers)
        self._groups = list(self._grouped(working_bytes))
        self._kept: dict[str, FlatModule] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def are_kept(self) -> bool:
        """Return whether all modules stay in memory, so that another pass reads no files."""
        return len(self._groups) == 1

    def modules(self) -> Iterator[FlatModule]:
        """Yield each module; only one group of them is in memory at a time."""
        for group in self._groups:
            if not self._kept.keys() >= set(group):
                self._kept = self._read(group)
            for module in group:
                yield self._kept[module]

    def _grouped(self, working_bytes: int) -> Iterator[list[str]]:
        group: list[str] = []
        group_bytes = 0
        for module, numbers in sorted(self.numbers.items()):
            # The values in their own dtype, their triplets in float64, and a mean per shared node.
            module_bytes = numbers * (8 + self.dtype.itemsize)
            module_bytes += 8 * len(self.families.above) * self._means[module]
            if group and group_bytes + module_bytes > working_bytes:
                yield group
                group, group_bytes = [], 0
            group.append(module)
            group_bytes += module_bytes
        if group:
            yield group

    def _read(self, group: Sequence[str]) -> dict[str, FlatModule]:
        values: dict[str, list[LowRank | None]] = {module: [] for module in group}
        self._kept = {}  # free the last group first, so that two are never in memory
        for name, outline in zip(self.names, self.outlines, strict=True):
            adapter = read_uncached(self.tree, name).weighed(self.tree[name].weight)
            adapter = adapter.renested(outline.nesting)
            for module in group:
                value = adapter.modules.get(module)
                # Clone: a view would keep the adapter's whole buffer in memory.
                values[module].append(None if value is None else value.with_tensors(torch.clone))
        return {module: self._problem(module, each) for module, each in values.items()}

    def _problem(self, module: str, values: list[LowRank | None]) -> FlatModule:
        stack = call_named(module, stack_of, values, self.moments.get(module))
        problem = SharedProblem(stack, self.families, self.weights, module)
        return FlatModule(module, values, problem)
