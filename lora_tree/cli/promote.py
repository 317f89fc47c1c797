"""``lora-tree promote``: a node as it was at a checkpoint becomes a node of the tree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..folder import load
from ..runs import promote, promotion_note
from .arguments import AsJson, Folder
from .console import out, print_json
from .typed import command_note

__all__ = ["promotion"]


def promotion(
    folder: Folder,
    path: Annotated[
        str, typer.Argument(help="Give it to this node, which is added if it is missing.")
    ],
    checkpoint: Annotated[
        Path,
        typer.Option(
            "--from",
            help="Take it from this checkpoint-N of a run or of a TreeTrainer.",
            metavar="FOLDER",
        ),
    ],
    node: Annotated[
        str | None,
        typer.Option(help="Take this node of the checkpoint; the one of the same path without it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take a node from a checkpoint of a run into the tree, and save the tree."""
    tree = load(folder)
    made = promote(tree, path, checkpoint, node=node)
    # One save writes the node, its entry in tree.yaml and the lock, or nothing.
    note = promotion_note(command_note().by, path, checkpoint, node=node)
    tree.save(folder, note=note)
    if as_json:
        print_json({"path": made.path, "checkpoint": str(checkpoint), "node": node or path})
    else:
        out().print(f"{made.path}: now what {node or path} was in {checkpoint}")
