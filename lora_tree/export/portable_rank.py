"""Choose the uniform rank of a portable adapter.

    needed     the largest rank of any module, exact or within max_error; times a conv's groups
    allowed    rank=: the needed rank is cut to it
    taken      ceil_rank: rounded up to the next of `ENGINE_RANKS`
    written    a multiple of every module's groups, because PEFT divides r by them

Law: the caller's rank is not exceeded, unless the caller asks for an engine's rank. Without the
caller's rank nothing is cut to make the rank a multiple: it is rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..errors import SpecError
from ..given import check_rank
from ..lowrank import LowRank

__all__ = ["ENGINE_RANKS", "ceil_rank_of", "groups_of", "rank_to_write"]

ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's ``max_lora_rank`` (0.32): an adapter takes the memory of the next one."""


def ceil_rank_of(rank: int) -> int:
    """Return the next rank that an engine allows.

    Raises:
        SpecError: the rank is larger than all of them.

    >>> ceil_rank_of(17)
    32
    """
    found = next((allowed for allowed in ENGINE_RANKS if allowed >= rank), None)
    if found is None:
        raise SpecError(
            f"rank {rank} is over the largest that vLLM serves, {ENGINE_RANKS[-1]}",
            "cut it: rank=…",
        )
    return found


def groups_of(value: LowRank) -> int:
    """Return how many matrices share PEFT's r: the groups of a convolution."""
    is_grouped = value.layout.kind == "conv" and value.A.ndim == 3
    return value.A.shape[0] if is_grouped else 1


def rank_to_write(
    modules: Mapping[str, LowRank], rank: int | None, max_error: float | None, *, ceil_rank: bool
) -> int:
    """Return the one rank to write, a multiple of every module's groups.

    Args:
        modules: name → the exact sum.
        rank, max_error, ceil_rank: as for `portable`.

    Raises:
        SpecError: the bounds make no sense, or can't both be met; names the module.
    """
    step = math.lcm(*(groups_of(value) for value in modules.values()))
    if rank is not None:
        check_rank(rank)
        if rank < step:
            raise SpecError(
                f"rank {rank} is less than the {step} groups of a convolution, which share it",
                f"rank={step} or more",
            )
    needed = 1
    for name, value in modules.items():
        needed = max(needed, _needed(name, value, rank, max_error) * groups_of(value))
    kept = needed if rank is None else min(rank, needed)
    if ceil_rank:
        kept = ceil_rank_of(kept)
    if rank is None or ceil_rank:
        return math.ceil(kept / step) * step
    return kept // step * step


def _needed(name: str, value: LowRank, rank: int | None, max_error: float | None) -> int:
    """Return the rank that one module needs, for each of its groups."""
    if max_error is None:
        return value.rank
    most = None if rank is None else rank // groups_of(value)
    try:
        return value.truncate(most, max_error=max_error).value.rank
    except SpecError as error:
        raise error.within(name) from error
