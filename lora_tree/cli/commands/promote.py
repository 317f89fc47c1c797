"""``lora-tree promote``: take a node from a run's checkpoint into the tree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ...errors import SpecError, printable
from ...folder import load
from ...runs import Comparison, SliceLosses, compare_trees, promote, promotion_note
from ...tree import AdapterTree
from ..arguments import (
    AsJson,
    Base,
    BatchSize,
    Folder,
    Length,
    MeasuredBeta,
    Quiet,
    TrustRemoteCode,
    file_name,
)
from ..command_notes import command_note
from ..console import err, out, print_json
from ..open_base import open_model, open_tokenizer
from ..open_rows import open_rows

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
            parser=file_name,
        ),
    ],
    node: Annotated[
        str | None,
        typer.Option(help="Take this node of the checkpoint; the one of the same path without it."),
    ] = None,
    if_better: Annotated[
        bool,
        typer.Option(
            "--if-better",
            help="Only if it has the lower loss on --data, and on no slice a higher one; "
            "else exit 1.",
        ),
    ] = False,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Compare on these rows, which it was not trained on.",
            metavar="FILE",
            parser=file_name,
        ),
    ] = None,
    slice_by: Annotated[
        str | None,
        typer.Option(
            "--slice", help="Compare the rows of each value of this column, too.", metavar="COLUMN"
        ),
    ] = None,
    base: Base = None,
    batch: BatchSize = 8,
    beta: MeasuredBeta = 0.1,
    max_length: Length = 1024,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Take a node from a checkpoint of a run into the tree, and save the tree."""
    if if_better and not data:
        raise SpecError("--if-better compares on rows held out", "name them: --data held-out.jsonl")
    tree = load(folder)
    made = promote(tree, path, checkpoint, node=node)
    comparison: Comparison | None = None
    if data:
        name, tokenizer = open_tokenizer(
            tree, folder, base, what="promote", trust_remote_code=trust_remote_code
        )
        # Rows are read when the tree has the promoted node, since they may be for a new node.
        rows = open_rows(data, tree, tokenizer, max_length=max_length, slice_by=slice_by)
        model = open_model(name, trust_remote_code=trust_remote_code)
        comparison = compare_trees(
            _load_unchanged(folder), tree, path, model, rows, batch=batch, beta=beta
        )
    refused = comparison is not None and if_better and not comparison.is_better
    if not refused:
        note = promotion_note(command_note().by, path, checkpoint, node=node)
        # One save writes the node, its entry in tree.yaml and the lock, or nothing.
        tree.save(folder, note=note)
    if as_json:
        outcome = {"path": made.path, "checkpoint": str(checkpoint), "node": node or path}
        print_json(outcome | {"promoted": not refused} | _plain(comparison))
    else:
        if comparison is not None:
            out().print(_table(comparison))
        if not refused:
            out().print(f"{made.path}: now has the adapter of {node or path} in {checkpoint}")
    if refused and comparison is not None:
        worse = f": worse on {', '.join(comparison.worse)}" if comparison.worse else ""
        err().print(f"{path}: not better{printable(worse)}; the tree stays as it is")
        raise typer.Exit(1)


def _load_unchanged(folder: Path) -> AdapterTree:
    # A second tree is opened: the first one has the promoted node already.
    return load(folder)


def _plain(found: Comparison | None) -> dict[str, Any]:
    if found is None:
        return {}
    slices: Mapping[str, SliceLosses] = found.slices
    return {
        "better": found.is_better,
        "unit": "nats per token",
        "whole": vars(found.whole),
        "slices": {name: vars(own) for name, own in slices.items()},
        "worse": found.worse,
    }


def _table(found: Comparison) -> Table:
    """Return the losses before and after, slice by slice, with those that rose in red."""
    table = Table(title="nats per token", title_justify="left")
    for heading in ("slice", "rows", "now", "then"):
        table.add_column(heading, justify="left" if heading == "slice" else "right")
    for name, own in [*found.slices.items(), ("all", found.whole)]:
        style = "" if own.after <= own.before else "red"
        then = Text(f"{own.after:.3f}", style)
        table.add_row(printable(name or "(none)"), str(own.rows), f"{own.before:.3f}", then)
    return table
