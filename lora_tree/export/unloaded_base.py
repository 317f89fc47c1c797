"""Read the shapes of a base's modules without loading it, from file headers or from its config.

    a folder     the headers of its safetensors files: name → shape, no numbers
    a hub id     its config.json, and the class that it names, instantiated on the meta device
    a module     the module itself

Law: nothing here allocates memory for weights, and nothing is downloaded for a name that only a
tree's files gave.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..carried import is_own
from ..errors import BaseMismatch, FormatError, LoraTreeError, SpecError
from ..extras import foreign, need, open_pretrained
from ..given import unchecked
from ..spelling import spelled_twice
from ..storage import as_path
from ..system.reading import is_file, is_folder
from .shards import Checkpoint, Stored, open_checkpoint

__all__ = ["NOTHING_CARRIED", "Base", "class_of", "skeleton"]

NOTHING_CARRIED = (
    "train without bias= and without resizing embeddings, or name the base it was trained on"
)
"""The advice if an adapter carries a tensor that differs from this base's own."""


def skeleton(
    base: str | os.PathLike[str],
    *,
    what: str = "a base's config",
    trust_remote_code: bool = False,
) -> Any:
    """Instantiate the model that a base's config.json names on the meta device.

    Args:
        base: a folder or a hub id.
        what: the calling command, for the message.
        trust_remote_code: run the base's own Python code, if its class is defined there.

    Raises:
        MissingExtra: transformers is not installed.
        SpecError: transformers can't read the config, or has no such model; or its class is the
            base's own code, and the caller did not allow it to run.
    """
    transformers = need("transformers", extra="transformers", what=what)
    config, kind = class_of(
        base,
        transformers,
        failed="transformers can't read its config.json",
        trust_remote_code=trust_remote_code,
    )
    if kind is None:
        named = getattr(config, "architectures", None)
        raise SpecError(
            f"{base}: its config.json names no architecture that transformers has: {named}",
            "upgrade transformers; or, if the class is the base's own code and you trust it, "
            "--trust-remote-code",
        )
    make: Callable[[Any], nn.Module] = kind
    if not issubclass(kind, nn.Module):
        # `kind` is an Auto class, which loads the class from the base's own code. The caller has
        # allowed that, or `class_of` would have returned None.
        make = partial(kind.from_config, trust_remote_code=True)
    with (
        foreign(
            f"{base}: transformers can't make the {config.architectures[0]} of its config.json"
        ),
        # On the meta device tensors take no memory: a base of 100 GB becomes a few MB.
        torch.device("meta"),
    ):
        return make(config).eval()


def class_of(
    base: str | os.PathLike[str], transformers: Any, *, failed: str, trust_remote_code: bool
) -> tuple[Any, Any]:
    """Return a base's config and the class that it names; None if transformers lacks that class.

    Args:
        base: a folder or a hub id.
        transformers: the package.
        failed: the message if the config can't be read.
        trust_remote_code: allow a class in the base's own Python code; the result is then the Auto
            class that loads it.

    Raises:
        SpecError: transformers can't read the config, or it needs code that may not run.
    """
    config = open_pretrained(
        transformers.AutoConfig,
        base,
        failed=failed,
        trust_remote_code=trust_remote_code,
    )
    architecture = next(iter(getattr(config, "architectures", None) or ()), "")
    kind = getattr(transformers, architecture, None)
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return config, kind
    if not trust_remote_code:
        return config, None
    return config, _own_class(transformers, config, architecture)


def _own_class(transformers: Any, config: Any, architecture: str) -> Any:
    """Return the Auto class for a base's own class, by the ``auto_map`` of its config."""
    for auto, reference in (getattr(config, "auto_map", None) or {}).items():
        if auto.startswith("AutoModel") and str(reference).rpartition(".")[2] == architecture:
            return getattr(transformers, auto, None)
    return None


class Base:
    """A base that may or may not be available.

    Args:
        base: a model, a folder or a hub id; None if none was named.
        named_by_caller: whether the caller named it. Otherwise the name comes from a tree's files,
            and nothing is fetched from the hub for it.
    """

    def __init__(
        self, base: nn.Module | str | os.PathLike[str] | None, *, named_by_caller: bool = True
    ) -> None:
        self._model = base if isinstance(base, nn.Module) else None
        self._name: str | None = None
        if base is not None and not isinstance(base, nn.Module):
            if not isinstance(unchecked(base), str | os.PathLike):
                raise SpecError(
                    f"base: expected a model, a folder or a hub id, got {base!r:.80}",
                    'base="models/base"',
                )
            self._name = os.fspath(base)
        self._named_by_caller = named_by_caller
        self._folder: Path | None = None
        if self._name and is_folder(as_path(self._name)):
            self._folder = as_path(self._name)

    @property
    def has_shapes(self) -> bool:
        """Return whether its shapes can be found: from a model, a folder, or a named hub id."""
        is_at_hand = self._model is not None or self._folder is not None
        return is_at_hand or (self._named_by_caller and self._name is not None)

    @cached_property
    def model(self) -> Any:
        """The model itself, or its skeleton; None if the base is not known."""
        if self._model is not None or not self.has_shapes:
            return self._model
        return skeleton(self._name or "", what="the shapes of a base")

    @cached_property
    def _stored(self) -> Mapping[str, Stored]:
        if self._folder is None:
            return {}
        try:
            checkpoint: Checkpoint = open_checkpoint(self._folder)
        except FormatError:
            # No safetensors, or broken ones: the shapes can still come from the config.
            return {}
        return checkpoint.tensors

    def shape(self, module: str) -> tuple[int, int] | None:
        """Return the (out, in) of a linear layer; None if it is not known."""
        # Try the headers first: they need no transformers.
        stored = self._stored.get(f"{module}.weight")
        if self._model is None and stored is not None and len(stored.shape) == 2:
            return stored.shape[0], stored.shape[1]
        if not self.has_shapes:
            return None
        # A folder without a config.json is no mistake here, but `skeleton` would raise for it.
        if self._folder is not None and not is_file(self._folder / "config.json"):
            return None
        try:
            weight = self.model.get_submodule(module).weight
        except AttributeError:
            return None
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return None
        return weight.shape[0], weight.shape[1]

    def renamer(self, names: Iterable[str]) -> nn.Module | None:
        """Return the model whose names an exported adapter gets; None to keep the adapter's names.

        The adapter's names are kept if the checkpoint has a tensor for each, or if there is no way
        to check. If two of them look like one module's, the model is required.

        Raises:
            SpecError, MissingExtra: the model is required but can't be made.
        """
        names = list(names)
        twice = spelled_twice(names) is not None
        if self._model is not None:
            return self._model
        if not self.has_shapes or not (twice or self._named_by_caller):
            return None
        # The cheap case: if these are the checkpoint's own names, no model is needed.
        if not twice and all(f"{name}.weight" in self._stored for name in names):
            return None
        try:
            model: nn.Module = self.model
        except LoraTreeError:
            if twice:
                raise
            return None  # keep the names; the shapes come from the checkpoint
        return model

    def check_unchanged(self, name: str, tensor: Tensor) -> None:
        """Refuse a carried tensor that differs from this base's own: it is an override.

        Raises:
            BaseMismatch: it differs, or no weights are available to compare it with.
        """
        own = self._own(name)
        if own is None:
            raise BaseMismatch(
                f"{name}: the adapter carries this tensor of its base, and no weights are at hand "
                "to compare it with",
                "name the base's folder: --base FOLDER, base=…",
            )
        if not is_own(name, tensor, own):
            raise BaseMismatch(
                f"{name}: the adapter carries a {name.rpartition('.')[2]} that is not the base's: "
                "it replaces it",
                NOTHING_CARRIED,
            )

    def _own(self, name: str) -> Tensor | None:
        if self._model is not None:
            # With duplicates: an adapter may carry a tied weight under either of its names.
            found = dict(self._model.named_parameters(remove_duplicate=False)).get(name)
            return None if found is None or found.is_meta else found.detach().cpu()
        stored = self._stored.get(name)
        return None if stored is None or stored.dtype is None else stored.read()

    def last_names(self) -> dict[str, set[str]] | None:
        """Return last part of a name → all modules with it; None if the modules are not known."""
        if self._model is not None:
            names = [name for name, _ in self._model.named_modules()]
        elif self._stored:
            names = [name.rpartition(".")[0] for name in self._stored]
        else:
            return None
        found: dict[str, set[str]] = {}
        for name in names:
            found.setdefault(name.rpartition(".")[2], set()).add(name)
        return found
