"""Names in memory ↔ names on the disk, as transformers itself converts them when it loads and saves.

    model.layers.0.mlp.experts.gate_up_proj   ⇄   model.layers.0.block_sparse_moe.experts.0.w1.weight
    (E, 2 · out, in)                              model.layers.0.block_sparse_moe.experts.0.w3.weight, …

Its own mapping says which tensors of a checkpoint a parameter is made of; its own operations make
it, and their reverse takes it apart again. Nothing here knows an architecture.

Law: what can't be inverted is refused. A parameter that is made of several tensors is taken apart
before it is changed, and must give the very bits that it was made of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import BaseMismatch, LoraTreeError, suggest
from ..extras import foreign
from ..renaming import Loading, loading_module
from .shards import Stored

__all__ = ["CheckpointNames", "TensorGroup"]


@dataclass
class TensorGroup:
    """Tensors on the disk, and the parameters that they make together.

    Args:
        first: the parameter that transformers files them under.
        parts: the tensors in the order in which they are loaded, each with the pattern of its name.
        converter: what makes the parameters of them; None where the one tensor is the one
            parameter.
    """

    first: str
    parts: list[tuple[Stored, str]] = field(default_factory=list)
    converter: Any = None

    @property
    def stored(self) -> list[Stored]:
        return [stored for stored, _ in self.parts]


class CheckpointNames:
    """The parameters of a model and the tensors of a checkpoint of it.

    Args:
        model: with shapes and no memory.
        tensors: those of the checkpoint, by name.
    """

    def __init__(self, model: Any, tensors: Mapping[str, Stored]) -> None:
        self._model = model
        self._groups: dict[str, TensorGroup] = {}
        loading = Loading(model)
        # expert 10 comes after expert 9
        order: Callable[[str], Any] = getattr(loading_module(), "dot_natural_key", str)
        for name in sorted(tensors, key=order):
            renamed, pattern, _ = loading.renamed(name)
            group = self._groups.setdefault(renamed, TensorGroup(renamed))
            group.parts.append((tensors[name], pattern or name))
            if pattern is not None:
                group.converter = loading.converters[pattern]
        # what revert_weight_conversion goes by: those that renamed something
        model._weight_conversions = [each for each in loading.conversions if each.was_used()]
        self._by_parameter = {
            name: group for group in self._groups.values() for name in self._made_of(group)
        }

    def group(self, parameter: str) -> TensorGroup:
        """The tensors that a parameter is made of.

        Raises:
            BaseMismatch: none is.
        """
        found = self._by_parameter.get(parameter)
        if found is None:
            raise BaseMismatch(
                f"{parameter}: the checkpoint has no tensor for "
                f"it{suggest(parameter, self._by_parameter)}",
                "is this the base that the adapter was trained on, with its head?",
            )
        return found

    def together(self, group: TensorGroup, read: Callable[[Stored], Tensor]) -> dict[str, Tensor]:
        """The parameters of a group, made of what ``read`` gives for each tensor: name → values.

        Raises:
            SpecError: transformers can't make them.
        """
        converter: Any = copy.deepcopy(group.converter)
        for stored, pattern in group.parts:
            converter.add_tensor(group.first, stored.name, pattern, read(stored))
        with foreign(
            f"{group.first}: transformers can't put it together from {group.parts[0][0].name}"
        ):
            made = converter.convert(group.first, model=self._model, config=self._model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }

    def apart(self, group: TensorGroup, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that a group's parameters are made of, by their names on the disk.

        Raises:
            SpecError: transformers can't take them apart.
            BaseMismatch: what comes of it are not the tensors that they were made of.
        """
        loading = loading_module()
        with foreign(
            f"{group.first}: transformers can't take it apart into the tensors of the checkpoint"
        ):
            parts = loading.revert_weight_conversion(self._model, dict(parameters))
        wanted = {stored.name: stored for stored in group.stored}
        prefix = f"{self._model.base_model_prefix}."
        spellings: tuple[Callable[[str], str], ...] = (
            str,
            lambda n: n.removeprefix(prefix),
            lambda n: prefix + n,
        )
        for spelled in spellings:
            named = {spelled(name): value for name, value in parts.items()}
            if named.keys() == wanted.keys() and all(
                named[n].shape == wanted[n].shape for n in wanted
            ):
                return {name: value.contiguous() for name, value in named.items()}
        raise BaseMismatch(
            f"{group.first}: transformers loads it from {len(wanted)} tensors, like "
            f"{next(iter(wanted))}, and would "
            f"save it as {len(parts)}, like {next(iter(parts), 'none')}: its conversion can't be "
            "inverted",
            "save the base again with the transformers installed here, and export from that: "
            "save_pretrained(folder)",
        )

    def check_inverse(self, group: TensorGroup, parameters: Mapping[str, Tensor]) -> None:
        """That taking a group's parameters apart gives the bits in the files.

        Raises:
            BaseMismatch, SpecError: it does not.
        """
        parts = self.apart(group, parameters)
        for stored in group.stored:
            if not torch.equal(
                parts[stored.name].view(torch.uint8), stored.read().view(torch.uint8)
            ):
                raise BaseMismatch(
                    f"{group.first}: taken apart again, {stored.name} has other values: its "
                    "conversion loses something",
                    "save the base again with the transformers installed here, and export from "
                    "that",
                )

    def _made_of(self, group: TensorGroup) -> Iterable[str]:
        if group.converter is None:
            return (group.first,)
        try:
            return self.together(
                group, lambda stored: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
            )
        except LoraTreeError:
            return (group.first,)  # told when somebody wants to change it
