"""The last table of a run: what became of each node."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from ..errors import printable
from ..folder import NodeOutcome

__all__ = ["outcome_table"]


def outcome_table(outcomes: Mapping[str, NodeOutcome]) -> Table:
    """Return a line for each node: its losses in training and, if measured, on held-out rows."""
    is_watched = any(one.before is not None for one in outcomes.values())
    has_stopped = any(one.stopped_at is not None for one in outcomes.values())
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("node", no_wrap=True)
    for heading in ("first loss", "last loss"):
        table.add_column(heading, justify="right")
    if is_watched:
        for heading in ("held-out before", "after", "best step"):
            table.add_column(heading, justify="right")
    if has_stopped:
        table.add_column("stopped at", justify="right")
    for node, one in outcomes.items():
        cells = [_loss(one.first), _loss(one.last)]
        if is_watched:
            cells += [_loss(one.before), _loss(one.after), _step(one.best_step)]
        if has_stopped:
            cells.append(_step(one.stopped_at))
        table.add_row(printable(node), *cells)
    return table


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f}"


def _step(step: int | None) -> str:
    return "" if step is None else str(step)
