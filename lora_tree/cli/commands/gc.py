"""``lora-tree gc``: remove earlier versions and run records beyond the bound, and files that no
version refers to.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ...budget import format_bytes
from ...errors import plural
from ...folder import gc
from ..arguments import AsJson, Folder
from ..console import out, print_json

__all__ = ["clean_up"]


def clean_up(
    folder: Folder,
    versions: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Keep this many earlier versions of each node; without it, as tree.yaml says.",
        ),
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option(min=1, help="Keep the records of this many last runs; 50 without it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove earlier versions and old runs' records, and say how many bytes that frees."""
    freed = gc(folder, versions=versions, runs=runs, dry_run=dry_run)
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "dry_run": dry_run,
                "versions": freed.nodes,
                "contents": freed.contents,
                "runs": freed.runs,
                "bytes": freed.nbytes,
                "left_bytes": freed.left_bytes,
            }
        )
        return
    for path, count in freed.nodes.items():
        out().print(f"{path}: {plural(count, 'earlier version')}", soft_wrap=True)
    if freed.runs:
        out().print(f"{plural(len(freed.runs), 'record')} of runs", soft_wrap=True)
    verb = "would free" if dry_run else "freed"
    out().print(
        f"{verb} {format_bytes(freed.nbytes)}; earlier versions take "
        f"{format_bytes(freed.left_bytes)}",
        soft_wrap=True,
    )
