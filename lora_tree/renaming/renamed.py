"""Moving: move each value of an adapter to the present name of its module in one base."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from torch import nn

from ..adapter import Adapter
from ..errors import BaseMismatch, LoraTreeError
from ..lowrank import LINEAR, PARAMETER, LowRank, concat
from ..sites import ParameterSite, find_site, is_there, takes_delta, weight_names
from .conversion import Conversion, Increment
from .loading import Loading
from .sum_error import error_of_sum

__all__ = ["Moving", "modules_or_parameters"]

T = TypeVar("T")


class Moving:
    """The values of one adapter, collected under their present names in a base.

    Args:
        base: the model with the present names.
        adapter: the adapter to rename.
    """

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter
        self._loading = Loading(base)
        # present name → the values to add up; those of one conversion share a relative error
        self._shares: dict[str, list[tuple[list[LowRank], float]]] = {}
        self._from: dict[str, list[str]] = {}  # present name → the names in the adapter
        self._conversions: dict[str, Conversion] = {}  # first parameter → the modules it is made of

    def moved(self) -> Adapter:
        """Return the adapter in the names of the base; raises as `Renaming.bound`."""
        old = self._adapter
        open_modules = modules_or_parameters(old)
        for name, value in old.modules.items():
            self._take(name, value, may_be_module=name.rpartition(".")[0] in open_modules)
        # After the loop, because a conversion needs all its modules together.
        for conversion in self._conversions.values():
            self._convert(conversion)
        modules = {name: self._sum(name) for name in self._shares}
        nesting, assumed = self._nesting(modules)
        return replace(
            old,
            modules=modules,
            errors=self._errors(),
            rounded=frozenset(name for name, was in self._from.items() if old.rounded & set(was)),
            unchanged=self._renamed_tensors(old.unchanged),
            overrides=self._renamed_tensors(old.overrides),
            nesting=nesting,
            assumed=assumed,
        )

    # ------------------------------------------------------------------ the modules
    def _take(self, name: str, value: LowRank, *, may_be_module: bool) -> None:
        """Put one value under its present name, or into the conversion that it is a part of.

        Args:
            may_be_module: whether the file does not tell if the value is of a raw parameter or of
                the module around it.
        """
        module, _, leaf = name.rpartition(".")
        # A file that names the only parameter of a module may mean the module: the base decides.
        if may_be_module and _is_weight(self._base, module, leaf) and value.A.shape[0] == 1:
            self._put(module, _as_linear(value), name)
            return
        # The law: a name that the base has is left alone, unless its module can't take a matrix.
        if is_there(self._base, name) and (value.layout != LINEAR or takes_delta(self._base, name)):
            self._put(name, value, name)
            return
        for parameter in _parameters_of(name, value):
            renamed, source, number = self._loading.renamed(parameter)
            if source is not None:
                matrix = _as_matrix(value, may_be_batch="*" not in source)
                if matrix is not None:
                    converter = self._loading.converters[source]
                    conversion = self._conversions.setdefault(
                        renamed, Conversion(renamed, converter)
                    )
                    error = self._adapter.errors.get(name, 0.0)
                    conversion.add(name, source, number, matrix, error=error)
                    return  # `_convert` adds it, together with the other sources
            if renamed in self._loading.parameters:
                placed = self._placed(renamed, value)
                if placed is not None:
                    self._put(*placed, name)
                    return
        # No mapping knows the name. The caller will find no site for it, and raise with the name in
        # the file.
        self._put(name, value, name)

    def _put(self, name: str, value: LowRank, old: str) -> None:
        self._shares.setdefault(name, []).append(([value], self._adapter.errors.get(old, 0.0)))
        sources = self._from.setdefault(name, [])
        if old not in sources:
            sources.append(old)

    def _placed(self, parameter: str, value: LowRank) -> tuple[str, LowRank] | None:
        """Return the name and the value for a parameter of the base; None if it takes no delta."""
        if value.layout == PARAMETER:
            return parameter, value
        module, _, leaf = parameter.rpartition(".")
        if _is_weight(self._base, module, leaf):
            return module, value
        if value.layout == LINEAR and self._loading.parameters[parameter].ndim == 2:
            # A router: once a Linear, now a module with a raw weight.
            return parameter, LowRank(
                value.A[None], value.B[None], value.scale, value.bias, PARAMETER
            )
        return None

    def _convert(self, conversion: Conversion) -> None:
        """Convert the modules of one conversion, and add the resulting values.

        Raises:
            BaseMismatch, ShapeMismatch: they can't be converted; names the first module.
        """
        try:
            # Compute all before the first is added: an error must not leave half of them.
            increments = list(conversion.increments(self._loading))
            placed = [self._as_site_has_it(increment) for increment in increments]
        except LoraTreeError as error:
            raise error.within(conversion.names[0]) from error
        made: dict[str, list[LowRank]] = {}
        for name, value in placed:
            made.setdefault(name, []).append(value)
            for old in conversion.names:
                self._from.setdefault(name, [])
                if old not in self._from[name]:
                    self._from[name].append(old)
        bound = conversion.error()
        for name, values in made.items():
            self._shares.setdefault(name, []).append((values, bound))

    def _as_site_has_it(self, increment: Increment) -> tuple[str, LowRank]:
        """Return the name and the value of the site whose stored weight gets this increment.

        Raises:
            BaseMismatch: the base has no such parameter.
        """
        parameter, left, right = increment.parameter, increment.left, increment.right
        module, _, leaf = parameter.rpartition(".")
        if left.ndim == 2 and _is_weight(self._base, module, leaf):
            return module, LowRank(right, left, increment.scale)
        if not is_there(self._base, parameter):
            raise BaseMismatch(
                f"{parameter}: the base has no such parameter, which transformers names"
            )
        if left.ndim == 2:
            left, right = left[None], right[None]
        site = find_site(self._base, parameter)
        if isinstance(site, ParameterSite) and site.is_transposed:
            left, right = right.mT, left.mT
        return parameter, LowRank(right, left, increment.scale, layout=PARAMETER)

    def _sum(self, name: str) -> LowRank:
        try:
            parts = itertools.chain.from_iterable(values for values, _ in self._shares[name])
            return concat(list(parts))
        except LoraTreeError as error:
            sources = " and ".join(self._from[name][:2])
            raise error.within(f"{name} (from {sources})") from error

    # ------------------------------------------------------------------ the rest of the adapter
    def _errors(self) -> dict[str, float]:
        """Return upper bounds on the relative errors, under the present names."""
        errors: dict[str, float] = {}
        if not self._adapter.errors:
            return errors
        for name, shares in self._shares.items():
            error = shares[0][1]
            if len(shares) > 1:
                error = error_of_sum([(concat(values), error) for values, error in shares])
            if error:
                errors[name] = error
        return errors

    def _renamed_tensors(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Return whole tensors, carried or replaced, under their present names."""
        placed: dict[str, T] = {}
        parameters = self._loading.parameters
        for name, tensor in tensors.items():
            renamed, source, _ = self._loading.renamed(name)
            # A tensor that a conversion would take is only a part of a parameter. It keeps its old
            # name, and binding reports that the base has no such tensor.
            keeps_name = name in parameters or renamed not in parameters or source is not None
            placed.setdefault(name if keeps_name else renamed, tensor)
        return placed

    def _nesting(
        self, modules: Mapping[str, LowRank]
    ) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
        """Return module → its raw parameters in order, and the modules whose order is assumed."""
        old = self._adapter
        # If several names became one, they have no order: use only names with a single source.
        today = {sources[0]: name for name, sources in self._from.items() if len(sources) == 1}
        nesting: dict[str, tuple[str, ...]] = {}
        assumed: set[str] = set()
        for module, parameters in old.nesting.items():
            holders: set[str] = set()
            leaves: list[str] = []
            for parameter in parameters:
                if f"{module}.{parameter}" in old.modules:
                    name = today.get(f"{module}.{parameter}", "")
                    holder, _, leaf = name.rpartition(".")
                    holders.add(holder)
                    leaves.append(leaf)
            # If they are in several modules now, they have no common order.
            if len(holders) == 1 and is_there(self._base, holder):
                nesting[holder] = tuple(leaves)
                if module in old.assumed:
                    assumed.add(holder)
        for name, value in modules.items():
            holder = name.rpartition(".")[0]
            if value.layout == PARAMETER and holder not in nesting and is_there(self._base, name):
                own = self._base.get_submodule(holder)._parameters
                if len(own) > 1:
                    nesting[holder] = tuple(own)
        return nesting, frozenset(assumed)


def modules_or_parameters(adapter: Adapter) -> set[str]:
    """Return the modules whose one raw parameter may be the module's own weight.

    The file has the same keys in both cases; only the base can tell.
    """
    return {m for m in adapter.assumed if len(adapter.nesting.get(m, ())) == 1}


def _is_weight(base: nn.Module, module: str, leaf: str) -> bool:
    """Return whether a parameter is the weight to which the deltas of its module are added."""
    if not module:
        return False
    try:
        site = find_site(base, module)
    except BaseMismatch:
        return False
    return not site.is_raw and site.weight_name == leaf


def _parameters_of(name: str, value: LowRank) -> list[str]:
    """Return the possible names of a module's weight in a checkpoint."""
    if value.layout == PARAMETER:
        return [name]
    return [f"{name}.{leaf}" for leaf in weight_names()]


def _as_matrix(value: LowRank, *, may_be_batch: bool) -> LowRank | None:
    """Return the value as a matrix, or as a batch if ``may_be_batch``; None if it is neither."""
    if value.layout == PARAMETER and value.A.shape[0] == 1:
        return _as_linear(value)
    if value.layout == LINEAR and value.A.ndim == 2:
        return value
    return value if may_be_batch and value.layout == PARAMETER else None


def _as_linear(value: LowRank) -> LowRank:
    """Return a batch of one as the matrix in it."""
    return LowRank(value.A[0], value.B[0], value.scale, value.bias, LINEAR)
