"""CheckpointPair: two checkpoints of one architecture, parameter by parameter in the model's
names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import BaseMismatch, LoraTreeError
from ..storage import as_path
from .names import CheckpointNames, TensorGroup
from .shards import Checkpoint, Stored, open_checkpoint, own_files

__all__ = ["CheckpointPair", "open_own"]


def open_own(folder: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint whose files lie in its own folder, headers only.

    Raises:
        FormatError, FolderError: as `open_checkpoint`.
    """
    path = Path(os.path.abspath(as_path(folder)))
    return open_checkpoint(path, inside=own_files(path))


class CheckpointPair:
    """Two checkpoints of one architecture.

    Args:
        model: of the base, with shapes and no memory.
        old, new: the base's checkpoint and another one.

    Attributes:
        old_names: the base's tensors by the model's parameters.
    """

    def __init__(self, model: Any, old: Checkpoint, new: Checkpoint) -> None:
        self._model, self._old, self._new = model, old, new
        self.old_names = CheckpointNames(model, old.tensors)
        self._names = self.old_names, CheckpointNames(model, new.tensors)
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def unmatched(self) -> dict[str, str]:
        """Return the tensors that only one of the two has → a sentence that says which."""
        found: dict[str, str] = {}
        for name in set(self._new.tensors) - set(self._old.tensors):
            found[name] = "the base has no such tensor"
        for name in set(self._old.tensors) - set(self._new.tensors):
            found[name] = "the tuned checkpoint has no such tensor"
        # transformers converts older names on the disk to the model's parameters, so tensors that
        # a conversion uses are matched even if their names differ.
        used: set[str] = set()
        for which in (0, 1):
            for parameter in self._shapes:
                group = self._group(which, parameter)
                used.update(stored.name for stored in (group.stored if group else ()))
        return {name: reason for name, reason in found.items() if name not in used}

    def misfit(self, parameter: str) -> str | None:
        """Return why a parameter's two values can't be subtracted; None if they can."""
        groups = self._group(0, parameter), self._group(1, parameter)
        if groups[0] is None and groups[1] is None:
            return None  # tied to another parameter, which is compared
        for which, group in zip(("base", "tuned checkpoint"), groups, strict=True):
            if group is None:
                return f"the {which} has no tensor for it"
            for stored in group.stored:
                if stored.dtype is None:
                    return f"stored as {stored.spelled}, which can't be subtracted"
        shapes: list[tuple[int, ...]] = []
        for which, names in zip(("base", "tuned checkpoint"), self._names, strict=True):
            try:
                shapes.append(names.shape(parameter))
            except LoraTreeError as error:
                reason = str(error).splitlines()[0].removeprefix(f"{parameter}: ")
                return f"the {which} doesn't hold the whole of it: {reason}"
        old, new = shapes
        if old != new:
            return f"{new}, and the base's is {old}{self._likely_reason(old, new)}"
        if old != self._shapes[parameter]:
            return (
                f"{old} in both checkpoints, and the base's config says {self._shapes[parameter]}"
            )
        return self._renumbered(parameter)

    def _likely_reason(self, old: tuple[int, ...], new: tuple[int, ...]) -> str:
        """Return the likely reason for another shape, to append to a sentence."""
        words = getattr(self._model.config.get_text_config(), "vocab_size", None)
        grew = len(old) == len(new) == 2 and old[1] == new[1] and old[0] < new[0]
        return ": a grown vocabulary?" if grew and old[0] == words else ""

    def _renumbered(self, parameter: str) -> str | None:
        """Return that both have as many experts, but other ones; None if they are the same."""
        old, new = (names.group(parameter).numbers for names in self._names)
        for pattern in old.keys() & new.keys():
            if sorted(old[pattern]) != sorted(new[pattern]):
                return (
                    f"its first {pattern} is number {min(new[pattern])}, and the base's is number "
                    f"{min(old[pattern])}"
                )
        return None

    def read_both(self, parameter: str) -> tuple[Tensor, Tensor] | None:
        """Return the base's value and the other one; None if it is tied to another parameter."""
        if self._group(0, parameter) is None:
            return None
        return self._read(0, parameter), self._read(1, parameter)

    def _group(self, which: int, parameter: str) -> TensorGroup | None:
        try:
            return self._names[which].group(parameter)
        except BaseMismatch:
            return None

    def _read(self, which: int, parameter: str) -> Tensor:
        names = self._names[which]
        group = names.group(parameter)
        if group.converter is None:
            return group.stored[0].read()
        return names.make_parameters(group, Stored.read)[parameter].contiguous()
