"""Renaming: convert an adapter's names and factors to those of one base."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..adapter import Adapter
from ..assembly import Assembly, AssemblyNames
from ..errors import BaseMismatch
from ..lowrank import LINEAR, PARAMETER, LowRank
from ..sites import as_site_has_it, is_there, takes_delta
from .renamed import Moving, modules_or_parameters

__all__ = ["Renaming"]


class Renaming:
    """The conversion of adapters to the names and factors of one base.

    Args:
        base: the model, possibly on the meta device.

    >>> base = nn.ModuleDict({"lin": nn.Linear(4, 4)})
    >>> fr = Adapter({"lin": LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    >>> Renaming(base).bound(fr) is fr
    True
    """

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._assembled = AssemblyNames(base) if isinstance(base, Assembly) else None

    def bound(self, adapter: Adapter) -> Adapter:
        """Return the adapter in the base's names; the same object if it has them already.

        A name that neither the base nor a mapping knows is kept: the caller looks for its site, and
        reports that there is none.

        Raises:
            BaseMismatch: factors can't be converted to the parameter that their module is a part of
                today; names the module.
            ShapeMismatch: two names become one, and their increments don't add up.
        """
        if self._assembled is not None:
            return self._assembled.bound(adapter)
        renamed = adapter
        if self._may_change(adapter):
            # Leave inference mode: tensors made in it could never train.
            with torch.inference_mode(False):
                renamed = Moving(self._base, adapter).moved()
        renamed = self._in_layouts_of_sites(renamed)
        if not renamed.nesting:
            return renamed
        return renamed.renested(_registered(self._base, renamed))

    def _in_layouts_of_sites(self, adapter: Adapter) -> Adapter:
        """Give values the layouts of their modules; some files do not state a kernel's size."""
        changed: dict[str, LowRank] = {}
        for name, value in adapter.modules.items():
            own = as_site_has_it(self._base, name, value)
            if own is not value:
                changed[name] = own
        if not changed:
            return adapter
        return replace(adapter, modules={**adapter.modules, **changed})

    def has(self, name: str) -> bool:
        """Return whether the base has a module, or a raw parameter, of that name."""
        return is_there(self._base, name)

    def _may_change(self, adapter: Adapter) -> bool:
        """Return whether a name, or the layout of its factors, may differ in this base.

        The answer is nearly always no, and costs one look-up per name. Only if it is yes, a
        `Moving` asks transformers.
        """
        if any(self._may_move(adapter, name, value) for name, value in adapter.modules.items()):
            return True
        tensor_names = [*adapter.unchanged, *adapter.overrides]
        return not all(self._has_tensor(name) for name in tensor_names)

    def _may_move(self, adapter: Adapter, name: str, value: LowRank) -> bool:
        if not is_there(self._base, name):
            return True
        if value.layout == PARAMETER:
            return name.rpartition(".")[0] in modules_or_parameters(adapter)
        return value.layout == LINEAR and not takes_delta(self._base, name)

    def _has_tensor(self, tensor: str) -> bool:
        module, _, leaf = tensor.rpartition(".")
        try:
            holder = self._base.get_submodule(module)
        except AttributeError:
            return False
        return leaf in holder._parameters or leaf in holder._buffers


def _registered(base: nn.Module, adapter: Adapter) -> dict[str, tuple[str, ...]]:
    """Return each nested module's adapted parameters, in the order in which a base registers them.

    Raises:
        BaseMismatch: the base has no such module.
    """
    order = {}
    for module, parameters in adapter.nesting.items():
        try:
            holder = base.get_submodule(module)
        except AttributeError:
            raise BaseMismatch(f"{module}: the base has no such module") from None
        own = dict(holder.named_parameters(recurse=False))
        order[module] = tuple(name for name in own if name in parameters)
    return order
