"""``lora-tree bisect``: which node of a lineage, or which version of a node, made a loss worse."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ...errors import plural
from ...folder import load, versions_beside
from ...runs import Bisection, bisect
from ...training.diverged import BASE_LABEL
from ..arguments import AsJson, Base, BatchSize, Data, Folder, Length, Quiet, TrustRemoteCode
from ..console import out, print_json
from ..open_measured import open_measured

__all__ = ["bisect_steps"]


def bisect_steps(
    folder: Folder,
    path: Annotated[str, typer.Argument(help="The path to go down, node by node: fr/legal.")],
    *,
    data: Data,
    versions: Annotated[
        bool, typer.Option("--versions", help="Compare the node's versions, not its ancestors.")
    ] = False,
    base: Base = None,
    batch: BatchSize = 32,
    max_length: Length = 1024,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure rows node by node down a lineage, or version by version; say where they got worse."""
    tree = load(folder)
    # Checked before the base is opened, which takes minutes: a typo is reported at once.
    tree.lineage(path)
    steps = versions_beside(tree, folder, path) if versions else path
    model, rows = open_measured(
        tree,
        folder,
        data,
        base,
        what="bisect",
        max_length=max_length,
        trust_remote_code=trust_remote_code,
    )
    bisection = bisect(model, steps, rows, batch=batch)
    if as_json:
        print_json(bisection.as_dict())
    else:
        _tell(bisection)


def _tell(found: Bisection) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("up to", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("change", justify="right", no_wrap=True)
    before: float | None = None
    for step, loss in zip(found.steps, found.losses, strict=True):
        change = "" if before is None else f"{loss - before:+.3f}"
        table.add_row(Text(step or BASE_LABEL), f"{loss:.3f}", change)
        before = loss
    out().print(table)
    worst = "no step made it worse" if found.worst is None else f"worse since {found.worst}"
    out().print(f"{worst}; nats on {plural(found.tokens, 'token')}", soft_wrap=True)
