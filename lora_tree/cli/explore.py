"""``lora-tree explore``: a tree as a page, to look at or to send to somebody."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..budget import format_bytes
from ..explore.facts import explore_facts, read_evaluation
from ..explore.page import explore_page
from ..folder import disk
from .arguments import Folder, Quiet
from .console import out
from .progress import steps_done

__all__ = ["explore"]


def explore(
    folder: Folder,
    html: Annotated[
        Path, typer.Option(help="Write the page there, as one file that loads nothing.")
    ],
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", help="Losses to show, as lora-tree eval --json prints them."),
    ] = None,
    alike: Annotated[
        list[str] | None,
        typer.Option(
            "--similar", help="Compare these nodes: a path or pattern; all where they are few."
        ),
    ] = None,
    norms: Annotated[
        bool, typer.Option("--norms/--no-norms", help="Read every adapter and measure it.")
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Show a tree as a page: nodes, lineages, norms, likeness, losses, runs and problems."""
    losses = None if evaluation is None else read_evaluation(evaluation)
    with steps_done("reading", 100, 0) as step:
        told = 0

        def progress(done: int, total: int) -> None:
            nonlocal told
            while told < 100 * done // max(total, 1):
                told += 1
                step("")

        facts = explore_facts(
            folder, alike=alike or None, norms=norms, evaluation=losses, progress=progress
        )
    page = explore_page(facts.as_dict()).encode()
    disk.replace(html, page)
    out().print(f"wrote {html}, {format_bytes(len(page))}", soft_wrap=True)
