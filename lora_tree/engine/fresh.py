"""Make the adapters of fresh nodes when a tree meets its base: only the base knows the shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import LoraTreeError
from ..flattening import NodeTerms, resolved
from ..renaming import Renaming
from ..sites import find_tensor_site, with_tied_rows
from ..sites.targets import fresh_adapter, patterns_of_a_tree
from ..tree import AdapterTree
from .arithmetic import Scratch, add_bias, add_weight, exact_mode

__all__ = ["OwnValue", "settle_fresh"]

OwnValue = Callable[[nn.Module, str], Tensor | None]
"""Returns the base's own numbers of a module's tensor; None if the tensor itself holds them."""


def settle_fresh(
    tree: AdapterTree, base: nn.Module, paths: Iterable[str], own: OwnValue | None = None
) -> None:
    """Give the fresh nodes among ``paths`` their adapters: all of them, or on an error none.

    Args:
        tree: the tree of these nodes.
        base: the model.
        paths: parents before children.
        own: the base's own numbers; None: nothing is merged into it.

    Raises:
        BaseMismatch: a node targets nothing in this base; names the node.
    """
    made: dict[str, Adapter] = {}
    patterns = patterns_of_a_tree()  # one budget of work for all nodes
    for path in paths:
        fresh = tree[path].fresh
        if fresh is None:
            continue
        try:
            # Tensors made under the caller's inference_mode could never train.
            with torch.inference_mode(False):
                spec = tree.defaults.complete(fresh, path)
                made[path] = fresh_adapter(
                    base,
                    spec,
                    base_name=tree.base,
                    patterns=patterns,
                    ground=partial(_ground, tree, base, path, made, own),
                )
        except LoraTreeError as error:
            raise error.within(path) from error
    # Only now, so that an error leaves every node fresh.
    for path, adapter in made.items():
        tree.replace(tree[path].holding(adapter))


def _ground(
    tree: AdapterTree,
    base: nn.Module,
    path: str,
    made: Mapping[str, Adapter],
    own: OwnValue | None,
    tensor: str,
) -> Tensor:
    """Return the value that a base's tensor has on the path of a node's parent, as a switch would
    write it.

    A fresh override is a copy of that value, so that it changes nothing.
    """
    site, attribute = find_tensor_site(base, tensor)
    now: Tensor = getattr(site.module, attribute)
    kept = None if own is None else own(site.module, attribute)
    value = (now if kept is None else kept).detach().to(now.device, copy=True)
    lineage = tree.lineage(path)[:-1]
    terms: NodeTerms = []
    renaming = Renaming(base)
    for node in lineage:
        adapter = made[node] if node in made else tree.adapter(node)
        weight = tree[node].weight
        if adapter is None or weight == 0.0:
            continue
        if not isinstance(weight, float):
            weight, adapter = 1.0, adapter.weighed(weight)
        terms.append((node, weight, with_tied_rows(base, renaming.bound(adapter))))
    with exact_mode(value.device):
        values = []
        for _, weight, adapter in resolved(terms, [lineage]):
            if tensor in adapter.overrides:
                adapter.overrides[tensor].write(value)
            if site.name in adapter.modules:
                values.append(adapter.modules[site.name].scaled(weight).to(device=value.device))
        if attribute == site.bias_name:
            add_bias(value, value, values)
        elif values:
            add_weight(site, value, value, values, Scratch())
    return value
