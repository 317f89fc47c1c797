"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["AsJson", "Base", "Data", "Folder", "Length", "Nodes"]

Folder = Annotated[Path, typer.Argument(help="A folder of adapters, or a tree.yaml.", metavar="FOLDER")]
Nodes = Annotated[list[str] | None, typer.Argument(help="Paths or patterns like 'fr/*'.", metavar="[NODES]...")]
Data = Annotated[list[Path], typer.Option(help="JSON lines: path, and text, or prompt and completion, or messages.")]
Base = Annotated[str | None, typer.Option(help="Folder or hub id of the base; the tree's own without it.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens to keep of a row.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
