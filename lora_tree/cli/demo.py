"""``lora-tree demo``: the main job on real input, and what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..demo import FULL, QUICK, run
from .console import err, out

__all__ = ["demo"]


def demo(
    folder: Annotated[
        Path, typer.Argument(help="Where to write; -base and -export go beside it.")
    ] = Path("demo-zoo"),
    quick: Annotated[bool, typer.Option("--quick", help="A toy size, in under a minute.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed trains the same adapters.")] = 0,
) -> None:
    """Train a small base and a tree of adapters on the standard library; reopen, switch, measure, export, compare."""
    out().print(run(folder, size=QUICK if quick else FULL, console=err(), seed=seed))
