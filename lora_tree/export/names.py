"""Map a model's parameters to a checkpoint's tensors, by transformers' own conversion.

    layers.0.mlp.experts.gate_up_proj   ⇄   layers.0.block_sparse_moe.experts.0.w1.weight
    (E, 2 · out, in)                        layers.0.block_sparse_moe.experts.0.w3.weight, …

The mapping of transformers (5) says which tensors of a checkpoint a parameter is made of. Its
operations put the parameter together, and their reverse takes it apart again. Nothing here knows an
architecture.

Law: a conversion that can't be inverted is refused. A parameter that is made of several tensors is
first taken apart unchanged, and must give the same bits as the files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import BaseMismatch, LoraTreeError, listing, plural, suggest
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
        converter: transformers' own object that makes the parameters; None if the one tensor is
            the one parameter.
        numbers: pattern → the numbers of its experts; only for patterns that count experts.
    """

    first: str
    parts: list[tuple[Stored, str]] = field(default_factory=list)
    converter: Any = None
    numbers: dict[str, list[int]] = field(default_factory=dict)

    @property
    def stored(self) -> list[Stored]:
        return [stored for stored, _ in self.parts]

    def check_whole(self) -> None:
        """Refuse tensors that would make another parameter than the one that was saved.

        Raises:
            BaseMismatch: two tensors are loaded as one parameter, or an expert is missing.
        """
        if self.converter is None and len(self.parts) > 1:
            raise BaseMismatch(
                f"{listing([stored.name for stored in self.stored])} are names of one tensor, of "
                "which transformers loads only one",
                "save the model again with save_pretrained, which writes one",
            )
        for pattern, numbers in self.numbers.items():
            # transformers stacks the experts that it finds, so all after a missing one would get
            # the place of the one before.
            missing = sorted({*range(min(numbers), max(numbers))} - {*numbers})
            if missing:
                raise BaseMismatch(
                    f"the checkpoint has {pattern} up to number {max(numbers)}, but not number "
                    f"{listing(map(str, missing))}",
                    "download it again, or save it again with save_pretrained",
                )


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
        # The experts are stacked in this order, so expert 10 has to come after expert 9.
        order: Callable[[str], Any] = getattr(loading_module(), "dot_natural_key", str)
        for name in sorted(tensors, key=order):
            renamed, pattern, number = loading.renamed(name)
            group = self._groups.setdefault(renamed, TensorGroup(renamed))
            group.parts.append((tensors[name], pattern or name))
            if pattern is not None:
                group.converter = loading.converters[pattern]
                if "*" in pattern:
                    group.numbers.setdefault(pattern, []).append(number)
        # transformers' revert_weight_conversion reads this attribute, which from_pretrained sets:
        # the conversions that renamed something.
        model._weight_conversions = [
            conversion for conversion in loading.conversions if conversion.was_used()
        ]
        self._by_parameter: dict[str, TensorGroup] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for group in self._groups.values():
            for name, shape in self._parameter_shapes(group).items():
                self._by_parameter[name] = group
                if shape is not None:
                    self._shapes[name] = shape

    def group(self, parameter: str) -> TensorGroup:
        """Return the tensors that a parameter is made of.

        Raises:
            BaseMismatch: the checkpoint has none for it.
        """
        found = self._by_parameter.get(parameter)
        if found is None:
            raise BaseMismatch(
                f"{parameter}: the checkpoint has no tensor for "
                f"it{suggest(parameter, self._by_parameter)}",
                "is this the base that the adapter was trained on, with its head?",
            )
        return found

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Return the shape of the parameter that its tensors make, from their headers alone.

        Raises:
            BaseMismatch: the checkpoint has no tensor for it, or not all.
            SpecError: transformers can't make it.
        """
        group = self.group(parameter)
        if parameter not in self._shapes:
            # Making it failed before; this raises the reason again.
            try:
                group.check_whole()
            except LoraTreeError as error:
                raise error.within(parameter) from error
            self.make_parameters(group, _without_numbers)
        return self._shapes[parameter]

    def make_parameters(
        self, group: TensorGroup, read: Callable[[Stored], Tensor]
    ) -> dict[str, Tensor]:
        """Make the parameters of a group from what ``read`` gives for each tensor: name → values.

        Raises:
            SpecError: transformers can't make them.
        """
        # A converter collects tensors in its own state, and the same object serves every layer.
        converter: Any = copy.deepcopy(group.converter)
        for stored, pattern in group.parts:
            converter.add_tensor(group.first, stored.name, pattern, read(stored))
        with foreign(
            f"{group.first}: transformers can't put it together from {group.parts[0][0].name}"
        ):
            made = converter.convert(group.first, model=self._model, config=self._model.config)
        found: dict[str, Tensor] = {}
        for name, value in made.items():
            found[name] = value[0] if isinstance(value, list) else value
        return found

    def take_apart(self, group: TensorGroup, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that a group's parameters are made of, by their names on the disk.

        Raises:
            SpecError: transformers can't take them apart.
            BaseMismatch: the result is not the set of tensors that they were made of.
        """
        loading = loading_module()
        with foreign(
            f"{group.first}: transformers can't take it apart into the tensors of the checkpoint"
        ):
            parts = loading.revert_weight_conversion(self._model, dict(parameters))
        expected = {stored.name: stored for stored in group.stored}
        # transformers loads a checkpoint of the bare model into a model with a head, and the other
        # way round. So names on the disk may have the prefix or lack it.
        prefix = f"{self._model.base_model_prefix}."
        spellings: tuple[Callable[[str], str], ...] = (
            str,
            lambda n: n.removeprefix(prefix),
            lambda n: prefix + n,
        )
        for spelled in spellings:
            named = {spelled(name): value for name, value in parts.items()}
            if named.keys() != expected.keys():
                continue
            if all(named[name].shape == expected[name].shape for name in expected):
                return {name: value.contiguous() for name, value in named.items()}
        raise BaseMismatch(
            f"{group.first}: transformers loads it from {plural(len(expected), 'tensor')}, like "
            f"{next(iter(expected))}, and would save it as {len(parts)}, like "
            f"{next(iter(parts), 'none')}: its conversion can't be inverted",
            "save the base again with the transformers installed here, and export from that: "
            "save_pretrained(folder)",
        )

    def check_inverse(self, group: TensorGroup, parameters: Mapping[str, Tensor]) -> None:
        """Check that taking a group's parameters apart gives the bits in the files.

        Raises:
            BaseMismatch, SpecError: it gives other tensors, or fails.
        """
        parts = self.take_apart(group, parameters)
        for stored in group.stored:
            # As bytes: a NaN is not equal to itself, and −0.0 is equal to 0.0.
            again, own = parts[stored.name].view(torch.uint8), stored.read().view(torch.uint8)
            if not torch.equal(again, own):
                raise BaseMismatch(
                    f"{group.first}: taken apart again, {stored.name} has other values: its "
                    "conversion loses something",
                    "save the base again with the transformers installed here, and export from "
                    "that",
                )

    def _parameter_shapes(self, group: TensorGroup) -> dict[str, tuple[int, ...] | None]:
        """Return the parameters that a group makes, name → shape, by a run on the meta device.

        If they can't be made, the shape is None: `shape` raises the reason for the parameters that
        a caller asks for, and most are never asked for.
        """
        try:
            group.check_whole()
            if group.converter is None:
                return {group.first: group.stored[0].shape}
            made = self.make_parameters(group, _without_numbers)
        except LoraTreeError:
            return {group.first: None}
        return {name: tuple(value.shape) for name, value in made.items()}


def _without_numbers(stored: Stored) -> Tensor:
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")
