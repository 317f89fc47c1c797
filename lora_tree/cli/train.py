"""``lora-tree train``: many nodes at once, from JSON lines into the folder."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import SpecError
from ..folder import load
from ..folder.tree_place import YAML
from ..model import attach
from ..runs import Run, Settings, Verdict
from ..training.diverged import BASE_LABEL
from .arguments import AsJson, Base, Data, Folder, Length, Nodes, TrustRemoteCode
from .console import err, out, print_json
from .open_base import open_model, open_tokenizer
from .open_rows import open_rows
from .progress import steps_done

__all__ = ["train"]


class Schedule(StrEnum):
    """How the learning rate goes on after its warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Over(StrEnum):
    """What the loss is a mean over."""

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
        Path | None, typer.Option(help="Where checkpoints go; FOLDER/.training without it.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches in a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate at its height.")] = 2e-4,
    lr_of: Annotated[
        list[str] | None, typer.Option(help="One node's own: fr=1e-5.", metavar="NODE=RATE")
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option(help="A path's in the loss: fr=2.", metavar="PATH=NUMBER")
    ] = None,
    loss: Annotated[
        Over,
        typer.Option(
            help="rows: every token weighs alike; paths: each path as if it trained alone; "
            "auto: rows where several levels train."
        ),
    ] = Over.auto,
    weight_decay: Annotated[
        float | None, typer.Option(min=0, help="Of every node; by depth without it.")
    ] = None,
    decay_by_depth: Annotated[
        str | None,
        typer.Option(help="Weight decay at depth 0, 1, …: 0,1,3.", metavar="NUMBERS"),
    ] = None,
    decay_of: Annotated[
        list[str] | None, typer.Option(help="One node's own: fr=0.", metavar="NODE=NUMBER")
    ] = None,
    clip_norm: Annotated[
        float, typer.Option(min=0, help="Of each node's gradients; 0: not at all.")
    ] = 1.0,
    dropout: Annotated[float, typer.Option(min=0, max=1)] = 0.0,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps in which the rate rises.")] = 0,
    schedule: Annotated[Schedule, typer.Option()] = Schedule.cosine,
    temperature: Annotated[
        float, typer.Option(help="1: rows as they are; inf: every path alike.")
    ] = 1.0,
    hold_back: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of each path's rows to judge by, not to train on: a leaf that does not "
            "beat its parent on them is kept at the weight that does.",
        ),
    ] = 0.05,
    seed: Annotated[int, typer.Option()] = 0,
    max_length: Length = 1024,
    save_every: Annotated[
        int, typer.Option(min=0, help="Steps between checkpoints; 0: none but the last.")
    ] = 50,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Train many nodes at once, and save the tree. The same command goes on where it was stopped."""
    settings = Settings(
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        lr=lr,
        lr_of=_numbers(lr_of, "--lr-of"),
        loss=loss.value,
        weight_decay=weight_decay,
        decay_by_depth=_by_depth(decay_by_depth),
        decay_of=_numbers(decay_of, "--decay-of"),
        clip_norm=clip_norm or None,
        dropout=dropout,
        warm_up=warm_up,
        schedule=schedule.value,
        temperature=temperature,
        weights=_numbers(weight, "--weight"),
        hold_back=hold_back,
        seed=seed,
    )
    tree = load(folder)
    name, tokenizer = open_tokenizer(
        tree, folder, base, what="train", trust_remote_code=trust_remote_code
    )
    rows = open_rows(data, tree, tokenizer, max_length=max_length)
    torch.manual_seed(seed)  # what fresh nodes start from
    model = attach(tree, open_model(name, trust_remote_code=trust_remote_code))
    where = _run(folder, run)
    running = Run(model, rows, settings, where, nodes=nodes or (), with_ancestors=with_ancestors)
    _foretell(running, len(rows))
    resumed = running.done
    with steps_done("training", steps, running.done) as bar, _interrupts() as interrupted:
        for step in running.steps(save_every=save_every or None):
            bar(" ".join(f"{path or BASE_LABEL} {loss:.3f}" for path, loss in step.losses.items()))
            if interrupted() and step.number < steps:
                kept = running.save()
                err().print(
                    f"stopped after {step.number} of {steps} steps; the same command goes on from {kept}"
                )
                raise typer.Exit(130)
    verdicts: list[Verdict] = []
    if running.was_over:
        kept = where / f"checkpoint-{running.done}"
    else:
        kept = running.save()
        verdicts = running.keep_what_helps()
        tree.save(folder)
        running.finish()
    stale = [path for path in tree.paths() if tree[path].stale]
    losses = running.losses()
    if as_json:
        print_json(
            {
                "nodes": running.nodes,
                "steps": running.done,
                "resumed_at": resumed,
                "checkpoint": str(kept),
                "rows": len(running.rows),
                "left_out": running.left_out,
                "held_back": [asdict(verdict) for verdict in verdicts],
                "losses": running.last,
                "first": {node: first for node, (first, _) in losses.items()},
                "last": {node: last for node, (_, last) in losses.items()},
                "stale": stale,
            }
        )
        return
    for node in running.nodes:
        first, last = losses.get(node, (math.nan, math.nan))
        out().print(f"{node}: loss {first:.3f} at first, {last:.3f} at last")
    for verdict in verdicts:
        out().print(str(verdict))
    out().print(f"trained {', '.join(running.nodes)}: {running.done} steps, saved in {folder}")
    if stale:
        out().print(f"stale now: {', '.join(stale)}")


# ---------------------------------------------------------------------- helpers
def _foretell(running: Run, rows: int) -> None:
    """Say what is about to happen, before anything does."""
    told = err()
    if running.aside is not None:
        tree = running.model.tree
        nodes = ", ".join(
            path for path in tree.paths() if path in running.aside.about.get("nodes", ())
        )
        told.print(
            f"the run before this one, of {nodes}, is finished and lies in {running.aside.folder} now"
        )
        if not running.aside.is_saved:
            told.print("  it did not save the tree: lora-tree promote takes its nodes from there")
    if running.left_out:
        told.print(f"{running.left_out} of {rows} rows go through no node that trains")
    if running.was_over:
        told.print(
            f"this run has finished, and the tree has what it came to: {running.folder}\n"
            "  nothing is left to do; with any other setting (--steps, --seed, …) another run begins from there"
        )
        return
    told.print("what trains:")
    for trained in running.trained:
        told.print(f"  {trained}")
    if running.held_back:
        plural = "s" if len(running.held_back) != 1 else ""
        told.print(f"held back: {len(running.held_back)} row{plural}, to judge leaves by")
    if running.outdated:
        told.print(f"becomes stale: {', '.join(running.outdated)}")
    if running.done:
        told.print(f"going on after step {running.done}")


def _run(folder: Path, run: Path | None) -> Path:
    """Where checkpoints go, so that they are not taken for nodes of the tree."""
    zoo = folder if folder.is_dir() else folder.parent
    if run is None:  # each YAML of a folder is a tree of its own
        return zoo / (".training" if folder in (zoo, zoo / YAML) else f".training-{folder.name}")
    if run.resolve().is_relative_to(zoo.resolve()):
        inside = run.resolve().relative_to(zoo.resolve()).parts
        if not any(part.startswith(".") for part in inside):
            raise SpecError(
                f"--run {run} lies in {zoo}, where folders of adapters are nodes of the tree",
                f"name one beside it, or {zoo}/.{run.name}, which the tree passes over",
            )
    return run


def _numbers(pairs: list[str] | None, option: str) -> dict[str, float]:
    found = {}
    for pair in pairs or ():
        path, equals, number = pair.rpartition("=")
        try:
            found[path] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise SpecError(f"{option} {pair}: expected a path and a number, like fr/legal=0.5")
    return found


def _by_depth(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise SpecError(
            f"--decay-by-depth {text}: expected numbers with commas between, like 0,1,3"
        ) from None


@contextmanager
def _interrupts() -> Iterator[Any]:
    """Ctrl-C, and a polite kill, are noted instead of raised; a second one is raised."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        # A shell ignores Ctrl-C for what it runs in the background, nohup does the same: it is not meant for this run.
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, note)
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
