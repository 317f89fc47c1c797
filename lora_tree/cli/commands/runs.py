"""``lora-tree runs``: the runs of a tree, one of them whole, or several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ...drawn.curves import curves_picture
from ...errors import PathError, listing, plural, printable
from ...folder import NodeOutcome, RunRecord, disk, run_records
from ...runs import RunComparison, compare_runs
from ..arguments import AsJson, Folder, file_name
from ..console import out, print_json
from ..outcome_table import outcome_table
from ..picture_place import check_picture_place

__all__ = ["list_runs"]


def list_runs(
    folder: Folder,
    numbers: Annotated[
        list[int] | None,
        typer.Argument(help="Show this run, or compare several.", metavar="NUMBERS"),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw the losses of the named runs into this file, as SVG.",
            metavar="FILE",
            parser=file_name,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs of a tree; show one, or compare several: settings and losses."""
    check_picture_place(picture)
    found = run_records(folder)
    chosen = _chosen(found, numbers or [])
    drawn = chosen if numbers else found[-1:]
    # Written before anything is printed, so that an error is the only output.
    if picture is not None:
        disk.replace(picture, curves_picture(drawn).encode())
    if as_json:
        document: dict[str, Any] = {"folder": str(folder), "runs": [_plain(one) for one in chosen]}
        if len(chosen) > 1 and numbers:
            document["comparison"] = compare_runs(chosen).as_dict()
        print_json(document)
        return
    if not found:
        out().print("no run of this tree is kept")
    elif not numbers:
        out().print(_list(found))
    elif len(chosen) == 1:
        _tell(chosen[0])
    else:
        _compare(chosen)
    if picture is not None:
        out().print(f"drawn: {picture}", soft_wrap=True)


def _chosen(found: Sequence[RunRecord], numbers: Sequence[int]) -> list[RunRecord]:
    """Return the runs with these numbers, in the order given; all runs if there is no number.

    Raises:
        PathError: there is no such run.
    """
    known = {record.number: record for record in found}
    missing = [number for number in numbers if number not in known]
    if missing:
        kept = f"the runs are {listing(map(str, known))}" if known else "no run is kept"
        raise PathError(f"no run {listing(map(str, missing))}; {kept}")
    return [known[number] for number in numbers] if numbers else list(found)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for heading in headings:
        table.add_column(printable(heading), no_wrap=True)
    return table


def _list(records: Sequence[RunRecord]) -> Table:
    table = _table("run", "state", "began", "steps", "nodes", "loss", "held-out")
    for record in records:
        outcomes = list(record.outcomes.values())
        table.add_row(
            str(record.number),
            record.state,
            record.began,
            f"{record.done}/{record.steps}",
            printable(listing(record.nodes, most=3)),
            _means([one.first for one in outcomes], [one.last for one in outcomes]),
            _means([one.before for one in outcomes], [one.after for one in outcomes]),
        )
    return table


def _means(before: Sequence[float | None], after: Sequence[float | None]) -> str:
    """Return the means over the nodes, ``2.942 → 2.514``; nothing if no node has a loss."""
    each = []
    for losses in (before, after):
        known = [loss for loss in losses if loss is not None]
        if not known:
            return ""
        each.append(f"{sum(known) / len(known):.3f}")
    return " → ".join(each)


def _tell(record: RunRecord) -> None:
    ended = f", ended {record.ended}" if record.ended else ""
    steps = plural(record.steps, "step")
    lines = [
        f"run {record.number}: {record.state}, {record.done} of {steps}",
        f"began {record.began}{ended}",
        record.by,
    ]
    for line in lines:
        out().print(printable(line), soft_wrap=True)
    if record.outcomes:
        out().print(outcome_table(record.outcomes))
    if record.stale:
        out().print(f"made stale: {', '.join(map(printable, record.stale))}", soft_wrap=True)
    out().print(f"step by step: {record.folder / 'metrics.jsonl'}", soft_wrap=True)


def _compare(records: Sequence[RunRecord]) -> None:
    compared: RunComparison = compare_runs(records)
    heads = [f"run {number}" for number in compared.numbers]
    table = _table("setting", *heads)
    for name, values in compared.differs.items():
        table.add_row(printable(name), *(printable(_value(value)) for value in values))
    if compared.differs:
        out().print(table)
    else:
        out().print("their settings are the same")
    out().print()
    table = _table("loss at the end", *heads)
    for node, outcomes in compared.outcomes.items():
        table.add_row(printable(node), *map(_loss, outcomes))
    out().print(table)


def _loss(outcome: NodeOutcome | None) -> str:
    """Return a node's last losses: ``1.871, held-out 2.604 at 120``."""
    if outcome is None or outcome.last is None:
        return ""
    text = f"{outcome.last:.3f}"
    if outcome.after is not None:
        text += f", held-out {outcome.after:.3f}"
    if outcome.best_step is not None:
        text += f" at {outcome.best_step}"
    return text


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{key}={one:g}" for key, one in value.items()) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(record: RunRecord) -> dict[str, Any]:
    plain = {key: value for key, value in vars(record).items() if key != "about"}
    plain["folder"] = str(record.folder)
    plain["outcomes"] = {node: vars(one) for node, one in record.outcomes.items()}
    for word in ("data", "max_length", "unit", "checkpoints", "held_out"):
        plain[word] = record.about.get(word)
    return plain
