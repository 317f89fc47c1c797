"""Make the adapters of fresh nodes when a tree meets its base: only the base knows the shapes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import LoraTreeError
from ..sites.targets import fresh_adapter, patterns_of_a_tree
from ..tree import AdapterTree

__all__ = ["settle_fresh"]


def settle_fresh(tree: AdapterTree, base: nn.Module, paths: Iterable[str]) -> None:
    """Give the fresh nodes among ``paths`` their adapters: all of them, or on an error none.

    Raises:
        BaseMismatch: a node targets nothing in this base; names the node.
    """
    made = {}
    patterns = patterns_of_a_tree()  # one budget of work for all nodes
    for path in paths:
        fresh = tree[path].fresh
        if fresh is None:
            continue
        try:
            # Tensors made under the caller's inference_mode could never train.
            with torch.inference_mode(False):
                spec = tree.defaults.complete(fresh, path)
                made[path] = fresh_adapter(base, spec, base_name=tree.base, patterns=patterns)
        except LoraTreeError as error:
            raise error.within(path) from error
    # Only now, so that an error leaves every node fresh.
    for path, adapter in made.items():
        tree.replace(tree[path].holding(adapter))
