"""Ways: check in one pass whether a base still has some sites.

Every switch checks it for every site of its plan. The sites' paths of modules overlap, and hardly
ever change from one switch to the next:

    base ─ model ─ layers ─┬─ 0 ─┬─ self_attn ─┬─ q_proj     site by site, `model` would be looked
                           │     │             └─ k_proj     up for every projection of every layer;
                           │     └─ mlp ───────── up_proj    here each module is looked up only
                           └─ 1 …                            once, in the module around it

Law: the answer is the one that `Site.is_in` gives for each site.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .site import Site

__all__ = ["Ways"]


class Ways:
    """The modules on the ways from a base to some sites, cached since the last check."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = tuple(sites)
        self._weights = [(site.module, site.weight_name, site.shape) for site in self._sites]
        # No reference to the base: plans hold this object and may outlive the model.
        self._first: dict[str, nn.Module] | None = None
        """Name in the base → its child at the last check; None before the first one."""
        self._further: list[tuple[nn.Module, str]] = []
        """(module around it, name in that) of every other module on a way."""
        self._children: list[nn.Module] = []
        """The modules of `_further` at the last check, in the same order."""

    def dtypes(self, base: nn.Module) -> tuple[torch.dtype | None, ...] | None:
        """Return the present dtypes of the sites' weights; None if a site has left the base."""
        if not self._lead_to_the_same_modules(base) and not self._lead_to_the_sites(base):
            return None
        dtypes: list[torch.dtype | None] = []
        for module, name, shape in self._weights:
            weight = module._parameters.get(name)
            if weight is None:
                is_unchanged = shape is None  # not a parameter, as before (quantised)
            elif shape is None:
                is_unchanged = is_lazy(weight)
            else:
                try:
                    is_unchanged = weight.shape == shape
                except RuntimeError:  # a lazy weight has taken its place
                    is_unchanged = False
            if not is_unchanged:
                return None
            dtypes.append(None if weight is None else weight.dtype)
        return tuple(dtypes)

    def _lead_to_the_same_modules(self, base: nn.Module) -> bool:
        """Return whether every module on the ways is the same as at the last check."""
        if self._first is None:
            return False
        for name, module in self._first.items():
            if base._modules.get(name) is not module:
                return False
        now = [around._modules.get(name) for around, name in self._further]
        return all(map(is_, now, self._children))

    def _lead_to_the_sites(self, base: nn.Module) -> bool:
        """Return whether the ways lead to the sites' own modules, and cache the modules on them.

        A module on a way may have been replaced by one that still holds the site's module.
        """
        first: dict[str, nn.Module] = {}
        further: dict[tuple[int, str], tuple[nn.Module, str]] = {}
        children: dict[tuple[int, str], nn.Module] = {}
        for site in self._sites:
            around = base
            for part in site.module_name.split("."):
                module = around._modules.get(part)
                if module is None:
                    return False
                if around is base:
                    first[part] = module
                else:
                    # The id is unique, because `further` keeps the module around alive.
                    further[id(around), part] = around, part
                    children[id(around), part] = module
                around = module
            if around is not site.module:
                return False
        self._first, self._further, self._children = (
            first,
            [*further.values()],
            [*children.values()],
        )
        return True
