"""Adapter: one node's own increments, module name → LowRank, with what they were made for.

A value: frozen, comparable by identity, usable without a model. Names are sorted, so nothing that is computed from an
adapter, and no byte that is written of it, depends on the order in which it was put together.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .carried import is_same_tensor, widest
from .errors import BaseMismatch, LoraTreeError, ShapeMismatch, SpecError
from .given import unchecked
from .lowrank import LowRank, concat, same_place
from .storage import as_path, storage

__all__ = ["Adapter", "combine", "over"]


def _frozen(of: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType({name: of[name] for name in sorted(of)})


@dataclass(frozen=True, eq=False)
class Adapter:
    """Increments of a base's modules.

    Args:
        modules: the name of a module (``model.layers.0.self_attn.q_proj``) or of a raw parameter
            (``model.layers.0.mlp.experts.down_proj``) → its `LowRank`. For an ``nn.MultiheadAttention`` named ``attn``,
            ``attn`` is its in-projection and ``attn.out_proj`` its out-projection.
        base: the base it was made for, as its maker named it.
        config: fields of the maker's ``adapter_config.json`` that do not change the value; kept for a round trip.
        unchanged: tensors of the base that came along (a frozen bias, an embedding saved beside its adapter): parameter
            name → value. The base's own must be equal when the adapter is bound to it, whatever dtype it is loaded in.
        nesting: module → its raw parameters in the order in which the base registers them; needed only to write two or
            more parameters of one module as PEFT does.
        assumed: the modules in `nesting` whose order a file did not say; `renested` corrects them.
        errors: module → relative error ‖ΔW − ΔW'‖ / ‖ΔW‖ that a truncation left; empty where none was made.
        rounded: the modules whose factors `to` rounded; `errors` does not count that.

    >>> import torch
    >>> fr = Adapter({"q_proj": LowRank(torch.ones(2, 4), torch.ones(4, 2))}, base="org/model")
    >>> fr.ranks, fr.numel
    ({'q_proj': 2}, 16)
    """

    modules: Mapping[str, LowRank]
    base: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    unchanged: Mapping[str, Tensor] = field(default_factory=dict)
    nesting: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    assumed: frozenset[str] = frozenset()
    errors: Mapping[str, float] = field(default_factory=dict)
    rounded: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not isinstance(unchecked(self.modules), Mapping):
            raise SpecError(
                f"an adapter's modules are a mapping from names to LowRanks, got {type(self.modules).__name__}"
            )
        for name, value in self.modules.items():
            if not isinstance(name, str) or not name:
                raise SpecError(
                    f"an adapter's modules are named by non-empty strings, got {name!r}"
                )
            if not isinstance(value, LowRank):
                raise SpecError(f"{name}: expected a LowRank, got {type(value).__name__}")
        self._check_beside()
        for attribute in ("modules", "config", "unchanged", "nesting", "errors"):
            object.__setattr__(self, attribute, _frozen(getattr(self, attribute)))

    def _check_beside(self) -> None:
        """What stands beside the modules: of the kinds that are said above.

        Raises:
            SpecError: something is not.
        """
        if self.base is not None and not isinstance(unchecked(self.base), str):
            raise SpecError(f"an adapter's base: expected a name or None, got {self.base!r:.80}")
        for attribute in ("config", "unchanged", "nesting", "errors"):
            given = unchecked(getattr(self, attribute))
            if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
                raise SpecError(
                    f"an adapter's {attribute}: expected a mapping from strings, got {given!r:.80}"
                )
        for name, tensor in self.unchanged.items():
            if not isinstance(tensor, Tensor):
                raise SpecError(
                    f"{name}: unchanged: expected a tensor, got {type(tensor).__name__}"
                )
        for name, order in self.nesting.items():
            if not isinstance(order, tuple) or not all(
                isinstance(parameter, str) for parameter in order
            ):
                raise SpecError(f"{name}: nesting: expected a tuple of names, got {order!r:.80}")
        for name, error in self.errors.items():
            if not isinstance(unchecked(error), Real):
                raise SpecError(f"{name}: errors: expected a number, got {error!r:.80}")
        for attribute in ("assumed", "rounded"):
            names = unchecked(getattr(self, attribute))
            if not isinstance(names, (set, frozenset)):
                raise SpecError(
                    f"an adapter's {attribute}: expected a set of names, got {names!r:.80}"
                )

    # ------------------------------------------------------------------ what it is
    @property
    def ranks(self) -> dict[str, int]:
        """Module → rank."""
        return {name: value.rank for name, value in self.modules.items()}

    @property
    def numel(self) -> int:
        """Numbers in all factors."""
        return sum(value.numel for value in self.modules.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, as they are held."""
        return sum(value.nbytes for value in self.modules.values())

    @property
    def error(self) -> float:
        """The largest relative error that a truncation left in any module; 0.0 where none was made."""
        return max(self.errors.values(), default=0.0)

    def __len__(self) -> int:
        return len(self.modules)

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        return f"Adapter({len(self)} modules, r={'/'.join(map(str, ranks)) or '-'}, base={self.base!r})"

    # ------------------------------------------------------------------ copies
    def __reduce__(self) -> tuple[type[Adapter], tuple[Any, ...]]:
        """For pickles, into which torch puts the whole buffer that a tensor lies in; many lie in one."""
        return Adapter, self.with_tensors(_apart)._said()

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        return Adapter(*copy.deepcopy(self._said(), memo))

    def _said(self) -> tuple[Any, ...]:
        """What it was made from."""
        held = (getattr(self, each.name) for each in fields(self))
        return tuple(dict(each) if isinstance(each, MappingProxyType) else each for each in held)

    # ------------------------------------------------------------------ the algebra
    def map(self, change: Callable[[LowRank], LowRank]) -> Adapter:
        """The same adapter with every module's value changed; an error names the module."""
        return replace(
            self,
            modules={name: _named(name, change, value) for name, value in self.modules.items()},
        )

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Adapter:
        """The same adapter with other tensors, of the same shapes, in the place of its own: elsewhere, or filled."""
        return replace(
            self,
            modules={name: value.with_tensors(change) for name, value in self.modules.items()},
            unchanged={name: change(tensor) for name, tensor in self.unchanged.items()},
        )

    def scaled(self, by: float) -> Adapter:
        """``by`` times every increment."""
        return self.map(lambda value: value.scaled(by))

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Adapter:
        """The same adapter on another device, or rounded to another dtype; `rounded` says which modules that changed.

        Raises:
            SpecError: a finite factor is too large for the dtype; names the module.

        >>> import torch
        >>> third = LowRank(torch.full((1, 2), 1 / 3), torch.ones(2, 1))
        >>> Adapter({"q": third.scaled(0.1), "v": LowRank(third.B.mT, third.B)}).to(dtype=torch.bfloat16).rounded
        frozenset({'q'})
        """
        moved = self.map(lambda value: _cast(value, device, dtype))
        changed = {
            name for name, value in moved.modules.items() if _differs(self.modules[name], value)
        }
        return replace(moved, rounded=self.rounded | changed)

    def truncate(self, rank: int | None = None, *, max_error: float | None = None) -> Adapter:
        """The nearest adapter of a smaller rank, module by module (see `LowRank.truncate`); `errors` says how near.

        Raises:
            SpecError: a bound makes no sense, or both can't be met; names the module.
        """
        cut = {
            n: _named(n, lambda v: v.truncate(rank, max_error=max_error), v)
            for n, v in self.modules.items()
        }
        errors = {name: c.relative_error for name, c in cut.items() if c.relative_error}
        return replace(self, modules={name: c.value for name, c in cut.items()}, errors=errors)

    def renested(self, order: Mapping[str, Sequence[str]]) -> Adapter:
        """The same adapter, with the order in which the base registers its raw parameters made certain.

        A PEFT file tells two parameters of one module apart by that order alone. Where it was assumed, increments
        move to the parameter that they belong to; where the names were known, only `nesting` changes.

        Args:
            order: module → all its parameters, as the base registers them. Other modules stay as they are.

        >>> import torch
        >>> up, down = (LowRank(torch.ones(1, 2, n), torch.ones(1, n, 2)) for n in (3, 4))
        >>> guess = Adapter({"x.up": up, "x.down": down}, nesting={"x": ("up", "down")}, assumed=frozenset("x"))
        >>> guess.renested({"x": ("down", "up")}).modules["x.down"] is up
        True
        """
        names = {name: name for name in self.modules}
        if not isinstance(unchecked(order), Mapping):
            raise SpecError(
                f"expected a mapping from modules to their parameters in order, got {order!r:.80}"
            )
        for module, registered in order.items():
            if isinstance(registered, str) or not isinstance(registered, Sequence):
                raise SpecError(
                    f"{module}: expected its parameters in order, got {registered!r:.80}"
                )
        nesting, assumed = dict(self.nesting), set(self.assumed)
        for module, registered in order.items():
            mine = tuple(p for p in registered if f"{module}.{p}" in self.modules)
            old = self.nesting.get(module, ())
            if module in assumed and set(mine) == set(old):
                names.update(
                    {
                        f"{module}.{was}": f"{module}.{is_}"
                        for was, is_ in zip(old, mine, strict=True)
                    }
                )
                assumed.discard(module)
            if len(mine) > 1 and module not in assumed:
                nesting[module] = mine
        return replace(
            self,
            modules={names[name]: value for name, value in self.modules.items()},
            errors={names[name]: error for name, error in self.errors.items()},
            rounded=frozenset(names[name] for name in self.rounded),
            nesting=nesting,
            assumed=frozenset(assumed),
        )

    # ------------------------------------------------------------------ files
    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Read a PEFT folder (``adapter_config.json`` and ``adapter_model.safetensors``).

        Raises:
            FormatError: the files are broken or incomplete; names the file and the key.
            UnsupportedAdapter: an adapter of a kind that does not add up.
        """
        return storage().read_adapter(as_path(folder))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a PEFT folder; it appears whole or not at all, and its bytes depend on the value alone.

        Raises:
            FormatError: PEFT has no way to write this value; names the module and the reason.
            FolderError: the folder can't be written.
        """
        storage().write_adapter(self, as_path(folder))


def combine(terms: Sequence[tuple[Adapter, float]], *, names: Sequence[str] = ()) -> Adapter:
    """Σ coefficient · adapter, module by module, as one adapter of rank Σr.

    ``base`` comes from the first term that has one. ``config`` holds the fields on which all terms that have a config
    agree: what one of them says alone is not true of the sum. Terms on several devices are brought to the first one's:
    a node that trains is where the base is, its parent where it was read to.

    Args:
        terms: each adapter with its coefficient.
        names: what to call each term in an error, where they have names: the nodes of a tree.

    Raises:
        ShapeMismatch: two terms change one module in different shapes; names the terms and the module.
        BaseMismatch: two terms were made for bases that differ in a tensor they both carry.
        SpecError: a coefficient times a scale is not finite.
    """
    given = unchecked(terms)
    pairs: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], Adapter) for p in pairs):
        raise SpecError(
            f"combine takes (adapter, coefficient) pairs, got {given!r:.80}",
            "combine([(x, 1.0), (y, 0.5)])",
        )
    terms = pairs
    certain = {m: order for a, _ in terms for m, order in a.nesting.items() if m not in a.assumed}
    terms = [(adapter.renested(certain), coefficient) for adapter, coefficient in terms]
    parts: dict[str, dict[int, LowRank]] = {}
    unchanged: dict[str, tuple[int, Tensor]] = {}
    nesting: dict[str, tuple[int, tuple[str, ...]]] = {}
    for i, (adapter, coefficient) in enumerate(terms):
        for name, value in adapter.modules.items():
            mine = parts.setdefault(name, {})
            with _naming(name, names, i):
                mine[i] = value.scaled(coefficient)
            with _naming(name, names, *sorted({next(iter(mine)), i})):
                same_place(next(iter(mine.values())), mine[i])
        for name, tensor in adapter.unchanged.items():
            j, known_tensor = unchanged.setdefault(name, (i, tensor))
            if not is_same_tensor(known_tensor, tensor):
                with _naming(name, names, j, i):
                    raise BaseMismatch("two adapters carry different values of this base tensor")
            unchanged[name] = j, widest(known_tensor, tensor)
        for module, order in adapter.nesting.items():
            j, known = nesting.get(module, (i, ()))
            both = set(known) & set(order)
            if [p for p in known if p in both] != [p for p in order if p in both]:
                with _naming(module, names, j, i):
                    raise ShapeMismatch(
                        f"two adapters order its parameters differently: {known} and {order}"
                    )
            nesting[module] = (j, known) if len(known) >= len(order) else (i, order)
    return Adapter(
        {name: _named(name, _sum, list(values.values())) for name, values in parts.items()},
        base=next((a.base for a, _ in terms if a.base), None),
        config=_agreed([adapter.config for adapter, _ in terms if adapter.config]),
        unchanged={name: tensor for name, (_, tensor) in unchanged.items()},
        nesting={module: order for module, (_, order) in nesting.items()},
        assumed=frozenset().union(*(adapter.assumed for adapter, _ in terms)),
    )


def _sum(values: list[LowRank]) -> LowRank:
    """Σ of some values, on the first one's device."""
    return concat([value.to(device=values[0].device) for value in values])


def over(memory: Tensor) -> Callable[[Tensor], Tensor]:
    """A tensor → the tensor that lies in ``memory`` where that one lies in its own storage. Nothing is copied.

    Args:
        memory: (bytes,) uint8, aligned for every dtype.

    >>> outline = torch.empty(16, dtype=torch.uint8, device="meta")[8:].view(torch.float32)
    >>> over(torch.arange(4.0).view(torch.uint8))(outline)
    tensor([2., 3.])
    """
    whole: dict[
        torch.dtype, Tensor
    ] = {}  # one call a tensor instead of three: an adapter has hundreds

    def there(tensor: Tensor) -> Tensor:
        dtype = tensor.dtype
        if dtype not in whole:
            whole[dtype] = memory[: memory.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        return whole[dtype].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return there


def _agreed(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields that all of these have, with the same value; lists of names in whatever order."""
    if not configs:
        return {}
    first, *others = configs
    agreed = dict(first)
    for other in others:
        for key in [
            key for key in agreed if key not in other or not _same_field(agreed[key], other[key])
        ]:
            del agreed[key]
    return agreed


def _same_field(one: Any, other: Any) -> bool:
    """Whether two values of a field are one; PEFT writes sets of names as lists, in changing order."""
    if isinstance(one, list) and isinstance(other, list):
        return sorted(map(repr, one)) == sorted(map(repr, other))
    return bool(one == other)


def _apart(tensor: Tensor) -> Tensor:
    """The tensor; a copy where it is a part of a larger buffer."""
    if tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size():
        return tensor
    own = tensor.detach().clone()
    if isinstance(tensor, Parameter):
        return Parameter(own, requires_grad=tensor.requires_grad)
    return own.requires_grad_(tensor.requires_grad)


@contextmanager
def _naming(module: str, names: Sequence[str], *of: int) -> Iterator[None]:
    """An error inside gets the terms that it is about, where they have names, and the module before its first line."""
    try:
        yield
    except LoraTreeError as error:
        who = " and ".join(names[i] for i in of) if names else ""
        raise error.within(f"{who}: {module}" if who else module) from error


def _named(name: str, call: Callable[[Any], Any], value: Any) -> Any:
    with _naming(name, ()):
        return call(value)


def _cast(value: LowRank, device: torch.device | str | None, dtype: torch.dtype | None) -> LowRank:
    """`LowRank.to`, where no number may be too large for the dtype."""
    moved = value.to(device=device, dtype=dtype)
    if _loses(value, moved):
        largest = max(float(t.abs().max()) for t in value.tensors if t.numel())
        most = torch.finfo(moved.dtype).max
        if (
            largest > most and value.is_finite
        ):  # some dtypes make it infinite, some their own largest
            raise SpecError(
                f"a factor goes up to {largest:.5g}, {str(dtype)[6:]} to {most:.5g}",
                "keep it in another dtype: bfloat16 and float32 go up to 3e38",
            )
    return moved


def _differs(old: LowRank, new: LowRank) -> bool:
    """The cast changed a number."""
    pairs = zip(old.tensors, new.tensors, strict=True)
    return _loses(old, new) and not all(
        torch.equal(n.to(device=o.device, dtype=o.dtype), o) for o, n in pairs
    )


def _loses(old: LowRank, new: LowRank) -> bool:
    """Some dtype can't hold what the one before could; numbers that are not there (meta) are not lost."""
    pairs = [
        (torch.finfo(o.dtype), torch.finfo(n.dtype))
        for o, n in zip(old.tensors, new.tensors, strict=True)
    ]
    return any(n.max < o.max or n.eps > o.eps for o, n in pairs) and not (
        old.A.is_meta or new.A.is_meta
    )
