"""The messages of ``lora-tree train``: what the run is about to do, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..drawn.curves import curves_picture
from ..errors import agreeing, plural
from ..folder import disk
from ..runs import Run, Verdict
from ..weights import plain_weight
from .console import note, out, print_json
from .outcome_table import outcome_table

__all__ = ["draw_run", "tell_outcome", "tell_plan"]


def tell_plan(running: Run, rows: int) -> None:
    """Say what a run is about to do.

    Args:
        running: before its first step.
        rows: the number of rows that were read.
    """
    if running.aside is not None:
        tree = running.model.tree
        before = running.aside.about.get("nodes", ())
        # The names come from run.json. A node of that run may have been removed from the tree
        # since.
        nodes = ", ".join(path for path in tree.paths() if path in before)
        note(
            f"the run before this one, of {nodes}, is finished "
            f"and lies in {running.aside.folder} now"
        )
        if not running.aside.is_saved:
            note("  it did not save the tree: take its nodes from there with lora-tree promote")
    if running.left_out:
        go = agreeing(running.left_out, "goes", "go")
        note(f"{running.left_out} of {plural(rows, 'row')} {go} through no node that trains")
    if running.was_over:
        note(
            f"this run has finished, and the tree has its nodes: {running.folder}\n"
            "  nothing is left to do; any other setting (--steps, --seed, …) begins another run "
            "from there"
        )
        return
    note("what trains:")
    for trained in running.trained:
        note(f"  {trained}")
    if running.prefers:
        note(f"DPO, beta {running.settings.beta:g}: each node against its frozen parent")
    if running.held_back:
        note(f"held back: {plural(len(running.held_back), 'row')}{_judged(running)}")
    if running.watched_on:
        note(f"measured during training: {plural(running.watched_on, 'held-out row')}")
    if running.outdated:
        note(f"becomes stale: {', '.join(running.outdated)}")
    if running.done:
        note(f"going on after step {running.done}")


def _judged(running: Run) -> str:
    """Say what the rows held back are for."""
    tree = running.model.tree
    for path in {row.path for row in running.held_back}:
        has_children = any(tree[below].has_adapter for below in tree.paths(path))
        if path in running.nodes and not has_children:
            return ", to judge the leaves"
    # As in `judge`: the children of a node were trained on it as it is.
    purpose = ", to judge leaves; none trains here"
    if running.watched_on or running.compares_checkpoints:
        return purpose
    return f"{purpose}, so --hold-back 0 would lose nothing"


def tell_outcome(
    running: Run,
    folder: Path,
    checkpoint: Path,
    verdicts: Sequence[Verdict],
    *,
    resumed_at: int,
    as_json: bool,
) -> None:
    """Print how a run ended.

    Args:
        running: whose tree was saved.
        folder: of the tree.
        checkpoint: the run's last.
        verdicts: on the leaves that were judged by rows held back.
        resumed_at: the step after which it went on.
        as_json: print one JSON document.
    """
    tree = running.model.tree
    stale = [path for path in tree.paths() if tree[path].stale]
    losses = running.losses()
    if as_json:
        print_json(
            {
                "nodes": running.nodes,
                "steps": running.taken,
                "resumed_at": resumed_at,
                "checkpoint": str(checkpoint),
                "kept": {str(kept): loss for kept, loss in running.kept().items()},
                "rows": len(running.rows),
                "left_out": running.left_out,
                "held_back": [_figures(verdict) for verdict in verdicts],
                "losses": running.last,
                "first": {node: first for node, (first, _) in losses.items()},
                "last": {node: last for node, (_, last) in losses.items()},
                "outcomes": {node: vars(one) for node, one in running.outcomes().items()},
                "run": None if running.record is None else running.record.number,
                "stale": stale,
            }
        )
        return
    out().print(outcome_table(running.outcomes()))
    for verdict in verdicts:
        out().print(str(verdict))
    # A second call of a finished run must not read as if it had trained once more.
    done = "trained before:" if running.was_over else "trained"
    out().print(
        f"{done} {', '.join(running.nodes)}: {plural(running.taken, 'step')}, saved in {folder}",
        soft_wrap=True,
    )
    for line in _checkpoint_lines(running):
        out().print(line, soft_wrap=True)
    if stale:
        out().print(f"stale now: {', '.join(stale)}", soft_wrap=True)


def draw_run(running: Run, file: Path) -> None:
    """Write the curves of a run that has ended; only say so if it took no step.

    Raises:
        FolderError: the file can't be written.
    """
    record = running.record
    if record is None:
        note("no step was taken, so nothing is drawn: lora-tree runs FOLDER N --picture FILE")
        return
    disk.replace(file, curves_picture([record]).encode())
    note(f"drawn: {file}")


def _figures(verdict: Verdict) -> dict[str, object]:
    """Return a verdict as plain data, for JSON."""
    return {**vars(verdict), "weight": plain_weight(verdict.weight)}


def _checkpoint_lines(running: Run) -> list[str]:
    """Say which checkpoints a run kept beside its last one, and which is the best."""
    kept = running.kept()
    if len(kept) < 2:
        return []
    known = {folder: loss for folder, loss in kept.items() if loss is not None}
    best = min(known, key=lambda folder: known[folder]) if known else None
    lines = []
    for folder, loss in kept.items():
        text = "" if loss is None else f": {loss:.3f} on the rows held back"
        lines.append(f"kept {folder}{text}{', the best' if folder == best else ''}")
    return lines
