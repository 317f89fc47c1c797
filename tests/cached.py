"""A folder of nodes of several sizes over a small base, and a cache whose evicted buffers can't be
read by accident.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import pytest
import torch
from oracle import NET, random_adapter
from torch import Tensor

import lora_tree as lt
from lora_tree.cache.pack import buffer_of
from lora_tree.cache.tier import Tier

RANKS = {"a": 1, "a/b": 3, "a/b/c": 2, "a/d": 1, "e": 2, "e/f": 1, "e/g": 4}
BYTES = {path: 4 * rank * (5 + 6 + 6 + 4) for path, rank in RANKS.items()}


def adapter(path: str, seed: int = 0) -> lt.Adapter:
    drawn = 1000 * seed + sorted(RANKS).index(path)
    return random_adapter(NET, drawn, r=RANKS[path], scale=0.5)


def zoo(folder: Path) -> Path:
    """The nodes of `RANKS`, in files of their own."""
    tree = lt.AdapterTree()
    for path in RANKS:
        tree.add(path, adapter=adapter(path))
    tree.save(folder)
    return folder


def weights(folder: Path, path: str) -> Path:
    return folder / path / "adapter_model.safetensors"


def inputs() -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(7))


def cached(model: lt.TreeModel) -> set[str]:
    """The nodes that the cache holds."""
    tree, tier = model.tree, model.cache._loader.tiers[-1]
    sources = {path: tree[path].source for path in tree.paths() if tree[path].source is not None}
    return {path for path, source in sources.items() if tier.find(source.key) is not None}


def resident_bytes(model: lt.TreeModel) -> int:
    """Return the bytes of the adapters that the host's tier holds."""
    return sum(entry.nbytes for entry in model.cache._loader.tiers[0]._residents.values())


class Evicted(list[Hashable]):
    """The keys that were; what they had is overwritten, unless somebody holds it who may."""

    spared = False


def poison(monkeypatch: pytest.MonkeyPatch) -> Evicted:
    """What is evicted turns to NaN, so that a model which goes on using it is found out."""
    evicted = Evicted()
    plain = Tier.discard

    def discard(self: Tier, key: Hashable) -> None:
        entry = self.find(key)
        plain(self, key)
        if entry is not None and self.budget_bytes is not None:
            evicted.append(key)
            buffer = buffer_of(entry.arrived.adapter)
            assert buffer is not None, "not packed"
            if not evicted.spared:
                buffer.fill_(255)

    monkeypatch.setattr(Tier, "discard", discard)
    return evicted
