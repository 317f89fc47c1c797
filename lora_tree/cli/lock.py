"""``lora-tree lock``: accept the files of a folder as they are."""

from __future__ import annotations

from typing import Annotated

import typer

from ..folder import lock as lock_folder
from .arguments import Folder
from .console import out

__all__ = ["lock"]


def lock(
    folder: Folder,
    accept_stale: Annotated[
        bool, typer.Option("--accept-stale", help="Also accept nodes trained on a lineage that has changed since.")
    ] = False,
) -> None:
    """Write tree.lock for the files as they are now."""
    lock_folder(folder, accept_stale=accept_stale)
    out().print(f"locked {folder}", markup=False, soft_wrap=True)
