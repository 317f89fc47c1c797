"""``python -m benchmarks.compare``: train everything and print the tables."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console

from .decays import decay_rules
from .kept import Kept
from .late import late_leaf
from .runs import compare, curve
from .systems import FULL, SMALL
from .tables import markdown, markdown_of_curve, markdown_of_late, markdown_of_rules


class Part(StrEnum):
    """The parts of the comparison."""

    packages = "packages"
    manuals = "manuals"
    curve = "curve"
    late = "late"
    decay = "decay"


def main(
    parts: Annotated[list[Part] | None, typer.Argument(help="All of them without it.")] = None,
    small: Annotated[
        bool, typer.Option("--small", help="A toy size: that it runs, not what comes out.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Every seed and leaf.")] = False,
    only: Annotated[
        str,
        typer.Option(
            help="Of packages and manuals, only tables whose heading has this in it.",
            metavar="TEXT",
        ),
    ] = "",
    keep: Annotated[
        Path | None,
        typer.Option(help="A folder that keeps each run's result: a later command goes on there."),
    ] = None,
) -> None:
    """Train everything and print the tables.

    The parts are packages and manuals, longer training, a late leaf, rules for decay.
    """
    transformers.utils.logging.disable_progress_bar()
    say = Console(stderr=True, highlight=False).print
    size = SMALL if small else FULL
    kept = Kept(keep)
    found: dict[str, object] = {}
    for part in parts or list(Part):
        say(f"[bold]{part}")
        text = ""
        if part in (Part.packages, Part.manuals):
            leaves, outcomes = compare(
                size, manuals=part is Part.manuals, only=only, kept=kept, say=say
            )
            found[part.value] = [asdict(outcome) for outcome in outcomes]
            text = "no manual pages are installed: skipped\n"
            if outcomes:
                text = markdown(leaves, outcomes)
        elif part is Part.curve:
            points = curve(size, kept=kept, say=say)
            found[part.value], text = points, markdown_of_curve(points)
        elif part is Part.decay:
            rules = decay_rules(size, kept=kept, say=say)
            found[part.value], text = rules, markdown_of_rules(rules)
        else:
            late = late_leaf(size, kept=kept, say=say)
            found[part.value] = [asdict(leaf) for leaf in late]
            text = markdown_of_late(late)
        if not as_json:
            sys.stdout.write(f"\n## {part.value}\n\n{text}")
            sys.stdout.flush()
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
