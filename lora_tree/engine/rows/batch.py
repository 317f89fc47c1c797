"""Decide what each row of a batch owes to each node of the tree.

    rows  0 1 2 3 4 5 6 7          in depth-first order of their paths
    fr    █ █ █ █ █ · · ·          every node owns one slice:
    legal █ █ · · · · · ·          an ancestor's product can be done once
    de    · · · · · █ █ █          for all the rows below it

Rows may come in any order; nothing here moves them. A form of the sum that wants rows of a kind
side by side takes them out of the input and adds its result back in their places, site by site
(`forms.py` says at what cost). `batch_axis.py` refuses an input that has another number of rows.

Law: what a row owes depends on its own path alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

import torch
from torch import Tensor

from ...blend import Blend, depth_first, parse_blend
from ...errors import LoraTreeError, SpecError
from ...tree import AdapterTree
from ...weights import Weight, weight_digest
from ..kernels import Segments, Tiling, group_of, segment_numbers
from ..upload import uploaded

__all__ = ["Batch", "RowRuns", "tree_node"]

Kind = tuple[float, ...]
"""A row's coefficient of every node; 0 for a node that is not on its lineage."""

Lineages = tuple[tuple[str, ...], ...]
"""The nodes of each path of a row, from the root down."""


@dataclass(frozen=True)
class RowRuns:
    """The products of a batch, node by node, each over rows that lie side by side.

    Args:
        order: the rows that owe anything, sorted so that few products are needed; or all rows in
            the batch's own order, if that takes at most twice as many products.
        parts: (start, end, node, coefficient); start and end are places in the order.
    """

    order: tuple[int, ...]
    parts: tuple[tuple[int, int, int, float], ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows, by the coefficients of the nodes on their lineages.

    Args:
        nodes: in the order of the sum. A node that rows owe with several weights per module is
            listed once for each, as ``fr``, ``fr#1``, ….
        kinds: the coefficients of each kind of row. Two kinds differ in these or in their lineages.
        of_row: row → the index of its kind.
        weights: for each of the nodes, the weight by which its coefficients in `kinds` are
            multiplied: 1, or a weight per module. None: all are 1.
        lineages: kind → the nodes of its paths, which decide whose overrides count; empty where
            that does not matter.

    >>> tree = AdapterTree()
    >>> for path in ("fr", "fr/legal", "de"): _ = tree.add(path)
    >>> batch = Batch.of(tree, ["fr/legal", "", "de", "fr/legal"])
    >>> batch.nodes, batch.kinds
    (('de', 'fr', 'fr/legal'), ((0.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0)))
    >>> batch.of_row
    (0, 1, 2, 0)
    """

    nodes: tuple[str, ...]
    kinds: tuple[Kind, ...]
    of_row: tuple[int, ...]
    weights: tuple[Weight, ...] | None = None
    lineages: tuple[Lineages, ...] = ()

    @staticmethod
    def of(tree: AdapterTree, paths: Iterable[Blend]) -> Batch:
        """Return the batch whose rows go by ``paths``.

        Raises:
            PathError, SpecError: a path is not in the tree, or a blend makes no sense; names the
                row.
        """
        if isinstance(paths, str) or not isinstance(paths, Iterable):
            raise SpecError(
                f"route takes one path or blend for every row, got {paths!r}",
                "route([path] * rows) sends every row the same way; activate(path) does too, for "
                "any number of rows",
            )
        found: dict[object, tuple[dict[str, Weight], Lineages]] = {}
        keys: list[object] = []
        nodes: set[str] = set()
        # A batch of thousands of rows has a few paths, and each is looked up once.
        for row, blend in enumerate(paths):
            try:
                # A mapping has no hash, and two spellings of one blend owe the same.
                key: object = blend
                if not isinstance(blend, str):
                    key = tuple(sorted(parse_blend(blend).items()))
                if key not in found:
                    coefficients = tree.coefficients(blend)
                    if isinstance(blend, str) and (blend in tree or not blend):
                        # The nodes that a path owes to are those of its lineage that count.
                        lineages: Lineages = (tuple(coefficients),)
                    else:
                        lineages = tuple(map(tuple, tree.counting_lineages(blend)))
                    found[key] = coefficients, lineages
                    nodes.update(coefficients)
            except LoraTreeError as error:
                raise error.within(f"row {row}") from error
            keys.append(key)
        if not keys:
            raise SpecError("route needs at least one row, got an empty list of paths")
        # The tree's own order, so that a row's sum does not depend on the rows around it.
        weights: dict[str, dict[str, Weight]] = {}
        for node in sorted(nodes, key=depth_first):
            weights[node] = {}
        # Rows that owe the same on the same lineages are of one kind.
        numbered: dict[tuple[_Debts, Lineages], int] = {}
        kind_of: dict[object, int] = {}
        for key, (coefficients, lineages) in found.items():
            owed = _debts(coefficients, weights), lineages
            kind_of[key] = numbered.setdefault(owed, len(numbered))
        in_order: list[_Column] = []
        for node, of_digest in weights.items():
            for digest in sorted(of_digest):
                in_order.append((node, digest))
        columns = {column: place for place, column in enumerate(in_order)}
        kinds: list[Kind] = []
        for debts, _ in numbered:
            numbers = [0.0] * len(in_order)
            for column, coefficient in debts:
                numbers[columns[column]] = coefficient
            kinds.append(tuple(numbers))
        return Batch(
            _labels([node for node, _ in in_order]),
            tuple(kinds),
            tuple([kind_of[key] for key in keys]),
            tuple([weights[node][digest] for node, digest in in_order]),
            tuple([lineages for _, lineages in numbered]),
        )

    def __len__(self) -> int:
        return len(self.of_row)

    # ------------------------------------------------------------------ derived batches
    def at(self, nodes: Sequence[str], without: Sequence[frozenset[str]] | None = None) -> Batch:
        """Return the batch with some of the nodes only: those that change one site.

        Args:
            nodes: in the order of the sum.
            without: kind → nodes that its rows owe nothing to here, because of an override; None:
                there are none.
        """
        if without is None and tuple(nodes) == self.nodes and self._kinds_differ:
            return self  # the case at nearly every site
        # In the order of ``nodes``, which is the order of the site's terms.
        columns = [self.nodes.index(node) for node in nodes]
        kinds = []
        for i, kind in enumerate(self.kinds):
            owed = [kind[column] for column in columns]
            if without is not None:
                for j, node in enumerate(nodes):
                    owed[j] = 0.0 if node in without[i] else owed[j]
            kinds.append(tuple(owed))
        # Kinds that differ in other nodes only are one kind here, at its first place.
        distinct: dict[Kind, int] = {}
        of_row = [distinct.setdefault(kinds[kind], len(distinct)) for kind in self.of_row]
        return Batch(tuple(nodes), tuple(distinct), tuple(of_row))

    def spread(self, repeat: int, tile: int) -> Batch:
        """Return every row ``repeat`` times in succession, and that whole batch ``tile`` times."""
        if repeat == tile == 1:
            return self
        rows: list[int] = []
        for kind in self.of_row:
            rows += [kind] * repeat
        return Batch(self.nodes, self.kinds, tuple(rows) * tile, self.weights)

    # ------------------------------------------------------------------ derived
    @cached_property
    def _kinds_differ(self) -> bool:
        """True if no two kinds have the same coefficients and differ in their lineages alone."""
        return len(set(self.kinds)) == len(self.kinds)

    @cached_property
    def owed_nodes(self) -> list[tuple[str, str, Weight]]:
        """(name here, the tree's node, the weight with which it is owed), in the order of the
        sum.
        """
        found = []
        for name, weight in zip(self.nodes, self.weights or (1.0,) * len(self.nodes), strict=True):
            found.append((name, tree_node(name), weight))
        return found

    @cached_property
    def is_uniform(self) -> bool:
        """True: all rows owe the same, so it does not matter which is which."""
        return len(self.kinds) == 1

    @cached_property
    def by_kind(self) -> list[tuple[tuple[int, ...], Kind]]:
        """(rows, coefficients) of every kind that owes anything, in the order of the first rows."""
        rows: dict[int, list[int]] = {}
        for row, kind in enumerate(self.of_row):
            rows.setdefault(kind, []).append(row)
        found = []
        for kind, members in rows.items():
            if self.owing[kind]:
                found.append((tuple(members), self.kinds[kind]))
        return found

    @cached_property
    def by_node(self) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        """(rows, the rows' coefficients) of every node; rows that owe it nothing are left out."""
        found = []
        for column in range(len(self.nodes)):
            rows, coefficients = [], []
            for row, kind in enumerate(self.of_row):
                coefficient = self.kinds[kind][column]
                if coefficient:
                    rows.append(row)
                    coefficients.append(coefficient)
            found.append((tuple(rows), tuple(coefficients)))
        return found

    @cached_property
    def runs(self) -> RowRuns:
        """The products of all nodes over rows that lie side by side, in the order of the sum."""
        # Nodes are in depth-first order, so kinds that are sorted by the nodes that they owe lie
        # beside those with which they share the most ancestors.
        by_path = self._runs(sorted(self.adapted, key=lambda row: self.owing[self.of_row[row]]))
        as_it_is = self._runs(range(len(self)))
        # Another order costs a copy of the inputs and two of the outputs. It is worth that only if
        # it takes less than half as many products.
        return as_it_is if len(as_it_is.parts) <= 2 * len(by_path.parts) else by_path

    def _runs(self, order: Sequence[int]) -> RowRuns:
        parts = []
        for node in range(len(self.nodes)):
            begin, before = 0, 0.0
            for place, row in enumerate(order):
                coefficient = self.kinds[self.of_row[row]][node]
                if coefficient != before:
                    if before:
                        parts.append((begin, place, node, before))
                    begin, before = place, coefficient
            if before:
                parts.append((begin, len(order), node, before))
        return RowRuns(tuple(order), tuple(parts))

    @cached_property
    def largest(self) -> dict[str, float]:
        """Node → the largest absolute coefficient that any row owes to it."""
        found = [0.0] * len(self.nodes)
        for kind, places in zip(self.kinds, self.owing, strict=True):
            for place in places:
                size = abs(kind[place])
                if size > found[place]:
                    found[place] = size
        return dict(zip(self.nodes, found, strict=True))

    @cached_property
    def owing(self) -> tuple[tuple[int, ...], ...]:
        """Kind → the indices in `nodes` of the nodes that it owes to, usually few of them."""
        places = range(len(self.nodes))
        return tuple([tuple(compress(places, kind)) for kind in self.kinds])

    @cached_property
    def debts(self) -> Hashable:
        """A key for what the rows owe: two batches with equal keys owe the same."""
        numbers = []
        for kind, places in zip(self.kinds, self.owing, strict=True):
            numbers.append(tuple([kind[place] for place in places]))
        return self.nodes, self.owing, tuple(numbers), self.of_row

    @cached_property
    def adapted(self) -> tuple[int, ...]:
        """The rows that owe anything."""
        return tuple([row for row, kind in enumerate(self.of_row) if self.owing[kind]])

    def coefficients(self, rows: Sequence[int]) -> Tensor:
        """Return what some rows owe to each node: (rows, nodes), float64, in host memory."""
        # In fp64: a coefficient is rounded once, into the dtype of the side path.
        numbers = [self.kinds[self.of_row[row]] for row in rows]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def index(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        """Return some of the rows as (rows,) int64 on a device; the same tensor for all sites."""
        found = self._indices.get((rows, device))
        if found is None:
            numbers = torch.tensor(rows, dtype=torch.int64, device="cpu")
            found = self._indices[rows, device] = uploaded(numbers, device)
        return found

    def segments(self, group: int, device: torch.device) -> Segments:
        """Return the lists that kernels read, on a device; the same object for all sites.

        Args:
            group: the number of rows in a group.
            device: where they are read.
        """
        found = self._segments.get((group, device))
        if found is None:
            sizes, numbers = segment_numbers(self.kinds, self.of_row, group, owing=self.owing)
            found = self._segments[group, device] = Segments(sizes, uploaded(numbers, device))
        return found

    def tiled(
        self, tokens: int, compute: torch.dtype, device: torch.device
    ) -> tuple[Segments, Tiling]:
        """Return the lists, and how kernels cut the inputs up; the same objects for all sites.

        Args:
            tokens: the number of inputs of a row.
            compute: the dtype in which kernels multiply.
            device: where the lists are read.
        """
        key = tokens, compute, device
        segments_and_tiling = self._tiled.get(key)
        if segments_and_tiling is None:
            segments = self.segments(group_of(tokens, len(self)), device)
            segments_and_tiling = self._tiled[key] = (
                segments,
                Tiling.of(segments.sizes, tokens, compute),
            )
        return segments_and_tiling

    @cached_property
    def _tiled(self) -> dict[tuple[int, torch.dtype, torch.device], tuple[Segments, Tiling]]:
        """The pairs that `tiled` has returned so far."""
        return {}

    @cached_property
    def _segments(self) -> dict[tuple[int, torch.device], Segments]:
        """The lists that `segments` has sent so far."""
        return {}

    @cached_property
    def _indices(self) -> dict[tuple[tuple[int, ...], torch.device], Tensor]:
        """The index lists that `index` has sent so far."""
        return {}


_Column = tuple[str, str]
"""(node, digest of the weight per module with which rows owe it); ``""``: that is a number."""


_Debts = tuple[tuple[_Column, float], ...]
"""(column, coefficient), in the order of the sum."""


def _debts(coefficients: Mapping[str, Weight], weights: Mapping[str, dict[str, Weight]]) -> _Debts:
    """Return what a row owes.

    Args:
        coefficients: of the row's nodes.
        weights: node → digest → the weight of that column; gets those of the row.
    """
    debts: list[tuple[_Column, float]] = []
    for node, weight in coefficients.items():
        # Rows whose weight is a number share the node's column, with that number in it. A weight
        # per module goes into the factors' scales, so each such weight has a column of its own.
        if isinstance(weight, float):
            debts.append(((node, ""), weight))
            weights[node][""] = 1.0
        else:
            digest = weight_digest(weight)
            debts.append(((node, digest), 1.0))
            weights[node][digest] = weight
    return tuple(debts)


def _labels(nodes: Sequence[str]) -> tuple[str, ...]:
    """Return the nodes, with a number appended to every occurrence of a node after its first."""
    if len(set(nodes)) == len(nodes):
        return tuple(nodes)
    found: list[str] = []
    seen: dict[str, int] = {}
    for node in nodes:
        again = seen.get(node, 0)
        found.append(f"{node}#{again}" if again else node)
        seen[node] = again + 1
    return tuple(found)


def tree_node(name: str) -> str:
    """Return the tree's node for a name in a batch."""
    return name.partition("#")[0]  # no node's name contains a "#"
