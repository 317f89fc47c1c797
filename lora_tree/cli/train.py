"""``lora-tree train``: many nodes at once, from JSON lines into the folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..folder import load
from ..model import attach
from ..provenance import data_files
from ..runs import Run, Settings
from .arguments import AsJson, Base, Data, Folder, Length, Nodes, Quiet, TrustRemoteCode
from .open_base import open_model, open_tokenizer
from .open_rows import open_rows
from .picture_place import check_picture_place
from .run_training import run_to_the_end
from .train_options import given_held_out, numbers, numbers_by_depth, run_folder
from .train_told import draw_run, foretell, tell_outcome
from .typed import command_note

__all__ = ["train"]


class Schedule(StrEnum):
    """How the learning rate goes on after its warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Tracker(StrEnum):
    """The programs that can be told of every step."""

    tensorboard = "tensorboard"
    wandb = "wandb"


class Over(StrEnum):
    """The things over which the loss is a mean."""

    auto = "auto"
    rows = "rows"
    paths = "paths"


def train(
    folder: Folder,
    nodes: Nodes = None,
    *,
    data: Data,
    with_ancestors: Annotated[
        bool, typer.Option("--with-ancestors", help="Train the nodes above those, too.")
    ] = False,
    base: Base = None,
    run: Annotated[
        Path | None, typer.Option(help="Keep checkpoints there; in FOLDER/.training without it.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Take so many steps of the optimiser.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Run so many rows at once.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Make a step of so many batches.")] = 1,
    lr: Annotated[float, typer.Option(help="Learn at this rate at its height.")] = 2e-4,
    lr_of: Annotated[
        list[str] | None,
        typer.Option(help="Give one node a rate of its own: fr=1e-5.", metavar="NODE=RATE"),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="Weigh a path in the loss: fr=2.", metavar="PATH=NUMBER"),
    ] = None,
    loss: Annotated[
        Over,
        typer.Option(
            help="Take the mean over rows: every token weighs alike; over paths: each path as if "
            "it trained alone; auto: rows where several levels train."
        ),
    ] = Over.auto,
    weight_decay: Annotated[
        float | None,
        typer.Option(min=0, help="Decay the weights of every node by this; by depth without it."),
    ] = None,
    decay_by_depth: Annotated[
        str | None,
        typer.Option(help="Decay by this at depth 0, 1, …: 0,1,3.", metavar="NUMBERS"),
    ] = None,
    decay_of: Annotated[
        list[str] | None,
        typer.Option(help="Give one node a decay of its own: fr=0.", metavar="NODE=NUMBER"),
    ] = None,
    clip_norm: Annotated[
        float, typer.Option(min=0, help="Clip each node's gradients to this norm; 0: not at all.")
    ] = 1.0,
    dropout: Annotated[
        float, typer.Option(min=0, max=1, help="Hide this part of a site's input.")
    ] = 0.0,
    warm_up: Annotated[int, typer.Option(min=0, help="Let the rate rise over so many steps.")] = 0,
    schedule: Annotated[
        Schedule, typer.Option(help="Lower the rate like this after its warm-up.")
    ] = Schedule.cosine,
    temperature: Annotated[
        float, typer.Option(help="Draw rows by path: 1 as they are, inf every path alike.")
    ] = 1.0,
    beta: Annotated[
        float,
        typer.Option(
            help="Of rows with chosen and rejected: keep a node this close to its parent."
        ),
    ] = 0.1,
    hold_back: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Judge by this share of each path's rows, not trained on: a leaf that does not "
            "beat its parent on them is kept at the weight that does.",
        ),
    ] = 0.05,
    eval_data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Measure every path on these rows on the way; without it, if you give one of the "
            "next two options, on the rows held back.",
            metavar="FILE",
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(min=1, help="Measure after so many steps; without it ten times a run."),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stop a node that did not improve in so many measurements in succession, and "
            "bring it back to its best step; the others go on.",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw every node's losses there at the end, as SVG.", metavar="FILE"),
    ] = None,
    report_to: Annotated[
        list[Tracker] | None, typer.Option(help="Tell this tracker of every step.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draw rows, dropout and new factors from this.")] = 0,
    max_length: Length = 1024,
    save_every: Annotated[
        int, typer.Option(min=0, help="Write a checkpoint after so many steps; 0: only the last.")
    ] = 50,
    keep: Annotated[
        int,
        typer.Option(
            min=1,
            help="Keep so many checkpoints: the last ones, and from two on the best one by its "
            "loss on the rows held back.",
        ),
    ] = 1,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train many nodes at once and save the tree; run it again to go on where it was stopped."""
    check_picture_place(picture)
    # The settings check themselves, so a wrong number is told before the tree and the base are
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
        from ..integrations.trackers import check_trackers

        check_trackers(trackers)
    tree = load(folder)
    name, tokenizer = open_tokenizer(
        tree, folder, base, what="train", trust_remote_code=trust_remote_code
    )
    # Rows before the base: a mistake in the data is told in seconds, the base may take minutes.
    rows = open_rows(data, tree, tokenizer, max_length=max_length)
    held_out = given_held_out(
        eval_data,
        eval_every,
        patience,
        steps=steps,
        read=lambda files: open_rows(files, tree, tokenizer, max_length=max_length),
        home=folder if folder.is_dir() else folder.parent,
    )
    # Fresh nodes are made when the tree meets its base, from torch's own generator.
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
    foretell(running, len(rows))
    resumed = running.done
    kept, verdicts = run_to_the_end(running, folder, save_every=save_every, trackers=trackers)
    if picture is not None:
        draw_run(running, picture)
    tell_outcome(running, folder, kept, verdicts, resumed_at=resumed, as_json=as_json)
