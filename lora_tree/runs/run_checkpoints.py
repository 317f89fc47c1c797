"""RunCheckpoints: the checkpoints of one run, with all their files.

    run/checkpoint-40/factors.safetensors      the factors that train, bit for bit
                      nodes/fr/legal/…         the same as PEFT adapters, to be promoted
                      optimizer.safetensors
                      best.safetensors         of a run that is watched, and may stop nodes
                      run.json                 its identity, step, losses; whether the tree has it

Law: a checkpoint is complete before an older one is deleted. A process that is killed leaves one
too many, never none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import FolderError, SpecError
from ..folder import disk
from ..model import TreeModel
from ..system.reading import is_file
from .checkpoint_factors import save_factors
from .checkpoint_place import retire, staged_checkpoint
from .place import ABOUT, checkpoints, checkpoints_to_delete, read_measured_loss, render_about
from .resume import STATE, render_state
from .watching import RunWatch

__all__ = ["RunCheckpoints"]


class RunCheckpoints:
    """The checkpoints of one run.

    Args:
        folder: of the checkpoints; made by the first `save`.
        keep: how many stay: the last ones, and from two on the best one.

    Raises:
        SpecError: ``keep`` is less than 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 1:
            raise SpecError(f"keep must be at least 1, got {keep}: the last checkpoint stays")
        self._folder, self._keep = folder, keep

    @property
    def are_compared(self) -> bool:
        """True if the best one stays, so that each needs its loss on the rows held back."""
        return self._keep > 1

    def save(
        self,
        step: int,
        about: Mapping[str, Any],
        model: TreeModel,
        optimizer: torch.optim.Optimizer,
        watch: RunWatch | None,
    ) -> Path:
        """Write a checkpoint, then remove superfluous ones; return its folder.

        Args:
            step: how many steps are done.
            about: the content of run.json.
            model: its factors that train are written.
            optimizer: over those.
            watch: of a run that is watched.

        Raises:
            FolderError: the folder can't be written.
            FormatError: PEFT has no way to write a node.
        """
        folder = self._of(step)
        with disk.named("make it", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        with staged_checkpoint(self._folder, folder.name, writes=True, meet=lambda: None) as stage:
            filled = stage / folder.name
            save_factors(model, filled)
            disk.write(filled / STATE, render_state(optimizer))
            if watch is not None:
                watch.save(filled)
            disk.write(filled / ABOUT, render_about(about))
        # Only now: a crash between the two leaves one checkpoint too many, never none.
        found = [(number, old) for number, old in checkpoints(self._folder) if number <= step]
        for old in checkpoints_to_delete(found, self._keep):
            retire(old)
        return folder

    def tell(self, step: int, about: Mapping[str, Any]) -> None:
        """Replace the run.json of a checkpoint.

        Raises:
            FolderError: the folder can't be written, or has no checkpoint of that step.
        """
        file = self._of(step) / ABOUT
        if not is_file(file):
            raise FolderError(f"{file.parent}: no checkpoint of the last step", "save() first")
        disk.replace(file, render_about(about))

    def kept(self) -> dict[Path, float | None]:
        """Return the checkpoints with their losses on the rows held back, as far as known."""
        return {folder: read_measured_loss(folder) for _, folder in checkpoints(self._folder)}

    def _of(self, step: int) -> Path:
        return self._folder / f"checkpoint-{step}"
