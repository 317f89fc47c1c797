"""Names and factors of an adapter as a base has them today.

An adapter names modules as the transformers did that trained it. Since then language models have
moved (``language_model.model.layers…`` is ``model.language_model.layers…`` now), and the experts of a
layer became one parameter. transformers renames a checkpoint when it loads one, by a mapping of its
own; the same mapping renames adapters here, so nothing below knows an architecture.

    several Linears, one parameter      W = op(W_1, W_2, …), and op moves rows and nothing else, so
    (experts; gate and up fused)        ΔW = Σ op(0, …, B_k, …, 0) A_k: transformers' own operation is
                                        applied to the Bs, and the As are stacked

Experts without a pair get zero factors. The parts lie side by side in the rank: A of a fused gate and
up is [A_gate; A_up], and B is block-diagonal.

Law: a name that the base has is left alone, and two names that become one are one module whose
increments add up. Whoever needs an adapter in a base's names asks `Renaming.bound`, over a loaded base
as over a skeleton, with factors as with their outlines.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .assembly import Assembly, AssemblyNames
from .errors import BaseMismatch, LoraTreeError
from .lowrank import LINEAR, PARAMETER, LowRank, concat
from .sites import ParameterSite, Site, find_site, is_there, takes_delta
from .storage import install_names

__all__ = ["Loading", "Renaming", "loading_module", "registered"]

MAPPING = "transformers.conversion_mapping"
LOADING = "transformers.core_model_loading"
MAX_CHARACTERS = 1000
"""Characters in a name that is looked up in the mapping: transformers' patterns can be slow on a hostile one."""


class Renaming:
    """An adapter's names and factors, as one base has them.

    Args:
        base: the model; on the meta device as well.

    >>> base = nn.ModuleDict({"lin": nn.Linear(4, 4)})
    >>> fr = Adapter({"lin": LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    >>> Renaming(base).bound(fr) is fr
    True
    """

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._assembled = AssemblyNames(base) if isinstance(base, Assembly) else None

    def bound(self, adapter: Adapter) -> Adapter:
        """The adapter in the base's names; itself where it has them already.

        A name that the base does not have, and that nothing says how to rename, stays as it is: the
        caller looks for its site, and says that there is none.

        Raises:
            BaseMismatch: factors can't be put together into the parameter that they are a part of
                today; names the module.
            ShapeMismatch: two names become one, and their increments don't add up.
        """
        if self._assembled is not None:
            return self._assembled.bound(adapter)
        found = adapter
        if any(self._moves(adapter, name, value) for name, value in adapter.modules.items()) or any(
            not self._has_parameter(name) for name in adapter.unchanged
        ):
            found = _Renamed(self._base, adapter).made()
        return found.renested(registered(self._base, found)) if found.nesting else found

    def has(self, name: str) -> bool:
        """Whether the base has a module, or a raw parameter, of that name."""
        return is_there(self._base, name)

    def _moves(self, adapter: Adapter, name: str, value: LowRank) -> bool:
        """Whether a name, or the kind of its factors, may be another one in this base."""
        if not is_there(self._base, name):
            return True
        if value.layout == PARAMETER:
            return name.rpartition(".")[0] in _either(adapter)
        return value.layout == LINEAR and not takes_delta(self._base, name)

    def _has_parameter(self, parameter: str) -> bool:
        module, _, leaf = parameter.rpartition(".")
        try:
            return leaf in self._base.get_submodule(module)._parameters
        except AttributeError:
            return False


@dataclass
class _Conversion:
    """Old modules that became one parameter, or several: the values of each source of a conversion.

    Args:
        converter: transformers' own.
        values: source → number of the expert (0 where it counts none) → what is added up there.
        names: the old names.
    """

    converter: Any
    values: dict[str, dict[int, list[LowRank]]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


class _Renamed:
    """One adapter on its way into the names of one base."""

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter
        self._loading = Loading(base)
        self._parts: dict[str, list[LowRank]] = {}
        self._from: dict[str, list[str]] = {}
        self._groups: dict[str, _Conversion] = {}

    def made(self) -> Adapter:
        """The adapter in the names of the base; raises as `Renaming.bound`."""
        with torch.inference_mode(False):  # it may train later
            return self._made()

    def _made(self) -> Adapter:
        either = _either(self._adapter)
        for name, value in self._adapter.modules.items():
            self._take(name, value, may_be_module=name.rpartition(".")[0] in either)
        for first, group in self._groups.items():
            self._take_group(first, group)
        modules = {
            name: _sum(name, self._from[name], values) for name, values in self._parts.items()
        }
        old = self._adapter
        errors: dict[str, float] = {}
        for name, sources in self._from.items():
            # the error of a sum is no larger than the largest of its parts, which are orthogonal
            error = max((old.errors.get(source, 0.0) for source in sources), default=0.0)
            errors |= {name: error} if error else {}
        nesting, assumed = self._nesting(modules)
        return replace(
            old,
            modules=modules,
            errors=errors,
            rounded=frozenset(name for name, s in self._from.items() if old.rounded & set(s)),
            unchanged=self._unchanged(),
            nesting=nesting,
            assumed=assumed,
        )

    def _take(self, name: str, value: LowRank, *, may_be_module: bool) -> None:
        """Put one module's value under its name of today, or into the group that it is a part of."""
        module, _, leaf = name.rpartition(".")
        if may_be_module and _is_weight(self._base, module, leaf) and value.A.shape[0] == 1:
            self._put(module, _as_linear(value), name)
            return
        if is_there(self._base, name) and (value.layout != LINEAR or takes_delta(self._base, name)):
            self._put(name, value, name)
            return
        for parameter in _parameters_of(name, value):
            renamed, source, number = self._loading.renamed(parameter)
            one = _as_matrix(value, in_a_batch="*" not in (source or ""))
            if source is not None and one is not None:
                group = self._groups.setdefault(
                    renamed, _Conversion(self._loading.converters[source])
                )
                group.values.setdefault(source, {}).setdefault(number, []).append(one)
                group.names.append(name)
                return
            if renamed in self._loading.parameters:
                found = self._placed(renamed, value)
                if found is not None:
                    self._put(*found, name)
                    return
        self._put(name, value, name)

    def _put(self, name: str, value: LowRank, old: str) -> None:
        self._parts.setdefault(name, []).append(value)
        self._from.setdefault(name, []).append(old)

    def _placed(self, parameter: str, value: LowRank) -> tuple[str, LowRank] | None:
        """The name and the value for a parameter of the base; None where it takes no such delta."""
        if value.layout == PARAMETER:
            return parameter, value
        module, _, leaf = parameter.rpartition(".")
        if _is_weight(self._base, module, leaf):
            return module, value
        if value.layout == LINEAR and self._loading.parameters[parameter].ndim == 2:
            return parameter, _as_parameter(
                value
            )  # a router: a Linear once, its weight a parameter now
        return None

    # ------------------------------------------------------------------ several that became one
    def _take_group(self, first: str, group: _Conversion) -> None:
        """Put together what a conversion makes of a group's values."""
        where = group.names[0]
        for numbered in group.values.values():
            if any(value.bias is not None for values in numbered.values() for value in values):
                raise BaseMismatch(
                    f"{where}: it adds a bias (lora_bias), and {first} of this base has none",
                    "train without lora_bias",
                )
        try:
            made = list(self._converted(first, group))
        except LoraTreeError as error:
            raise error.within(where) from error
        for parameter, left, right, scale in made:
            name, value = self._as_site_has_it(parameter, left, right)
            self._parts.setdefault(name, []).append(value.scaled(scale))
            sources = self._from.setdefault(name, [])
            sources += [source for source in group.names if source not in sources]

    def _converted(
        self, first: str, group: _Conversion
    ) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """Parameter, left, right and scale for each source: the stored parameter gets scale · left @ right."""
        converter = group.converter
        target = self._loading.parameters.get(first)
        counted = any("*" in source for source in converter.source_patterns)
        experts = 1
        if counted:
            if target is None or target.ndim != 3:
                raise BaseMismatch(f"this base has no parameter {first} that holds its experts")
            experts = target.shape[0] * len(
                converter.target_patterns
            )  # some are shared out between several
        values = {}
        for source, numbered in group.values.items():
            values[source] = _stack(numbered, experts) if counted else concat(numbered[0])
        rows = self._rows(converter, values, target)
        for source, value in values.items():
            *batch, _, rank = value.B.shape
            parts: dict[str, Iterable[Tensor]] = {}
            trial: dict[str, Iterable[Tensor]] = {}
            for other in converter.source_patterns:
                own = value.B if other == source else value.B.new_zeros(*batch, rows[other], rank)
                probe = _numbered(experts if counted else 1, rows[other])
                probe = probe if counted else probe[0].expand(*batch, rows[other], len(_COLUMNS))
                parts[other] = own if counted else [own]
                trial[other] = probe if counted else [probe]
            where = self._where(first, converter, trial)
            for parameter, made in self._loading.convert(first, converter, parts).items():
                which, turned = where[parameter]
                A = value.A if which is None else value.A[which.to(value.A.device)]
                if turned:
                    yield parameter, A.mT, made, value.scale
                else:
                    yield parameter, made, A, value.scale

    def _rows(
        self, converter: Any, values: Mapping[str, LowRank], target: Tensor | None
    ) -> dict[str, int]:
        """Source → how many rows its weight has; of one without factors, an equal share of the target's."""
        rows = {source: value.B.shape[-2] for source, value in values.items()}
        sources = converter.source_patterns
        share = 0 if target is None else max(target.shape[1:] or (0,)) // len(sources)
        same = set(rows.values())
        for source in sources:
            rows.setdefault(source, next(iter(same)) if len(same) == 1 else share)
        return rows

    def _where(
        self, first: str, converter: Any, trial: Mapping[str, Iterable[Tensor]]
    ) -> dict[str, tuple[Tensor | None, bool]]:
        """Parameter → which experts a conversion puts there (None where it counts none), and whether it transposes.

        It is tried out on weights of a few columns, numbered together with their experts.

        Raises:
            BaseMismatch: it mixes columns: then what it makes of B says nothing about what it makes of B·A.
        """
        found = {}
        for parameter, made in self._loading.convert(first, converter, trial).items():
            for turned in (False, True):
                order = _order(made.mT if turned else made)
                if order is not None:
                    counted = any("*" in source for source in converter.source_patterns)
                    found[parameter] = (order if counted else None, turned)
                    break
            else:
                self._refuse(first, converter)
        return found

    def _refuse(self, first: str, converter: Any) -> None:
        said = " and ".join(type(operation).__name__ for operation in converter.operations)
        raise BaseMismatch(
            f"transformers makes {first} of it by {said}, which has no low-rank form",
            "merge the adapter into the base under the transformers that trained it",
        )

    def _as_site_has_it(self, parameter: str, left: Tensor, right: Tensor) -> tuple[str, LowRank]:
        """The name and the value of a site whose stored weight gets left @ right."""
        module, _, leaf = parameter.rpartition(".")
        if left.ndim == 2 and _is_weight(self._base, module, leaf):
            return module, LowRank(right, left)
        left, right = (left, right) if left.ndim == 3 else (left[None], right[None])
        if not is_there(self._base, parameter):
            raise BaseMismatch(
                f"{parameter}: the base has no such parameter, which transformers names"
            )
        site = find_site(self._base, parameter)
        if isinstance(site, ParameterSite) and site.is_transposed:
            return parameter, LowRank(left.mT, right.mT, layout=PARAMETER)
        return parameter, LowRank(right, left, layout=PARAMETER)

    # ------------------------------------------------------------------ the rest of the adapter
    def _unchanged(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, tensor in self._adapter.unchanged.items():
            renamed, source, _ = self._loading.renamed(name)
            known = renamed in self._loading.parameters and source is None
            new = name if name in self._loading.parameters or not known else renamed
            found.setdefault(new, tensor)
        return found

    def _nesting(
        self, modules: Mapping[str, LowRank]
    ) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
        """Module → its raw parameters as the base registers them, and of which modules a file left that open."""
        old = self._adapter
        today = {sources[0]: name for name, sources in self._from.items() if len(sources) == 1}
        nesting: dict[str, tuple[str, ...]] = {}
        assumed = set()
        for module, parameters in old.nesting.items():
            new = [
                today.get(f"{module}.{p}", "") for p in parameters if f"{module}.{p}" in old.modules
            ]
            holders = {name.rpartition(".")[0] for name in new}
            if len(holders) == 1 and is_there(self._base, holder := holders.pop()):
                nesting[holder] = tuple(name.rpartition(".")[2] for name in new)
                assumed |= {holder} if module in old.assumed else set()
        for name, value in modules.items():
            holder = name.rpartition(".")[0]
            if value.layout == PARAMETER and holder not in nesting and is_there(self._base, name):
                own = self._base.get_submodule(holder)._parameters
                if len(own) > 1:
                    nesting[holder] = tuple(own)
        return nesting, frozenset(assumed)


class Loading:
    """How transformers renames what it loads into a model.

    Args:
        model: of any kind; one that is not transformers' has no other names.

    Attributes:
        parameters: the model's own, by name.
        converters: pattern of a source → what makes a parameter of it.
        conversions: transformers' list; empty before its version 5, where names were the model's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.converters: dict[str, Any] = {}
        self.conversions: list[Any] = []
        self._rename: Callable[[str], tuple[str, str | None]] = lambda name: (name, None)
        self._renamings: list[Any] = []
        if _is_transformers(model):
            self._ask_transformers()

    def _ask_transformers(self) -> None:
        model, mapping, loading = self._model, _module(MAPPING), loading_module()
        prefix = model.base_model_prefix
        keys = {**self.parameters, **dict(model.named_buffers(remove_duplicate=False))}
        if mapping is None or loading is None:
            self._rename = lambda name: (_prefixed(name, prefix, keys), None)
            return
        try:
            self.conversions = list(mapping.get_model_conversion_mapping(model))
        except Exception as error:  # whatever it raises: it is another library's
            raise BaseMismatch(
                f"transformers can't tell how {type(model).__name__} is loaded: {type(error).__name__}: {error}"
            ) from error
        self._renamings = [c for c in self.conversions if isinstance(c, loading.WeightRenaming)]
        converters = [c for c in self.conversions if isinstance(c, loading.WeightConverter)]
        self.converters = {source: c for c in converters for source in c.source_patterns}

        def rename(name: str) -> tuple[str, str | None]:
            renamed, source = loading.rename_source_key(
                name, self._renamings, converters, prefix, keys
            )
            if renamed not in keys and name in keys:
                return name, None
            return renamed, source

        self._rename = rename

    def renamed(self, name: str) -> tuple[str, str | None, int]:
        """The parameter that a tensor of a checkpoint goes into, the source of its conversion, and which expert."""
        if len(name) > MAX_CHARACTERS:
            return name, None, 0
        renamed, source = self._rename(name)
        if source is None or "*" not in source:
            return renamed, source, 0
        key = name
        for renaming in self._renamings:
            key, _ = renaming.rename_source_key(key)
        number = re.search(source.replace("*.", r"(\d{1,6})\."), key)
        return (renamed, source, int(number[1])) if number else (name, None, 0)

    def convert(
        self, first: str, converter: Any, parts: Mapping[str, Iterable[Tensor]]
    ) -> dict[str, Tensor]:
        """Parameter → what transformers makes of these tensors, by source.

        Raises:
            BaseMismatch: it can't.
        """
        own = copy.deepcopy(converter)
        for source, tensors in parts.items():
            for at, tensor in enumerate(tensors):
                own.add_tensor(first, f"{source}.{at}", source, tensor)
        try:
            made = own.convert(first, model=self._model, config=self._model.config)
        except Exception as error:  # whatever it raises: it is another library's
            raise BaseMismatch(
                f"transformers can't make {first} of it: {type(error).__name__}: {error}"
            ) from error
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


def registered(base: nn.Module, adapter: Adapter) -> dict[str, tuple[str, ...]]:
    """Each nested module's adapted parameters in the order in which a base registers them.

    Raises:
        BaseMismatch: the base has no such module.
    """
    order = {}
    for module, parameters in adapter.nesting.items():
        try:
            holder = base.get_submodule(module)
        except AttributeError:
            raise BaseMismatch(f"{module}: the base has no such module") from None
        own = (name for name, _ in holder.named_parameters(recurse=False))
        order[module] = tuple(name for name in own if name in parameters)
    return order


_COLUMNS = torch.arange(3.0, device="cpu")


def _numbered(experts: int, rows: int) -> Tensor:
    """(experts, rows, 3): every number says of which expert and in which column it is."""
    each_expert = torch.arange(float(experts), device="cpu").mul(len(_COLUMNS)).reshape(-1, 1, 1)
    return (each_expert + _COLUMNS).expand(experts, rows, len(_COLUMNS))


def _order(made: Tensor) -> Tensor | None:
    """The experts in a batch of such numbers; None where the columns are not in their order."""
    made = made if made.ndim == 3 else made[None]
    if made.shape[-1] != len(_COLUMNS):
        return None
    order = made[:, 0, 0].div(len(_COLUMNS)).long()
    wanted = order.reshape(-1, 1, 1) * len(_COLUMNS) + _COLUMNS
    return order if bool((made == wanted).all()) else None


def _either(adapter: Adapter) -> set[str]:
    """Modules whose one raw parameter may be the module's own weight; the file could not tell."""
    return {m for m in adapter.assumed if len(adapter.nesting.get(m, ())) == 1}


def _site(base: nn.Module, name: str) -> Site | None:
    try:
        return find_site(base, name)
    except BaseMismatch:
        return None


def _is_weight(base: nn.Module, module: str, leaf: str) -> bool:
    """Whether a parameter is what a module's deltas are added to."""
    site = _site(base, module) if module else None
    return site is not None and not isinstance(site, ParameterSite) and site.weight_name == leaf


def _parameters_of(name: str, value: LowRank) -> tuple[str, ...]:
    """The parameters that a module of that name may have kept its weight in."""
    if value.layout == PARAMETER:
        return (name,)
    if value.layout == LINEAR:
        return f"{name}.weight", f"{name}.in_proj_weight"
    return (f"{name}.weight",)


def _as_parameter(value: LowRank) -> LowRank:
    return LowRank(value.A[None], value.B[None], value.scale, value.bias, PARAMETER)


def _as_linear(value: LowRank) -> LowRank:
    return LowRank(value.A[0], value.B[0], value.scale, value.bias, LINEAR)


def _as_matrix(value: LowRank, *, in_a_batch: bool) -> LowRank | None:
    """The value as a source of a conversion: a matrix, or a batch where that may be; None where it is neither."""
    if value.layout == PARAMETER and value.A.shape[0] == 1:
        return _as_linear(value)
    if value.layout == LINEAR and value.A.ndim == 2:
        return value
    return value if in_a_batch and value.layout == PARAMETER else None


def _stack(numbered: Mapping[int, list[LowRank]], experts: int) -> LowRank:
    """The values of all experts as one batch; zeros for those without one.

    Raises:
        BaseMismatch: there is an expert too many, or two differ in shape.
    """
    if max(numbered) >= experts:
        raise BaseMismatch(
            f"it is of expert {max(numbered)}, and this base has {experts}, counted from 0"
        )
    summed = {number: concat(values) for number, values in numbered.items()}
    scales = {value.scale for value in summed.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    folded = {n: value if value.scale == scale else value.folded() for n, value in summed.items()}
    rank = max(value.rank for value in folded.values())
    padded = {number: value.padded(rank) for number, value in folded.items()}
    first = next(iter(padded.values()))
    batch = []
    for number in range(experts):
        value = padded.get(number)
        if value is None:
            value = first.with_tensors(torch.zeros_like)
        batch.append(replace(value, A=value.A[None], B=value.B[None]))
    try:
        A = torch.cat([value.A for value in batch])
        B = torch.cat([value.B for value in batch])
    except RuntimeError:
        shapes = sorted({value.shape[1:] for value in batch})
        raise BaseMismatch(f"the experts' factors differ in shape: {shapes}") from None
    return LowRank(A, B, scale)


def _sum(name: str, sources: list[str], values: list[LowRank]) -> LowRank:
    try:
        return concat(values)
    except LoraTreeError as error:
        raise error.within(f"{name} (from {' and '.join(sources[:2])})") from error


def _is_transformers(model: nn.Module) -> bool:
    """Whether transformers made its class: only then does its mapping say something about it."""
    mine = any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)
    return mine and hasattr(model, "config") and hasattr(model, "base_model_prefix")


def loading_module() -> Any:
    """transformers' own loader; None before its version 5."""
    return _module(LOADING)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _prefixed(name: str, prefix: str, keys: Mapping[str, Tensor]) -> str:
    """A name with or without the base model's prefix, whichever the model has."""
    bare = name.removeprefix(f"{prefix}.")
    return next((n for n in (name, bare, f"{prefix}.{name}") if n in keys), name)


install_names(Renaming)
