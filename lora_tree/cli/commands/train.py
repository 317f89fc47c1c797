"""``lora-tree train``: train many nodes at once on JSON lines, and save them in the folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from ...folder import load
from ...model import attach
from ...provenance import data_files
from ...runs import Run, Settings
from ..arguments import (
    AsJson,
    Base,
    BatchSize,
    Data,
    Folder,
    Length,
    Nodes,
    Quiet,
    TrustRemoteCode,
    file_name,
)
from ..command_notes import command_note
from ..open_base import open_model, open_tokenizer
from ..open_rows import open_rows
from ..picture_place import check_picture_place
from ..run_training import run_to_the_end
from ..train_options import numbers, numbers_by_depth, read_held_out_options, run_folder
from ..train_output import draw_run, tell_outcome, tell_plan

__all__ = ["train"]


class Schedule(StrEnum):
    """The courses that the learning rate can take after its warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Tracker(StrEnum):
    """The trackers that can log every step."""

    tensorboard = "tensorboard"
    wandb = "wandb"


class Over(StrEnum):
    """The choices of ``--loss``: the mean over all rows, or over each path's own."""

    auto = "auto"
    rows = "rows"
    paths = "paths"


def train(
    folder: Folder,
    nodes: Nodes = None,
    *,
    data: Data,
    with_ancestors: Annotated[
        bool, typer.Option("--with-ancestors", help="Train the ancestors of those nodes, too.")
    ] = False,
    base: Base = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Keep checkpoints here; in FOLDER/.training without it.", parser=file_name
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Take this many steps of the optimiser.")] = 200,
    batch: BatchSize = 8,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Accumulate the gradients of this many batches for a step.")
    ] = 1,
    lr: Annotated[float, typer.Option(help="The learning rate at its highest.")] = 2e-4,
    lr_of: Annotated[
        list[str] | None,
        typer.Option(
            help="Give one node a learning rate of its own: fr=1e-5.", metavar="NODE=RATE"
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="Weigh a path in the loss: fr=2.", metavar="PATH=NUMBER"),
    ] = None,
    loss: Annotated[
        Over,
        typer.Option(
            help="rows: the mean over all tokens. paths: the sum of each path's own mean, as if it "
            "trained alone. auto: rows if several levels train, else paths."
        ),
    ] = Over.auto,
    weight_decay: Annotated[
        float | None,
        typer.Option(min=0, help="Weight decay of every node; without it by depth."),
    ] = None,
    decay_by_depth: Annotated[
        str | None,
        typer.Option(help="Weight decay at depth 0, 1, …: 0,1,3.", metavar="NUMBERS"),
    ] = None,
    decay_of: Annotated[
        list[str] | None,
        typer.Option(help="Give one node a decay of its own: fr=0.", metavar="NODE=NUMBER"),
    ] = None,
    clip_norm: Annotated[
        float, typer.Option(min=0, help="Clip each node's gradients to this norm; 0: not at all.")
    ] = 1.0,
    dropout: Annotated[
        float,
        typer.Option(min=0, max=1, help="Set this share of an adapter's inputs to zero."),
    ] = 0.0,
    warm_up: Annotated[
        int, typer.Option(min=0, help="Raise the learning rate over this many first steps.")
    ] = 0,
    schedule: Annotated[
        Schedule, typer.Option(help="How the learning rate falls after the warm-up.")
    ] = Schedule.cosine,
    temperature: Annotated[
        float, typer.Option(help="Draw paths: 1 as often as they have rows, inf equally often.")
    ] = 1.0,
    beta: Annotated[
        float,
        typer.Option(
            help="DPO's beta, for rows with chosen and rejected: the larger it is, the closer a "
            "node stays to its parent."
        ),
    ] = 0.1,
    hold_back: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Hold back this share of each path's rows. A leaf that does not beat its parent "
            "on them is kept at a smaller weight.",
        ),
    ] = 0.05,
    eval_data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Measure every path on these rows during the training. Without it, --eval-every "
            "and --patience measure on the rows held back.",
            metavar="FILE",
            parser=file_name,
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(min=1, help="Measure every N steps; without it ten times a run."),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stop a node that did not improve in this many measurements in succession, and "
            "bring it back to its best step; the others go on.",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw every node's losses into this file at the end, as SVG.",
            metavar="FILE",
            parser=file_name,
        ),
    ] = None,
    report_to: Annotated[
        list[Tracker] | None, typer.Option(help="Log every step to this tracker.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the order of rows, of dropout and of new factors.")
    ] = 0,
    max_length: Length = 1024,
    save_every: Annotated[
        int, typer.Option(min=0, help="Write a checkpoint every N steps; 0: only the last.")
    ] = 50,
    keep: Annotated[
        int,
        typer.Option(
            min=1,
            help="Keep this many last checkpoints. If more than one, the one with the least "
            "loss on the rows held back is among them.",
        ),
    ] = 1,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train many nodes at once and save the tree; run it again to go on where it was stopped."""
    check_picture_place(picture)
    # `Settings` checks its values, so a wrong number is reported before the tree and the base are
    # opened.
    settings = Settings(
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        lr=lr,
        lr_of=numbers(lr_of, "--lr-of"),
        loss=loss.value,
        weight_decay=weight_decay,
        decay_by_depth=numbers_by_depth(decay_by_depth),
        decay_of=numbers(decay_of, "--decay-of"),
        clip_norm=clip_norm or None,
        dropout=dropout,
        warm_up=warm_up,
        schedule=schedule.value,
        temperature=temperature,
        weights=numbers(weight, "--weight"),
        beta=beta,
        hold_back=hold_back,
        seed=seed,
    )
    trackers = [tracker.value for tracker in report_to or ()]
    if trackers:
        from ...integrations.trackers import check_trackers

        check_trackers(trackers)
    tree = load(folder)
    name, tokenizer = open_tokenizer(
        tree, folder, base, what="train", trust_remote_code=trust_remote_code
    )
    # Rows are read before the base is opened: a mistake in the data is reported in seconds, while
    # the base may take minutes.
    rows = open_rows(data, tree, tokenizer, max_length=max_length)
    held_out = read_held_out_options(
        eval_data,
        eval_every,
        patience,
        steps=steps,
        read=lambda files: open_rows(files, tree, tokenizer, max_length=max_length),
        home=folder if folder.is_dir() else folder.parent,
    )
    # `attach` makes the adapters of fresh nodes, and draws them from torch's global generator.
    torch.manual_seed(seed)
    model = attach(tree, open_model(name, trust_remote_code=trust_remote_code))
    where = run_folder(folder, run)
    home = folder if folder.is_dir() else folder.parent
    running = Run(
        model,
        rows,
        settings,
        where,
        nodes=nodes or (),
        with_ancestors=with_ancestors,
        keep=keep,
        data=data_files(data, home),
        max_length=max_length,
        held_out=held_out,
        records=folder,
        by=command_note().by,
    )
    tell_plan(running, len(rows))
    resumed = running.done
    kept, verdicts = run_to_the_end(running, folder, save_every=save_every, trackers=trackers)
    if picture is not None:
        draw_run(running, picture)
    tell_outcome(running, folder, kept, verdicts, resumed_at=resumed, as_json=as_json)
