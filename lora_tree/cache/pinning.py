"""Pins for what a base is about to do: the adapters of some nodes, held where the base is now."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .cache import Cache, Hold
from .link import link_to

__all__ = ["Pinning"]


class Pinning:
    """Hold adapters in a cache, which follows the base when that was moved.

    It holds no reference to the model, so that an unused model is freed at once.
    """

    def __init__(self, cache: Cache, base: nn.Module) -> None:
        self._cache, self._base = cache, base
        self._home = _home(base)

    def __call__(self, paths: Iterable[str]) -> Hold:
        """Return a hold of some nodes' adapters; raises as `Cache.hold`."""
        home = _home(self._base)
        if home != self._home:
            self._cache.follow(link_to(self._base))
            self._home = home
        return self._cache.hold(paths)


def _home(base: nn.Module) -> torch.device | None:
    """Where a base's first parameter is: cheap to ask, and another one after the base was moved."""
    first = next(base.parameters(), None)
    return None if first is None else first.device
