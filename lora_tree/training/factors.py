"""The factors that train, as parameters of one module, so that optimisers and checkpoints see them.

    factors./fr.<module with / for dots>/A       (r, in), fp32 or wider, or as asked; where the module's weight is
    factors./fr/legal.…                          a node each, under its path

Law: what stands here under a path is what the tree holds for it. A node may have been renamed, replaced or removed
since it trained last; before anybody trains again, its parameters go along with it, or go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import StateError, listing
from ..lowrank import LowRank, is_sharded
from ..tree import AdapterTree

__all__ = ["Factors", "path_of"]

_DOT = "\N{ONE DOT LEADER}"


class Factors(nn.ModuleDict):
    """Node → its factors as parameters."""

    def follow(self, tree: AdapterTree) -> None:
        """Take every node's parameters to the path under which the tree holds them now; drop those it holds no more."""
        if not self:
            return
        held = {
            id(parameter): module for module in self.values() for parameter in module.parameters()
        }
        self.clear()
        for path in tree.paths():
            loaded = tree[path].loaded
            tensors = (
                [t for value in loaded.modules.values() for t in value.tensors]
                if loaded is not None
                else []
            )
            owners = {id(held.get(id(t))): held.get(id(t)) for t in tensors}
            if len(owners) == 1 and (owner := next(iter(owners.values()))) is not None:
                self[_key(path)] = owner

    def own(
        self,
        path: str,
        adapter: Adapter,
        dtype: torch.dtype | None = torch.float32,
        places: Mapping[str, torch.device] | None = None,
    ) -> Adapter:
        """The node's adapter with its factors copied into parameters of this module; the same one if they are.

        Args:
            path: the node.
            adapter: what the tree holds for it.
            dtype: of the parameters, or wider where the factors are; None: as the factors are.
            places: module → where its factors compute; None: they stay where they are.
        """
        places = places or {}
        if _key(path) in self and _as_asked(adapter, dtype):
            self._move(adapter, places)
            return adapter
        node = _NodeFactors(dtype)
        modules = {n: node.take(n, v, places.get(n, v.device)) for n, v in adapter.modules.items()}
        owned = replace(adapter, modules=modules, errors={}, rounded=frozenset())
        node.adapter = owned
        self[_key(path)] = node
        return owned

    def _move(self, adapter: Adapter, places: Mapping[str, torch.device]) -> None:
        """Let parameters follow a base that was moved. They stay the same objects, for optimisers have them."""
        for name, value in adapter.modules.items():
            for tensor in value.tensors:
                if tensor.device != places.get(name, tensor.device) and not is_sharded(tensor):
                    gradient, tensor.grad = tensor.grad, None
                    tensor.data = tensor.data.to(places[name])
                    tensor.grad = None if gradient is None else gradient.to(places[name])

    # ------------------------------------------------------------------ where they are sharded
    def shown(self, path: str, adapter: Adapter) -> Adapter:
        """What the tree holds for a node, in the parameters that stand here now; the same one if it is in those.

        Sharding puts others in their place: a part of each between forwards, whole ones while one runs.
        """
        node = self._modules.get(_key(path))
        if not isinstance(node, _NodeFactors) or adapter is not node.adapter:
            return adapter
        node.used = node.shown()
        return node.used

    @property
    def moved(self) -> bool:
        """Other parameters stand here now than when they were last asked for."""
        return any(
            isinstance(n, _NodeFactors) and n.used is not None and n.shown() is not n.used
            for n in self.values()
        )

    @property
    def sharded(self) -> bool:
        """Several ranks hold a part of every factor each."""
        return any(is_sharded(parameter) for parameter in self.parameters())

    def check_sharded(self, paths: Iterable[str], dtype: torch.dtype | None) -> None:
        """Sharded factors stay what they are: nobody could shard new ones, or spread a change of what trains.

        Raises:
            StateError: other nodes are to train than when they were sharded, or in another dtype.
        """
        if not self.sharded:
            return
        held, chosen = set(self.paths), set(paths)
        if held != chosen:
            raise StateError(
                f"the factors of {listing(sorted(held))} are sharded, and {listing(sorted(chosen)) or 'nothing'} is to "
                "train",
                "say what trains before fully_shard, and the same after it; for other nodes attach again",
            )
        for key, node in self.items():
            if (
                isinstance(node, _NodeFactors)
                and node.adapter is not None
                and not _as_asked(node.adapter, dtype)
            ):
                raise StateError(
                    f"{path_of(key)}: its factors are sharded, and keep their dtype", "dtype=None"
                )

    def refresh(self, tree: AdapterTree, within: nn.Module) -> None:
        """Let the tree hold the parts that this rank has, where factors were sharded, in some module ``within``."""
        for module in within.modules():
            reshard: Callable[[], object] | None = getattr(module, "reshard", None)
            if reshard is not None:  # a forward without a backward leaves whole ones
                reshard()
        for key, node in self.items():
            path = path_of(key)
            if (
                isinstance(node, _NodeFactors)
                and path in tree
                and tree[path].loaded is node.adapter is not None
            ):
                now = node.shown()
                if now is not node.adapter:
                    tree.replace(tree[path].with_loaded(now))
                    node.adapter = now

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
        return [
            path_of(key) for key, m in self.items() if any(p.requires_grad for p in m.parameters())
        ]

    @property
    def paths(self) -> list[str]:
        """All nodes whose factors are here."""
        return [path_of(key) for key in self]


class _NodeFactors(nn.Module):
    """One node's factors; their names are the modules', as `_slashed` writes them."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._dtype = dtype
        self._kept: dict[int, tuple[Adapter, Adapter]] = {}
        self.adapter: Adapter | None = None
        self.used: Adapter | None = None

    def take(self, name: str, value: LowRank, device: torch.device) -> LowRank:
        """Copies of ``value``'s factors on ``device``, as parameters of this module, and the value made of them."""
        dtype = _dtype(value, self._dtype)
        name = _slashed(name)

        def parameter(part: str, tensor: Tensor) -> nn.Parameter:
            made = nn.Parameter(tensor.detach().to(device, dtype, copy=True), requires_grad=False)
            self.register_parameter(f"{name}/{part}", made)
            return made

        bias = None if value.bias is None else parameter("bias", value.bias)
        return replace(value, A=parameter("A", value.A), B=parameter("B", value.B), bias=bias)

    def shown(self) -> Adapter:
        """`adapter` in the parameters that stand here now; the same object for the same parameters."""
        assert self.adapter is not None
        first = id(next(iter(self._parameters.values()), None))  # they are exchanged all together
        made = self._kept.get(first)
        if made is None or made[0] is not self.adapter:
            values = {
                name: self._shown(name, value) for name, value in self.adapter.modules.items()
            }
            same = all(values[name] is value for name, value in self.adapter.modules.items())
            if len(self._kept) > 3:
                self._kept.clear()
            made = self._kept[first] = (
                self.adapter,
                self.adapter if same else replace(self.adapter, modules=values),
            )
        return made[1]

    def _shown(self, name: str, value: LowRank) -> LowRank:
        name, held = _slashed(name), self._parameters
        A, B, bias = held[f"{name}/A"], held[f"{name}/B"], held.get(f"{name}/bias")
        if A is value.A and B is value.B:
            return value
        assert A is not None and B is not None  # noqa: PT018
        return replace(value, A=A, B=B, bias=bias)


def _slashed(name: str) -> str:
    """A module's name within a parameter's: torch reserves the dot.

    A slash and a tilde of its own are written as in a JSON pointer (RFC 6901), so that no two names become one.

    >>> _slashed("layers.0.q_proj"), _slashed("to/k.0")
    ('layers/0/q_proj', 'to~1k/0')
    """
    return name.replace("~", "~0").replace("/", "~1").replace(".", "/")


def _dtype(value: LowRank, asked: torch.dtype | None) -> torch.dtype:
    if asked is None:
        return value.dtype
    if (
        value.dtype.itemsize == 1
    ):  # an 8-bit float, which torch promotes to nothing; any other holds its numbers
        return asked
    return torch.promote_types(value.dtype, asked)


def _as_asked(adapter: Adapter, dtype: torch.dtype | None) -> bool:
    return all(_dtype(v, dtype) == v.A.dtype == v.B.dtype for v in adapter.modules.values())


def path_of(name: str) -> str:
    """The node to which a submodule of `Factors`, or a parameter in one, belongs.

    >>> path_of("/fr/v1․5.model/layers/0/q_proj/A")
    'fr/v1.5'
    """
    return name.partition(".")[0].removeprefix("/").replace(_DOT, ".")


def _key(path: str) -> str:
    """A node's path as the name of a submodule. The slash makes it one that no attribute of a module has."""
    return "/" + path.replace(".", _DOT)
