"""Draw the next row: first a path, with a temperature, then the path's next row.

    p(path) ∝ rows(path) ** (1 / temperature)        1: as the rows are; ∞: every path alike

A path's rows come in a random order. When all of them have come, a new order is drawn, so that no
row comes twice before that. Temperature sampling as in multilingual pre-training: Arivazhagan et
al. 2019, https://arxiv.org/abs/1907.05019 §4.

Law: the rows of an epoch are a function of the paths, the seed and the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from ..errors import SpecError, plural

__all__ = ["PathSampler"]


class PathSampler(Sampler[int]):
    """A sampler that yields indices of rows, path by path; for a ``DataLoader``.

    Args:
        paths: the path of every row.
        temperature: more than 0, up to ``math.inf``.
        seed: of the draws; with the epoch it decides every one of them.
        length: indices in an epoch; None: as many as rows.

    Raises:
        SpecError: no rows, or a temperature or length that makes no sense.

    >>> sampler = PathSampler(["fr"] * 90 + ["de"] * 10, temperature=math.inf)
    >>> 30 < sum(row >= 90 for row in sampler) < 70
    True
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        temperature: float = 1.0,
        seed: int = 0,
        length: int | None = None,
    ) -> None:
        if not temperature > 0:
            raise SpecError(
                f"temperature must be more than 0, got {temperature!r}",
                "1 draws paths in proportion to their rows, inf equally often",
            )
        if not paths or (length is not None and length < 1):
            raise SpecError(
                f"a sampler needs rows and a length, got {plural(len(paths), 'row')} "
                f"and length {length}"
            )
        self._length = len(paths) if length is None else length
        self._seed = seed
        # A loader that never calls `set_epoch` gets the same order in every epoch.
        self._epoch = 0
        self._rows: dict[str, list[int]] = {}
        for row, path in enumerate(paths):
            self._rows.setdefault(path, []).append(row)
        # Counts are divided by the largest one: at a low temperature a power of the counts
        # themselves would overflow.
        most = max(map(len, self._rows.values()))
        shares = [math.pow(len(rows) / most, 1 / temperature) for rows in self._rows.values()]
        self._shares = torch.tensor(shares, dtype=torch.float64, device="cpu")

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that comes next; data loaders call this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        # A separate generator: the rows must not depend on other code that draws random numbers.
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        rows = list(self._rows.values())
        left: list[list[int]] = [[] for _ in rows]  # of each path, the rows still to come
        drawn = torch.multinomial(self._shares, self._length, replacement=True, generator=generator)
        for which in drawn.tolist():
            if not left[which]:
                # Drawn only when needed: a path that never comes draws nothing, and so does not
                # change the order of the others.
                order = torch.randperm(len(rows[which]), generator=generator, device="cpu")
                left[which] = [rows[which][i] for i in order.tolist()]
            yield left[which].pop()
