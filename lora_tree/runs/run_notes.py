"""RunNotes: the description of how a run trains, for the places that keep it.

    tree.lock     training    for each node that a save takes from the run, to train it again
    run.json      training    in each checkpoint, for a promotion
    the record    facts       in the tree's folder, for people

Law: files and folders are named as seen from the tree, so that the notes still hold when all of
them are moved together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..provenance import DataFile, SaveNote, TrainedWith, WatchedWith, seen_from
from ..tree import AdapterTree
from .settings import Settings

__all__ = ["RunNotes"]


@dataclass(frozen=True, eq=False)
class RunNotes:
    """The notes of one run.

    Args:
        tree: of the run.
        nodes: the nodes that train.
        settings: how it trains.
        folder: of the run's checkpoints.
        data: the files that the rows came from, if any did.
        max_length: tokens that were kept of a row.
        watched: how the run is watched; None: it is not.
        prefers: its rows are preferences.
    """

    tree: AdapterTree
    nodes: Sequence[str]
    settings: Settings
    folder: Path
    data: Sequence[DataFile]
    max_length: int | None
    watched: WatchedWith | None
    prefers: bool

    @property
    def training(self) -> TrainedWith | None:
        """The rows and settings, for the note of a save; None if the rows came from no files."""
        if not self.data:
            return None
        return TrainedWith(
            nodes=list(self.nodes),
            data=list(self.data),
            settings=self.settings.plain(),
            max_length=self.max_length,
            run=self.relative_folder,
            held_out=self.watched,
        )

    def of_save(self, by: str, losses: Mapping[str, tuple[float, float]]) -> SaveNote:
        """Return the note of the save that puts the run's nodes into the tree.

        Args:
            by: the command, or the name of the program.
            losses: node → its first and last loss.
        """
        training = self.training
        training_by_node = {} if training is None else dict.fromkeys(self.nodes, training)
        return SaveNote(by=by, training=training_by_node, losses=dict(losses))

    @property
    def facts(self) -> dict[str, Any]:
        """The facts for the run's record, as plain data."""
        return {
            "data": [file.model_dump() for file in self.data],
            "max_length": self.max_length,
            "unit": "nats per preference" if self.prefers else "nats per token",
        }

    @property
    def relative_folder(self) -> str:
        """The folder of the checkpoints as seen from the tree, as the paths of its data are."""
        # Computed at each call: the tree has no home before it is first saved.
        home = self.tree.home
        return str(self.folder) if home is None else seen_from(home.parent, self.folder)
