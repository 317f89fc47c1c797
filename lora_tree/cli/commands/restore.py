"""``lora-tree restore``: bring back an earlier version of a node, or a removed node."""

from __future__ import annotations

from typing import Annotated

import typer

from ...errors import listing
from ...folder import restore
from ..arguments import AsJson, Folder
from ..command_notes import command_note
from ..console import out, print_json

__all__ = ["bring_back"]


def bring_back(
    folder: Folder,
    versions: Annotated[
        list[str],
        typer.Argument(
            help="Versions like fr/legal@2; paths or patterns of nodes that were removed.",
            metavar="VERSIONS",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Bring back earlier versions of nodes; the present ones are kept, too."""
    restored = restore(folder, *versions, note=command_note())
    if as_json:
        entries = []
        for node in restored:
            entry = {"path": node.path, "version": node.number, "content": node.version.content}
            entries.append(entry | {"was_removed": node.was_removed, "stale": node.stale})
        print_json({"folder": str(folder), "restored": entries})
        return
    for node in restored:
        what = "brought back" if node.was_removed else "restored"
        content, weight = f"{node.version.content[:12]}…", f"{node.version.weight:g}"
        out().print(
            f"{what} {node.path}: version {node.number}, content {content}, weight {weight}",
            soft_wrap=True,
        )
    stale = [node.path for node in restored if node.stale]
    if stale:
        out().print(f"stale now: {listing(stale)}: trained on another lineage", soft_wrap=True)
