"""Assembly: several models as one base, for a tree whose nodes change more than one of them.

    unet.down_blocks.0.attentions.0.….to_q      the module of a component
    unet.down_blocks_0_attentions_0_…_to_q      the same, in a file that writes dots as underscores
    down_blocks.0.attentions.0.….to_q           the same, in an adapter of that component alone

Underscores can't be turned back into dots by themselves. So each component's own names are written
with underscores too, once, and a name is looked up among them.

Law: a name that fits two modules is refused, and so is a name that fits none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from torch import nn

from .adapter import Adapter
from .errors import BaseMismatch, LoraTreeError, StateError, listing, suggest
from .lowrank import LowRank, concat
from .sites import as_site_has_it, is_there
from .sites.other_models import COMPONENTS, LANGUAGE_MODEL, kind_of_model

__all__ = ["Assembly", "AssemblyNames", "Convert"]

Convert = Callable[[str, LowRank], Mapping[str, LowRank]]
"""(name that no component has, its value) → {a component's own name: value}; empty if unknown."""


class Assembly(nn.Module):
    """Several models as submodules. Their pipeline calls them; the assembly has no forward.

    Args:
        components: name → model; a name has no dots.
        name_or_path: the name of the assembly, for messages.
        aliases: other words for components, which files use.
        prefixes: component → the prefix that its modules' names once had, and still have in older
            files.
        convert: translates the names of other programs; called for a name that no component has.

    >>> base = Assembly({"unet": nn.Sequential(nn.Linear(4, 4))})
    >>> [name for name, _ in base.named_parameters()]
    ['unet.0.weight', 'unet.0.bias']
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        *,
        name_or_path: str = "",
        aliases: Mapping[str, str] | None = None,
        prefixes: Mapping[str, str] | None = None,
        convert: Convert | None = None,
    ) -> None:
        super().__init__()
        for name, component in components.items():
            self.add_module(name, component)
        self.name_or_path = name_or_path
        self.aliases = dict(aliases or {})
        self.prefixes = dict(prefixes or {})
        self.convert = convert
        # nn.Module begins in training mode, and pipelines hold their models in eval mode. A
        # `TreeModel` takes over this flag, so it has to be that of the components.
        self.training = any(component.training for component in components.values())

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to run: there is no order in which the components follow each other.

        Raises:
            StateError: always.
        """
        raise StateError(
            f"an assembly of {listing(self._modules)} has no forward of its own",
            "call the pipeline, or a component",
        )


class AssemblyNames:
    """Translates an adapter's module names into the assembly's.

    Args:
        base: the assembly.
    """

    def __init__(self, base: Assembly) -> None:
        self._base = base
        self._flat: dict[str, dict[str, list[str]]] = {}

    def bound(self, adapter: Adapter) -> Adapter:
        """Return the adapter in the assembly's names; the same object if it has them already.

        Raises:
            BaseMismatch: a name fits two modules, or none; or another program's names can't be
                converted.
            ShapeMismatch: two names become one, and their increments don't add up.
        """
        # The same object for an adapter that fits: plans are cached by the identity of adapters.
        if all(self._fits(name, value) for name, value in adapter.modules.items()):
            return adapter
        parts: dict[str, list[LowRank]] = {}
        sources: dict[str, list[str]] = {}
        for name, value in adapter.modules.items():
            for own, moved in self._placed(name, value).items():
                parts.setdefault(own, []).append(as_site_has_it(self._base, own, moved))
                sources.setdefault(own, []).append(name)
        modules: dict[str, LowRank] = {}
        errors: dict[str, float] = {}
        rounded: set[str] = set()
        for own, values in parts.items():
            try:
                modules[own] = concat(values)
            except LoraTreeError as error:
                raise error.within(f"{own} (from {listing(sources[own], most=2)})") from error
            errors[own] = max(adapter.errors.get(name, 0.0) for name in sources[own])
            if not adapter.rounded.isdisjoint(sources[own]):
                rounded.add(own)
        nonzero_errors = {own: error for own, error in errors.items() if error}
        return replace(adapter, modules=modules, errors=nonzero_errors, rounded=frozenset(rounded))

    def _placed(self, name: str, value: LowRank) -> Mapping[str, LowRank]:
        """Return the modules of the base that a name stands for, each with its value.

        A name stands for several modules if the other program fuses modules that the base splits.
        """
        own = self._own(name)
        if own is not None:
            return {own: value}
        converted: Mapping[str, LowRank] = {}
        if self._base.convert is not None:
            converted = self._base.convert(name, value)
        placed: dict[str, LowRank] = {}
        for other, moved in converted.items():
            own = self._own(other)
            if own is None:
                raise self._unknown(other, f"{name}: ")
            placed[own] = moved
        if not placed:
            raise self._unknown(name)
        return placed

    def _own(self, name: str) -> str | None:
        """Return the one module of the base that ``name`` stands for; None if there is none."""
        if is_there(self._base, name):
            return name
        first, _, rest = name.partition(".")
        component = self._base.aliases.get(first, first)
        if component in self._base._modules and rest:
            candidates = self._spelled(component, rest)
        else:
            # An adapter of one component alone has no prefix. It belongs to the component that has
            # such a module.
            candidates = []
            for component_name in self._base._modules:
                candidates += self._spelled(component_name, name)
        if len(candidates) > 1:
            raise BaseMismatch(
                f"{name}: ambiguous in this base: it could be {listing(candidates)}",
                "rename the module in the file: write its own name, with dots",
            )
        return candidates[0] if candidates else None

    def _spelled(self, component: str, path: str) -> Sequence[str]:
        """Return the modules of a component that equal ``path`` with underscores for dots."""
        # Made once for each component: an adapter asks for hundreds of names, and a table of all
        # modules takes a walk over the whole component.
        table = self._flat.get(component)
        if table is None:
            prefix = self._base.prefixes.get(component, "")
            table = _flattened(self._base.get_submodule(component), prefix)
            self._flat[component] = table
        return [f"{component}.{own}" for own in table.get(path.replace(".", "_"), ())]

    def _fits(self, name: str, value: LowRank) -> bool:
        """Return whether the base has the module, and its site takes the value unchanged."""
        return is_there(self._base, name) and as_site_has_it(self._base, name, value) is value

    def _unknown(self, name: str, where: str = "") -> BaseMismatch:
        """Return the error for a name that fits no module."""
        first, _, rest = name.partition(".")
        component = self._base.aliases.get(first, first)
        has = listing(self._base._modules)
        if component not in self._base._modules:
            kind = kind_of_model(name)
            if kind == LANGUAGE_MODEL:
                return BaseMismatch(
                    f"{where}{name}: the adapter is for {kind}, and this base is a pipeline of "
                    f"{has}",
                    "attach the tree to the model that the adapter was trained on",
                )
            if kind is not None and first not in COMPONENTS:
                # The adapter is for one component alone, so its names have no prefix.
                return BaseMismatch(
                    f"{where}{name}: none of this base's components has a module of that name; "
                    f"it has {has}",
                    "was the file made for another architecture?",
                )
            return BaseMismatch(
                f"{where}{name}: this base has no component {first!r}; it has {has}"
            )
        names = [own for own, _ in self._base.get_submodule(component).named_modules() if own]
        flat = {own.replace(".", "_"): own for own in names}
        near = suggest(rest.replace(".", "_"), flat, prefix="; the nearest is ")
        return BaseMismatch(
            f"{where}{name}: no module of this base's {component} has that name, dots or "
            f"underscores{near}",
            "was the file made for another architecture?",
        )


def _flattened(component: nn.Module, prefix: str) -> dict[str, list[str]]:
    """Return a table: a name with underscores for dots → the modules that are spelled so.

    If the component has a former prefix, each name is entered with it as well.
    """
    modules_by_spelling: dict[str, list[str]] = {}
    for name, module in component.named_modules():
        # A container has no weight, so no factor is meant for it. In the table it could only make a
        # name ambiguous, or stand for a module that is refused later.
        if not name or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        spellings = [name, f"{prefix}.{name}"] if prefix else [name]
        for spelling in spellings:
            modules_by_spelling.setdefault(spelling.replace(".", "_"), []).append(name)
    return modules_by_spelling
