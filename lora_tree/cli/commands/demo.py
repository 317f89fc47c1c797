"""``lora-tree demo``: the main job on real input, and the figures that it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...demo import FULL, QUICK, run
from ..arguments import Quiet, file_name
from ..console import err, is_quiet, out

__all__ = ["demo"]


def demo(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Write this folder; the base goes beside it as FOLDER-base, an export as "
            "FOLDER-export.",
            metavar="FOLDER",
            parser=file_name,
        ),
    ] = Path("demo-zoo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Train a tiny base and tree, in under a minute.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed: the same one gives the same result.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Train a small base and a tree on Python's own library; switch, measure, export, compare."""
    # The bars go to stderr, so that stdout holds the report alone.
    console = err()
    console.quiet = is_quiet()
    out().print(run(folder, size=QUICK if quick else FULL, console=console, seed=seed))
