"""``lora-tree restore``: bring back an earlier version of a node, or a removed node."""

from __future__ import annotations

from typing import Annotated

import typer

from ...errors import listing
from ...folder import restore
from ..arguments import AsJson, Folder
from ..console import out, print_json
from ..typed import command_note

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
        for one in restored:
            entry = {"path": one.path, "version": one.number, "content": one.version.content}
            entries.append(entry | {"was_removed": one.was_removed, "stale": one.stale})
        print_json({"folder": str(folder), "restored": entries})
        return
    for one in restored:
        what = "brought back" if one.was_removed else "restored"
        content, weight = f"{one.version.content[:12]}…", f"{one.version.weight:g}"
        out().print(
            f"{what} {one.path}: version {one.number}, content {content}, weight {weight}",
            soft_wrap=True,
        )
    stale = [one.path for one in restored if one.stale]
    if stale:
        out().print(f"stale now: {listing(stale)}: trained on another lineage", soft_wrap=True)
