"""Loading: transformers' mapping from a checkpoint's tensors to a model's parameters."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import BaseMismatch

__all__ = ["Loading", "loading_module"]

MAPPING = "transformers.conversion_mapping"
LOADING = "transformers.core_model_loading"

MAX_CHARACTERS = 1000
"""The longest name that is renamed: transformers' patterns can take very long on a hostile one."""


class Loading:
    """The renaming that transformers does when it loads a checkpoint into a model.

    Args:
        model: any model. Without a transformers class, names are not changed.

    Attributes:
        parameters: the model's own, by name.
        converters: pattern of a source → the converter that makes a parameter of it.
        conversions: transformers' list; empty before its version 5, when a checkpoint had the
            model's names.
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
        # Buffers too: a checkpoint holds both, and transformers looks a name up among both.
        prefix = model.base_model_prefix
        keys = {**self.parameters, **dict(model.named_buffers(remove_duplicate=False))}
        # Before version 5 there was no mapping: a checkpoint's names were the model's, with or
        # without the prefix.
        if mapping is None or loading is None:
            self._rename = lambda name: (_prefixed(name, prefix, keys), None)
            return
        try:
            self.conversions = list(mapping.get_model_conversion_mapping(model))
        except Exception as error:
            # Any exception: the mapping is another library's, and runs the model's own code.
            raise BaseMismatch(
                f"transformers can't tell how {type(model).__name__} is loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        converters: list[Any] = []
        for conversion in self.conversions:
            if isinstance(conversion, loading.WeightRenaming):
                self._renamings.append(conversion)
            elif isinstance(conversion, loading.WeightConverter):
                converters.append(conversion)
                self.converters.update(dict.fromkeys(conversion.source_patterns, conversion))

        def rename(name: str) -> tuple[str, str | None]:
            renamed, source = loading.rename_source_key(
                name, self._renamings, converters, prefix, keys
            )
            # The patterns may also match a name that the model has today, and change it.
            if renamed not in keys and name in keys:
                return name, None
            return renamed, source

        self._rename = rename

    def renamed(self, name: str) -> tuple[str, str | None, int]:
        """Return the parameter into which a tensor of a checkpoint is loaded.

        Returns:
            its name, the source of its conversion (None if it is only renamed), and the number of
            its expert (0 if the conversion has no experts).
        """
        if len(name) > MAX_CHARACTERS:
            return name, None, 0
        renamed, source = self._rename(name)
        if source is None or "*" not in source:
            return renamed, source, 0
        # transformers returns the source's pattern without the expert's number. Rename again, step
        # by step, to find it.
        key = name
        for renaming in self._renamings:
            key, _ = renaming.rename_source_key(key)
        number = re.search(source.replace("*.", r"(\d{1,6})\."), key)
        if number is None:
            return name, None, 0
        return renamed, source, int(number[1])

    def convert(
        self, first: str, converter: Any, parts: Mapping[str, Iterable[Tensor]]
    ) -> dict[str, Tensor]:
        """Apply a conversion; return parameter → its tensor.

        Args:
            first: the first parameter of the conversion.
            converter: transformers' own object.
            parts: source → its tensors, in the order of their experts.

        Raises:
            BaseMismatch: transformers can't convert them.
        """
        # A converter collects tensors in its own state, and is shared by all layers: use a copy.
        own = copy.deepcopy(converter)
        for source, tensors in parts.items():
            for at, tensor in enumerate(tensors):
                own.add_tensor(first, f"{source}.{at}", source, tensor)
        try:
            made = own.convert(first, model=self._model, config=self._model.config)
        except Exception as error:  # any exception, as above
            raise BaseMismatch(
                f"transformers can't make {first} of it: {type(error).__name__}: {error}"
            ) from error
        converted: dict[str, Tensor] = {}
        for name, value in made.items():
            # Some operations return a list of one tensor.
            converted[name] = value[0] if isinstance(value, list) else value
        return converted


def _is_transformers(model: nn.Module) -> bool:
    """Return whether a model's class is, or is derived from, one that transformers can map."""
    is_derived = any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)
    return is_derived and hasattr(model, "config") and hasattr(model, "base_model_prefix")


def loading_module() -> Any:
    """Return transformers' module that loads checkpoints; None before its version 5."""
    return _module(LOADING)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _prefixed(name: str, prefix: str, keys: Mapping[str, Tensor]) -> str:
    """Return the name with or without the base model's prefix, whichever the model has."""
    for spelled in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if spelled in keys:
            return spelled
    return name
