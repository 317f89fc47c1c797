"""One node's factors as parameters of a module.

    /fr.<module with / for dots>/A       (r, in), fp32 or wider, or in the dtype asked for
    /fr.<module with / for dots>/B       (out, r)
    /fr.<tensor with / for dots>/override    as the base's tensor, or (rows, dim)

A parameter's name contains the module's name, and torch reserves the dot for nested modules. So
dots become slashes within it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..lowrank import LowRank
from ..override import Override

__all__ = ["NodeFactors", "is_in_dtype", "key_of", "path_of"]

_DOT = "\N{ONE DOT LEADER}"

_MOST_SHOWN = 4
"""Sets of parameters whose adapters are remembered: FSDP2 alternates between two."""


class NodeFactors(nn.Module):
    """One node's factors; the names of its parameters are the modules', as `_slashed` writes them.

    Args:
        dtype: of the parameters, or wider if the factors are; None: as the factors are.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._dtype = dtype
        # id of the first parameter → (`adapter` at that time, the adapter shown over that set of
        # parameters)
        self._shown_before: dict[int, tuple[Adapter, Adapter]] = {}
        self.adapter: Adapter | None = None
        """The adapter that the tree holds."""
        self.used: Adapter | None = None
        """The adapter that `shown` returned last, over the parameters of that time."""

    def take(self, name: str, value: LowRank, device: torch.device) -> LowRank:
        """Copy a value's factors to a device as parameters; return the value made of them."""
        dtype = _training_dtype(value, self._dtype)
        name = _slashed(name)

        def parameter(part: str, tensor: Tensor) -> nn.Parameter:
            # A copy, even if device and dtype stay the same: the tensor may lie in the file's
            # buffer, which another path may use, or in page-locked memory.
            own = tensor.detach().to(device, dtype, copy=True)
            made = nn.Parameter(own, requires_grad=False)
            self.register_parameter(f"{name}/{part}", made)
            return made

        bias = None if value.bias is None else parameter("bias", value.bias)
        return replace(value, A=parameter("A", value.A), B=parameter("B", value.B), bias=bias)

    def take_override(self, tensor: str, override: Override, device: torch.device) -> Override:
        """Copy an override to a device as a parameter; return the override made of it."""
        dtype = _wider(override.values.dtype, self._dtype)
        own = override.values.detach().to(device, dtype, copy=True)
        made = nn.Parameter(own, requires_grad=False)
        self.register_parameter(f"{_slashed(tensor)}/override", made)
        return override.with_values(made)

    def shown(self) -> Adapter:
        """Return `adapter` over the present parameters; for the same parameters, the same object.

        Plans and cached side paths compare values by identity. FSDP2 exchanges all parameters
        together, so the first one identifies the set.
        """
        assert self.adapter is not None
        first = id(next(iter(self._parameters.values()), None))
        known = self._shown_before.get(first)
        if known is not None and known[0] is self.adapter:
            return known[1]
        values: dict[str, LowRank] = {}
        changed = False
        for name, value in self.adapter.modules.items():
            values[name] = self._value_now(name, value)
            changed = changed or values[name] is not value
        overrides: dict[str, Override] = {}
        for name, override in self.adapter.overrides.items():
            held = self._parameters[f"{_slashed(name)}/override"]
            assert held is not None, "torch types a slot as optional; this one is always filled"
            overrides[name] = override.with_values(held)
            changed = changed or overrides[name] is not override
        now = self.adapter
        if changed:
            now = replace(self.adapter, modules=values, overrides=overrides)
        if len(self._shown_before) >= _MOST_SHOWN:
            self._shown_before.clear()
        self._shown_before[first] = (self.adapter, now)
        return now

    def _value_now(self, name: str, value: LowRank) -> LowRank:
        name, held = _slashed(name), self._parameters
        A, B, bias = held[f"{name}/A"], held[f"{name}/B"], held.get(f"{name}/bias")
        if A is value.A and B is value.B:
            return value
        # torch types a slot of `_parameters` as optional; those of a factor are always filled.
        assert A is not None and B is not None  # noqa: PT018
        return replace(value, A=A, B=B, bias=bias)


def is_in_dtype(adapter: Adapter, dtype: torch.dtype | None) -> bool:
    """Return whether factors are in the dtype in which they would train if asked for ``dtype``."""

    def is_right(value: LowRank) -> bool:
        return _training_dtype(value, dtype) == value.A.dtype == value.B.dtype

    if not all(is_right(value) for value in adapter.modules.values()):
        return False
    dtypes = {override.values.dtype for override in adapter.overrides.values()}
    return all(_wider(own, dtype) == own for own in dtypes)


def path_of(name: str) -> str:
    """Return the node to which a submodule of `Factors`, or a parameter in one, belongs.

    >>> path_of("/fr/v1․5.model/layers/0/q_proj/A")
    'fr/v1.5'
    """
    return name.partition(".")[0].removeprefix("/").replace(_DOT, ".")


def key_of(path: str) -> str:
    """Return a node's path as the name of a submodule.

    The slash makes it one that no attribute of a module has.

    >>> path_of(key_of("fr/v1.5"))
    'fr/v1.5'
    """
    return "/" + path.replace(".", _DOT)


def _slashed(name: str) -> str:
    """Return a module's name for use within a parameter's: torch reserves the dot.

    A slash and a tilde of its own are written as in a JSON pointer (RFC 6901), so that no two names
    become one.

    >>> _slashed("layers.0.q_proj"), _slashed("to/k.0")
    ('layers/0/q_proj', 'to~1k/0')
    """
    return name.replace("~", "~0").replace("/", "~1").replace(".", "/")


def _training_dtype(value: LowRank, requested: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which a value trains: the requested one, or its own if that is wider."""
    if requested is None:
        return value.dtype
    if value.dtype.itemsize == 1:
        # torch has no promotion for an 8-bit float. Any dtype that trains holds its numbers.
        return requested
    return torch.promote_types(value.dtype, requested)


def _wider(own: torch.dtype, requested: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which an override trains: the requested one, or its own if wider."""
    return own if requested is None else torch.promote_types(own, requested)
