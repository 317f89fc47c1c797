"""The demo's folders appear whole or not at all, and never over a folder that is not its own.

Everything is written below a hidden folder beside the target and moved into place at the end; an exception, Ctrl-C
included, removes it. A mark in each folder tells the next run that it may be replaced.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import FolderError

__all__ = ["staged"]

MARK = ".lora-tree-demo"


@contextmanager
def staged(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Empty folders to write to, one for each target, with the targets' own names; moved into place on success.

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
    parent = targets[0].absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    stage = parent / f".{targets[0].name}-{secrets.token_hex(4)}"
    try:
        stage.mkdir(mode=0o700)
        folders = [stage / target.name for target in targets]
        for folder in folders:
            folder.mkdir()
        yield folders
        for folder, target in zip(folders, targets, strict=True):
            (folder / MARK).write_text("Made by `lora-tree demo`, which may replace this folder.\n")
            if target.exists():
                target.rename(stage / f"{target.name}.old")
            folder.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
