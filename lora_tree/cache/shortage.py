"""The error for a request that exceeds a budget: what each node needs, and the least budget."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from ..budget import format_bytes
from ..engine.ledger import FREE_FIRST
from ..errors import BudgetError, LoraTreeError, listing
from ..storage import Source
from .copies import TreeSource, cache_key
from .pack import tensors
from .tier import Tier

__all__ = ["explain_shortage"]


def explain_shortage(
    error: BudgetError,
    needed: Mapping[str, Source],
    tiers: Sequence[Tier],
    lock: threading.Condition,
) -> BudgetError:
    """Return an error that says how much a whole request needs, in place of one adapter's.

    Args:
        error: the error of the adapter that did not fit; returned as it is if no budget is too
            small for the request, or if the sizes can no longer be read.
        needed: node → source, of the whole request.
        tiers: the cache's, from the outside in.
        lock: the cache's, not held.
    """
    try:
        sizes = {path: _size(source) for path, source in needed.items()}
    except (LoraTreeError, OSError):
        return error
    keys = [cache_key(source) for source in needed.values()]
    # A tier before the last holds one adapter at a time on its way, and
    # none that is sent from the tree.
    sent = [sizes[path] for path, source in needed.items() if not isinstance(source, TreeSource)]
    for tier in tiers:
        others, least = 0, max(sent, default=0)
        if tier is tiers[-1]:
            with lock:
                others = tier.busy_bytes(keys)
            least = sum(sizes.values()) + others
        if tier.budget_bytes is not None and least > tier.budget_bytes:
            return _too_small(tier, sizes, least, others)
    return error


def _size(source: Source) -> int:
    return sum(t.numel() * t.element_size() for t in tensors(source.outline()))


def _too_small(tier: Tier, sizes: dict[str, int], least: int, others: int) -> BudgetError:
    parts = listing(f"{path} {format_bytes(nbytes)}" for path, nbytes in sizes.items())
    in_use = ""
    todo = [
        f"{tier.budget_name}={least} (bytes, {format_bytes(least)}) is the least that is enough"
    ]
    if others:
        in_use = f" beside {format_bytes(others)} that are in use"
        todo.append(FREE_FIRST)
    leaf = next(reversed(sizes))
    return BudgetError(
        f"{leaf}: {format_bytes(least - others)} have to be in memory at once ({parts}){in_use}; "
        f"{tier.budget_name} is {format_bytes(tier.budget_bytes or 0)}",
        *todo,
    )
