"""``lora-tree retrain``: train stale nodes again, with the data and settings of their last run."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...errors import SpecError, listing
from ...folder import NodeOutcome, StaleWarning, load
from ...model import attach
from ...provenance import data_files
from ...runs import HeldOut, Retraining, RetrainJob, Row, Run, plan_retraining
from ...tree import AdapterTree
from ..arguments import AsJson, Base, Folder, Nodes, Quiet, TrustRemoteCode
from ..command_notes import command_note
from ..console import note, out, print_json
from ..open_base import open_model, open_tokenizer
from ..open_rows import open_rows
from ..outcome_table import outcome_table
from ..run_training import check_run_places, run_to_the_end
from ..train_options import run_folder
from ..train_output import tell_plan

__all__ = ["train_again"]


def train_again(
    folder: Folder,
    nodes: Nodes = None,
    *,
    stale: Annotated[bool, typer.Option("--stale", help="Train all stale nodes.")] = False,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Begin from new factors of the same shapes, not from the present ones."
        ),
    ] = False,
    base: Base = None,
    save_every: Annotated[
        int, typer.Option(min=0, help="Write a checkpoint every N steps; 0: only the last.")
    ] = 50,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before the training.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained, and train nothing.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train nodes again, and all below them, with the data and settings of their last training."""
    if stale == bool(nodes):
        raise SpecError(
            "name nodes, or take what is stale: lora-tree retrain FOLDER --stale", "not both"
        )
    tree = _opened(folder)
    plan = plan_retraining(tree, nodes or None, fresh=fresh)
    if not as_json:
        _tell(plan, dry_run=dry_run, fresh=fresh)
    trained: dict[str, NodeOutcome] = {}
    if plan.jobs:
        if not dry_run:
            _ask(yes=yes, as_json=as_json)
        name, tokenizer = open_tokenizer(
            tree, folder, base, what="retrain", trust_remote_code=trust_remote_code
        )
        # The rows of all runs are read before the first run trains: a mistake in the last file is
        # reported now, not after hours; and by a dry run, which loads no model.
        rows = [_rows(job, job.data, tree, tokenizer) for job in plan.jobs]
        held_out = [_held_out(job, tree, tokenizer) for job in plan.jobs]
        for job in plan.jobs:
            check_run_places(run_folder(folder, job.run), folder)
    if plan.jobs and not dry_run:
        model = open_model(name, trust_remote_code=trust_remote_code)
        for job, own_rows, watch in zip(plan.jobs, rows, held_out, strict=True):
            trained.update(
                _train(job, own_rows, watch, folder, model, save_every=save_every, fresh=fresh)
            )
        tree = _opened(folder)
    still = [path for path in tree.paths() if tree[path].stale]
    if as_json:
        print_json(_plain(folder, plan, trained, still, dry_run=dry_run, fresh=fresh))
    elif not dry_run:
        if trained:
            out().print(outcome_table(trained))
        if still:
            out().print(f"stale still: {listing(still)}", soft_wrap=True)
    if plan.left:
        raise typer.Exit(1)


def _opened(folder: Path) -> AdapterTree:
    with warnings.catch_warnings():
        # This command reports stale nodes itself, so the warning would only repeat that.
        warnings.simplefilter("ignore", StaleWarning)
        return load(folder)


def _tell(plan: Retraining, *, dry_run: bool, fresh: bool) -> None:
    if not plan.jobs and not plan.left:
        out().print("nothing is stale: nothing to do")
        return
    if plan.jobs:
        what = "would train again" if dry_run else "to be trained again"
        out().print(f"{what}{', from new factors' if fresh else ''}:")
    for job in plan.jobs:
        out().print(f"  {job}", soft_wrap=True)
        if job.changed:
            files = listing(str(file) for file in job.changed)
            out().print(f"    changed since it was trained: {files}", soft_wrap=True)
    for path, reason in plan.left.items():
        out().print(f"can't train {path}: {reason}", soft_wrap=True)


def _ask(*, yes: bool, as_json: bool) -> None:
    """Ask whether to go on.

    Raises:
        SpecError: stdin is no terminal, or stdout is kept for JSON: it can't ask.
        typer.Abort: the answer is no.
    """
    if yes:
        return
    if as_json or not sys.stdin.isatty():
        raise SpecError(
            "retrain asks before it trains, and can't ask with --json or without a terminal",
            "--yes trains without asking; --dry-run says what it would do",
        )
    typer.confirm("train these nodes again?", abort=True, err=True)


def _rows(job: RetrainJob, files: Sequence[Path], tree: AdapterTree, tokenizer: Any) -> list[Row]:
    length = job.training.max_length or 1024
    rows = open_rows(files, tree, tokenizer, max_length=length)
    nodes = set(job.nodes)
    return [row for row in rows if nodes.intersection(tree.lineage(row.path))]


def _held_out(job: RetrainJob, tree: AdapterTree, tokenizer: Any) -> HeldOut | None:
    """Return the job's held-out settings of the last time; None if it had none for these nodes."""
    was = job.training.held_out
    if was is None:
        return None
    if not job.held_out:
        return HeldOut(was.every, None, was.patience)
    rows = _rows(job, job.held_out, tree, tokenizer)
    # A run of several nodes may be repeated for one of them, and the rows may be of the others.
    home = tree.home.parent if tree.home is not None else Path()
    files = data_files(job.held_out, home)
    return HeldOut(was.every, rows, was.patience, files) if rows else None


def _train(
    job: RetrainJob,
    rows: Sequence[Row],
    held_out: HeldOut | None,
    folder: Path,
    base: Any,
    *,
    save_every: int,
    fresh: bool,
) -> dict[str, NodeOutcome]:
    """Run one job, save the tree, and return what became of its nodes."""
    # Opened again for each run, which builds on what the run before has saved.
    tree = _opened(folder)
    torch.manual_seed(job.settings.seed)
    model = attach(tree, base)
    home = folder if folder.is_dir() else folder.parent
    try:
        running = Run(
            model,
            rows,
            job.settings,
            run_folder(folder, job.run),
            nodes=job.nodes,
            data=data_files(job.data, home),
            max_length=job.training.max_length,
            held_out=held_out,
            records=folder,
            by=command_note().by,
            fresh=fresh,
        )
        tell_plan(running, len(rows))
        run_to_the_end(running, folder, save_every=save_every)
        if running.was_over:
            # `tell_plan` has said that this run is finished, and so the tree is not saved again.
            other = "" if fresh else "; --fresh trains from new factors"
            note(f"left as it is: {', '.join(job.nodes)}{other}")
            return {}
        note(f"trained {', '.join(job.nodes)}, saved in {folder}")
        return running.outcomes()
    finally:
        model.detach()


def _plain(
    folder: Path,
    plan: Retraining,
    trained: Mapping[str, NodeOutcome],
    still: Sequence[str],
    *,
    dry_run: bool,
    fresh: bool,
) -> dict[str, Any]:
    jobs = []
    for job in plan.jobs:
        jobs.append(
            {
                "nodes": list(job.nodes),
                "data": [str(file) for file in job.data],
                "held_out": [str(file) for file in job.held_out],
                "changed": [str(file) for file in job.changed],
                "settings": job.settings.plain(),
            }
        )
    losses = {
        node: {"first": outcome.first, "last": outcome.last} for node, outcome in trained.items()
    }
    return {
        "folder": str(folder),
        "dry_run": dry_run,
        "fresh": fresh,
        "jobs": jobs,
        "left": plan.left,
        "losses": losses,
        "outcomes": {node: vars(outcome) for node, outcome in trained.items()},
        "stale": still,
    }
