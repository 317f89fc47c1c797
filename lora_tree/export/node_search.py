"""Look for other nodes of a tree in the part of a merged checkpoint that a path does not explain.

    R = M − Σ m_n D_n                         for the few parameters with the largest rests
    share(c) = ⟨R, D_c⟩² / (‖R‖² ‖D_c‖²)      for every node c that is not in the path

The node with the largest share joins the path's nodes, and all multiples are solved again.

Memory: R of `MOST_SAMPLES` parameters in fp64, and one adapter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lowrank import LowRank
from ..renaming import Renaming
from ..tree import AdapterTree
from ..weights import weight_at
from .checkpoint_pair import CheckpointPair
from .merge_guess import Fit
from .writes import Write

__all__ = ["NodeSearch", "base_with_overrides", "sides_of"]

MOST_SAMPLES = 4
MOST_ADDED = 3
LEAST_SHARE = 0.2
"""A node that explains a smaller share of the rest counts as similar by chance."""


@dataclass
class NodeSearch:
    """The state of a search.

    Args:
        writes: parameter → what the path adds to it, for the sampled parameters.
        rests: parameter → its unexplained part, (batch, rows, cols) float64.
        multiples: node → its multiple so far.
    """

    writes: Mapping[str, Write]
    rests: dict[str, Tensor]
    multiples: dict[str, float]

    @classmethod
    def of(
        cls,
        pair: CheckpointPair,
        writes: Mapping[str, Write],
        fits: Sequence[Fit],
        multiples: Mapping[str, float],
    ) -> NodeSearch:
        """Take the parameters with the largest unexplained parts."""

        def left(fit: Fit) -> float:
            own = [multiples[node] for node in fit.nodes]
            return fit.rest(torch.tensor(own, dtype=torch.float64))

        sampled: dict[str, Write] = {}
        rests: dict[str, Tensor] = {}
        for fit in sorted(fits, key=left, reverse=True)[:MOST_SAMPLES]:
            write = sampled[fit.name] = writes[fit.name]
            both = pair.read_both(fit.name)
            assert both is not None, "it was read before"
            rows = write.site.rows(both[1]).double()
            rows = rows - write.site.rows(base_with_overrides(write, both[0])).double()
            for node, value in zip(write.nodes, write.values, strict=True):
                rows = rows - multiples[node] * _product(write, value)
            rests[fit.name] = rows
        return cls(sampled, rests, dict(multiples))

    def added(
        self, tree: AdapterTree, renaming: Renaming, own: Collection[str]
    ) -> dict[str, float]:
        """Return the nodes that were merged in addition to the path's own: node → multiple.

        The path's own multiples are updated along with them.
        """
        found: dict[str, Mapping[str, LowRank]] = {}
        for _ in range(MOST_ADDED):
            best, most = "", LEAST_SHARE
            for node in tree.paths():
                if node in own or node in found:
                    continue
                share = self._share(self._values(tree, renaming, node))
                if share > most:
                    best, most = node, share
            if not best:
                break
            found[best] = self._values(tree, renaming, best)
            self._solve_again(found)
        return {node: self.multiples.pop(node) for node in found}

    def _values(self, tree: AdapterTree, renaming: Renaming, node: str) -> dict[str, LowRank]:
        """Return a node's weighted increments of the sampled parameters, if their shapes fit."""
        adapter = tree.adapter(node)
        if adapter is None:
            return {}
        modules = renaming.bound(adapter).modules
        found = {}
        for name, write in self.writes.items():
            value = modules.get(write.module)
            if value is not None and value.shape == write.values[0].shape:
                found[name] = value.scaled(weight_at(tree[node].weight, write.module))
        return found

    def _share(self, values: Mapping[str, LowRank]) -> float:
        """Return the share of the rests that a node explains."""
        along = own = 0.0
        for name, value in values.items():
            left, right = sides_of(self.writes[name], value)
            along += float(((left.mT @ self.rests[name]) * right).sum())
            own += float(((left.mT @ left) * (right @ right.mT)).sum())
        whole = math.fsum(float(rows.square().sum()) for rows in self.rests.values())
        return along**2 / (own * whole) if own and whole else 0.0

    def _solve_again(self, found: Mapping[str, Mapping[str, LowRank]]) -> None:
        """Solve for all multiples on the rests; add the steps to them, and subtract their share."""
        nodes = [*dict.fromkeys([*self.multiples, *found])]
        gram = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
        along = torch.zeros(len(nodes), dtype=torch.float64)
        for name, rows in self.rests.items():
            write = self.writes[name]
            terms = dict(zip(write.nodes, write.values, strict=True))
            terms |= {node: values[name] for node, values in found.items() if name in values}
            sides = {node: sides_of(write, value) for node, value in terms.items()}
            for node, (left, right) in sides.items():
                i = nodes.index(node)
                along[i] += ((left.mT @ rows) * right).sum()
                for other, (top, side) in sides.items():
                    gram[i, nodes.index(other)] += ((left.mT @ top) * (right @ side.mT)).sum()
        step = torch.linalg.pinv(gram, hermitian=True) @ along
        for i, node in enumerate(nodes):
            self.multiples[node] = self.multiples.get(node, 0.0) + float(step[i])
        for name in self.rests:
            write = self.writes[name]
            terms = dict(zip(write.nodes, write.values, strict=True))
            terms |= {node: values[name] for node, values in found.items() if name in values}
            for node, value in terms.items():
                times = float(step[nodes.index(node)])
                self.rests[name] = self.rests[name] - times * _product(write, value)


def base_with_overrides(write: Write | None, own: Tensor) -> Tensor:
    """Return the tensor to which a path's increments are added: the base's, with its overrides."""
    if write is None or not write.overrides:
        return own
    own = own.clone()
    for override in write.overrides:
        override.write(own)
    return own


def sides_of(write: Write, value: LowRank) -> tuple[Tensor, Tensor]:
    """Return left (batch, rows, r) and right (batch, r, cols) in fp64, the scale in left."""
    left, right = write.site.sides_of(value)
    return left.double() * value.scale, right.double()


def _product(write: Write, value: LowRank) -> Tensor:
    left, right = sides_of(write, value)
    return left @ right
