"""``lora-tree eval``: every node on every path's rows, as a table, as JSON and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ...folder import disk, load_versions, version_beside
from ...runs import LossMatrix, evaluate
from ...training.diverged import BASE_LABEL
from ...tree import AdapterTree
from ..arguments import (
    AsJson,
    Base,
    BatchSize,
    Data,
    Folder,
    Length,
    MeasuredBeta,
    On,
    Quiet,
    SkipBroken,
    TrustRemoteCode,
    advise_skip,
    file_name,
)
from ..console import out, print_json
from ..open_measured import open_measured
from ..picture_place import check_picture_place
from ..progress import steps_done

__all__ = ["evaluation"]


def evaluation(
    folder: Folder,
    nodes: Annotated[
        list[str] | None,
        typer.Argument(
            help="Measure these: paths, patterns like 'fr/*', or earlier versions like fr@2.",
            metavar="NODES",
        ),
    ] = None,
    *,
    on: On = None,
    data: Data,
    base: Base = None,
    batch: BatchSize = 8,
    beta: MeasuredBeta = 0.1,
    max_length: Length = 1024,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Write a heat map into this file, as SVG.", metavar="FILE", parser=file_name
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    skip_broken: SkipBroken = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure the loss of every node, and of the bare base, on the rows of every path."""
    check_picture_place(picture)
    tree, _ = load_versions(folder, *(on or ()), skip_broken=skip_broken)
    # Checked before the base is opened, which takes minutes: a typo is reported at once.
    chosen, names = _chosen(tree, folder, nodes) if nodes else (None, {})
    model, rows = open_measured(
        tree,
        folder,
        data,
        base,
        what="eval",
        max_length=max_length,
        trust_remote_code=trust_remote_code,
    )
    # The bare base is measured beside the nodes, so the bar has one step more than there are nodes.
    count = 1 + len(chosen or [path for path in tree.paths() if tree[path].has_adapter])
    with advise_skip(folder, skips=skip_broken), steps_done("evaluating", count, 0) as bar:
        matrix = evaluate(model, rows, nodes=chosen, batch=batch, beta=beta, tick=lambda: bar(""))
    matrix = replace(matrix, paths=tuple(names.get(path, path) for path in matrix.paths))
    # Written before the table is printed, so that an error is the only output.
    if picture is not None:
        disk.replace(picture, matrix.picture().encode())
    if as_json:
        print_json(_plain(matrix))
    else:
        out().print(_table(matrix))
        out().print("rows: the active path; columns: the path of the rows", soft_wrap=True)


def _chosen(
    tree: AdapterTree, folder: Path, nodes: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Return the paths to measure, and for each earlier version the name that the user gave it.

    A version is added to the tree beside its node, so that both can be measured.

    Raises:
        PathError: there is no such node or version.
    """
    patterns = [name for name in nodes if "@" not in name]
    # Patterns are matched before versions are added, or they would match those as well.
    paths = tree.matching(patterns) if patterns else []
    names = {}
    for name in nodes:
        if "@" in name:
            path = version_beside(tree, folder, name)
            names[path] = name
            paths.append(path)
    return paths, names


def _plain(matrix: LossMatrix) -> dict[str, Any]:
    losses = {}
    for path, row in zip(matrix.paths, matrix.losses, strict=True):
        losses[path] = dict(zip(matrix.domains, row, strict=True))
    tokens = dict(zip(matrix.domains, matrix.tokens, strict=True))
    return {"unit": matrix.unit, "losses": losses, "tokens": tokens}


def _table(matrix: LossMatrix) -> Table:
    """Return the matrix as a table, with each column's best loss in bold."""
    table = Table(
        title=matrix.unit,
        title_justify="left",
    )
    table.add_column("active path")
    best = []
    for domain, column in zip(matrix.domains, zip(*matrix.losses, strict=True), strict=True):
        table.add_column(domain or BASE_LABEL, justify="right")
        # min() keeps a NaN that comes first, because no number is less than it. A base that
        # overflows in fp16 would leave its column without a best loss.
        best.append(min((loss for loss in column if math.isfinite(loss)), default=None))
    for path, losses in zip(matrix.paths, matrix.losses, strict=True):
        cells = []
        for loss, low in zip(losses, best, strict=True):
            cells.append(Text(f"{loss:.3f}", "bold" if loss == low else ""))
        table.add_row(path or BASE_LABEL, *cells)
    return table
