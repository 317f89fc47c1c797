"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import stdout_is_json

__all__ = ["AsJson", "Base", "Data", "Folder", "Length", "Nodes", "SkipBroken", "TrustRemoteCode"]


def _only_json(context: typer.Context, wanted: bool) -> bool:
    """Keep stdout for the one document, from here until the command is done."""
    if wanted:
        context.with_resource(stdout_is_json())
    return wanted


AsJson = Annotated[bool, typer.Option("--json", help="For programs.", callback=_only_json)]
Folder = Annotated[
    Path, typer.Argument(help="A folder of adapters, or a tree.yaml.", metavar="FOLDER")
]
Nodes = Annotated[
    list[str] | None, typer.Argument(help="Paths or patterns like 'fr/*'.", metavar="[NODES]...")
]
Data = Annotated[
    list[Path],
    typer.Option(help="JSON lines: path, and text, or prompt and completion, or messages."),
]
Base = Annotated[
    str | None, typer.Option(help="Folder or hub id of the base; the tree's own without it.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code that the base brings along."),
]
SkipBroken = Annotated[
    bool,
    typer.Option("--skip-broken", help="Leave out nodes that can't be used, and all below them."),
]
Length = Annotated[int, typer.Option(min=2, help="Tokens to keep of a row.")]
