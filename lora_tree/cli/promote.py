"""``lora-tree promote``: what a node was at a checkpoint, made a node of the tree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..folder import load
from ..runs import promote
from .arguments import AsJson, Folder
from .console import out, print_json

__all__ = ["promotion"]


def promotion(
    folder: Folder,
    path: Annotated[
        str, typer.Argument(help="The node to give it to; added where it is not there.")
    ],
    checkpoint: Annotated[
        Path, typer.Option("--from", help="A checkpoint-N of a run or of a TreeTrainer.")
    ],
    node: Annotated[
        str | None, typer.Option(help="Which of its nodes; the one of the same path without it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make what a node was at a checkpoint a node of the tree, and save it."""
    tree = load(folder)
    made = promote(tree, path, checkpoint, node=node)
    tree.save(folder)
    if as_json:
        print_json({"path": made.path, "checkpoint": str(checkpoint), "node": node or path})
    else:
        out().print(f"{made.path}: now what {node or path} was in {checkpoint}")
