"""The loss of each path over many batches: since the last log, and over an evaluation.

A path's mean is over its own tokens, wherever its rows were: in another micro-batch, or on
another rank. So sums and counts are kept apart until the means are asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ...blend import Blend, spelled
from ...engine.upload import uploaded
from ...training.losses import row_losses
from ...training.rank_names import blends_of_all, ranks
from ...tree import AdapterTree

__all__ = ["PathMeans", "PathTotals"]


class PathMeans:
    """Each path's mean loss over the training steps since the last log."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        """Path → the losses of its steps on this rank, added up."""
        self._steps: Counter[str] = Counter()

    def count(self, tokens: Mapping[str, int]) -> None:
        """Note that a step begins. ``tokens``: each path's learnt tokens in it, over all ranks."""
        self._steps.update(path for path, count in tokens.items() if count)

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's part of each path's loss; nothing waits for the device."""
        for path, part in parts.items():
            self.sums[path] = self.sums.get(path, torch.zeros_like(part)) + part

    def take(self, device: torch.device) -> dict[str, float]:
        """Return each path's mean over the steps in which it had tokens, and reset."""
        # Counts are over all ranks, so every rank has the same paths in the same order. A path
        # without rows on this rank has no sum here, and gives a zero.
        paths = sorted(self._steps)
        if not paths:
            return {}
        zero = torch.zeros(())
        sums = torch.stack([self.sums.get(path, zero).double().to(device) for path in paths])
        if ranks() > 1:
            dist.all_reduce(sums)
        means = {}
        for path, total in zip(paths, sums.tolist(), strict=True):
            means[path] = total / self._steps[path]
        self.sums.clear()
        self._steps.clear()
        return means


class PathTotals:
    """Each path's loss over a whole evaluation, token by token and over all ranks.

    Args:
        tree: of the paths.
    """

    def __init__(self, tree: AdapterTree) -> None:
        # Ranks exchange numbers, so a path is sent as its index here, which is the same on all.
        self._order = ["", *tree.paths()]
        self._sums: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    def table(
        self, logits: Tensor, labels: Tensor, paths: Sequence[Blend], *, shift: bool
    ) -> Tensor:
        """Return (rows, 3), float64: the path's place, the row's summed loss, its learnt tokens.

        If several ranks evaluate, each has to call this.
        """
        sums, tokens = row_losses(logits, labels, shift=shift)
        names = list(map(spelled, paths))
        self._add_blends(names, sums.device)
        places = [self._order.index(name) for name in names]
        which = uploaded(torch.tensor(places, dtype=torch.float64, device="cpu"), sums.device)
        # float64 holds every count of tokens and every place exactly.
        return torch.stack([which, sums.double(), tokens.double()], dim=1)

    def add(self, table: Tensor) -> None:
        """Add the rows of a table to the totals."""
        for which, loss, tokens in table.tolist():
            name = self._order[int(which)]
            self._sums[name] = self._sums.get(name, 0.0) + loss
            self._tokens[name] = self._tokens.get(name, 0) + int(tokens)

    def means(self) -> dict[str, float]:
        """Return the mean over each path's tokens; paths without learnt tokens are left out."""
        return {name: self._sums[name] / tokens for name, tokens in self._tokens.items() if tokens}

    def losses(self) -> dict[str, tuple[float, int]]:
        """Return each path's mean and its learnt tokens."""
        return {name: (mean, self._tokens[name]) for name, mean in self.means().items()}

    def _add_blends(self, names: Sequence[str], device: torch.device) -> None:
        """Give every blend a place, the same on all ranks."""
        strange = sorted(set(names) - set(self._order))
        if ranks() > 1:
            # Most batches have no blend on any rank. Then only one number is exchanged.
            some = torch.tensor(len(strange), device=device)
            dist.all_reduce(some)
            strange = blends_of_all(strange, device) if int(some) else []
        self._order += [name for name in strange if name not in self._order]
