"""One run to its end, for the commands that train: steps with a bar, Ctrl-C, the last checkpoint,
the save.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from ..errors import FolderError, plural
from ..runs import Run, StepLosses, Verdict
from ..training.diverged import BASE_LABEL
from .command_notes import command_note
from .console import err
from .interrupts import noted_interrupts
from .progress import steps_done

__all__ = ["check_run_places", "run_to_the_end"]


def run_to_the_end(
    running: Run, folder: Path, *, save_every: int, trackers: Sequence[str] = ()
) -> tuple[Path, Sequence[Verdict]]:
    """Train, save the tree, and note that the run is finished.

    Args:
        running: before its first step.
        folder: of the tree.
        save_every: steps between checkpoints; 0: only the last one.
        trackers: names of the trackers that get every step; the caller has checked them.

    Returns:
        the last checkpoint, and the verdicts on leaves.

    Raises:
        FolderError: the checkpoints or the tree can't be written where they belong.
        typer.Exit: interrupted; a checkpoint is written, and the tree is not saved.
        LoraTreeError: as `Run.steps`, `Run.save` and `AdapterTree.save`.
    """
    if not running.was_over:
        # Checked before the first step: an error at the first checkpoint, or at the save, would
        # lose hours of training.
        check_run_places(running.folder, folder)
    steps = running.settings.steps
    with (
        steps_done("training", steps, running.done) as bar,
        noted_interrupts() as interrupted,
        _open_trackers(running, trackers) as tell,
    ):
        for step in running.steps(save_every=save_every or None):
            bar(" ".join(f"{path or BASE_LABEL} {loss:.3f}" for path, loss in step.losses.items()))
            tell(step)
            # After the last step nothing is left to stop: the run ends and saves the tree as
            # without Ctrl-C.
            if interrupted() and step.number < steps:
                kept = running.save()
                # Printed with --quiet, too, because the tree is not saved.
                err().print(
                    f"stopped after {step.number} of {plural(steps, 'step')}; "
                    f"run the same command again to go on from {kept}"
                )
                raise typer.Exit(interrupted())
    if running.was_over:
        # A run that was over trains nothing and writes nothing; its last checkpoint is still there.
        return running.folder / f"checkpoint-{running.done}", ()
    kept = running.save()
    # After the checkpoint: this ends the training of all nodes, and a checkpoint is made of the
    # factors that train. Before the tree is saved, because it changes weights in the tree.
    verdicts = running.reweigh_leaves()
    running.model.tree.save(folder, note=running.note(command_note().by))
    # Last: a run counts as finished only once its tree is on the disk.
    running.finish()
    return kept, verdicts


def check_run_places(run: Path, folder: Path) -> None:
    """Refuse folders that a run could not write.

    Args:
        run: of the checkpoints.
        folder: of the tree.

    Raises:
        FolderError: there is no permission; names the folder.
    """
    _check_writable(run, "choose another folder for the checkpoints: --run DIR")
    home = folder if folder.is_dir() else folder.parent
    _check_writable(home, "copy the tree to a folder that you can write to, and train there")


def _check_writable(place: Path, todo: str) -> None:
    """Refuse a place that this process may not write, judged by permissions alone."""
    nearest = place.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not os.access(nearest, os.W_OK):
        raise FolderError(f"{place}: can't be written, so the run could not save", todo)


@contextmanager
def _open_trackers(running: Run, trackers: Sequence[str]) -> Iterator[Callable[[StepLosses], None]]:
    """Yield a function that reports a step to the trackers."""
    if not trackers:
        yield lambda step: None
        return
    from ..integrations.trackers import reporting

    def folder() -> Path:
        record = running.record
        assert record is not None, "the commands keep every run"
        return record.folder

    config = running.settings.plain()
    with reporting(trackers, folder, config, done=running.done) as tell:
        yield tell
