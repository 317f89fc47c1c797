"""Agreement among ranks: their number, and the blends of their rows.

Ranks add up losses and counts by position, so the order must be the same on all of them. Nodes are
in the tree's order. A blend may be in the rows of one rank alone, so its name is sent to the
others, and all use the sorted names of all ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
import torch.distributed as dist

__all__ = ["blends_of_all", "ranks"]


def ranks() -> int:
    """Return how many processes train together; 1 outside of a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1


def blends_of_all(own_names: Sequence[str], device: torch.device) -> list[str]:
    """Return the names that any rank has, sorted; every rank has to call this.

    Args:
        own_names: this rank's.
        device: where the ranks exchange tensors.
    """
    encoded = json.dumps(sorted(own_names)).encode()
    length = torch.tensor([len(encoded)], dtype=torch.int64, device=device)
    lengths = [torch.zeros_like(length) for _ in range(ranks())]
    dist.all_gather(lengths, length)
    # Ranks exchange tensors of one size.
    longest = max(int(one) for one in lengths)
    padded = encoded + b" " * (longest - len(encoded))
    sent = torch.tensor(list(padded), dtype=torch.uint8, device=device)
    heard = [torch.zeros_like(sent) for _ in range(ranks())]
    dist.all_gather(heard, sent)
    names: set[str] = set()
    for one in heard:
        names.update(json.loads(bytes(one.tolist())))
    return sorted(names)
