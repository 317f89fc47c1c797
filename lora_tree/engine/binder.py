"""Binder: adapters under the names of one base, checked against its modules.

An adapter fits the base or it does not, on any path, so it is checked once. Later requests check
only that its modules are still there.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..base_names import warn_of_base
from ..errors import LoraTreeError, listing
from ..lowrank import LowRank
from ..override import Override, OverrideWarning
from ..renaming import Renaming
from ..sites import Site, find_site, find_tensor_site
from ..weights import Weight
from .finite import check_override_numbers
from .rows.batch import tree_node

__all__ = ["Binder"]

KEPT_WEIGHTS = 16
"""The most weights per module kept for one adapter: a server's clients may send any number."""


class Binder:
    """Adapters checked against one base, and the sites that they use.

    Args:
        base: the model.
        base_name: the tree's name for it.
        own_name: the model's own name, if it has one.
        own_value: returns the base's own numbers of a module's tensor if a path may be merged into
            it; None: the tensor itself holds them now.

    Attributes:
        base: the model.
        replaced: how often a known name turned out to have another module than before. The same
            factors behave differently with it.
    """

    def __init__(
        self,
        base: nn.Module,
        base_name: str | None,
        *,
        own_name: str | None = None,
        own_value: Callable[[nn.Module, str], Tensor | None] = lambda module, name: None,
    ) -> None:
        self.base, self.replaced = base, 0
        self._own_value = own_value
        self._base_name = base_name
        self._own_name = own_name or base_name
        self._warned: set[str] = set()  # names of bases in adapters that were warned about
        self._renaming = Renaming(base)
        self._sites: dict[str, Site] = {}
        # None stands for an adapter that needs no renaming: a value that held its own weak key
        # would keep it alive.
        self._bound: weakref.WeakKeyDictionary[Adapter, tuple[Adapter | None, list[Site]]]
        self._bound = weakref.WeakKeyDictionary()
        self._weighted: weakref.WeakKeyDictionary[Adapter, OrderedDict[Weight, Adapter]]
        self._weighted = weakref.WeakKeyDictionary()

    def bind(self, node: str, adapter: Adapter) -> Adapter:
        """Return ``adapter`` under the names of this base, checked.

        Raises:
            BaseMismatch: a module is missing, of another kind or shape; or a tensor that the
                adapter replaces is.
        """
        known = self._bound.get(adapter)
        # An adapter is bound once; after that, only check that its modules are still there.
        if known is not None and all(site.is_in(self.base) for site in known[1]):
            return known[0] or adapter
        try:
            bound = self._in_base(node, adapter)
            sites = [self.site(name) for name in bound.modules]
            for site, value in zip(sites, bound.modules.values(), strict=True):
                site.check(value)
            for tensor, override in bound.overrides.items():
                site, attribute = self.tensor_site(tensor)
                site.check_override(attribute, override)
                check_override_numbers(tensor, override, getattr(site.module, attribute))
                sites.append(site)
        except LoraTreeError as error:
            raise self._error_at_node(error, node, adapter) from error
        # A warning and no error: people rename and quantise bases. Once for each name.
        if adapter.base and adapter.base not in self._warned:
            self._warned.add(adapter.base)
            warn_of_base(node, adapter.base, self._own_name, stacklevel=2)
        self._bound[adapter] = None if bound is adapter else bound, sites
        self._weighted.pop(adapter, None)  # made for the modules that were there before
        return bound

    def site(self, name: str) -> Site:
        """Return the site that has this name in the base now; a replaced module is looked up."""
        known = self._sites.get(name)
        if known is not None and known.is_in(self.base):
            return known
        if known is not None:
            self.replaced += 1
        known = self._sites[name] = find_site(self.base, name)
        return known

    def bound_site(self, name: str) -> Site:
        """Return a site that a bound adapter uses, without checking that it is still there."""
        return self._sites[name]

    def site_for(self, node: str, name: str, value: LowRank) -> Site:
        """Return the site of that name, which ``value`` fits.

        Raises:
            BaseMismatch: there is none, or the value does not fit; names the node.
        """
        try:
            site = self.site(name)
            site.check(value)
        except LoraTreeError as error:
            raise error.within(node) from error
        return site

    def tensor_site(self, tensor: str) -> tuple[Site, str]:
        """Return the site of an override, and which of the module's tensors it is."""
        module, _, leaf = tensor.rpartition(".")
        for name in (module, tensor):
            known = self._sites.get(name)
            is_its_tensor = known is not None and leaf in (known.weight_name, known.bias_name)
            if known is not None and is_its_tensor and known.is_in(self.base):
                return known, leaf
        site, leaf = find_tensor_site(self.base, tensor)
        if site.name in self._sites:
            self.replaced += 1
        self._sites[site.name] = site
        return site, leaf

    def weighed(self, node: str, weight: Weight, adapter: Adapter) -> tuple[float, Adapter]:
        """Return a coefficient and the adapter that it is for, under the names of this base.

        A weight per module is multiplied into the adapter's scales. That is done before modules are
        renamed, because its patterns are for the adapter's own names. The result is kept, so that
        the same adapter and weight give the same object, and sites see that nothing changed.
        """
        node = tree_node(node)  # for messages
        bound = self.bind(node, adapter)
        if isinstance(weight, float):
            return weight, bound
        known = self._weighted.setdefault(adapter, OrderedDict())
        if weight in known:
            known.move_to_end(weight)
            return 1.0, known[weight]
        try:
            known[weight] = self._in_base(node, adapter.weighed(weight))
        except LoraTreeError as error:
            raise error.within(node) from error
        if len(known) > KEPT_WEIGHTS:
            known.popitem(last=False)
        return 1.0, known[weight]

    def own_value(self, module: nn.Module, attribute: str) -> Tensor | None:
        """Return the base's own numbers of a module's tensor; None if the tensor holds them."""
        return self._own_value(module, attribute)

    def device_of(self, tensor: str, override: Override) -> torch.device:
        """Return the device on which an override computes: that of the base's own tensor."""
        site, attribute = self.tensor_site(tensor)
        own = getattr(site.module, attribute, None)
        return own.device if isinstance(own, Tensor) else override.values.device

    # ------------------------------------------------------------------ private
    def _in_base(self, node: str, adapter: Adapter) -> Adapter:
        """Return an adapter under the names of this base, with all its overrides marked as such."""
        return self._split_unchanged(node, self._renaming.bound(adapter))

    def _error_at_node(self, error: LoraTreeError, node: str, adapter: Adapter) -> LoraTreeError:
        """Return an error with the node's name, and with the base that the adapter names if it is
        another one.
        """
        where = error.within(node)
        todo = list(where.todo)
        if adapter.base and self._base_name and adapter.base != self._base_name:
            todo.append(
                f"the adapter names base {adapter.base!r}, the model attached is "
                f"{self._base_name!r}"
            )
        return type(error)(where.what, *todo)

    def _split_unchanged(self, node: str, adapter: Adapter) -> Adapter:
        """Return the adapter, with the carried tensors that differ from the base's as overrides.

        The comparison is with the base's own numbers, whatever is merged into them now.
        """
        if not adapter.unchanged:
            return adapter
        own: dict[str, Tensor] = {}
        for name in adapter.unchanged:
            module, _, leaf = name.rpartition(".")
            try:
                holder, now = self.base.get_submodule(module), self.base.get_parameter(name)
            except AttributeError:
                continue  # it is refused by its name below
            kept = self._own_value(holder, leaf)
            own[name] = now.detach() if kept is None else kept
        split = adapter.split_unchanged(own)
        other = [name for name in split.overrides if name not in adapter.overrides]
        if other:
            what = f"{node}: {listing(other)}: the adapter carries a value unlike the base's"
            warnings.warn(
                OverrideWarning(
                    f"{what}, and replaces the base's under this node (an override)",
                    "if the adapter was trained over another base, attach the tree to that one",
                ),
                stacklevel=2,
            )
        return split
