"""Adapter: one node's own increments, module name → LowRank, its overrides, and the base they were
made for.

A frozen value that is compared by identity and needs no model. Names are sorted, so nothing that is
computed from an adapter, and no byte that is written of it, depends on the order in which it was
put together.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from .carried import is_own
from .errors import BaseMismatch, LoraTreeError, SpecError, plural
from .given import unchecked
from .lowrank import LowRank
from .lowrank.cast import cast, differs
from .nesting import Nesting
from .overlay import apart
from .override import Override, tensor_owner
from .storage import as_path, storage
from .weights import GivenWeight, Weight, as_weight, check_matched

__all__ = ["Adapter"]

_EMPTY: Mapping[str, Any] = MappingProxyType({})
"""One empty mapping that all adapters share: most have no overrides, errors or nesting."""


# With eq=False an object keeps its own hash. Plans and caches know an adapter by its identity; a
# comparison of fields would read every factor, and mappings can't be hashed at all.
@dataclass(frozen=True, eq=False)
class Adapter:
    """Increments of a base's modules, and replacements of its tensors.

    Args:
        modules: the name of a module (``model.layers.0.self_attn.q_proj``) or of a raw parameter
            (``model.layers.0.mlp.experts.down_proj``) → its `LowRank`. For an
            ``nn.MultiheadAttention`` named ``attn``, ``attn`` is its in-projection and
            ``attn.out_proj`` its out-projection.
        base: the base it was made for, as its maker named it.
        config: fields of the maker's ``adapter_config.json`` that do not change the value; kept for
            a round trip.
        unchanged: tensors of the base that the adapter carries (a frozen bias, an embedding saved
            beside its adapter): parameter name → value. Binding the adapter compares them with the
            base's own, in any dtype; one that differs is an override, and a warning says so.
        nesting: module → its raw parameters in the order in which the base registers them; needed
            only to write two or more parameters of one module as PEFT does.
        assumed: the modules in `nesting` whose order a file did not say; `renested` corrects them.
        errors: module → relative error ‖ΔW − ΔW'‖ / ‖ΔW‖ that a truncation left; empty if none was
            made. Where a base gives several modules one name, an upper bound for their sum.
        rounded: the modules whose factors `to` rounded; `errors` does not count that.
        overrides: the name of a tensor of the base (``score.weight``) → its replacement.

    Raises:
        SpecError: a field has the wrong type; names the module.

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
    overrides: Mapping[str, Override] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(unchecked(self.modules), Mapping):
            raise SpecError(
                "an adapter's modules are a mapping from names to LowRanks, "
                f"got {type(self.modules).__name__}"
            )
        for name, value in self.modules.items():
            if not isinstance(name, str) or not name:
                raise SpecError(
                    f"an adapter's modules are named by non-empty strings, got {name!r}"
                )
            if not isinstance(value, LowRank):
                raise SpecError(f"{name}: expected a LowRank, got {type(value).__name__}")
        self._check_others()
        # Copies: a caller may go on changing the dictionaries that it gave.
        for attribute in ("modules", "config", "unchanged", "nesting", "errors", "overrides"):
            object.__setattr__(self, attribute, _frozen(getattr(self, attribute)))

    def _check_others(self) -> None:
        """Check every field but the modules.

        Raises:
            SpecError: a field has the wrong type.
        """
        if self.base is not None and not isinstance(unchecked(self.base), str):
            raise SpecError(f"an adapter's base: expected a name or None, got {self.base!r:.80}")
        for attribute in ("config", "unchanged", "nesting", "errors", "overrides"):
            given = unchecked(getattr(self, attribute))
            if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
                raise SpecError(
                    f"an adapter's {attribute}: expected a mapping from strings, got {given!r:.80}"
                )
        for name, tensor in self.unchanged.items():
            if not isinstance(unchecked(tensor), Tensor):
                kind = type(tensor).__name__
                raise SpecError(f"{name}: unchanged: expected a tensor, got {kind}")
        for name, override in self.overrides.items():
            if not isinstance(unchecked(override), Override):
                kind = type(override).__name__
                raise SpecError(f"{name}: overrides: expected an Override, got {kind}")
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
    def module_names(self) -> list[str]:
        """The modules that the adapter changes: first those with increments, then those with
        overrides only.
        """
        owners = [tensor_owner(tensor)[0] for tensor in self.overrides]
        return list(dict.fromkeys([*self.modules, *owners]))

    @property
    def numel(self) -> int:
        """The number of elements in all factors and overrides."""
        return sum(tensor.numel() for _, tensor in self.named_tensors())

    @property
    def nbytes(self) -> int:
        """The bytes of all factors and overrides, in the dtypes that they have in memory."""
        factors = sum(value.nbytes for value in self.modules.values())
        return factors + sum(override.nbytes for override in self.overrides.values())

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) for every tensor that may train: factors under the name of their
        module, overrides under that of the base's tensor.
        """
        for name, value in self.modules.items():
            for tensor in value.tensors:
                yield name, tensor
        for name, override in self.overrides.items():
            yield name, override.values

    @property
    def is_trainable(self) -> bool:
        """True if a factor or an override is a parameter, which an optimiser may have changed."""
        if any(value.is_trainable for value in self.modules.values()):
            return True
        return any(override.is_trainable for override in self.overrides.values())

    @property
    def trains(self) -> bool:
        """True if a factor or an override requires gradients."""
        if any(value.trains for value in self.modules.values()):
            return True
        return any(override.trains for override in self.overrides.values())

    @property
    def error(self) -> float:
        """The largest relative error that a truncation left in any module; 0.0 if none was made."""
        return max(self.errors.values(), default=0.0)

    def __len__(self) -> int:
        return len(self.modules)

    def __bool__(self) -> bool:
        # `len` counts increments. Without this, an adapter with overrides alone would be falsy.
        return bool(self.modules or self.overrides or self.unchanged)

    def __repr__(self) -> str:
        ranks = "/".join(map(str, sorted(set(self.ranks.values()))))
        overrides = f", {plural(len(self.overrides), 'override')}" if self.overrides else ""
        modules = plural(len(self), "module")
        return f"Adapter({modules}, r={ranks or '-'}{overrides}, base={self.base!r})"

    # ------------------------------------------------------------------ copies
    def __reduce__(self) -> tuple[type[Adapter], tuple[Any, ...]]:
        """Support pickle, with every tensor in a buffer of its own; see `apart`."""
        return Adapter, self.with_tensors(apart)._arguments()

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        # Not by way of `__reduce__`, which gives each tensor a buffer of its own first. deepcopy
        # copies a buffer that several tensors share once, and the copies share it again.
        return Adapter(*copy.deepcopy(self._arguments(), memo))

    def _arguments(self) -> tuple[Any, ...]:
        """Return the arguments that make an equal value, in types that pickle supports."""
        found = []
        for each in fields(self):
            value = getattr(self, each.name)
            found.append(dict(value) if isinstance(value, MappingProxyType) else value)
        return tuple(found)

    # ------------------------------------------------------------------ the algebra
    def map(self, change: Callable[[LowRank], LowRank]) -> Adapter:
        """Return the adapter with every module's value changed; an error names the module."""
        modules: dict[str, LowRank] = {}
        for name, value in self.modules.items():
            try:
                modules[name] = change(value)
            except LoraTreeError as error:
                raise error.within(name) from error
        return replace(self, modules=modules)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Adapter:
        """Return the adapter with ``change(tensor)`` in place of each tensor; shapes must stay."""
        overrides = {}
        for name, override in self.overrides.items():
            overrides[name] = override.with_values(change(override.values))
        return replace(
            self,
            modules={name: value.with_tensors(change) for name, value in self.modules.items()},
            unchanged={name: change(tensor) for name, tensor in self.unchanged.items()},
            overrides=overrides,
        )

    def scaled(self, by: GivenWeight) -> Adapter:
        """Return ``by`` times every increment.

        Args:
            by: a number, or a number for each module, ``{"default": 1, "*.down_proj": 0.5}``. A
                module whose number is 0 is left out.

        Raises:
            SpecError: ``by`` is no finite number, or makes a scale that is not finite; names the
                module. Or a pattern matches no module.

        >>> import torch
        >>> fr = Adapter({"q": LowRank(torch.ones(1, 4), torch.ones(2, 1))})
        >>> fr.scaled(0.5).modules["q"].dense()[0, 0].item()
        0.5
        """
        if isinstance(by, int | float):
            return self.map(lambda value: value.scaled(by))
        weight = as_weight(by, "scaled")
        check_matched([("scaled", weight, self.module_names)])
        return self.weighed(weight)

    def weighed(self, weight: Weight) -> Adapter:
        """Return the adapter with each increment's scale multiplied by its module's weight.

        Modules of weight 0 are left out, with their overrides and carried tensors. For the
        library's own use: unlike `scaled` it accepts patterns that match no module.
        """
        if isinstance(weight, float):
            return self.scaled(weight)
        modules: dict[str, LowRank] = {}
        for name, value in self.modules.items():
            number = weight.of(name)
            # A zero is left out, not multiplied: 0 · inf is NaN.
            if number == 0.0:
                continue
            try:
                modules[name] = value.scaled(number)
            except LoraTreeError as error:
                raise error.within(name) from error

        def counts(tensor: str) -> bool:
            return weight.of(tensor_owner(tensor)[0]) != 0.0

        return replace(
            self,
            modules=modules,
            overrides={tensor: own for tensor, own in self.overrides.items() if counts(tensor)},
            unchanged={tensor: own for tensor, own in self.unchanged.items() if counts(tensor)},
        )

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Adapter:
        """Return the adapter on another device, or with its factors rounded to another dtype.

        `rounded` of the result names the modules whose factors lost digits. Overrides keep their
        dtype.

        Raises:
            SpecError: a finite factor is too large for the dtype; names the module.

        >>> import torch
        >>> third = LowRank(torch.full((1, 2), 1 / 3), torch.ones(2, 1))
        >>> exact = LowRank(third.B.mT, third.B)
        >>> Adapter({"q": third, "v": exact}).to(dtype=torch.bfloat16).rounded
        frozenset({'q'})
        """
        moved = self.map(lambda value: cast(value, device, dtype))
        lost = [name for name, value in moved.modules.items() if differs(self.modules[name], value)]
        overrides = {}
        for name, override in self.overrides.items():
            overrides[name] = override.with_values(override.values.to(device=device))
        return replace(moved, rounded=self.rounded.union(lost), overrides=overrides)

    def truncate(self, rank: int | None = None, *, max_error: float | None = None) -> Adapter:
        """Return the nearest adapter of a smaller rank, module by module; `errors` says how near.

        Args:
            rank, max_error: as for `LowRank.truncate`, for each module.

        Raises:
            SpecError: a bound makes no sense, or both can't be met; names the module.

        >>> import torch
        >>> fr = Adapter({"q": LowRank(torch.eye(2, 4), torch.diag(torch.tensor([4.0, 3.0])))})
        >>> short = fr.truncate(1)
        >>> short.ranks, round(short.error, 3)
        ({'q': 1}, 0.6)
        """
        errors: list[float] = []

        def cut(value: LowRank) -> LowRank:
            short, _, relative_error = value.truncate(rank, max_error=max_error)
            # `map` keeps the order, so the n-th error belongs to the n-th module.
            errors.append(relative_error)
            return short

        short = self.map(cut)
        left = {name: error for name, error in zip(self.modules, errors, strict=True) if error}
        return replace(short, errors=left)

    def renested(self, order: Mapping[str, Sequence[str]]) -> Adapter:
        """Return the adapter with its raw parameters in the order in which the base has them.

        A PEFT file tells two parameters of one module apart only by the order in which the base
        registers them. If the order was assumed, increments move to the parameter that they belong
        to; if the names were known, only `nesting` changes.

        Args:
            order: module → all its parameters, as the base registers them. Other modules stay as
                they are.

        Raises:
            SpecError: ``order`` is no such mapping.

        >>> import torch
        >>> up, down = (LowRank(torch.ones(1, 2, n), torch.ones(1, n, 2)) for n in (3, 4))
        >>> guess = Adapter(
        ...     {"x.up": up, "x.down": down}, nesting={"x": ("up", "down")}, assumed=frozenset("x")
        ... )
        >>> guess.renested({"x": ("down", "up")}).modules["x.down"] is up
        True
        """
        known, moved = Nesting(self.nesting, self.assumed).settled(order, self.modules)

        def name_of(name: str) -> str:
            return moved.get(name, name)

        return replace(
            self,
            modules={name_of(name): value for name, value in self.modules.items()},
            errors={name_of(name): error for name, error in self.errors.items()},
            rounded=frozenset(map(name_of, self.rounded)),
            nesting=known.orders,
            assumed=known.assumed,
        )

    def split_unchanged(self, own: Mapping[str, Tensor]) -> Adapter:
        """Compare the carried tensors (`unchanged`) with the base's own, and return the adapter
        with those that differ as overrides.

        Args:
            own: the base's own tensors, by name.

        Raises:
            BaseMismatch: the base has no tensor of that name, or one of another shape; names it.

        >>> import torch
        >>> carried = Adapter({}, unchanged={"x": torch.ones(2), "y": torch.ones(2)})
        >>> split = carried.split_unchanged({"x": torch.ones(2).bfloat16(), "y": torch.zeros(2)})
        >>> list(split.unchanged), list(split.overrides)
        (['x'], ['y'])
        """
        overrides: dict[str, Override] = {}
        for name, tensor in self.unchanged.items():
            if name not in own:
                raise BaseMismatch(
                    f"{name}: the adapter carries this tensor of its base, this base has none",
                    "attach the base that it was trained on",
                )
            if not is_own(name, tensor, own[name]):
                overrides[name] = Override(tensor)
        if not overrides:
            return self
        unchanged = {name: t for name, t in self.unchanged.items() if name not in overrides}
        # If the adapter has an override of the same tensor already, that one wins.
        return replace(self, unchanged=unchanged, overrides={**overrides, **self.overrides})

    # ------------------------------------------------------------------ files
    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Read a PEFT folder, or one ``.safetensors`` file of kohya's or diffusers'.

        The keys of a file say which it is.

        Raises:
            FormatError: the files are broken or incomplete; names the file and the key.
            UnsupportedAdapter: the adapter is of a kind that does not add up to W + B·A.
        """
        # The formats import this module, so it can't import them: see `storage`.
        return storage().read_adapter(as_path(folder))

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        form: Literal["peft", "kohya", "diffusers", "mlx"] = "peft",
    ) -> None:
        """Write a PEFT folder, or a file of an image format; its bytes depend on the value alone.

        The folder or file appears whole or not at all.

        Args:
            folder: the folder to write. The image formats write one file: its name ends in
                ``.safetensors``, or for ``diffusers`` it is the folder in which
                ``load_lora_weights`` looks for one.
            form: ``kohya`` and ``diffusers`` are for modules named by the component of a pipeline,
                ``unet.…``; ``mlx`` is mlx-lm's folder, of one rank.

        Raises:
            FormatError: the format has no way to write this value; names the module and the reason.
            SpecError: there is no such format.
            FolderError: the folder can't be written.
        """
        storage().write_adapter(self, as_path(folder), form)


def _frozen(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a read-only copy, sorted by name."""
    if not mapping:
        return _EMPTY
    return MappingProxyType({name: mapping[name] for name in sorted(mapping)})
