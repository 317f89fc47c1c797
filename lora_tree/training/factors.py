"""The factors that train, as parameters of one module, so that optimisers and checkpoints see them.

    factors.fr.<module with / for dots>/A        (r, in), fp32 or wider, or as asked
    factors.fr/legal.…                           a node each, under its path

Law: what stands here under a path is what the tree holds for it. A node may have been renamed, replaced or removed
since it trained last; before anybody trains again, its parameters go along with it, or go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..lowrank import LowRank
from ..tree import AdapterTree

__all__ = ["Factors"]

_DOT = "\N{ONE DOT LEADER}"


class Factors(nn.ModuleDict):
    """Node → its factors as parameters."""

    def follow(self, tree: AdapterTree) -> None:
        """Take every node's parameters to the path under which the tree holds them now; drop those it holds no more."""
        if not self:
            return
        held = {id(parameter): module for module in self.values() for parameter in module.parameters()}
        self.clear()
        for path in tree.paths():
            loaded = tree[path].loaded
            tensors = [t for value in loaded.modules.values() for t in value.tensors] if loaded is not None else []
            owners = {id(held.get(id(t))): held.get(id(t)) for t in tensors}
            if len(owners) == 1 and (owner := next(iter(owners.values()))) is not None:
                self[_key(path)] = owner

    def own(self, path: str, adapter: Adapter, dtype: torch.dtype | None = torch.float32) -> Adapter:
        """The node's adapter with its factors copied into parameters of this module; the same one if they are.

        Args:
            path: the node.
            adapter: what the tree holds for it.
            dtype: of the parameters, or wider where the factors are; None: as the factors are.
        """
        as_asked = all(_dtype(v, dtype) == v.A.dtype == v.B.dtype for v in adapter.modules.values())
        if _key(path) in self and as_asked:
            return adapter
        node = _Node(dtype)
        owned = replace(
            adapter, modules={n: node.take(n, v) for n, v in adapter.modules.items()}, errors={}, rounded=frozenset()
        )
        self[_key(path)] = node
        return owned

    def train_only(self, paths: Iterable[str]) -> None:
        """These nodes train, the others are frozen."""
        chosen = {_key(path) for path in paths}
        for key, module in self.items():
            module.requires_grad_(key in chosen)

    def of(self, path: str) -> list[nn.Parameter]:
        """A node's parameters, A and B of every module."""
        return list(self[_key(path)].parameters())

    @property
    def training_paths(self) -> list[str]:
        """The nodes that train."""
        return [key.replace(_DOT, ".") for key, m in self.items() if any(p.requires_grad for p in m.parameters())]


class _Node(nn.Module):
    """One node's factors; their names are the modules' with ``/`` for dots."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._dtype = dtype

    def take(self, name: str, value: LowRank) -> LowRank:
        """Copies of ``value``'s factors as parameters of this module, and the value made of them."""
        dtype = _dtype(value, self._dtype)

        def parameter(part: str, tensor: Tensor) -> nn.Parameter:
            made = nn.Parameter(tensor.detach().to(dtype, copy=True), requires_grad=False)
            self.register_parameter(f"{name.replace('.', '/')}/{part}", made)
            return made

        bias = None if value.bias is None else parameter("bias", value.bias)
        return replace(value, A=parameter("A", value.A), B=parameter("B", value.B), bias=bias)


def _dtype(value: LowRank, asked: torch.dtype | None) -> torch.dtype:
    return value.dtype if asked is None else torch.promote_types(value.dtype, asked)


def _key(path: str) -> str:
    """A node's path as the name of a submodule: torch reserves the dot."""
    return path.replace(".", _DOT)
