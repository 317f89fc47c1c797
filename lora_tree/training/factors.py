"""The factors that train, as parameters of one module, so that optimisers and checkpoints see them.

    factors./fr.<module>/A       each node's under its path, on the device of its module
    factors./fr/legal.…          see `node_factors`

Law: the parameters under a path belong to the adapter that the tree holds for it. A node may
have been renamed, replaced or removed since it trained last. Before any node trains again, its
parameters move with it, or are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from ..adapter import Adapter
from ..errors import StateError, agreeing, listing
from ..lowrank import is_sharded
from ..tree import AdapterTree
from .node_factors import NodeFactors, is_in_dtype, key_of, path_of

__all__ = ["Factors"]


class Factors(nn.ModuleDict):
    """Node → its factors as parameters."""

    def follow(self, tree: AdapterTree) -> None:
        """Move every node's parameters to the path under which the tree holds them; drop others."""
        if not self:
            return
        owners: dict[int, nn.Module] = {}
        for module in self.values():
            for parameter in module.parameters():
                owners[id(parameter)] = module
        # Cleared first: two nodes may have exchanged their names.
        self.clear()
        for path in tree.paths():
            owner = _owner_of(tree[path].loaded, owners)
            if owner is not None:
                self[key_of(path)] = owner

    def own(
        self,
        path: str,
        adapter: Adapter,
        dtype: torch.dtype | None = torch.float32,
        places: Mapping[str, torch.device] | None = None,
    ) -> Adapter:
        """Return the node's adapter with its factors copied into parameters of this module.

        An adapter whose factors are parameters here already is returned as it is.

        Args:
            path: the node.
            adapter: the one that the tree holds for it.
            dtype: of the parameters, or wider if the factors are; None: as the factors are.
            places: module, or overridden tensor → the device where it computes; None: they stay
                where they are.
        """
        places = places or {}
        if key_of(path) in self and is_in_dtype(adapter, dtype):
            self._move(adapter, places)
            return adapter
        node = NodeFactors(dtype)
        modules = {}
        for name, value in adapter.modules.items():
            modules[name] = node.take(name, value, places.get(name, value.device))
        overrides = {}
        for tensor, override in adapter.overrides.items():
            place = places.get(tensor, override.values.device)
            overrides[tensor] = node.take_override(tensor, override, place)
        # The errors of an earlier truncation or rounding do not describe factors that go on
        # training.
        owned = replace(
            adapter, modules=modules, overrides=overrides, errors={}, rounded=frozenset()
        )
        node.adapter = owned
        self[key_of(path)] = node
        return owned

    def _move(self, adapter: Adapter, places: Mapping[str, torch.device]) -> None:
        """Move parameters to where the base is now.

        They stay the same objects: optimisers refer to them.
        """
        for name, tensor in adapter.named_tensors():
            place = places.get(name, tensor.device)
            if tensor.device == place or is_sharded(tensor):
                continue
            # torch refuses new data on another device while a gradient is there.
            gradient, tensor.grad = tensor.grad, None
            tensor.data = tensor.data.to(place)
            if gradient is not None:
                tensor.grad = gradient.to(place)

    def train_only(self, paths: Iterable[str]) -> None:
        """Let these nodes train, and freeze the others."""
        chosen = set(map(key_of, paths))
        for key, module in self.items():
            module.requires_grad_(key in chosen)

    def of(self, path: str) -> list[nn.Parameter]:
        """Return a node's parameters, A and B of every module."""
        return list(self[key_of(path)].parameters())

    @property
    def training_paths(self) -> list[str]:
        """The nodes that train."""
        training = []
        for key, module in self.items():
            if any(parameter.requires_grad for parameter in module.parameters()):
                training.append(path_of(key))
        return training

    @property
    def paths(self) -> list[str]:
        """All nodes whose factors are here."""
        return list(map(path_of, self))

    # ------------------------------------------------------------------ if they are sharded
    def shown(self, path: str, adapter: Adapter) -> Adapter:
        """Return a node's adapter over its present parameters; the same object if it has those.

        Sharding replaces parameters: by this rank's part of each between forwards, and by whole
        ones during a forward.
        """
        if not self._modules:
            return adapter  # nothing ever trained; a fast path, as every switch asks for each node
        node = self._modules.get(key_of(path))
        if not isinstance(node, NodeFactors) or adapter is not node.adapter:
            return adapter
        node.used = node.shown()
        return node.used

    @property
    def moved(self) -> bool:
        """True if the parameters of a node were replaced since the last call of `shown`."""
        for _, node in self._nodes():
            is_other = node.used is not None and node.shown() is not node.used
            if is_other:
                return True
        return False

    @property
    def sharded(self) -> bool:
        """True if each of several ranks holds a part of every factor."""
        return any(map(is_sharded, self.parameters()))

    def check_sharded(self, paths: Iterable[str], dtype: torch.dtype | None) -> None:
        """Refuse to change which factors train, or their dtype, once they are sharded.

        Only FSDP2 could shard new factors, and each rank would have to do the same at the same
        time.

        Raises:
            StateError: other nodes are to train than those that were sharded, or in another dtype.
        """
        if not self.sharded:
            return
        held, chosen = set(self.paths), set(paths)
        if held != chosen:
            wanted = listing(sorted(chosen)) or "nothing"
            raise StateError(
                f"the factors of {listing(sorted(held))} are sharded, and {wanted} "
                f"{agreeing(len(chosen) or 1, 'is', 'are')} to train",
                "call trainable(…) before fully_shard, and with the same nodes after it; "
                "to train other nodes, attach again",
            )
        for path, node in self._nodes():
            if node.adapter is not None and not is_in_dtype(node.adapter, dtype):
                raise StateError(
                    f"{path}: its factors are sharded, and keep their dtype", "dtype=None"
                )

    def refresh(self, tree: AdapterTree, within: nn.Module) -> None:
        """Make the tree hold this rank's parts of the factors, if they were sharded.

        Args:
            tree: of the nodes.
            within: the module that was sharded, and maybe modules in it.
        """
        for module in within.modules():
            # A forward without a backward leaves whole parameters, which the tree must not hold.
            reshard: Callable[[], object] | None = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()
        for path, node in self._nodes():
            if node.adapter is None or path not in tree or tree[path].loaded is not node.adapter:
                continue
            now = node.shown()
            if now is not node.adapter:
                tree.replace(tree[path].with_loaded(now))
                node.adapter = now

    def _nodes(self) -> Iterator[tuple[str, NodeFactors]]:
        for key, node in self.items():
            if isinstance(node, NodeFactors):
                yield path_of(key), node


def _owner_of(adapter: Adapter | None, owners: Mapping[int, nn.Module]) -> nn.Module | None:
    """Return the module whose parameters are all of an adapter's tensors; None if there is none.

    An adapter with tensors of two nodes, or with a new tensor, has none: it gets new parameters.
    """
    if adapter is None:
        return None
    found: nn.Module | None = None
    for _, tensor in adapter.named_tensors():
        owner = owners.get(id(tensor))
        if owner is None or (found is not None and owner is not found):
            return None
        found = owner
    return found
