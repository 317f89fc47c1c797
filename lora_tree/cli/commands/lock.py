"""``lora-tree lock``: accept the present files of a folder."""

from __future__ import annotations

from typing import Annotated

import typer

from ...errors import listing
from ...folder import relock
from ..arguments import AsJson, Folder
from ..console import out, print_json

__all__ = ["accept_files"]


def accept_files(
    folder: Folder,
    accept_stale: Annotated[
        bool,
        typer.Option(
            "--accept-stale",
            help="Accept nodes, too, whose lineage has changed since they were trained.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Accept the present files: write tree.lock, and say what has changed since."""
    changes = relock(folder, accept_stale=accept_stale)
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "nodes": len(changes.lock.nodes),
                "accepted": changes.accepted,
                "moved": changes.moved,
                "gone": changes.gone,
                "stale": changes.stale,
            }
        )
        return
    lines = [f"locked {folder}"]
    if changes.accepted:
        lines.append(f"accepted: {listing(changes.accepted)}")
    for node, before in changes.moved.items():
        lines.append(
            f"moved: {node} has the files of {before}, and takes over what they were trained on"
        )
    if changes.gone:
        lines.append(f"gone: {listing(changes.gone)}")
    lines += [f"stale: {text}" for text in changes.stale.values()]
    for line in lines:
        out().print(line, markup=False, soft_wrap=True)
