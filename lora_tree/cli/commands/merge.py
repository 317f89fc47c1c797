"""``lora-tree merge``: add one node that merges the increments of several paths."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from ...algebra import Edited, merge_paths
from ...folder import load
from ...weights import parse_weight
from ..arguments import AsJson, Folder
from ..editing import DryRun, MaxError, Rank, Work

__all__ = ["Density", "Method", "Seed", "Space", "merge_nodes"]


class Method(StrEnum):
    """The ways to merge."""

    linear = "linear"
    magnitude_prune = "magnitude_prune"
    ties = "ties"
    dare_linear = "dare_linear"
    dare_ties = "dare_ties"
    sce = "sce"


class Space(StrEnum):
    """The numbers that a method compares."""

    core = "core"
    knots = "knots"
    dense = "dense"


Density = Annotated[float, typer.Option(help="Keep this share of each adapter's numbers.")]
Seed = Annotated[int, typer.Option(help="Seed for methods that drop numbers at random.")]


def merge_nodes(
    folder: Folder,
    paths: Annotated[list[str], typer.Argument(help="The paths to merge.")],
    to: Annotated[str, typer.Option("--to", help="The new node; usually a sibling of theirs.")],
    weight: Annotated[
        list[str] | None,
        typer.Option(
            help="A weight for each path, in their order; 1 without it.", metavar="WEIGHT"
        ),
    ] = None,
    method: Annotated[Method, typer.Option(help="The method of merging.")] = Method.ties,
    density: Density = 1.0,
    space: Annotated[
        Space, typer.Option(help="core and knots work on factors; dense is for small weights.")
    ] = Space.core,
    rank: Rank = None,
    max_error: MaxError = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Add a node that merges several paths, by TIES, DARE, SCE or task arithmetic."""
    work = Work(load(folder), folder, dry_run=dry_run)
    edited, merged = merge_paths(
        work.tree,
        paths,
        to=to,
        weights=[parse_weight(text, "--weight") for text in weight or ()] or None,
        method=method.value,
        density=density,
        space=space.value,
        rank=rank,
        max_error=max_error,
        seed=seed,
    )
    distances = dict(zip(paths, merged.distances, strict=True))
    notes = []
    for path, distance in distances.items():
        notes.append(f"{path}: the merge differs by {distance:.2g} of its norm")
    with_notes = Edited(edited.added, errors=edited.errors, notes=(*edited.notes, *notes))
    work.finish(with_notes, as_json=as_json, distances=distances)
