"""What each row of a batch owes to each node of the tree.

    rows  0 1 2 3 4 5 6 7          in depth-first order of their paths
    fr    █ █ █ █ █ · · ·          every node owns one slice:
    legal █ █ · · · · · ·          an ancestor's product can be done once
    de    · · · · · █ █ █          for all the rows below it

Rows may come in any order; nothing here moves them. Where a form of the sum wants rows of a kind side by side it takes
them out of the input and adds its result back in their places, site by site (`forms.py` says at what cost).

Law: what a row owes depends on its own path alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..blend import Blend, depth_first, parse_blend
from ..errors import LoraTreeError, SpecError
from ..tree import AdapterTree
from .upload import uploaded

__all__ = ["Batch"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows, by the coefficients of the nodes on their lineages.

    Args:
        nodes: in the order of the sum.
        kinds: the distinct things that a row can owe: a coefficient for every node, 0 where it is not on the lineage.
        of_row: row → its kind.

    >>> tree = AdapterTree()
    >>> for path in ("fr", "fr/legal", "de"): _ = tree.add(path)
    >>> batch = Batch.of(tree, ["fr/legal", "", "de", "fr/legal"])
    >>> batch.nodes, batch.kinds
    (('de', 'fr', 'fr/legal'), ((0.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0)))
    >>> batch.of_row
    (0, 1, 2, 0)
    """

    nodes: tuple[str, ...]
    kinds: tuple[tuple[float, ...], ...]
    of_row: tuple[int, ...]

    @staticmethod
    def of(tree: AdapterTree, paths: Iterable[Blend]) -> Batch:
        """The batch whose rows go by ``paths``.

        Raises:
            PathError, SpecError: a path is not in the tree, or a blend makes no sense; names the row.
        """
        if isinstance(paths, str) or not isinstance(paths, Iterable):
            raise SpecError(
                f"route takes one path or blend for every row, got {paths!r}",
                "route([path] * rows) sends every row the same way; activate(path) does too, for any number of rows",
            )
        known: dict[object, int] = {}
        owed: list[dict[str, float]] = []
        of_row: list[int] = []
        for row, blend in enumerate(paths):
            try:
                key = blend if isinstance(blend, str) else tuple(sorted(parse_blend(blend).items()))
                if key not in known:
                    known[key] = len(owed)
                    owed.append(tree.coefficients(blend))
            except LoraTreeError as error:
                raise error.within(f"row {row}") from error
            of_row.append(known[key])
        if not of_row:
            raise SpecError("route needs at least one row, got an empty list of paths")
        nodes = tuple(sorted({node for each in owed for node in each}, key=depth_first))
        return _distinct(
            nodes, [tuple(each.get(node, 0.0) for node in nodes) for each in owed], of_row
        )

    def __len__(self) -> int:
        return len(self.of_row)

    # ------------------------------------------------------------------ the same rows, seen otherwise
    def at(self, nodes: Sequence[str]) -> Batch:
        """What the rows owe to some of the nodes: those that change one site, in the order of the sum."""
        columns = [self.nodes.index(node) for node in nodes]
        return _distinct(
            tuple(nodes), [tuple(kind[c] for c in columns) for kind in self.kinds], self.of_row
        )

    def spread(self, repeat: int, tile: int) -> Batch:
        """Every row ``repeat`` times in place, and the whole of that ``tile`` times over."""
        rows = [kind for kind in self.of_row for _ in range(repeat)]
        return Batch(self.nodes, self.kinds, tuple(rows) * tile)

    # ------------------------------------------------------------------ what follows from it
    @cached_property
    def is_uniform(self) -> bool:
        """All rows owe the same, so that nobody has to know which is which."""
        return len(self.kinds) == 1

    @cached_property
    def by_kind(self) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        """(rows, coefficients) of every kind that owes anything, in the order of their first rows."""
        rows: dict[int, list[int]] = {}
        for row, kind in enumerate(self.of_row):
            rows.setdefault(kind, []).append(row)
        return [
            (tuple(found), self.kinds[kind])
            for kind, found in rows.items()
            if any(self.kinds[kind])
        ]

    @cached_property
    def by_node(self) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        """(rows, the rows' coefficients) of every node."""
        found = []
        for column in range(len(self.nodes)):
            owed = [self.kinds[kind][column] for kind in self.of_row]
            rows = tuple(row for row, c in enumerate(owed) if c)
            found.append((rows, tuple(owed[row] for row in rows)))
        return found

    @cached_property
    def largest(self) -> dict[str, float]:
        """Node → the largest coefficient that any row owes to it, without its sign."""
        return {node: max(abs(kind[i]) for kind in self.kinds) for i, node in enumerate(self.nodes)}

    @cached_property
    def adapted(self) -> tuple[int, ...]:
        """The rows that owe anything."""
        return tuple(row for row, kind in enumerate(self.of_row) if any(self.kinds[kind]))

    def coefficients(self, rows: Sequence[int]) -> Tensor:
        """(rows, nodes), float64."""
        return torch.tensor(
            [self.kinds[self.of_row[row]] for row in rows], dtype=torch.float64, device="cpu"
        )

    def index(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        """(rows,) int64: some of the rows, where a device reads them; the same tensor for all sites."""
        found = self._indices.get((rows, device))
        if found is None:
            numbers = torch.tensor(rows, dtype=torch.int64, device="cpu")
            found = self._indices[rows, device] = uploaded(numbers, device)
        return found

    @cached_property
    def _indices(self) -> dict[tuple[tuple[int, ...], torch.device], Tensor]:
        """The index lists that `index` has sent so far."""
        return {}


def _distinct(
    nodes: tuple[str, ...], owed: Sequence[tuple[float, ...]], of_row: Sequence[int]
) -> Batch:
    """A batch whose kinds are in use, and different from each other."""
    kinds: dict[tuple[float, ...], int] = {}
    mine = [kinds.setdefault(owed[kind], len(kinds)) for kind in of_row]
    return Batch(nodes, tuple(kinds), tuple(mine))
