"""``lora-tree blame``: which part of a lineage moves the loss of some rows."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ...errors import plural
from ...folder import load
from ...runs import Blame, blame
from ..arguments import AsJson, Base, BatchSize, Data, Folder, Length, Quiet, TrustRemoteCode
from ..console import out, print_json
from ..open_measured import open_measured

__all__ = ["blame_parts"]


class Parts(StrEnum):
    """The parts that are left out one at a time."""

    nodes = "nodes"
    kinds = "kinds"
    layers = "layers"
    modules = "modules"


def blame_parts(
    folder: Folder,
    path: Annotated[str, typer.Argument(help="The path whose nodes are examined: fr/legal.")],
    *,
    data: Data,
    by: Annotated[
        Parts,
        typer.Option(
            help="Leave out whole nodes; or of each node the modules of one kind (q_proj), of one "
            "layer, or one module at a time."
        ),
    ] = Parts.nodes,
    node: Annotated[
        list[str] | None, typer.Option(help="Examine only parts of this node; repeat it.")
    ] = None,
    base: Base = None,
    batch: BatchSize = 32,
    max_length: Length = 1024,
    most: Annotated[int, typer.Option(min=1, help="Parts to list, the largest first.")] = 20,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Leave out each part of a lineage, and say what that does to the loss and the answers."""
    tree = load(folder)
    # Checked before the base is opened, which takes minutes: a typo is reported at once.
    tree.lineage(path)
    model, rows = open_measured(
        tree,
        folder,
        data,
        base,
        what="blame",
        max_length=max_length,
        trust_remote_code=trust_remote_code,
    )
    blamed = blame(model, path, rows, by=by.value, nodes=node or None, batch=batch)
    if as_json:
        print_json(blamed.as_dict())
    else:
        _tell(blamed, most)


def _tell(found: Blame, most: int) -> None:
    tokens = plural(found.tokens, "token")
    out().print(f"{found.path}: {found.loss:.3f} nats on {tokens}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("without", no_wrap=True)
    for heading in ("loss", "change", "KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part in found.parts[:most]:
        name = f"{part.node}: {part.part}" if part.part else part.node
        change = f"{part.change:+.3f}"
        table.add_row(Text(name), f"{part.loss:.3f}", change, f"{part.divergence:.3f}")
    out().print(table)
    if len(found.parts) > most:
        more = plural(len(found.parts) - most, "more part")
        out().print(f"and {more}: --most", soft_wrap=True)
