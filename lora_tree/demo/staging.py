"""The demo's folders: they appear whole, and never over a folder that the demo did not make.

A mark in each folder tells the next run that it may replace the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import FolderError
from ..folder.atomic_folders import new_folders

__all__ = ["demo_folders"]

MARK = ".lora-tree-demo"


@contextmanager
def demo_folders(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield an empty folder for each target, under its name; on success each moves to its place.

    Args:
        targets: siblings.

    Raises:
        FolderError: a target exists and the demo did not make it; before anything is written.
    """
    for target in targets:
        if target.exists() and not (target / MARK).is_file():
            raise FolderError(
                f"{target} exists, and the demo did not make it",
                "name another folder, or remove it",
            )
    with new_folders([target.absolute() for target in targets]) as folders:
        yield folders
        # Marked last: a folder that was not filled must not pass for one that the demo made.
        for folder in folders:
            (folder / MARK).write_text("Made by `lora-tree demo`, which may replace this folder.\n")
