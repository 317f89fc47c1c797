"""``lora-tree explore``: a tree as a page, served to the browser or written as one file."""

from __future__ import annotations

import time
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from ...budget import format_bytes
from ...errors import SpecError
from ...explore.facts import explore_facts, read_evaluation
from ...explore.page import explore_page
from ...explore.server import PLAYGROUND_PATH, serving
from ...folder import disk, load
from ..arguments import Folder, Quiet, SkipBroken, TrustRemoteCode, file_name
from ..console import out
from ..interrupts import noted_interrupts
from ..open_playground import open_playground
from ..progress import steps_done

__all__ = ["explore"]


def explore(
    folder: Folder,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write the page into this one file, which loads nothing, and start no server.",
            parser=file_name,
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval", help="Losses to show, as lora-tree eval --json prints them.", parser=file_name
        ),
    ] = None,
    similar_nodes: Annotated[
        list[str] | None,
        typer.Option(
            "--similar", help="Compare these nodes: a path or pattern; all where they are few."
        ),
    ] = None,
    norms: Annotated[
        bool, typer.Option("--norms/--no-norms", help="Read every adapter and measure it.")
    ] = True,
    base: Annotated[
        str | None,
        typer.Option(
            help="Ask this base beside the page: folder or hub id of a model, folder of a pipeline."
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="The port on 127.0.0.1; a free one without it."),
    ] = None,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser.")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
    skip_broken: SkipBroken = False,
    quiet: Quiet = False,
) -> None:
    """Show a tree as a page; with --base, answer prompts by several paths and blends at once."""
    if html is not None and base is not None:
        raise SpecError(
            "--base needs a server, and --html writes a file instead", "leave one of them out"
        )
    if html is not None:
        disk.check_parent(html)
    losses = None if evaluation is None else read_evaluation(evaluation)
    with steps_done("reading", 100, 0) as step:
        shown_percent = 0

        def progress(done: int, total: int) -> None:
            nonlocal shown_percent
            while shown_percent < 100 * done // max(total, 1):
                shown_percent += 1
                step("")

        facts = explore_facts(
            folder, alike=similar_nodes or None, norms=norms, evaluation=losses, progress=progress
        )
    if html is not None:
        data = explore_page(facts.as_dict()).encode()
        disk.replace(html, data)
        out().print(f"wrote {html}, {format_bytes(len(data))}", soft_wrap=True)
        return
    playground = None
    if base is not None:
        tree = load(folder, skip_broken=skip_broken)
        playground = open_playground(tree, folder, base, trust_remote_code=trust_remote_code)
    page = explore_page(facts.as_dict(), playground=PLAYGROUND_PATH if playground else None)
    with (
        noted_interrupts() as interrupted,
        serving(lambda: page, playground=playground, port=port) as served,
    ):
        out().print(f"{served.url}  (Ctrl-C ends it)", soft_wrap=True)
        if open_browser:
            webbrowser.open(served.url)
        while not interrupted():
            time.sleep(0.1)
