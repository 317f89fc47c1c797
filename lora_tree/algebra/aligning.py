"""Align adapters: give the raw parameters of all the names that one of them is certain of.

A file may leave open in which order a module registers its raw parameters (`lora_tree.nesting`).
Then the names of its increments are a guess, and an adapter that knows the order settles it. Every
verb that compares or adds up adapters aligns them first: otherwise it would take the increment of
one parameter for that of another.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..adapter import Adapter

__all__ = ["aligned"]


def aligned(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters with raw parameters renamed by the orders that are certain.

    >>> import torch
    >>> from lora_tree import LowRank
    >>> up, down = (LowRank(torch.ones(1, 2, n), torch.ones(1, n, 2)) for n in (3, 4))
    >>> values, other = {"x.up": up, "x.down": down}, {"x.up": down, "x.down": up}
    >>> known = Adapter(other, nesting={"x": ("down", "up")})
    >>> guess = Adapter(values, nesting={"x": ("up", "down")}, assumed=frozenset("x"))
    >>> aligned([guess, known])[0].modules["x.down"] is up
    True
    """
    certain: dict[str, tuple[str, ...]] = {}
    for adapter in adapters:
        for module, order in adapter.nesting.items():
            # An order that a file did not state is a guess, and must not rename another adapter's.
            if module not in adapter.assumed:
                certain[module] = order
    if not certain:
        return list(adapters)  # nearly always: few adapters have raw parameters
    return [adapter.renested(certain) for adapter in adapters]
