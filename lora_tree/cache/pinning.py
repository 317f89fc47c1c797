"""Hold the adapters that a base is about to use, on the device where the base is now."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..engine.behaviour import Ahead
from .cache import Cache, Hold
from .link import link_to

__all__ = ["Pinning"]


class Pinning:
    """Holds adapters in a cache, and has the cache follow a base that was moved.

    It refers to the base and not to the `TreeModel`. The model refers to it, so a reference back
    would be a cycle, and an unused model would keep its memory until the garbage collector runs.
    """

    def __init__(self, cache: Cache, base: nn.Module) -> None:
        self._cache, self._base = cache, base
        self._home = _device_of(base)

    def __call__(self, paths: Iterable[str], ahead: Ahead | None = None) -> Hold:
        """Return a hold on some nodes' adapters; arguments and errors are those of `Cache.hold`."""
        home = _device_of(self._base)
        if home != self._home:
            # torch has no hook for `base.to(…)`, so the move is noticed here, at the next request.
            self._cache.follow(link_to(self._base))
            self._home = home
        return self._cache.hold(paths, ahead)


def _device_of(base: nn.Module) -> torch.device | None:
    """Return the device of a base's first parameter, which changes when the base is moved.

    Called at every switch, and so cheaper than `link_to`, which looks at every parameter.
    """
    first = next(base.parameters(), None)
    return None if first is None else first.device
